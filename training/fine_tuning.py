"""What the scripts that fine-tune a UNet share: the base, what is trained of it, and what is left at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.utils import make_image_grid

from objectcompose.adapters.base_identity import BaseIdentity, identify_base
from objectcompose.files import write_png
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.training.export import (
    add_export_arguments,
    card_of_run,
    export_weights,
    loading_line,
    values_before,
)
from objectcompose.training.loop import Draw, LossDict, add_loop_arguments, loop_options, run_loop
from objectcompose.training.runs import TrainingRun, start_run
from objectcompose.training.trainable import TrainModules, select_trainable


@dataclass(frozen=True)
class FineTuning:
    """A run that is set up.

    Attributes:
        args: as parsed.
        run: that has begun.
        pipeline: the base; its UNet is in training, the rest is frozen, in float32.
        parameters: what is trained, by name.
        scheduler: adds noise as the base was trained with it.
        made_for: the base.
        before: values of the parameters before training, where the export needs them.
    """

    args: argparse.Namespace
    run: TrainingRun
    pipeline: Any
    parameters: dict[str, torch.nn.Parameter]
    scheduler: DDPMScheduler
    made_for: BaseIdentity
    before: dict[str, torch.Tensor] | None

    @property
    def accelerator(self) -> Accelerator:
        """Of the run."""
        return self.run.accelerator


def add_fine_tuning_arguments(parser: argparse.ArgumentParser, train_modules: TrainModules, **loop: Any) -> None:
    """Enter the common options; `train_modules` and `loop` are the method's own defaults."""
    parser.add_argument("--pretrained_model", default=None, help="folder or Hub id of the base; none: toybox")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time, same result")
    parser.add_argument("--validation_prompts", nargs="*", default=[], help="painted while training")
    add_loop_arguments(parser, **loop)
    add_export_arguments(parser)
    parser.set_defaults(train_modules=train_modules)


def start_fine_tuning(args: argparse.Namespace, script: str, argv: Sequence[str] | None) -> FineTuning:
    """Load the base and choose what is trained.

    Args:
        args: as parsed.
        script: the module's name in `objectcompose.training`.
        argv: what was parsed; None: `sys.argv`.

    Raises:
        CheckpointError: the base cannot be loaded.
        ObjectComposeError: an option is out of range.
    """
    run = start_run(args, script, argv)
    pipeline = load_checkpoint(args.pretrained_model, str(run.accelerator.device), option="--pretrained_model")
    pipeline.register_modules(safety_checker=None)  # validation pictures are to be seen
    for frozen in (pipeline.vae, pipeline.text_encoder):
        frozen.requires_grad_(False).float()
    made_for = identify_base(pipeline.unet, args.pretrained_model)
    parameters = select_trainable(pipeline.unet.train(), args.train_modules, args.lora_rank)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    before = values_before(parameters, args.train_modules, args.delta_rank)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return FineTuning(args, run, pipeline, parameters, scheduler, made_for, before)


def finish_fine_tuning(
    run: FineTuning,
    losses_of_batch: Callable[[Sequence[Draw]], AbstractContextManager[LossDict]],
    dataset_size: int,
    title: str,
    summary: str,
    data: str,
    data_digest: str,
) -> None:
    """Train, then write weights and card into the output folder's `weights`.

    Args:
        run: of `start_fine_tuning`.
        losses_of_batch, dataset_size: see `run_loop`.
        title, summary, data: of the card.
        data_digest: see `TrainingRun.claim`.

    Raises:
        CheckpointError: the output folder has checkpoints of another run.
    """
    args, unet = run.args, run.pipeline.unet
    run.run.claim(args.output_dir, unet, data_digest)
    paint = painter(run.pipeline, args.validation_prompts, args.output_dir / "validation")
    run_loop(run.accelerator, run.parameters, losses_of_batch, dataset_size, loop_options(args), paint)
    if run.accelerator.is_main_process:
        base = args.pretrained_model or "toybox-1"
        card = card_of_run(args, title, summary, data, base_model=base, command=run.run.command)
        folder = export_weights(
            args.output_dir / "weights", unet, args.train_modules, run.before, run.made_for, card, args.delta_rank
        )
        print(f"weights after {args.max_train_steps} steps: {folder}")
        print(f"to load them: {loading_line(folder)}")


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
        write_png(folder / f"step-{step:06d}.png", make_image_grid(images, 1, len(images)))

    return paint
