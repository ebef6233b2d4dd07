"""Fine-tune a text-to-image UNet with TokenCompose's losses on grounded captions (arXiv 2312.03626).

    accelerate launch -m objectcompose.training.train_token_compose \\
        --pretrained_model stable-diffusion-v1-5/stable-diffusion-v1-5 --data my_captions --output_dir outputs/tc
    python -m objectcompose.training.train_token_compose --toybox_scenes 4000 --output_dir outputs/tc    # embedded

The data's layout is in `objectcompose.training.grounded_captions`, the losses in `token_compose_losses`. Run the same
command again to go on after an interruption. The result is in the output folder's `weights`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from objectcompose.command_help import attributes_help, script_parser
from objectcompose.errors import LayoutError
from objectcompose.toybox.weights import active_preset
from objectcompose.training.caption_encoding import MASK_MODES, CaptionEncoder, check_caption_lengths
from objectcompose.training.common import run_script
from objectcompose.training.fine_tuning import add_fine_tuning_arguments, finish_fine_tuning, start_fine_tuning
from objectcompose.training.grounded_captions import CaptionDataset, GroundedCaptions, ToyboxCaptions, read_records
from objectcompose.training.loop import loop_options
from objectcompose.training.runs import picture_side
from objectcompose.training.token_compose_losses import (
    SUPERVISED_LAYERS,
    TokenComposeLosses,
    TokenComposeLossOptions,
)


def create_parser() -> argparse.ArgumentParser:
    """All options; the defaults are those of the authors' run on Stable Diffusion 1.4."""
    parser = script_parser(__doc__)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="folder of grounded captions")
    data.add_argument("--toybox_scenes", type=int, help="train on so many scenes of the toybox instead")
    parser.add_argument("--resolution", type=int, default=None, help="side of the samples; none: the base's own")
    parser.add_argument("--cache_dir", type=Path, default=None, help="keep encoded samples here; changes no result")
    parser.add_argument("--mask_mode", choices=MASK_MODES, default="bilinear", help="masks on coarse grids")
    parser.add_argument(
        "--on_missing", choices=("error", "skip"), default="error", help="a noun not in its caption, or a long one"
    )
    losses, texts = parser.add_argument_group("losses"), attributes_help(TokenComposeLossOptions)
    for name, weight in (("ldm_weight", 1.0), ("token_weight", 1e-3), ("pixel_weight", 5e-5)):
        losses.add_argument(f"--{name}", type=float, default=weight, help=texts[name])
    losses.add_argument(
        "--head_mode", choices=("ratio_mean", "map_mean"), default="ratio_mean", help=texts["head_mode"]
    )
    losses.add_argument(
        "--pixel_sum", choices=("resolutions", "layers"), default="resolutions", help=texts["pixel_sum"]
    )
    losses.add_argument("--layers", default=SUPERVISED_LAYERS, help="supervised layers, a regex")
    add_fine_tuning_arguments(
        parser,
        "unet",
        max_train_steps=24_000,
        gradient_accumulation_steps=4,
        learning_rate=5e-6,
        checkpointing_steps=1000,
    )
    return parser


def load_dataset(args: argparse.Namespace, resolution: int) -> CaptionDataset:
    """The data set that the arguments name.

    Raises:
        LayoutError, ImageInputError: it is missing or broken.
    """
    if args.data is not None:
        return GroundedCaptions(read_records(args.data), resolution)
    preset = active_preset()
    if args.toybox_scenes < 1:
        raise LayoutError(f"`toybox_scenes` must be at least 1, got {args.toybox_scenes}.")
    if resolution != preset.image_size:
        raise LayoutError(f"`resolution` must be {preset.image_size} with `toybox_scenes`, got {resolution}.")
    return ToyboxCaptions(preset, args.toybox_scenes, args.cache_dir or args.output_dir / "scenes")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = create_parser().parse_args(argv)
    loop_options(args)  # refuses bad numbers before anything is loaded
    loss_options = TokenComposeLossOptions(
        **{name: getattr(args, name) for name in TokenComposeLossOptions.__dataclass_fields__}
    )
    run = start_fine_tuning(args, "train_token_compose", argv)
    pipeline, unet = run.pipeline, run.pipeline.unet
    resolution = picture_side(pipeline, args.resolution)
    with run.accelerator.main_process_first():  # who renders or reads first fills the caches
        dataset = load_dataset(args, resolution)
    if isinstance(dataset, GroundedCaptions):
        texts = [record.caption for record in dataset.records]
        check_caption_lengths(pipeline.tokenizer, texts, args.on_missing, run.accelerator.is_main_process)
    encoder = CaptionEncoder(
        dataset,
        pipeline.tokenizer,
        pipeline.text_encoder,
        pipeline.vae,
        levels=len(unet.config.block_out_channels),
        mask_mode=args.mask_mode,
        on_missing=args.on_missing,
        cache=args.cache_dir,
    )
    losses = TokenComposeLosses(
        unet, run.scheduler, encoder, pipeline.vae.config.scaling_factor, loss_options, run.accelerator.autocast
    )
    finish_fine_tuning(
        run,
        losses,
        len(dataset),
        title="TokenCompose UNet",
        summary="A UNet that was fine-tuned with TokenCompose's token and pixel losses (arXiv 2312.03626).",
        data=f"{len(dataset)} grounded captions from {args.data.name if args.data else 'toybox scenes'}",
        data_digest=dataset.digest(),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_script(main))
