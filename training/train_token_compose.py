"""Fine-tune a text-to-image UNet with TokenCompose's losses on grounded captions (arXiv 2312.03626).

    accelerate launch -m objectcompose.training.train_token_compose \\
        --pretrained_model stable-diffusion-v1-5/stable-diffusion-v1-5 --data my_captions --output_dir outputs/tc
    python -m objectcompose.training.train_token_compose --toybox_scenes 4000 --output_dir outputs/tc    # embedded

The data's layout is in `objectcompose.training.grounded_captions`, the losses in `token_compose_losses`. Run the same
command again to go on after an interruption. The result is in the output folder's `weights`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.utils import make_image_grid

from objectcompose.adapters.base_identity import identify_base
from objectcompose.errors import LayoutError
from objectcompose.pipelines.generate import load_checkpoint
from objectcompose.toybox.weights import active_preset
from objectcompose.training.caption_encoding import MASK_MODES, CaptionEncoder
from objectcompose.training.common import start_training
from objectcompose.training.export import add_export_arguments, card_of_run, export_weights, values_before
from objectcompose.training.grounded_captions import CaptionDataset, GroundedCaptions, ToyboxCaptions, read_records
from objectcompose.training.loop import add_loop_arguments, loop_options, run_loop
from objectcompose.training.token_compose_losses import (
    SUPERVISED_LAYERS,
    TokenComposeLosses,
    TokenComposeLossOptions,
)
from objectcompose.training.trainable import select_trainable


def create_parser() -> argparse.ArgumentParser:
    """All options; the defaults are those of the authors' run on Stable Diffusion 1.4."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pretrained_model", default=None, help="folder or Hub id of the base; none: toybox")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="folder of grounded captions")
    data.add_argument("--toybox_scenes", type=int, help="train on so many scenes of the toybox instead")
    parser.add_argument("--resolution", type=int, default=None, help="side of the samples; none: the base's own")
    parser.add_argument("--cache_dir", type=Path, default=None, help="keep encoded samples here; changes no result")
    parser.add_argument("--mask_mode", choices=MASK_MODES, default="bilinear", help="masks on coarse grids")
    parser.add_argument("--on_missing", choices=("error", "skip"), default="error", help="a noun not in its caption")
    losses = parser.add_argument_group("losses")
    losses.add_argument("--ldm_weight", type=float, default=1.0, help="of the denoising loss")
    losses.add_argument("--token_weight", type=float, default=1e-3, help="lambda, of the token loss")
    losses.add_argument("--pixel_weight", type=float, default=5e-5, help="gamma, of the pixel loss")
    losses.add_argument("--head_mode", choices=("ratio_mean", "map_mean"), default="ratio_mean", help="see token_loss")
    losses.add_argument("--layers", default=SUPERVISED_LAYERS, help="supervised layers, a regex")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time, same result")
    parser.add_argument("--validation_prompts", nargs="*", default=[], help="painted while training")
    add_loop_arguments(
        parser, max_train_steps=24_000, gradient_accumulation_steps=4, learning_rate=5e-6, checkpointing_steps=1000
    )
    add_export_arguments(parser)
    parser.set_defaults(train_modules="unet")
    return parser


def load_dataset(args: argparse.Namespace, resolution: int) -> CaptionDataset:
    """The data set that the arguments name.

    Raises:
        LayoutError, ImageInputError: it is missing or broken.
    """
    if args.data is not None:
        return GroundedCaptions(read_records(args.data), resolution)
    preset = active_preset()
    if resolution != preset.image_size:
        raise LayoutError(f"`resolution` must be {preset.image_size} with `toybox_scenes`, got {resolution}.")
    return ToyboxCaptions(preset, args.toybox_scenes, args.cache_dir or args.output_dir / "scenes")


def painter(pipeline: Any, prompts: Sequence[str], folder: Path) -> Callable[[int], None] | None:
    """Writes one sheet of pictures per validation, always from the same noise; None without prompts."""
    if not prompts:
        return None
    pipeline.set_progress_bar_config(disable=True)

    def paint(step: int) -> None:
        was_training = pipeline.unet.training
        pipeline.unet.eval()
        generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
        images = pipeline(list(prompts), num_inference_steps=20, generator=generators).images
        pipeline.unet.train(was_training)
        folder.mkdir(parents=True, exist_ok=True)
        make_image_grid(images, 1, len(images)).save(folder / f"step-{step:06d}.png")

    return paint


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = create_parser().parse_args(argv)
    options = loop_options(args)
    loss_options = TokenComposeLossOptions(
        args.token_weight, args.pixel_weight, args.ldm_weight, args.head_mode, args.layers
    )
    accelerator = start_training(seed=args.seed, mixed_precision=args.mixed_precision)
    pipeline = load_checkpoint(args.pretrained_model, str(accelerator.device))
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    resolution = args.resolution or unet.config.sample_size * pipeline.vae_scale_factor
    with accelerator.main_process_first():  # who renders or reads first fills the caches
        dataset = load_dataset(args, resolution)
    for frozen in (vae, text_encoder):
        frozen.requires_grad_(False).float()
    made_for = identify_base(unet, args.pretrained_model)
    parameters = select_trainable(unet.train(), args.train_modules, args.lora_rank)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    before = values_before(parameters, args.train_modules, args.delta_rank)
    encoder = CaptionEncoder(
        dataset,
        pipeline.tokenizer,
        text_encoder,
        vae,
        levels=len(unet.config.block_out_channels),
        mask_mode=args.mask_mode,
        on_missing=args.on_missing,
        cache=args.cache_dir,
        identity=f"{args.pretrained_model} {made_for.fingerprint}",
    )
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    losses = TokenComposeLosses(
        unet, scheduler, encoder, vae.config.scaling_factor, loss_options, accelerator.autocast
    )
    paint = painter(pipeline, args.validation_prompts, args.output_dir / "validation")
    run_loop(accelerator, parameters, losses, len(dataset), options, paint)
    if accelerator.is_main_process:
        card = card_of_run(
            args,
            title="TokenCompose UNet",
            summary="A UNet that was fine-tuned with TokenCompose's token and pixel losses (arXiv 2312.03626).",
            data=f"{len(dataset)} grounded captions from {args.data.name if args.data else 'toybox scenes'}",
            base_model=args.pretrained_model or "toybox-1",
        )
        folder = export_weights(
            args.output_dir / "weights", unet, args.train_modules, before, made_for, card, args.delta_rank
        )
        print(f"weights after {options.max_train_steps} steps: {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
