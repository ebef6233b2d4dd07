"""`objectcompose generate`: a prompt, or a layout file, to PNG files.

    objectcompose generate --prompt "a photo of a dog and a cup" --out outputs/dog.png
    objectcompose generate --layout scene.json --attention --num-images 2 --out outputs/scene.png
    objectcompose generate --pipeline locref --adapter owner/adapter --layout scene.json --out outputs/locref.png
    objectcompose generate --pipeline object-prompt --adapter owner/adapter --prompt "a dog and a cup" \
        --object dog.png --object cup.png --out outputs/both.png
    torchrun --standalone --nproc_per_node 2 -m objectcompose generate --prompt "a dog" --num-images 8

Without `--model` the small model that comes with the repository paints the picture. Pictures are painted one at a
time, by as many processes as a launcher starts: each is what its own seed gives, whatever is painted beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from objectcompose.adapters.folders import loading_errors
from objectcompose.errors import CheckpointError, LayoutError, ObjectComposeError
from objectcompose.grounding.grounder import usable_device
from objectcompose.layout import SceneObject, load_layout
from objectcompose.pipelines.adapter_loading import adapter_class_of
from objectcompose.pipelines.pipeline_locref import LocRefPipeline
from objectcompose.pipelines.pipeline_mifo import MIFOPipeline
from objectcompose.pipelines.pipeline_object_prompt import ObjectPromptPipeline
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from objectcompose.pipelines.plot import overlay_output, save_png
from objectcompose.processes import process_state
from objectcompose.toybox.weights import toybox_path


HELP = "Make pictures from a prompt or a layout file."
#: Name on the command line -> pipeline.
PIPELINES: dict[str, Any] = {
    "token-compose": TokenComposePipeline,
    "locref": LocRefPipeline,
    "mifo": MIFOPipeline,
    "object-prompt": ObjectPromptPipeline,
}


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
    parser.add_argument("--negative-prompt", help="what to steer away from")
    parser.add_argument(
        "--pipeline", choices=PIPELINES, default="token-compose", help="the method that paints (%(default)s)"
    )
    parser.add_argument("--adapter", help="folder or Hub id of the method's trained adapter")
    parser.add_argument(
        "--image-encoder",
        help="folder or Hub id of the CLIP vision model that reads the pictures; default: that of the model",
    )
    parser.add_argument("--model", help="folder or Hub id of a Stable Diffusion 1.x/2.x checkpoint; default: toybox")
    parser.add_argument("--out", type=Path, default=Path("outputs/generate.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the others count up (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (%(default)s)")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance scale (%(default)s)")
    parser.add_argument("--num-images", type=int, default=1, help="pictures to make (%(default)s)")
    parser.add_argument("--height", type=int, help="in pixels; default: the model's")
    parser.add_argument("--width", type=int, help="in pixels; default: the model's")
    parser.add_argument("--device", help="such as cpu or cuda; default: cuda if there is one")
    parser.add_argument(
        "--attention", action="store_true", help="also write an overlay of each phrase's attention beside the picture"
    )


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
    pipeline = load_checkpoint(args.model, place, args.pipeline, args.adapter, args.image_encoder)
    pipeline.set_progress_bar_config(disable=not state.is_main_process)
    for index in mine:
        _paint_picture(pipeline, args, prompt, objects, index)
    return 0


def _paint_picture(
    pipeline: Any, args: argparse.Namespace, prompt: str, objects: list[SceneObject], index: int
) -> None:
    """Paint picture `index` of `--num-images`, alone in its batch: beside others its sums would round otherwise."""
    output = pipeline(
        prompt,
        negative_prompt=args.negative_prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
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


def load_checkpoint(
    model: str | None = None,
    device: str | None = None,
    pipeline: str = "token-compose",
    adapter: str | None = None,
    image_encoder: str | None = None,
) -> Any:
    """A pipeline from a folder or Hub id, or from toybox.

    Args:
        model: folder or Hub id; None stands for the toybox base.
        device: where to run; None stands for "cuda" where there is one, else "cpu".
        pipeline: one of `PIPELINES`.
        adapter: folder or Hub id of the method's adapter; None leaves it out.
        image_encoder: folder or Hub id of a CLIP vision model with a preprocessor config; None stands for what the
            model has, and for toybox's with the toybox base.

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
        raise CheckpointError(f"`--model` {source!r} is no checkpoint folder: it has no model_index.json.")
    try:
        with _quiet_loading(looks_local):
            components = _adapter_components(pipeline, model, adapter, image_encoder)
            path = str(Path(source).expanduser()) if looks_local else source
            loaded = pipeline_class.from_pretrained(path, **components)
    except ObjectComposeError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"`--model` {source!r} cannot be loaded: {first_line}") from error
    needed = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    missing = [name for name in needed if getattr(loaded, name) is None]
    if missing:
        raise CheckpointError(f"`--model` {source!r} lacks {', '.join(missing)}.")
    return loaded.to(place)


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
