"""The pipelines that the conformance suite runs over: one row each, on tiny components.

A row says how to build the pipeline and how to ask for what is its own (objects, parts, maps); the suite asks for it
everywhere, so that batches, callbacks and saving are tested with the method at work. `plain_class` is what the
pipeline must equal bit for bit when nothing of its own is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.pipelines.pipeline_locref import LocRefPipeline
from objectcompose.pipelines.pipeline_mifo import MIFOPipeline
from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from tests.pipelines.object_prompt_helpers import own_components as object_prompt_components
from tests.pipelines.phrase_boxes import PhraseBoxesPipeline
from tests.tiny import tiny_components, tiny_image_encoder


@dataclass(frozen=True)
class Scene:
    """A prompt and its objects, in layout-JSON form."""

    prompt: str
    objects: Sequence[dict[str, Any]]


SCENES = (
    Scene("a dog and a corgi", [{"phrase": "dog"}, {"phrase": "corgi"}]),
    Scene("a red cup on the table", [{"phrase": "red cup"}, {"phrase": "table"}]),
)


@dataclass(frozen=True)
class Row:
    """One pipeline of the suite.

    Attributes:
        pipeline_class: the pipeline.
        options: arguments of every call that uses the method, beside the objects.
        scenes: what is asked for, two scenes at least.
        plain_class: the pipeline of diffusers that it equals when it is not asked for anything of its own.
        adds_components: components beside those of the plain pipeline, made for a UNet.
    """

    pipeline_class: Any
    options: dict[str, Any]
    scenes: Sequence[Scene] = SCENES
    plain_class: Any = StableDiffusionPipeline
    adds_components: Callable[[Any], dict[str, Any]] = lambda unet: {}

    def components(self, kind: str = "sd1", **changes: Any) -> dict[str, Any]:
        plain = {**tiny_components(kind), **changes}
        return {**plain, **self.adds_components(plain["unet"])}

    def build(self, kind: str = "sd1", **changes: Any) -> Any:
        return quiet(self.pipeline_class(**self.components(kind, **changes)))

    def build_both(self, **changes: Any) -> tuple[Any, Any]:
        """The plain pipeline and this one, on the same components."""
        plain = {**tiny_components(), **changes}
        ours = {**plain, **self.adds_components(plain["unet"])}
        return quiet(self.plain_class(**plain)), quiet(self.pipeline_class(**ours))

    def call(self, pipeline: Any, *scenes: int, **arguments: Any) -> Any:
        """The method at work on scenes (default: the first): two steps, tensors, one seeded generator per picture."""
        chosen = [self.scenes[index] for index in scenes or (0,)]
        count = len(chosen) * arguments.get("num_images_per_prompt", 1)
        defaults = {
            "prompt": [scene.prompt for scene in chosen],
            "objects": [list(scene.objects) for scene in chosen],
            "num_inference_steps": 2,
            "output_type": "pt",
            "generator": generators(count),
            **self.options,
        }
        return pipeline(**{**defaults, **arguments})


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(count: int, first: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def picture(colour: str, width: int = 20, height: int = 12) -> Image.Image:
    """A reference: a disc on transparent ground."""
    image = Image.new("RGBA", (width, height))
    image.paste(Image.new("RGBA", (width - 4, height - 4), colour), (2, 2))
    return image


# a batch of different layouts: two references that overlap, and one beside an object of the prompt alone
REFERENCE_SCENES = (
    Scene(
        "a dog and a corgi",
        [
            {"phrase": "dog", "image": picture("red"), "box": (0.0, 0.1, 0.6, 0.8)},
            {"phrase": "corgi", "image": picture("blue", 9, 17), "box": (0.4, 0.2, 1.0, 1.0), "order": 1},
        ],
    ),
    Scene(
        "a red cup on the table",
        [{"image": picture("green"), "box": (0.3, 0.3, 0.9, 0.7), "scale": 0.8}, {"phrase": "table"}],
    ),
)


# another number of objects in each, one of them without a phrase
PROMPTED_SCENES = (
    Scene("a dog and a corgi", [{"phrase": "dog", "image": picture("red")}, {"image": picture("blue", 9, 17)}]),
    Scene("a red cup on the table", [{"phrase": "red cup", "image": picture("green"), "scale": 0.8}]),
)


# boxes that overlap, and one object alone
BOXED_SCENES = (
    Scene(
        "a dog and a corgi",
        [{"phrase": "dog", "box": (0.0, 0.1, 0.6, 0.8)}, {"phrase": "corgi", "box": (0.4, 0.2, 1.0, 1.0)}],
    ),
    Scene("a red cup on the table", [{"phrase": "red cup", "box": (0.3, 0.3, 0.9, 0.7)}]),
)
# two steps, both guided, the second one with refined masks
BOX_CONTROL = {"guided_steps": 4, "iterations": 1, "refine_start": 1, "stop_below": 0.0}


def locref_components(unet: Any) -> dict[str, Any]:
    encoder = tiny_image_encoder()
    return {"image_encoder": encoder, "adapter": LocRefAdapter.from_unet(unet, image_encoder=encoder, num_tokens=3)}


ROWS = {
    "token_compose": Row(TokenComposePipeline, {"return_attention": True}),
    "locref": Row(
        LocRefPipeline, {"return_attention": True}, scenes=REFERENCE_SCENES, adds_components=locref_components
    ),
    "mifo": Row(MIFOPipeline, {"return_attention": True, "box_control": BOX_CONTROL}, scenes=BOXED_SCENES),
    "object_prompt": Row(
        ObjectPromptPipeline,
        {"return_attention": True},
        scenes=PROMPTED_SCENES,
        adds_components=object_prompt_components,
    ),
    "phrase_boxes": Row(PhraseBoxesPipeline, {"return_attention": True}, scenes=BOXED_SCENES),
}
