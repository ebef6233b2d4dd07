"""The model that is evaluated: a checkpoint, and what was trained on top of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from objectcompose.adapters.folders import loading_errors
from objectcompose.adapters.unet_delta import UNetDelta
from objectcompose.errors import CheckpointError, MissingPackageError
from objectcompose.grounding.loading import first_line
from objectcompose.pipelines.call_checks import check_checkpoint
from objectcompose.pipelines.generate import load_checkpoint
from objectcompose.training.export import DELTA_NAME


EVALUATED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which model is evaluated and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="folder or Hub id of a Stable Diffusion 1.x/2.x checkpoint; default: toybox")
    group.add_argument("--unet", type=Path, metavar="DIR", help="folder of a fine-tuned UNet to put in its place")
    group.add_argument("--delta", type=Path, metavar="FILE", help="what fine-tuning changed of the UNet, to put on it")
    group.add_argument("--lora", metavar="FILE", help="file, folder or Hub id of a LoRA to put on it")
    group.add_argument(
        "--safety-checker", action="store_true", help="keep the checkpoint's own, which blacks pictures out"
    )
    group.add_argument("--device", help="such as cpu or cuda; default: the process's accelerator, if there is one")
    group.add_argument(
        "--dtype",
        choices=sorted(EVALUATED_DTYPES),
        default="float32",
        help="of the model and of a detector (%(default)s)",
    )


def load_evaluated(args: argparse.Namespace, device: str, method: str = "token-compose", **parts: str | None) -> Any:
    """The pipeline that the arguments of `add_model_arguments` name.

    Args:
        args: as parsed.
        device: where it runs.
        method: its name, as `generate --pipeline` has it.
        parts: `adapter` and `image_encoder` of `load_checkpoint`.

    Raises:
        CheckpointError: something cannot be loaded, or was made for another base.
        MissingPackageError: a LoRA needs peft.
        ObjectComposeError: the device cannot be used.
    """
    if args.unet is not None and args.delta is not None:
        raise CheckpointError("`--unet` and `--delta` must not both be given: a delta belongs on its base's own UNet.")
    pipeline = load_checkpoint(args.model, device, method, **parts)
    if not args.safety_checker:
        pipeline.register_modules(safety_checker=None)
    if args.unet is not None:
        unet = load_unet(args.unet)
        check_checkpoint(pipeline.vae, pipeline.text_encoder, unet)
        pipeline.register_modules(unet=unet)
    pipeline.to(device)
    dtype = EVALUATED_DTYPES[args.dtype]
    if any(getattr(pipeline, name).dtype != dtype for name in ("unet", "vae", "text_encoder")):
        pipeline.to(dtype)
    if args.delta is not None:
        path = args.delta / DELTA_NAME if args.delta.is_dir() else args.delta
        UNetDelta.load(path).attach(pipeline.unet, args.model)
    if args.lora is not None:
        _load_lora(pipeline, args.lora)
    return pipeline


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


def _load_lora(pipeline: Any, source: str) -> None:
    path = Path(source)
    folder, name = (str(path.parent), path.name) if path.is_file() else (source, None)
    with loading_errors(source, refuses_pickles=True):
        try:
            pipeline.load_lora_weights(folder, weight_name=name, use_safetensors=True)
        except ImportError as error:
            raise MissingPackageError(f'`--lora` needs peft: pip install "objectcompose[train]" ({error}).') from error
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"`--lora` {source!r} cannot be loaded: {first_line(error)}.") from error
