"""What the scripts that train an adapter share: a frozen base, one adapter beside it, and what is left at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from diffusers import DDPMScheduler

from objectcompose.adapters.folders import folder_saved_whole
from objectcompose.adapters.model_card import write_model_card
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.pipelines.reference_images import encoder_side
from objectcompose.training.denoising import check_prediction_type
from objectcompose.training.export import add_card_arguments, card_of_run, loading_line
from objectcompose.training.loop import Draw, LossDict, add_loop_arguments, loop_options, run_loop
from objectcompose.training.runs import TrainingRun, start_run


@dataclass(frozen=True)
class AdapterTraining:
    """A run that is set up.

    Attributes:
        args: as parsed.
        run: that has begun.
        pipeline: the method's, with base, image encoder and adapter; only the adapter is in training, the rest is
            frozen, in float32.
        scheduler: adds noise as the base was trained with it.
    """

    args: argparse.Namespace
    run: TrainingRun
    pipeline: Any
    scheduler: DDPMScheduler

    @property
    def accelerator(self) -> Accelerator:
        """Of the run."""
        return self.run.accelerator


def add_adapter_arguments(parser: argparse.ArgumentParser, **loop: Any) -> None:
    """Enter the common options; `loop` are the method's own defaults."""
    parser.add_argument("--pretrained_model", default=None, help="folder or Hub id of the base; none: toybox")
    parser.add_argument(
        "--image_encoder", default=None, help="folder or Hub id of the CLIP vision model; none: base's"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time, same result")
    add_loop_arguments(parser, **loop)
    add_card_arguments(parser)


def start_adapter_training(
    args: argparse.Namespace,
    script: str,
    argv: Sequence[str] | None,
    method: str,
    make_adapter: Callable[[Any], Any],
) -> AdapterTraining:
    """Load the base and put a new adapter beside it.

    Args:
        args: as parsed.
        script: the module's name in `objectcompose.training`.
        argv: what was parsed; None: `sys.argv`.
        method: the pipeline's name, as `generate --pipeline` has it.
        make_adapter: from the pipeline to the adapter that is trained.

    Raises:
        CheckpointError: the base or the image encoder cannot be loaded, or there is none.
        ObjectComposeError: an option is out of range.
    """
    run = start_run(args, script, argv)
    device = run.accelerator.device
    pipeline = load_checkpoint(
        args.pretrained_model, str(device), method, image_encoder=args.image_encoder, option="--pretrained_model"
    )
    pipeline.register_modules(safety_checker=None)  # validation pictures are to be seen
    encoder_side(pipeline.image_encoder)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    check_prediction_type(scheduler)
    for frozen in (pipeline.vae, pipeline.text_encoder, pipeline.unet, pipeline.image_encoder):
        frozen.requires_grad_(False).float().eval()
    adapter = make_adapter(pipeline).to(device).float().train()
    pipeline.register_modules(adapter=adapter)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return AdapterTraining(args, run, pipeline, scheduler)


def finish_adapter_training(
    training: AdapterTraining,
    losses_of_batch: Callable[[Sequence[Draw]], AbstractContextManager[LossDict]],
    dataset_size: int,
    title: str,
    summary: str,
    data: str,
    data_digest: str,
    paint: Callable[[int], None] | None = None,
    **found: Any,
) -> None:
    """Train, then write adapter and card into the output folder's `weights`.

    Args:
        training: of `start_adapter_training`.
        losses_of_batch, dataset_size: see `run_loop`.
        title, summary, data: of the card.
        data_digest, found: see `TrainingRun.claim`.
        paint: makes the validation pictures of a step.

    Raises:
        CheckpointError: the output folder has checkpoints of another run.
    """
    args, adapter = training.args, training.pipeline.adapter
    training.run.claim(args.output_dir, training.pipeline.unet, data_digest, **found)
    run_loop(
        training.accelerator,
        dict(adapter.named_parameters()),
        losses_of_batch,
        dataset_size,
        loop_options(args),
        paint,
    )
    if training.accelerator.is_main_process:
        base = args.pretrained_model or "toybox-1"
        card = card_of_run(args, title, summary, data, base_model=base, command=training.run.command)
        with folder_saved_whole(args.output_dir / "weights", adapter.config_name) as folder:
            adapter.save_pretrained(folder)
            write_model_card(folder, card)
        print(f"adapter after {args.max_train_steps} steps: {args.output_dir / 'weights'}")
        print(f"to load it: {loading_line(args.output_dir / 'weights')}")
