"""objectcompose: diffusers pipelines that compose several objects in one picture.

Public names are loaded on first use, so `import objectcompose` costs nothing and every sub-package may import the
vocabulary (`objectcompose.errors`, `objectcompose.layout`) without starting an import circle.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

if TYPE_CHECKING:
    from objectcompose.adapters.locref_adapter import LocRefAdapter as LocRefAdapter
    from objectcompose.adapters.object_prompt_adapter import ObjectPromptAdapter as ObjectPromptAdapter
    from objectcompose.adapters.unet_delta import UNetDelta as UNetDelta
    from objectcompose.attention_processors.box_control import BoxControlOptions as BoxControlOptions
    from objectcompose.attention_processors.branch import Branch as Branch
    from objectcompose.attention_processors.install import match_layers as match_layers
    from objectcompose.attention_processors.install import use_parts as use_parts
    from objectcompose.attention_processors.mask import KeyMask as KeyMask
    from objectcompose.attention_processors.probe import RegionMassProbe as RegionMassProbe
    from objectcompose.attention_processors.probe import TokenMapProbe as TokenMapProbe
    from objectcompose.attention_processors.regions import rasterize as rasterize
    from objectcompose.errors import CheckpointError as CheckpointError
    from objectcompose.errors import CheckpointFileError as CheckpointFileError
    from objectcompose.errors import ImageInputError as ImageInputError
    from objectcompose.errors import LayerNotFoundError as LayerNotFoundError
    from objectcompose.errors import LayoutError as LayoutError
    from objectcompose.errors import MissingFieldError as MissingFieldError
    from objectcompose.errors import MissingPackageError as MissingPackageError
    from objectcompose.errors import NonFiniteError as NonFiniteError
    from objectcompose.errors import ObjectComposeError as ObjectComposeError
    from objectcompose.errors import ObjectNotFoundError as ObjectNotFoundError
    from objectcompose.errors import PartConflictError as PartConflictError
    from objectcompose.errors import PhraseNotFoundError as PhraseNotFoundError
    from objectcompose.errors import PromptTooLongError as PromptTooLongError
    from objectcompose.errors import RegionError as RegionError
    from objectcompose.grounding.cache import GroundingCache as GroundingCache
    from objectcompose.grounding.detection import Detection as Detection
    from objectcompose.grounding.detection import detections_to_layout as detections_to_layout
    from objectcompose.grounding.detection import merge_detections as merge_detections
    from objectcompose.grounding.grounder import Grounder as Grounder
    from objectcompose.grounding.grounder import load_grounder as load_grounder
    from objectcompose.layout import Layout as Layout
    from objectcompose.layout import SceneObject as SceneObject
    from objectcompose.layout import layout_from_coco as layout_from_coco
    from objectcompose.layout import load_layout as load_layout
    from objectcompose.layout import save_layout as save_layout
    from objectcompose.pipelines.learned_instances import load_instances as load_instances
    from objectcompose.pipelines.mifo_control import MIFOBoxControl as MIFOBoxControl
    from objectcompose.pipelines.pipeline_locref import LocRefPipeline as LocRefPipeline
    from objectcompose.pipelines.pipeline_mifo import MIFOPipeline as MIFOPipeline
    from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline as ObjectPromptPipeline
    from objectcompose.pipelines.pipeline_output import ComposeOutput as ComposeOutput
    from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline as TokenComposePipeline

# name -> module that defines it; the same names as above (tests/package compares the two)
_PUBLIC = {
    "BoxControlOptions": "objectcompose.attention_processors.box_control",
    "Branch": "objectcompose.attention_processors.branch",
    "CheckpointError": "objectcompose.errors",
    "CheckpointFileError": "objectcompose.errors",
    "ComposeOutput": "objectcompose.pipelines.pipeline_output",
    "Detection": "objectcompose.grounding.detection",
    "Grounder": "objectcompose.grounding.grounder",
    "GroundingCache": "objectcompose.grounding.cache",
    "ImageInputError": "objectcompose.errors",
    "KeyMask": "objectcompose.attention_processors.mask",
    "LayerNotFoundError": "objectcompose.errors",
    "Layout": "objectcompose.layout",
    "LayoutError": "objectcompose.errors",
    "LocRefAdapter": "objectcompose.adapters.locref_adapter",
    "LocRefPipeline": "objectcompose.pipelines.pipeline_locref",
    "MIFOBoxControl": "objectcompose.pipelines.mifo_control",
    "MIFOPipeline": "objectcompose.pipelines.pipeline_mifo",
    "MissingFieldError": "objectcompose.errors",
    "MissingPackageError": "objectcompose.errors",
    "NonFiniteError": "objectcompose.errors",
    "ObjectComposeError": "objectcompose.errors",
    "ObjectNotFoundError": "objectcompose.errors",
    "ObjectPromptAdapter": "objectcompose.adapters.object_prompt_adapter",
    "ObjectPromptPipeline": "objectcompose.pipelines.pipeline_object_prompt",
    "PartConflictError": "objectcompose.errors",
    "PhraseNotFoundError": "objectcompose.errors",
    "PromptTooLongError": "objectcompose.errors",
    "RegionError": "objectcompose.errors",
    "RegionMassProbe": "objectcompose.attention_processors.probe",
    "SceneObject": "objectcompose.layout",
    "TokenComposePipeline": "objectcompose.pipelines.pipeline_token_compose",
    "TokenMapProbe": "objectcompose.attention_processors.probe",
    "UNetDelta": "objectcompose.adapters.unet_delta",
    "detections_to_layout": "objectcompose.grounding.detection",
    "layout_from_coco": "objectcompose.layout",
    "load_grounder": "objectcompose.grounding.grounder",
    "load_instances": "objectcompose.pipelines.learned_instances",
    "load_layout": "objectcompose.layout",
    "match_layers": "objectcompose.attention_processors.install",
    "merge_detections": "objectcompose.grounding.detection",
    "rasterize": "objectcompose.attention_processors.regions",
    "save_layout": "objectcompose.layout",
    "use_parts": "objectcompose.attention_processors.install",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
