"""Who paints the layouts that are measured: LocRef, the prompt alone, or diffusers' IP-Adapter with masks.

The rival reads the same references, prepared alike, and is told where they go by diffusers' `ip_adapter_masks`: the
boxes on the canvas, of two that overlap the one in front, as LocRef's regions have it; diffusers resizes them for each
layer. What it sees is added to the text. diffusers shows all prompts of a call the same pictures, so that each layout
is a call of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline

from objectcompose.adapters.folders import loading_errors
from objectcompose.errors import CheckpointError, LayoutError, ObjectComposeError
from objectcompose.evaluation.generation import paint_records
from objectcompose.evaluation.layout_cases import LayoutCase, layouts_digest
from objectcompose.evaluation.models import load_evaluated
from objectcompose.evaluation.presence import PICTURE_FOLDER, sampling_options
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.grounding.loading import first_line
from objectcompose.layout import SceneObject
from objectcompose.pipelines.reference_images import (
    clip_statistics,
    encode_references,
    encoder_side,
    normalize_pixels,
    reference_pixels,
)
from objectcompose.pipelines.reference_layout import reference_regions


Arguments = Callable[[Sequence[PromptRecord]], dict[str, Any]]


def add_painter_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare who paints."""
    group = parser.add_argument_group("painter")
    group.add_argument("--adapter", help="LocRef's, a folder or Hub id; default: none, the prompt alone is painted")
    group.add_argument("--ip-adapter", type=Path, metavar="FILE", help="rival: IP-Adapter weights, with masks")
    group.add_argument("--image-encoder", help="folder or Hub id; default: the model's own, or toybox's")
    group.add_argument("--gamma", type=float, help="share of the text inside boxes; default: the adapter's")
    group.add_argument("--no-region-mask", action="store_true", help="let each reference act in all boxes")


def check_painter(args: argparse.Namespace, cases: Sequence[LayoutCase]) -> None:
    """Raise ObjectComposeError where the arguments contradict one another or the layouts."""
    if args.adapter is not None and args.ip_adapter is not None:
        raise ObjectComposeError("`--adapter` and `--ip-adapter` must not both be given: one of them paints.")
    for name, given in (("--gamma", args.gamma is not None), ("--no-region-mask", args.no_region_mask)):
        if given and args.adapter is None:
            raise ObjectComposeError(f"`{name}` needs `--adapter`: nothing else has it.")
    if args.ip_adapter is not None:
        for case in cases:
            for index, item in enumerate(case.objects):
                if item.scale != 1:
                    raise LayoutError(
                        f"`--ip-adapter` needs objects of scale 1; objects[{index}] of layout {case.record.id} has"
                        f" {item.scale:g}."
                    )


def painter_words(args: argparse.Namespace) -> str:
    """Who paints, in words."""
    if args.ip_adapter is not None:
        return "IP-Adapter with masks"
    if args.adapter is None:
        return "the prompt alone"
    switches = ["without region mask"] if args.no_region_mask else []
    switches += [] if args.gamma is None else [f"gamma {args.gamma:g}"]
    return ", ".join(["LocRef", *switches])


def paint_layouts(args: argparse.Namespace, cases: Sequence[LayoutCase], place: str, state: PartialState) -> None:
    """Paint what is missing of the pictures in `<out>/pictures`.

    Args:
        args: as parsed, checked.
        cases: the layouts.
        place: device of the pipeline.
        state: the processes.

    Raises:
        CheckpointError: something cannot be loaded, or the folder holds pictures of something else.
    """
    options = sampling_options(args)
    if args.ip_adapter is not None:
        options["batch_size"] = 1  # diffusers takes masks for one prompt
    pipeline, arguments = _painter(args, {case.record.id: case for case in cases}, place, options["guidance_scale"])
    paint_records(
        pipeline,
        [case.record for case in cases],
        args.out / PICTURE_FOLDER,
        **options,
        call_arguments=arguments,
        call_identity=f"{painter_words(args)}, layouts {layouts_digest(cases)}",
        state=state,
    )


def _painter(
    args: argparse.Namespace, cases: dict[str, LayoutCase], place: str, guidance_scale: float
) -> tuple[Any, Arguments]:
    """A pipeline, and what its call gets for a batch of prompts."""
    if args.ip_adapter is not None:
        pipeline = load_masked_ip_adapter(args, place)
        own_side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        canvas = (args.height or own_side, args.width or own_side)
        copies = 2 if guidance_scale > 1 else 1
        return pipeline, lambda records: ip_adapter_arguments(pipeline, cases[records[0].id].objects, canvas, copies)
    if args.adapter is None:
        return load_evaluated(args, place), lambda records: {}
    # phrases are the detector's names of categories, which a prompt need not have, or not as often
    objects = {name: [dataclasses.replace(item, phrase=None) for item in case.objects] for name, case in cases.items()}
    switches: dict[str, Any] = {} if args.gamma is None else {"gamma": args.gamma}
    switches |= {"region_mask": False} if args.no_region_mask else {}
    pipeline = load_evaluated(args, place, "locref", adapter=args.adapter, image_encoder=args.image_encoder)
    return pipeline, lambda records: {"objects": [objects[record.id] for record in records], **switches}


def load_masked_ip_adapter(args: argparse.Namespace, place: str) -> StableDiffusionPipeline:
    """diffusers' own pipeline with IP-Adapter weights of one picture's kind, and an image encoder.

    Raises:
        CheckpointError: something is missing, or cannot be loaded.
    """
    base = load_evaluated(args, place, "locref", image_encoder=args.image_encoder)
    encoder_side(base.image_encoder)
    components = {name: part for name, part in base.components.items() if name != "adapter"}
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    path = Path(args.ip_adapter)
    if path.suffix != ".safetensors" or not path.is_file():
        raise CheckpointError(f"`--ip-adapter` must be a safetensors file, got {str(path)!r}.")
    with loading_errors(str(path), refuses_pickles=True):
        try:
            pipeline.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"`--ip-adapter` {str(path)!r} cannot be loaded: {first_line(error)}.") from error
    return pipeline


@torch.no_grad()
def ip_adapter_arguments(
    pipeline: Any, objects: Sequence[SceneObject], canvas: tuple[int, int], copies: int
) -> dict[str, Any]:
    """What a call with one prompt gets to show N references in their boxes.

    Args:
        pipeline: of `load_masked_ip_adapter`.
        objects: with `image` and `box`, at least one.
        canvas: height and width of the masks; diffusers resizes them.
        copies: 2 under guidance, whose first half sees zeros for pictures, as IP-Adapter was trained; else 1.

    Returns:
        `ip_adapter_image_embeds`, one tensor `(copies, N, D)`, and `cross_attention_kwargs` with `ip_adapter_masks`,
        one tensor `(1, N, H, W)` of {0, 1}.
    """
    encoder = pipeline.image_encoder
    mean, std = clip_statistics(pipeline.feature_extractor)
    pixels = torch.stack([reference_pixels(item.image, encoder_side(encoder), mean) for item in objects])
    shown = encode_references(encoder, normalize_pixels(pixels, mean, std).to(encoder.device)).embeds[None]
    masks = reference_regions(objects, canvas).at(canvas)[None]
    return {
        "ip_adapter_image_embeds": [torch.cat([torch.zeros_like(shown)] * (copies - 1) + [shown])],
        "cross_attention_kwargs": {"ip_adapter_masks": [masks]},
    }
