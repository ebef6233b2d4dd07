"""Train LocRef-Diffusion's adapter on pictures with boxes (arXiv 2411.15252); the base stays as it is.

    accelerate launch -m objectcompose.training.train_locref \\
        --pretrained_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --image_encoder laion/CLIP-ViT-H-14-laion2B-s32B-b79K \\
        --coco_instances instances_train2017.json --coco_captions captions_train2017.json --images train2017 \\
        --train_batch_size 32 --cache_dir cache --output_dir outputs/locref
    python -m objectcompose.training.train_locref --toybox_scenes 4000 --output_dir outputs/locref    # embedded

Data are read by `objectcompose.training.boxed_pictures`, the losses are in `locref_losses`. Run the same command again
to go on after an interruption. The result is in the output folder's `weights`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid

from objectcompose.adapters.locref_adapter import COMPOSITE_KINDS, REFERENCE_PROJECTIONS, LocRefAdapter
from objectcompose.command_help import script_parser
from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.files import write_png
from objectcompose.pipelines.plot import draw_layout
from objectcompose.toybox.weights import active_preset
from objectcompose.training.adapter_training import (
    add_adapter_arguments,
    finish_adapter_training,
    start_adapter_training,
)
from objectcompose.training.boxed_pictures import BoxedPictures, read_coco, read_openimages
from objectcompose.training.caption_encoding import check_caption_lengths
from objectcompose.training.common import run_script
from objectcompose.training.locref_losses import LocRefLosses, LocRefLossOptions
from objectcompose.training.loop import loop_options
from objectcompose.training.reference_augmentation import ReferenceAugmentation
from objectcompose.training.reference_encoding import ReferenceEncoder
from objectcompose.training.reference_samples import ReferenceDataset, ReferenceSample, ToyboxReferences, pil_picture
from objectcompose.training.runs import picture_side


#: Steps of a validation picture.
VALIDATION_STEPS = 20


def create_parser() -> argparse.ArgumentParser:
    """All options; the weights of the loss are the paper's, what it leaves open is IP-Adapter's."""
    parser = script_parser(__doc__)
    _add_data_arguments(parser)
    losses, defaults = parser.add_argument_group("losses"), LocRefLossOptions()
    losses.add_argument("--foreground_weight", type=float, default=defaults.foreground_weight, help="inside boxes")
    losses.add_argument("--background_weight", type=float, default=defaults.background_weight, help="outside boxes")
    for name, what in (
        ("text", "the caption"),
        ("images", "all pictures"),
        ("both", "caption and pictures"),
        ("composite", "the composite image"),
    ):
        default = getattr(defaults, f"drop_{name}")
        losses.add_argument(f"--drop_{name}", type=float, default=default, help=f"probability of leaving out {what}")
    losses.add_argument("--drop_object", type=float, default=0.1, help="probability of leaving out one of the objects")
    adapter = parser.add_argument_group("adapter (defaults: the paper's design; others are ablations)")
    adapter.add_argument("--num_tokens", type=int, default=None, help="of a picture; none: 16")
    adapter.add_argument("--hidden_width", type=int, default=None, help="of the projection; none: the vector's width")
    adapter.add_argument("--feature", choices=("pooled", "embeds"), default=None, help="vector of the image encoder")
    adapter.add_argument("--projection", choices=REFERENCE_PROJECTIONS, default=None, help="from vector to tokens")
    adapter.add_argument("--composite", choices=COMPOSITE_KINDS, default=None, help="what tells where objects go")
    adapter.add_argument("--no_region_mask", action="store_true", help="each reference acts in all boxes")
    adapter.add_argument("--gamma", type=float, default=None, help="share of the text inside boxes; none: 0")
    adapter.add_argument("--ip_adapter", type=Path, default=None, help="start from these weights, with their design")
    add_adapter_arguments(
        parser,
        max_train_steps=200_000,
        train_batch_size=32,
        learning_rate=1e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=1000,
        checkpointing_steps=1000,
        validation_steps=5000,
    )
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument("--coco_instances", type=Path, help="instances file in COCO's format")
    source.add_argument("--openimages_boxes", type=Path, help="boxes file (CSV) in OpenImages' format")
    source.add_argument("--toybox_scenes", type=int, help="train on so many scenes of the toybox instead")
    data.add_argument("--coco_captions", type=Path, help="captions file in COCO's format")
    data.add_argument("--openimages_captions", type=Path, help="JSON Lines with `image_id` and `caption`")
    data.add_argument("--images", type=Path, help="folder of the pictures")
    data.add_argument("--resolution", type=int, default=None, help="side of the samples; none: the base's own")
    data.add_argument("--cut_outs", type=float, default=0.0, help="share of references cut out by their COCO mask")
    data.add_argument("--scene_flip", type=float, default=0.5, help="probability of a mirrored picture (not toybox)")
    data.add_argument("--cache_dir", type=Path, default=None, help="keep encoded samples here; changes no result")
    data.add_argument("--validation_scenes", type=int, default=0, help="first scenes to paint while training")
    data.add_argument("--variants", type=int, default=4, help="of each sample: crop, caption, augmentation")
    defaults = ReferenceAugmentation()
    data.add_argument("--reference_flip", type=float, default=defaults.flip, help="probability")
    data.add_argument("--reference_colour", type=float, default=defaults.colour, help="colour factors: 1 +- this")
    data.add_argument("--reference_crop", type=float, default=defaults.crop, help="least share of area kept")
    data.add_argument("--reference_rotation", type=float, default=defaults.rotation, help="largest angle, degrees")
    data.add_argument("--box_jitter", type=float, default=defaults.box, help="share of a box's sides")


def check_data_arguments(args: argparse.Namespace) -> None:
    """Raise `LayoutError` where files that the source needs are not named, or others are."""
    wanted: set[str] = set()
    if args.coco_instances is not None:
        wanted = {"coco_captions", "images"}
    elif args.openimages_boxes is not None:
        wanted = {"openimages_captions", "images"}
    for name in ("coco_captions", "openimages_captions", "images"):
        if (getattr(args, name) is not None) != (name in wanted):
            raise LayoutError(f"`{name}` {'is needed' if name in wanted else 'must not be given'} with this data.")


def load_dataset(args: argparse.Namespace, resolution: int) -> ReferenceDataset:
    """The data set that the arguments name.

    Raises:
        LayoutError, ImageInputError, ObjectComposeError: it is missing or broken.
    """
    if args.toybox_scenes is not None:
        preset = active_preset()
        if resolution != preset.image_size:
            raise LayoutError(f"`resolution` must be {preset.image_size} with `toybox_scenes`, got {resolution}.")
        return ToyboxReferences(preset, args.toybox_scenes)
    if args.coco_instances is not None:
        pictures = read_coco(args.coco_instances, args.coco_captions, args.images)
    else:
        pictures = read_openimages(args.openimages_boxes, args.openimages_captions, args.images)
    return BoxedPictures(pictures, resolution, flip=args.scene_flip, cut_outs=args.cut_outs)


def make_adapter(args: argparse.Namespace, pipeline: Any) -> LocRefAdapter:
    """The adapter that training starts from.

    Raises:
        CheckpointError: a size that cannot be, or weights of something else.
        ObjectComposeError: a design is asked for beside the one that IP-Adapter weights bring.
    """
    names = ("num_tokens", "hidden_width", "feature", "projection", "composite", "gamma")
    choices = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    choices |= {"region_mask": False} if args.no_region_mask else {}
    base = args.pretrained_model or "toybox-1"
    if args.ip_adapter is None:
        return LocRefAdapter.from_unet(pipeline.unet, base, pipeline.image_encoder, **choices)
    if choices:
        raise ObjectComposeError(f"`{min(choices)}` must not be given with `ip_adapter`, which brings its own.")
    adapter = LocRefAdapter.from_ip_adapter(args.ip_adapter, pipeline.unet, base)
    # those defaults are for weights used as they come; here they are trained with null pictures, at full strength
    adapter.register_to_config(null_references=True, ci_scale=1.0, ri_scale=1.0)
    return adapter


def scene_painter(pipeline: Any, samples: Sequence[ReferenceSample], folder: Path) -> Callable[[int], None] | None:
    """Writes one sheet per validation: a row for each scene: it, its layout, what is painted; None without scenes.

    Args:
        pipeline: with the adapter in training.
        samples: painted from the same noise each time.
        folder: of the sheets.
    """
    if not samples:
        return None
    pipeline.set_progress_bar_config(disable=True)

    def paint(step: int) -> None:
        adapter = pipeline.adapter.eval()
        output = pipeline(
            [sample.caption for sample in samples],
            objects=[list(sample.objects) for sample in samples],
            num_inference_steps=VALIDATION_STEPS,
            generator=[torch.Generator().manual_seed(number) for number in range(len(samples))],
            return_composite=adapter.config.composite == "image",
        )
        adapter.train()
        sheet = []
        for number, (sample, painted) in enumerate(zip(samples, output.images, strict=True)):
            composite = [] if output.composite is None else [output.composite[number].resize(painted.size)]
            boxes = [{"box": item.box} for item in sample.objects]
            scene = pil_picture(sample.pixels / 2 + 0.5).resize(painted.size)
            sheet += [scene, *composite, draw_layout(painted, boxes)]
        folder.mkdir(parents=True, exist_ok=True)
        picture = make_image_grid(sheet, len(samples), len(sheet) // len(samples))
        write_png(folder / f"step-{step:06d}.png", picture)

    return paint


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = create_parser().parse_args(argv)
    loop_options(args)  # bad numbers are refused before anything is loaded
    options = LocRefLossOptions(**{name: getattr(args, name) for name in LocRefLossOptions.__dataclass_fields__})
    augmentation = ReferenceAugmentation(
        args.reference_flip, args.reference_colour, args.reference_crop, args.reference_rotation, args.box_jitter
    )
    check_data_arguments(args)
    run = start_adapter_training(args, "train_locref", argv, "locref", lambda pipeline: make_adapter(args, pipeline))
    pipeline = run.pipeline
    dataset = load_dataset(args, picture_side(pipeline, args.resolution))
    if isinstance(dataset, BoxedPictures):
        texts = [caption for picture in dataset.pictures for caption in picture.captions]
        check_caption_lengths(pipeline.tokenizer, texts, is_shown=run.accelerator.is_main_process)
    if not 0 <= args.validation_scenes <= len(dataset):
        raise ObjectComposeError(
            f"`validation_scenes` must lie in [0, {len(dataset)}] with this data, got {args.validation_scenes}."
        )
    encoder = ReferenceEncoder(
        dataset, pipeline, augmentation, args.variants, args.drop_object, args.seed, args.cache_dir
    )
    losses = LocRefLosses(pipeline, run.scheduler, encoder, options, run.accelerator.autocast)
    shown = [encoder.draw_sample(index, 0) for index in range(args.validation_scenes)]
    finish_adapter_training(
        run,
        losses,
        len(dataset),
        title="LocRef adapter",
        summary="Objects from reference pictures in given boxes, after LocRef-Diffusion (arXiv 2411.15252).",
        data=f"{len(dataset)} pictures with boxes from {_source(args)}",
        data_digest=dataset.digest(),
        paint=scene_painter(pipeline, shown, args.output_dir / "validation"),
    )
    return 0


def _source(args: argparse.Namespace) -> str:
    path = args.coco_instances or args.openimages_boxes
    return "toybox scenes" if path is None else path.name


if __name__ == "__main__":
    raise SystemExit(run_script(main))
