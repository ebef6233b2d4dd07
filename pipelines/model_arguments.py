"""What the commands that paint share: which model paints, in which precision, and for how long."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.errors import CheckpointError
from objectcompose.grounding.grounder import DTYPES
from objectcompose.pipelines.call_checks import check_checkpoint
from objectcompose.pipelines.checkpoints import load_checkpoint, load_lora, load_unet


#: Steps and guidance of the toybox base, and of Stable Diffusion as diffusers has them.
TOYBOX_SAMPLING, SAMPLING = (20, 5.0), (50, 7.5)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> Any:
    """Declare which model paints and where it runs; returns the group, for a command's own."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="folder or Hub id of a Stable Diffusion 1.x/2.x checkpoint; default: toybox")
    group.add_argument("--unet", type=Path, metavar="DIR", help="folder of a fine-tuned UNet to put in its place")
    group.add_argument("--delta", type=Path, metavar="FILE", help="what fine-tuning changed of the UNet, to put on it")
    group.add_argument("--lora", metavar="FILE", help="file, folder or Hub id of a LoRA to put on it")
    group.add_argument("--device", help="such as cpu or cuda; default: the process's accelerator, if there is one")
    group.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="number format of the models (%(default)s)"
    )
    return group


def load_from_arguments(
    args: argparse.Namespace,
    device: str | None,
    method: str = "token-compose",
    adapter: str | None = None,
    image_encoder: str | None = None,
) -> Any:
    """The pipeline that the arguments of `add_checkpoint_arguments` name.

    Args:
        args: as parsed.
        device: where it runs; None as for `load_checkpoint`.
        method: its name in `PIPELINES`.
        adapter, image_encoder: see `load_checkpoint`.

    Raises:
        CheckpointError: something cannot be loaded, or was made for another base.
        MissingPackageError: a LoRA needs peft.
        ObjectComposeError: the device cannot be used.
    """
    if args.unet is not None and args.delta is not None:
        raise CheckpointError("`--unet` and `--delta` must not both be given: a delta belongs on its base's own UNet.")
    pipeline = load_checkpoint(args.model, device, method, adapter, image_encoder)
    if args.unet is not None:
        unet = load_unet(args.unet)
        check_checkpoint(pipeline.vae, pipeline.text_encoder, unet)
        pipeline.register_modules(unet=unet.to(pipeline.vae.device))
    dtype = DTYPES[args.dtype]
    if any(getattr(pipeline, name).dtype != dtype for name in ("unet", "vae", "text_encoder")):
        pipeline.to(dtype)
    if args.delta is not None:
        path = args.delta / DELTA_NAME if args.delta.is_dir() else args.delta
        UNetDelta.load(path).attach(pipeline.unet, args.model)
    if args.lora is not None:
        load_lora(pipeline, args.lora)
    return pipeline


def add_sampling_arguments(group: Any) -> None:
    """Declare how a picture is painted; `group` is a parser or a group of it."""
    group.add_argument("--steps", type=int, help="denoising steps; default: 20 for toybox, else 50")
    group.add_argument("--guidance-scale", type=float, help="default: 5 for toybox, else 7.5")
    group.add_argument("--negative-prompt", help="what to steer away from")
    group.add_argument("--height", type=int, help="in pixels; default: the model's")
    group.add_argument("--width", type=int, help="in pixels; default: the model's")


def steps_and_guidance(args: argparse.Namespace) -> tuple[int, float]:
    """Denoising steps and guidance scale, as given or as the model has them."""
    steps, guidance_scale = TOYBOX_SAMPLING if args.model is None else SAMPLING
    return (
        steps if args.steps is None else args.steps,
        guidance_scale if args.guidance_scale is None else args.guidance_scale,
    )
