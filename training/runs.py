"""How training scripts start: one accelerator, one command for the card, a folder that is this run's own, one size."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from objectcompose.errors import ObjectComposeError
from objectcompose.pipelines.call_checks import check_count
from objectcompose.training.common import check_same_run, start_training


#: What may change from one start of a run to the next: it decides how long it is, or what is left of it, not a step.
FREE_OPTIONS = frozenset({
    "output_dir", "cache_dir", "max_train_steps", "checkpointing_steps", "validation_steps", "validation_prompts",
    "validation_scenes", "report_to", "gradient_checkpointing", "delta_rank", "base_license", "data_license",
    "weights_license",
})  # fmt: skip


@dataclass(frozen=True)
class TrainingRun:
    """A run that has begun.

    Attributes:
        accelerator: of the run.
        command: that starts it again.
        settings: all options that decide what a step does, as JSON values, and the script.
    """

    accelerator: Accelerator
    command: str
    settings: dict[str, Any]

    def claim(self, folder: Path, free: Collection[str] = ()) -> None:
        """Make a folder of checkpoints this run's own.

        Args:
            folder: of the run, or of a part of it.
            free: settings that this part does not depend on.

        Raises:
            CheckpointError: it has checkpoints of another run.
        """
        with self.accelerator.main_process_first():
            check_same_run(folder, {name: value for name, value in self.settings.items() if name not in free})


def start_run(args: argparse.Namespace, script: str, argv: Sequence[str] | None) -> TrainingRun:
    """Begin a run; nothing is loaded yet.

    Args:
        args: as parsed, with `seed` and `mixed_precision`.
        script: the module's name in `objectcompose.training`.
        argv: what was parsed; None: `sys.argv`.
    """
    settings = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}
    plain = {name: _plain(value) for name, value in settings.items()}
    command = f"python -m objectcompose.training.{script} {shlex.join(sys.argv[1:] if argv is None else argv)}"
    accelerator = start_training(seed=args.seed, mixed_precision=args.mixed_precision)
    return TrainingRun(accelerator, command, {"script": script, **plain})


def picture_side(pipeline: Any, resolution: int | None = None) -> int:
    """Side in pixels of the square pictures to train on: `resolution`, else the base's own (`default_size`).

    Raises:
        ObjectComposeError: `resolution` is below 1; or there is none, and the base's own size is not known or no
            square.
    """
    if resolution is not None:
        check_count("resolution", resolution)
        return resolution
    height, width = pipeline.default_size()
    if height != width:
        raise ObjectComposeError(
            f"`resolution` is needed where the base's own pictures are no squares: they are {height} x {width} pixels."
        )
    return int(height)


def _plain(value: Any) -> Any:
    """Paths as text, also in lists."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
