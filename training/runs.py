"""How training scripts start: one accelerator, one command for the card, a folder that is this run's own, one size."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from objectcompose.adapters.base_identity import identify_base
from objectcompose.errors import ObjectComposeError
from objectcompose.pipelines.call_checks import check_count
from objectcompose.training.common import check_same_run, start_training


#: What may change from one start of a run to the next: it decides how long it is, or what is left of it, not a step.
FREE_OPTIONS = frozenset({
    "output_dir", "cache_dir", "checkpointing_steps", "validation_steps", "validation_prompts", "validation_scenes",
    "report_to", "gradient_checkpointing", "delta_rank", "base_license", "data_license", "weights_license",
})  # fmt: skip
#: Schedules whose rates do not follow from `max_train_steps`, so that it is free with them, too.
OPEN_SCHEDULES = ("constant", "constant_with_warmup")


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

    def claim(self, folder: Path, unet: Any, data: str, free: Collection[str] = (), **found: Any) -> None:
        """Make a folder of checkpoints this run's own.

        Args:
            folder: of the run, or of a part of it.
            unet: the base's, before it is trained.
            data: digest of what is trained on.
            free: settings that this part does not depend on.
            found: further settings, as JSON values, that follow from several options.

        Raises:
            CheckpointError: it has checkpoints of another run.
        """
        if self.settings["lr_scheduler"] in OPEN_SCHEDULES:
            free = {*free, "max_train_steps"}
        kept = {name: value for name, value in self.settings.items() if name not in free}
        base = digest_of([str(identify_base(unet).fingerprint).encode()])
        with self.accelerator.main_process_first():
            check_same_run(folder, {**kept, "base_digest": base, "data_digest": data, **found})


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
    plain["mixed_precision"] = str(accelerator.mixed_precision)  # where no option said so
    return TrainingRun(accelerator, command, {"script": script, **plain})


def digest_of(content: Iterable[bytes | memoryview], files: Iterable[Path] = ()) -> str:
    """16 hex digits that name what a run depends on.

    Args:
        content: all that is small enough to be read again at each start.
        files: the rest, such as pictures: their names and sizes in bytes stand for them.
    """
    digest = hashlib.sha256()
    for part in content:
        digest.update(hashlib.sha256(part).digest())
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


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
