"""Train ObjectPrompt's adapter: object pictures to keys and values (VisualComposer, arXiv 2501.01424).

    accelerate launch -m objectcompose.training.train_object_prompt \\
        --pretrained_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --image_encoder laion/CLIP-ViT-H-14-laion2B-s32B-b79K \\
        --ip_adapter_plus ip-adapter-plus_sd15.safetensors --data my_captions --output_dir outputs/object-prompt
    python -m objectcompose.training.train_object_prompt --toybox_scenes 4000 --output_dir outputs/object-prompt

`--data` is a folder of grounded captions (`objectcompose ground-captions` writes one): its masks cut the object
pictures out. The loss is in `object_prompt_losses`, the pictures in `object_prompt_data`. Run the same command again
to go on after an interruption. The adapter is in the output folder's `weights`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from objectcompose.adapters.object_prompt_adapter import TOKEN_STREAMS, ObjectPromptAdapter
from objectcompose.command_help import script_parser
from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.files import write_png
from objectcompose.toybox.weights import active_preset
from objectcompose.training.adapter_training import (
    AdapterTraining,
    add_adapter_arguments,
    finish_adapter_training,
    start_adapter_training,
)
from objectcompose.training.caption_encoding import CaptionEncoder, check_caption_lengths
from objectcompose.training.common import run_script
from objectcompose.training.grounded_captions import GroundedCaptions, read_records
from objectcompose.training.loop import loop_options
from objectcompose.training.object_prompt_data import (
    CutOutScenes,
    ObjectFeatures,
    ObjectScenes,
    ToyboxScenes,
    captions_with_objects,
)
from objectcompose.training.object_prompt_losses import ConditionOptions, ObjectPromptLosses
from objectcompose.training.runs import picture_side


#: What the maps to values start from: the base's own for text, as IP-Adapter has it, or nothing.
VALUE_INITS = ("text", "zero")
#: Steps and guidance of a validation picture.
VALIDATION_STEPS, VALIDATION_GUIDANCE = 20, 5.0

logger = logging.getLogger(__name__)


def create_parser() -> argparse.ArgumentParser:
    """All options; the defaults are IP-Adapter's and, for what it has not, the method's page."""
    parser = script_parser(__doc__)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="folder of grounded captions")
    data.add_argument("--toybox_scenes", type=int, help="train on so many scenes of the toybox instead")
    parser.add_argument("--resolution", type=int, default=None, help="side of the samples; none: the base's own")
    parser.add_argument("--cache_dir", type=Path, default=None, help="keep what is encoded here; changes no result")
    parser.add_argument("--prompt_views", type=int, default=4, help="fixed augmentations of each object picture")
    parser.add_argument("--validation_scenes", type=int, default=0, help="first scenes to paint while training")
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--streams", choices=sorted(TOKEN_STREAMS), default="mixed", help="what feeds keys and values"
    )
    adapter.add_argument("--num_tokens", type=int, default=16, help="tokens of one object")
    adapter.add_argument("--resampler_depth", type=int, default=4, help="blocks of the appearance adapter")
    adapter.add_argument(
        "--value_init", choices=VALUE_INITS, default="text", help="zero: training starts from what the base paints"
    )
    adapter.add_argument("--ip_adapter_plus", type=Path, default=None, help="weights to start from, safetensors")
    adapter.add_argument(
        "--key_side_share", type=float, default=0.1, help="of the steps, first, that train keys only; warm starts"
    )
    drops = parser.add_argument_group("conditions")
    for name, option in ConditionOptions.__dataclass_fields__.items():
        what = "chance per object; one always stays" if name == "drop_object" else "chance per sample"
        drops.add_argument(f"--{name}", type=float, default=option.default, help=what)
    add_adapter_arguments(
        parser, max_train_steps=50_000, train_batch_size=8, learning_rate=1e-4, checkpointing_steps=1000
    )
    return parser


def load_scenes(run: AdapterTraining, resolution: int) -> ObjectScenes:
    """The scenes that the arguments name, of pictures those that show an object; warns of what is left out or cut.

    Raises:
        LayoutError, ImageInputError, RegionError: they are missing or broken.
        ObjectComposeError: there are none.
    """
    args, accelerator = run.args, run.accelerator
    if args.data is not None:
        captions = GroundedCaptions(read_records(args.data), resolution)
        chosen = captions_with_objects(captions, accelerator.is_main_process)
        if len(chosen) < len(captions) and accelerator.is_main_process:
            logger.warning(
                f"{len(captions) - len(chosen)} of {len(captions)} pictures are left out: they show no object that can"
                " be cut out."
            )
        texts = [captions.records[number].caption for number in chosen.numbers]
        check_caption_lengths(run.pipeline.tokenizer, texts, is_shown=accelerator.is_main_process)
        return CutOutScenes(chosen)
    if args.toybox_scenes < 1:
        raise ObjectComposeError(f"`--toybox_scenes` must be at least 1, got {args.toybox_scenes}.")
    preset = active_preset()
    if resolution != preset.image_size:
        raise LayoutError(f"`resolution` must be {preset.image_size} with `toybox_scenes`, got {resolution}.")
    with accelerator.main_process_first():  # who renders first fills the cache
        return ToyboxScenes(preset, args.toybox_scenes, args.cache_dir or args.output_dir / "scenes")


def make_adapter(args: argparse.Namespace, pipeline: Any) -> ObjectPromptAdapter:
    """The adapter that training starts from.

    Raises:
        CheckpointError: a size that cannot be, or weights of something else.
    """
    adapter = ObjectPromptAdapter.from_unet(
        pipeline.unet,
        args.pretrained_model or "toybox-1",
        pipeline.image_encoder,
        streams=args.streams,
        num_tokens=args.num_tokens,
        resampler_depth=args.resampler_depth,
    )
    if args.value_init == "zero":  # the branch adds nothing then, until its values learn to
        for weight in adapter.projections.value_maps.parameters():
            torch.nn.init.zeros_(weight)
    if args.ip_adapter_plus is not None:
        adapter.load_ip_adapter_plus(args.ip_adapter_plus, pipeline.unet)
    return adapter


def check_arguments(args: argparse.Namespace) -> ConditionOptions:
    """Refuse bad numbers before anything is loaded.

    Raises:
        ObjectComposeError: a number is out of range.
    """
    loop_options(args)
    if not 0 <= args.key_side_share <= 1:
        raise ObjectComposeError(f"`key_side_share` must be in [0, 1], got {args.key_side_share}.")
    if args.value_init == "zero" and args.ip_adapter_plus is not None:
        raise ObjectComposeError("`value_init` must not be 'zero' with `ip_adapter_plus`, which has values.")
    for name, least in (("prompt_views", 1), ("num_tokens", 1), ("resampler_depth", 1), ("validation_scenes", 0)):
        if getattr(args, name) < least:
            raise ObjectComposeError(f"`{name}` must be at least {least}, got {getattr(args, name)}.")
    return ConditionOptions(**{name: getattr(args, name) for name in ConditionOptions.__dataclass_fields__})


def make_losses(run: AdapterTraining, scenes: ObjectScenes, options: ConditionOptions) -> ObjectPromptLosses:
    """The losses of a run on these scenes."""
    args, pipeline = run.args, run.pipeline
    encoder = CaptionEncoder(
        scenes.captions,
        pipeline.tokenizer,
        pipeline.text_encoder,
        pipeline.vae,
        levels=len(pipeline.unet.config.block_out_channels),
        on_missing="skip",  # nouns are not looked for in the text here
        cache=args.cache_dir,
    )
    features = ObjectFeatures(
        scenes,
        pipeline.image_encoder,
        pipeline.feature_extractor,
        views=args.prompt_views,
        cache=args.cache_dir,
    )
    key_side_steps = round(args.key_side_share * args.max_train_steps) if args.ip_adapter_plus is not None else 0
    return ObjectPromptLosses(
        pipeline.unet,
        pipeline.adapter,
        run.scheduler,
        encoder,
        features,
        pipeline.vae.config.scaling_factor,
        options,
        key_side_steps,
        run.accelerator.autocast,
    )


def scene_painter(pipeline: Any, scenes: ObjectScenes, count: int, folder: Path) -> Callable[[int], None] | None:
    """Writes one sheet per validation: each row a scene, what is painted from its object pictures, and these.

    Args:
        pipeline: with the adapter in training.
        scenes: the first ones that have objects are painted, always from the same noise.
        count: how many; with 0 there is no painter.
        folder: of the sheets.
    """
    # one by one, since each scene is decoded to know
    chosen = list(islice((index for index in range(len(scenes.captions)) if scenes.count(index)), count))
    if not chosen:
        return None
    pipeline.set_progress_bar_config(disable=True)
    pictures = [[scenes.picture(index, number, 0) for number in range(scenes.count(index))] for index in chosen]
    samples = [scenes.captions[index] for index in chosen]

    def paint(step: int) -> None:
        adapter = pipeline.adapter.eval()
        painted = pipeline(
            [sample.caption for sample in samples],
            objects=[[{"image": picture} for picture in row] for row in pictures],
            num_inference_steps=VALIDATION_STEPS,
            guidance_scale=VALIDATION_GUIDANCE,
            generator=[torch.Generator().manual_seed(number) for number in range(len(samples))],
        ).images
        adapter.train()
        width = max(map(len, pictures))
        sheet = [_sheet_row(*one, width) for one in zip(samples, painted, pictures, strict=True)]
        rows = [picture for row in sheet for picture in row]
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"step-{step:06d}.png", make_image_grid(rows, len(sheet), len(sheet[0])))

    return paint


def _sheet_row(sample: Any, painted: Image.Image, pictures: Sequence[Image.Image], width: int) -> list[Image.Image]:
    """Scene, painted picture, then the prompts on white; all of the painted picture's size."""
    scene = Image.fromarray((sample.pixels.add(1).mul(127.5)).round().byte().permute(1, 2, 0).numpy())
    blank = Image.new("RGB", painted.size, "white")
    shown = []
    for picture in pictures:
        tile = blank.copy()
        resized = picture.resize(painted.size)
        tile.paste(resized, mask=resized.getchannel("A"))
        shown.append(tile)
    return [scene.resize(painted.size), painted, *shown, *[blank] * (width - len(shown))]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = create_parser().parse_args(argv)
    options = check_arguments(args)
    run = start_adapter_training(
        args, "train_object_prompt", argv, "object-prompt", lambda pipeline: make_adapter(args, pipeline)
    )
    pipeline = run.pipeline
    scenes = load_scenes(run, picture_side(pipeline, args.resolution))
    losses = make_losses(run, scenes, options)
    paint = scene_painter(pipeline, scenes, args.validation_scenes, args.output_dir / "validation")
    finish_adapter_training(
        run,
        losses,
        len(scenes.captions),
        title="ObjectPrompt adapter",
        summary="Object pictures as prompts: keys from a narrow encoding of each picture, values from a wide one"
        f" (VisualComposer, arXiv 2501.01424; not the authors' weights). Streams: {args.streams}.",
        data=f"{len(scenes.captions)} scenes from {args.data.name if args.data else 'toybox'}",
        data_digest=scenes.captions.digest(),
        paint=paint,
        key_side_steps=losses.key_side_steps,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_script(main))
