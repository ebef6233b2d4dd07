"""What the scripts that train an adapter share: the frozen base, the adapter, pictures on the way, what is left."""

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

from objectcompose.adapters.folders import folder_saved_whole
from objectcompose.adapters.model_card import ModelCardFacts, write_model_card
from objectcompose.errors import ObjectComposeError
from objectcompose.files import write_png
from objectcompose.pipelines.adapter_loading import adapter_class_of
from objectcompose.pipelines.generate import load_checkpoint
from objectcompose.pipelines.reference_images import encoder_side
from objectcompose.training.common import start_training
from objectcompose.training.export import add_card_arguments, card_of_run
from objectcompose.training.loop import Draw, LossDict, add_loop_arguments, loop_options, run_loop


EXPORT_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class AdapterTraining:
    """A run that is set up.

    Attributes:
        args: as parsed.
        accelerator: of the run.
        pipeline: the method's, on the base, frozen and in float32; `pipeline.adapter` is the adapter in training.
        adapter: in training, in float32.
        parameters: what is trained, by name.
        scheduler: adds noise as the base was trained with it.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    pipeline: Any
    adapter: Any
    parameters: dict[str, torch.nn.Parameter]
    scheduler: DDPMScheduler


def add_adapter_arguments(parser: argparse.ArgumentParser, **loop: Any) -> None:
    """Enter the common options; `loop` are the method's own defaults of the loop."""
    parser.add_argument("--pretrained_model", default=None, help="folder or Hub id of the base; none: toybox")
    parser.add_argument("--image_encoder", default=None, help="folder or Hub id; none: the base's own, or toybox's")
    parser.add_argument("--ip_adapter", type=Path, default=None, help="start from this file of IP-Adapter weights")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time, same result")
    parser.add_argument("--cache_dir", type=Path, default=None, help="keep encoded samples here; changes no result")
    parser.add_argument("--validation_scenes", type=int, default=0, help="scenes to paint while training")
    add_loop_arguments(parser, **loop)
    add_card_arguments(parser)
    parser.add_argument("--export_dtype", choices=tuple(EXPORT_DTYPES), default="float32", help="of the result")


def start_adapter_training(args: argparse.Namespace, pipeline: str, **choices: Any) -> AdapterTraining:
    """Load and freeze the base, and make the adapter that is trained.

    Args:
        args: parsed options of `add_adapter_arguments`.
        pipeline: name of the method in `objectcompose.pipelines.generate.PIPELINES`.
        choices: arguments of the adapter's `from_unet`, where it does not start from an IP-Adapter.

    Raises:
        CheckpointError: base, image encoder or IP-Adapter cannot be loaded, or do not belong together.
        ObjectComposeError: an option is out of range, or `choices` cannot be had with an IP-Adapter.
    """
    if args.validation_scenes < 0:
        raise ObjectComposeError(f"`validation_scenes` must be at least 0, got {args.validation_scenes}.")
    if args.ip_adapter is not None and choices:
        raise ObjectComposeError(
            f"`ip_adapter` brings its own {', '.join(sorted(choices))}, which must be left out with it."
        )
    accelerator = start_training(seed=args.seed, mixed_precision=args.mixed_precision)
    loaded = load_checkpoint(
        args.pretrained_model, str(accelerator.device), pipeline, image_encoder=args.image_encoder
    )
    encoder_side(loaded.image_encoder)  # refuses a base without one
    for frozen in (loaded.unet, loaded.vae, loaded.text_encoder, loaded.image_encoder):
        frozen.requires_grad_(False).float().eval()
    if args.gradient_checkpointing:
        loaded.unet.enable_gradient_checkpointing()
    adapter_class, base_model = adapter_class_of(type(loaded)), args.pretrained_model or "toybox-1"
    if args.ip_adapter is not None:
        adapter = adapter_class.from_ip_adapter(args.ip_adapter, loaded.unet, base_model)
    else:
        adapter = adapter_class.from_unet(loaded.unet, base_model, image_encoder=loaded.image_encoder, **choices)
    adapter = adapter.to(accelerator.device, torch.float32).train()
    loaded.register_modules(adapter=adapter)
    parameters = dict(adapter.named_parameters())
    scheduler = DDPMScheduler.from_config(loaded.scheduler.config)
    return AdapterTraining(args, accelerator, loaded, adapter, parameters, scheduler)


def finish_adapter_training(
    run: AdapterTraining,
    losses_of_batch: Callable[[Sequence[Draw]], AbstractContextManager[LossDict]],
    dataset_size: int,
    scenes: Sequence[tuple[str, Sequence[Any]]],
    title: str,
    summary: str,
    data: str,
) -> None:
    """Train, then write adapter and card into the output folder's `weights`.

    Args:
        run: of `start_adapter_training`.
        losses_of_batch, dataset_size: see `run_loop`.
        scenes: prompts and objects, painted while training; may be none.
        title, summary, data: of the card.
    """
    args = run.args
    paint = _scene_painter(run.pipeline, scenes, args.output_dir / "validation")
    run_loop(run.accelerator, run.parameters, losses_of_batch, dataset_size, loop_options(args), paint)
    if run.accelerator.is_main_process:
        card = card_of_run(args, title, summary, data, base_model=args.pretrained_model or "toybox-1")
        folder = export_adapter(args.output_dir / "weights", run.adapter, card, EXPORT_DTYPES[args.export_dtype])
        print(f"adapter after {args.max_train_steps} steps: {folder}")


def export_adapter(folder: Path, adapter: Any, card: ModelCardFacts, dtype: torch.dtype) -> Path:
    """Write an adapter and its card; the folder is whole or does not load.

    Raises:
        CheckpointFileError: it cannot be written.
    """
    with folder_saved_whole(folder, adapter.config_name) as target:
        adapter.to(dtype).save_pretrained(target)
        write_model_card(target, card)
    return folder


def _scene_painter(
    pipeline: Any, scenes: Sequence[tuple[str, Sequence[Any]]], folder: Path
) -> Callable[[int], None] | None:
    """Writes one sheet of pictures per validation, always from the same noise; None without scenes."""
    if not scenes:
        return None
    pipeline.set_progress_bar_config(disable=True)

    def paint(step: int) -> None:
        was_training = pipeline.adapter.training
        pipeline.adapter.eval()
        images = pipeline(
            [prompt for prompt, _ in scenes],
            objects=[list(objects) for _, objects in scenes],
            num_inference_steps=20,
            generator=[torch.Generator().manual_seed(number) for number in range(len(scenes))],
        ).images
        pipeline.adapter.train(was_training)
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"step-{step:06d}.png", make_image_grid(images, 1, len(images)))

    return paint
