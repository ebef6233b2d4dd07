"""Checkpoints for commands, training and examples: a base, what a method adds, and what was trained on top of it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from objectcompose.adapters.folders import loading_errors
from objectcompose.errors import CheckpointError, MissingPackageError, ObjectComposeError
from objectcompose.grounding.grounder import usable_device
from objectcompose.grounding.loading import first_line
from objectcompose.pipelines.adapter_loading import adapter_class_of
from objectcompose.pipelines.pipeline_locref import LocRefPipeline
from objectcompose.pipelines.pipeline_mifo import MIFOPipeline
from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from objectcompose.toybox.weights import toybox_path


#: Name on the command line -> pipeline.
PIPELINES: dict[str, Any] = {
    "token-compose": TokenComposePipeline,
    "locref": LocRefPipeline,
    "mifo": MIFOPipeline,
    "object-prompt": ObjectPromptPipeline,
}


def load_checkpoint(
    model: str | None = None,
    device: str | None = None,
    pipeline: str = "token-compose",
    adapter: str | None = None,
    image_encoder: str | None = None,
    option: str = "--model",
) -> Any:
    """A pipeline from a folder or Hub id, or from toybox.

    Args:
        model: folder or Hub id; None stands for the toybox base.
        device: where to run; None stands for "cuda" where there is one, else "cpu".
        pipeline: one of `PIPELINES`.
        adapter: folder or Hub id of the method's adapter; None leaves it out.
        image_encoder: folder or Hub id of a CLIP vision model with a preprocessor config; None stands for what the
            model has, and for toybox's with the toybox base.
        option: what messages call `model`.

    Raises:
        CheckpointError: there is no usable Stable Diffusion checkpoint, or one of the other parts cannot be loaded or
            was made for another base.
        ObjectComposeError: the device cannot be used, or the method has no adapter.
    """
    place = usable_device(device, "--device")  # before anything is loaded
    pipeline_class = PIPELINES[pipeline]
    source = str(toybox_path("base")) if model is None else model
    looks_local = Path(source).exists() or source.startswith((".", "/", "~"))
    if looks_local and not (Path(source).expanduser() / "model_index.json").is_file():
        raise CheckpointError(f"`{option}` {source!r} is no checkpoint folder: it has no model_index.json.")
    try:
        with _quiet_loading(looks_local):
            components = _adapter_components(pipeline, model, adapter, image_encoder)
            path = str(Path(source).expanduser()) if looks_local else source
            loaded = pipeline_class.from_pretrained(path, **components)
    except ObjectComposeError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"`{option}` {source!r} cannot be loaded: {first_line(error)}.") from error
    needed = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    missing = [name for name in needed if getattr(loaded, name) is None]
    if missing:
        raise CheckpointError(f"`{option}` {source!r} lacks {', '.join(missing)}.")
    return loaded.to(place)


def load_unet(folder: Path) -> UNet2DConditionModel:
    """A UNet from its folder, or from the folder `unet` in it.

    Raises:
        CheckpointError: there is none that can be loaded.
    """
    place = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    if not (place / "config.json").is_file():
        raise CheckpointError(f"`--unet` {str(folder)!r} must be a folder with config.json, or have one as `unet`.")
    with loading_errors(place, refuses_pickles=True):
        try:
            return UNet2DConditionModel.from_pretrained(place, use_safetensors=True, low_cpu_mem_usage=False)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"`--unet` {str(folder)!r} cannot be loaded: {first_line(error)}.") from error


def load_lora(pipeline: Any, source: str) -> None:
    """Put a LoRA on a pipeline.

    Args:
        pipeline: of diffusers' kind; changed.
        source: file, folder or Hub id.

    Raises:
        CheckpointError: it cannot be loaded.
        MissingPackageError: peft is not installed.
    """
    path = Path(source)
    folder, name = (str(path.parent), path.name) if path.is_file() else (source, None)
    with loading_errors(source, refuses_pickles=True):
        try:
            pipeline.load_lora_weights(folder, weight_name=name, use_safetensors=True)
        except ImportError as error:
            raise MissingPackageError(f'`--lora` needs peft: pip install "objectcompose[train]" ({error}).') from error
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"`--lora` {source!r} cannot be loaded: {first_line(error)}.") from error


def _adapter_components(
    pipeline: str, model: str | None, adapter: str | None, image_encoder: str | None
) -> dict[str, Any]:
    """The components that a method with an adapter has beside those of the checkpoint."""
    pipeline_class = PIPELINES[pipeline]
    components: dict[str, Any] = {}
    if "adapter" not in inspect.signature(pipeline_class.__init__).parameters:
        for name, value in (("--adapter", adapter), ("--image-encoder", image_encoder)):
            if value is not None:
                raise ObjectComposeError(f"`{name}` cannot be used: `--pipeline` {pipeline} has no adapter.")
        return components
    if adapter is not None:
        components["adapter"] = adapter_class_of(pipeline_class).from_pretrained(adapter)
    if image_encoder is None and model is None:
        image_encoder = str(toybox_path("image_encoder"))
    if image_encoder is not None:
        with loading_errors(image_encoder, refuses_pickles=True):
            components["image_encoder"] = CLIPVisionModelWithProjection.from_pretrained(
                image_encoder, dtype=torch.float32, use_safetensors=True
            )
            components["feature_extractor"] = CLIPImageProcessor.from_pretrained(image_encoder)
    return components


@contextlib.contextmanager
def _quiet_loading(is_quiet: bool) -> Iterator[None]:
    """Hide the libraries' progress bars while a folder loads, which takes a moment; downloads keep theirs."""
    libraries = [diffusers_logging, transformers_logging] if is_quiet else []
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
