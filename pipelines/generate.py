"""`objectcompose generate`: a prompt, or a layout file, to PNG files.

    objectcompose generate --prompt "a photo of a dog and a car" --out outputs/dog.png
    objectcompose generate --layout scene.json --attention --num-images 2 --out outputs/scene.png
    objectcompose generate --pipeline locref --adapter owner/adapter --layout scene.json --out outputs/locref.png
    objectcompose generate --pipeline object-prompt --adapter owner/adapter --prompt "a dog and a car" \\
        --object dog.png --object car.png --out outputs/both.png
    torchrun --standalone --nproc_per_node 2 -m objectcompose generate --prompt "a dog" --num-images 8

Without `--model` the small model that comes with the repository paints the picture. Pictures are painted one at a
time, by as many processes as a launcher starts: each is what its own seed gives, whatever is painted beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.layout import SceneObject, load_layout
from objectcompose.pipelines.checkpoints import PIPELINES
from objectcompose.pipelines.learned_instances import load_instances
from objectcompose.pipelines.model_arguments import (
    add_checkpoint_arguments,
    add_sampling_arguments,
    load_from_arguments,
    steps_and_guidance,
)
from objectcompose.pipelines.plot import overlay_output, save_png
from objectcompose.processes import process_state


HELP = "Make pictures from a prompt or a layout file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="what the picture shows")
    source.add_argument("--layout", type=Path, metavar="FILE.json", help="prompt and objects as layout JSON")
    parser.add_argument(
        "--phrase",
        action="append",
        default=[],
        metavar="WORDS",
        help="with --prompt: a phrase of it to show attention for; may be repeated",
    )
    parser.add_argument(
        "--object",
        action="append",
        default=[],
        metavar="PICTURE",
        help="with --prompt: a picture of an object, best a cut-out with an alpha channel; may be repeated",
    )
    parser.add_argument(
        "--pipeline", choices=PIPELINES, default="token-compose", help="the method that paints (%(default)s)"
    )
    parser.add_argument("--adapter", help="folder or Hub id of the method's trained adapter")
    parser.add_argument(
        "--image-encoder",
        help="folder or Hub id of the CLIP vision model that reads the pictures; default: that of the model",
    )
    parser.add_argument(
        "--instances",
        type=Path,
        metavar="DIR",
        help="output folder of learn_mifo, whose placeholders prompts may name",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/generate.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the others count up (%(default)s)")
    parser.add_argument("--num-images", type=int, default=1, help="pictures to make (%(default)s)")
    parser.add_argument(
        "--attention", action="store_true", help="also write an overlay of each phrase's attention beside the picture"
    )
    add_sampling_arguments(parser)
    add_checkpoint_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; input that cannot be used raises.

    Raises:
        ObjectComposeError: bad arguments, layout or checkpoint; nothing was written then.
    """
    prompt, objects = _read_scene(args)
    if args.attention and not objects:
        raise LayoutError("`--attention` needs `--phrase`, or a layout with objects.")
    if args.num_images < 1:
        raise ObjectComposeError(f"`--num-images` must be at least 1, got {args.num_images}.")
    if not 0 <= args.seed < 2**63 - args.num_images:
        raise ObjectComposeError(f"`--seed` must be a whole number from 0 on, below 2**63, got {args.seed}.")
    if args.out.suffix.lower() != ".png":
        raise ObjectComposeError(f"`--out` must end in .png, got {str(args.out)!r}.")
    state = process_state(args.device)
    mine = range(state.process_index, args.num_images, state.num_processes)
    if not mine:  # more processes than pictures
        return 0
    place = args.device or (str(state.device) if state.num_processes > 1 else None)
    pipeline = load_from_arguments(args, place, args.pipeline, adapter=args.adapter, image_encoder=args.image_encoder)
    if args.instances is not None:
        load_instances(pipeline, args.instances)
    pipeline.set_progress_bar_config(disable=not state.is_main_process)
    for index in mine:
        _paint_picture(pipeline, args, prompt, objects, index)
    return 0


def _paint_picture(
    pipeline: Any, args: argparse.Namespace, prompt: str, objects: list[SceneObject], index: int
) -> None:
    """Paint picture `index` of `--num-images`, alone in its batch: beside others its sums would round otherwise."""
    steps, guidance_scale = steps_and_guidance(args)
    output = pipeline(
        prompt,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(args.seed + index),
        objects=objects or None,
        return_attention=args.attention,
    )
    target = args.out if args.num_images == 1 else args.out.with_stem(f"{args.out.stem}_{index}")
    print(save_png(output.images[0], target), flush=True)
    overlays = overlay_output(output)[0] if args.attention else {}
    for number, overlay in enumerate(overlays.values()):
        print(save_png(overlay, target.with_stem(f"{target.stem}_attention_{number}")), flush=True)


def _read_scene(args: argparse.Namespace) -> tuple[str, list[SceneObject]]:
    if args.layout is None:
        phrases = [SceneObject(phrase=phrase) for phrase in args.phrase]
        return args.prompt, phrases + [SceneObject(image=picture) for picture in args.object]
    for name in ("phrase", "object"):
        if getattr(args, name):
            raise LayoutError(f"`--{name}` goes with `--prompt`; a layout names its own objects.")
    layout = load_layout(args.layout)
    return layout.prompt, list(layout.objects)
