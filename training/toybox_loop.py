"""The loop that toybox's small models share: resumable, averaged, stopped by a step count or by the clock."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from objectcompose.command_help import script_parser
from objectcompose.toybox.categories import PRESETS, Preset
from objectcompose.training.common import (
    Checkpointer,
    JsonlLogger,
    check_same_run,
    collect_state,
    create_ema,
    progress_bar,
)


#: What may change from one start of a run to the next.
_FREE_TOYBOX_OPTIONS = {"weights", "runs", "minutes", "compile", "default_steps", "continue_weights"}


def toybox_parser(docstring: str, batch_size: int, steps: dict[str, int]) -> argparse.ArgumentParser:
    """The arguments that every toybox trainer takes.

    Args:
        docstring: of the script.
        batch_size: default batch size.
        steps: default number of steps of each preset.
    """
    parser = script_parser(docstring, shows_defaults=False)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="size of the world")
    parser.add_argument("--weights", type=Path, default=Path("examples/toybox"), help="where finished models lie")
    parser.add_argument("--runs", type=Path, default=Path("runs/toybox"), help="checkpoints, logs and caches")
    parser.add_argument("--steps", type=int, default=None, help=f"optimizer steps (default: {steps})")
    parser.add_argument(
        "--minutes", type=float, default=None, help="save and stop after this long; run again to go on"
    )
    parser.add_argument("--batch_size", type=int, default=batch_size, help="samples in a step")
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise and the order of the data")
    parser.add_argument("--compile", action="store_true", help="compile the models (a minute's start, then faster)")
    parser.set_defaults(default_steps=steps)
    return parser


def parse_toybox(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Preset, torch.device]:
    """Parsed arguments, the preset, and the device to train on; seeds torch."""
    args = parser.parse_args()
    args.steps = args.steps or args.default_steps[args.preset]
    args.runs = args.runs / args.preset
    torch.manual_seed(args.seed)
    return args, PRESETS[args.preset], torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    name: str,
    model: Any,
    loss_of_step: Callable[[int], torch.Tensor],
    args: argparse.Namespace,
    lr: float,
    ema_decay: float = 0.999,
    every: int = 250,
    begun: tuple[int, float] = (0, 0.0),
) -> tuple[Any, int]:
    """Train until `args.steps`, or for `args.minutes`, going on from the newest checkpoint.

    Args:
        name: of the run: names checkpoints and log.
        model: module whose parameters are trained, on its device.
        loss_of_step: from the step number (which fixes the batch) to a scalar loss.
        args: of `toybox_parser`.
        lr: peak learning rate; 3 % warm-up, then cosine to zero at `args.steps`.
        ema_decay: of the average that is returned.
        every: steps between checkpoints.
        begun: steps and seconds that the model was trained for before, where there is no checkpoint: the schedule goes
            on from there, with a new optimizer and average.

    Returns:
        A copy of the model with averaged weights, and the steps done.

    Raises:
        CheckpointError: the checkpoints are of a run with other options.
    """
    options = {key: value for key, value in vars(args).items() if key not in _FREE_TOYBOX_OPTIONS}
    check_same_run(args.runs / name, {"run": name, **options, "lr": lr, "ema_decay": ema_decay}, checkpoints="")
    start, seconds_before = begun
    # `initial_lr`: a schedule that starts late wants it
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "initial_lr": lr}], lr, (0.9, 0.99))
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=max(1, args.steps // 33),
        num_training_steps=args.steps,
        last_epoch=start - 1,
    )
    ema = create_ema(model, ema_decay)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    checkpoints, began = Checkpointer(args.runs / name), time.monotonic()
    device = next(model.parameters()).device
    resumed_step = checkpoints.restore(**parts)
    start = start if resumed_step is None else resumed_step
    ema.to(device)
    step = start
    log = JsonlLogger(args.runs / f"{name}.jsonl", resume_step=start)
    if resumed_step is None and start:
        log.log(start, seconds=seconds_before)
    with log, progress_bar(args.steps, start, name) as bar:
        while step < args.steps:
            loss = loss_of_step(step)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            ema.step(model.parameters())
            step += 1
            bar.update()
            if step % 50 == 0:
                log.log(step, loss=loss.item(), grad_norm=norm.item(), seconds=time.monotonic() - began)
            over = args.minutes is not None and time.monotonic() - began > 60 * args.minutes
            if step % every == 0 or step == args.steps or over:
                checkpoints.save(step, collect_state(**parts))
            if over:
                break
    averaged = copy.deepcopy(model)
    ema.copy_to(averaged.parameters())
    return averaged.eval(), step
