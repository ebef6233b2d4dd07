"""What all training scripts share: set-up, checkpoints that survive a kill, exact resume, logging. No loop.

A script that saves `collect_state(...)` with `Checkpointer` after a step and restores it continues bit for bit as if
it had never stopped: weights, optimizer, EMA, schedule and random number generators are in the state, and
`shuffled_batch` makes the order of the data a function of the step alone.
"""

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from objectcompose.checkout import checkout_state
from objectcompose.errors import CheckpointError, MissingPackageError, ObjectComposeError
from objectcompose.files import write_atomically
from objectcompose.processes import PROCESS_TIMEOUT, leave_group_at_exit


_STEP_PREFIX = "step-"
_PARTIAL_PREFIX = ".partial-"
_STATE_FILE = "state.pt"
MIXED_PRECISIONS = ("no", "fp16", "bf16")
CHECKPOINT_FOLDER, RUN_FILE = "checkpoints", "run.json"
#: Settings that older run files lack. There they count as equal, so that runs of that time go on; they are added then.
_LATER_SETTINGS = {"max_train_steps", "key_side_steps", "base_digest", "data_digest"}


def start_training(
    *, seed: int, mixed_precision: str | None = None, gradient_accumulation_steps: int = 1, cpu: bool = False
) -> Accelerator:
    """Accelerator with all random number generators seeded, each process with its own seed.

    Args:
        seed: non-negative; process i uses `seed + i`.
        mixed_precision: one of `MIXED_PRECISIONS`; None: what accelerate was launched with, else "no".
        gradient_accumulation_steps: micro-batches per optimizer step, at least 1.
        cpu: stay on the CPU even where a GPU is there.

    Raises:
        ObjectComposeError: another `mixed_precision`, or "fp16" on a CPU, whose losses would not be scaled.
    """
    mixed_precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision not in MIXED_PRECISIONS:
        raise ObjectComposeError(
            f"`mixed_precision` must be one of {', '.join(MIXED_PRECISIONS)}, got {mixed_precision!r}."
        )
    cpu = cpu or not torch.accelerator.is_available()  # said aloud, else processes on CPUs would not find one another
    if cpu and mixed_precision == "fp16":
        raise ObjectComposeError('`mixed_precision` "fp16" needs a GPU; on a CPU take "bf16" or "no".')
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        cpu=cpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
    )
    leave_group_at_exit()
    set_seed(seed, device_specific=True)
    return accelerator


def create_ema(model: torch.nn.Module, decay: float = 0.9999) -> EMAModel:
    """Exponential moving average of a model's parameters, warmed up so that early steps are not the random start.

    Args:
        model: its parameters are averaged; call `ema.step(model.parameters())` after each optimizer step.
        decay: in [0, 1).
    """
    if not 0.0 <= decay < 1.0:
        raise ObjectComposeError(f"`decay` must lie in [0, 1), got {decay}.")
    return EMAModel(model.parameters(), decay=decay, use_ema_warmup=True, inv_gamma=1.0, power=2 / 3)


def shuffled_batch(step: int, dataset_size: int, batch_size: int, seed: int) -> torch.Tensor:
    """Indices of the batch of one step: epochs of independent permutations, laid end to end.

    Args:
        step: from 0.
        dataset_size: items in the data set, at least 1.
        batch_size: items in a batch, at least 1; a batch may span two epochs.
        seed: seed of the permutations.

    Returns:
        int64 indices in [0, dataset_size), shape `(batch_size,)`: a function of the arguments alone, so resume needs
        nothing but the step.
    """
    if step < 0 or dataset_size < 1 or batch_size < 1:
        raise ObjectComposeError(
            "`step` must be at least 0 and `dataset_size` and `batch_size` at least 1, "
            f"got {step}, {dataset_size} and {batch_size}."
        )
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // dataset_size for position in positions}
    orders = {epoch: _epoch_order(epoch, dataset_size, seed) for epoch in epochs}
    return torch.stack([orders[position // dataset_size][position % dataset_size] for position in positions])


def _epoch_order(epoch: int, dataset_size: int, seed: int) -> torch.Tensor:
    # SeedSequence mixes both numbers, so that epoch 1 of seed 0 is not epoch 0 of seed 1
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.randperm(dataset_size, generator=torch.Generator().manual_seed(mixed))


def rng_state() -> dict[str, Any]:
    """State of the generators of Python, numpy and torch (CPU and every CUDA device)."""
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [str(numpy_name), torch.from_numpy(np.array(numpy_keys, dtype=np.int64)), *numpy_rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned; CUDA states only when there are as many devices as then."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def collect_state(**parts: Any) -> dict[str, Any]:
    """State of everything that changes while training: `collect_state(model=model, optimizer=optimizer, ema=ema)`.

    Args:
        parts: objects with `state_dict()`: models (unwrapped), optimizers, schedulers, EMA.

    Returns:
        One entry per part, and `rng`.
    """
    return {**{name: part.state_dict() for name, part in parts.items()}, "rng": rng_state()}


def restore_state(state: Mapping[str, Any], **parts: Any) -> None:
    """Load what `collect_state` returned, into the parts of the same names.

    Raises:
        CheckpointError: the state holds other parts, or a part of another shape.
    """
    if set(state) != {*parts, "rng"}:
        raise CheckpointError(f"`state` must hold {sorted([*parts, 'rng'])}, got {sorted(state)}.")
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"`state` does not fit `{name}`: {error}") from error
    restore_rng(state["rng"])


class Checkpointer:
    """Checkpoints of a run in `folder/step-<step>`, written whole or not at all.

    Flat dicts of tensors (a model's weights) become `<key>.safetensors`; everything else goes to `state.pt`, which is
    only ever read with `weights_only=True`, so it cannot run code.

    Args:
        folder: made when missing. Not for two runs at once.
        keep: newest checkpoints to keep, at least 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ObjectComposeError(f"`keep` must be at least 1, got {keep}.")
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = [
            path.name.removeprefix(_STEP_PREFIX) for path in self.folder.glob(f"{_STEP_PREFIX}*") if path.is_dir()
        ]
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then remove the oldest ones and what killed runs left behind.

        Args:
            step: finished optimizer steps, at least 0. A checkpoint of the same step is replaced.
            state: string keys; values tensors, numbers, strings, and lists, tuples and dicts of them.

        Returns:
            The checkpoint's folder.
        """
        if step < 0:
            raise ObjectComposeError(f"`step` must be at least 0, got {step}.")
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=self.folder))
        rest = {}
        for key, value in state.items():
            if _is_flat_tensors(value):
                # a copy of each, since safetensors refuses tensors that share memory (tied weights)
                save_file(
                    {name: part.detach().contiguous().clone() for name, part in value.items()},
                    partial / f"{key}.safetensors",
                )
            else:
                rest[key] = value
        torch.save(rest, partial / _STATE_FILE)
        for path in [*partial.iterdir(), partial]:
            _flush_to_disk(path)
        target = self.folder / f"{_STEP_PREFIX}{step:08d}"
        if target.exists():  # a folder cannot replace a full one in one go; the old one goes aside first
            os.replace(target, tempfile.mkdtemp(prefix=_PARTIAL_PREFIX, dir=self.folder))
        os.replace(partial, target)
        _flush_to_disk(self.folder)
        self._remove_old()
        return target

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint as `(step, state)`, all of it on the CPU, or None when there is none.

        Generators take their state from the CPU only, and what a part loads it copies to where it is.

        Raises:
            CheckpointError: it cannot be read; nothing older is taken in its place silently.
        """
        steps = self.steps()
        if not steps:
            return None
        folder = self.folder / f"{_STEP_PREFIX}{steps[-1]:08d}"
        try:
            state = torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
            for path in sorted(folder.glob("*.safetensors")):
                state[path.stem] = load_file(path)
        except (OSError, RuntimeError, EOFError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"`{folder}` cannot be read ({error}); remove it to go on from an older one."
            ) from error
        except Exception as error:  # unpickling errors have no common base
            raise CheckpointError(f"`{folder}` holds no state that is safe to load: {error}") from error
        return steps[-1], state

    def restore(self, **parts: Any) -> int | None:
        """Load the newest checkpoint into the parts that it was collected from, and keep nothing of it beside them.

        Returns:
            Its step, or None when there is none.

        Raises:
            CheckpointError: see `latest` and `restore_state`.
        """
        found = self.latest()
        if found is None:
            return None
        restore_state(found[1], **parts)
        return found[0]

    def _remove_old(self) -> None:
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"{_STEP_PREFIX}{step:08d}")
        for path in self.folder.glob(f"{_PARTIAL_PREFIX}*"):
            shutil.rmtree(path)


def _is_flat_tensors(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and isinstance(part, torch.Tensor) for name, part in value.items())


def _flush_to_disk(path: Path) -> None:
    if os.name == "nt":  # where folders cannot be opened, and files only be flushed by who writes them
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_same_run(folder: str | Path, settings: Mapping[str, Any], checkpoints: str = CHECKPOINT_FOLDER) -> None:
    """Write down in `folder/run.json` what a run is, or compare with the run whose checkpoints are there.

    Without it a command with other options, or of another method, would go on from checkpoints that are not its own.

    Args:
        folder: of the run; made when missing.
        settings: all that decides what a step does, as JSON values.
        checkpoints: where they are in the folder.

    Raises:
        CheckpointError: the folder has checkpoints of a run with other settings, which are named, or of one that is
            not known.
    """
    folder = Path(folder)
    path, mine = folder / RUN_FILE, json.loads(json.dumps(dict(settings)))
    if Checkpointer(folder / checkpoints).steps():
        if not path.is_file():
            raise CheckpointError(
                f"The folder {folder} has checkpoints, but no `{RUN_FILE}` that says of which run. Take another"
                " folder, or remove them."
            )
        try:
            theirs = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"`{path}` cannot be read: {error}.") from error
        theirs = {**{name: value for name, value in mine.items() if name in _LATER_SETTINGS}, **theirs}
        others = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
        if others:
            shown = "; ".join(f"{name} is {theirs.get(name)!r} there and {mine.get(name)!r} here" for name in others)
            raise CheckpointError(
                f"The folder {folder} has checkpoints of another run: {shown}. Take another folder, or remove it."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(mine, indent=2) + "\n").encode())


class JsonlLogger:
    """One JSON object per line and step, and the same numbers to TensorBoard when wanted.

    Args:
        path: the log file; appended to.
        resume_step: lines of later steps (written after the checkpoint that a run resumes from) and a torn last line
            are removed first. None: the log starts anew.
        tensorboard: folder for TensorBoard, which must be installed then; None for none.
    """

    def __init__(
        self, path: str | Path, resume_step: int | None = None, tensorboard: str | Path | None = None
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else [line for line in read_log(self.path) if line["step"] <= resume_step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._stream = self.path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter  # an extra: only who asks for it needs it
            except ImportError as error:
                raise MissingPackageError(
                    f'`report_to` "tensorboard" needs tensorboard: pip install "objectcompose[train]" ({error}).'
                ) from error
            self._writer = SummaryWriter(str(tensorboard))

    def log(self, step: int, **values: float) -> None:
        """Write the numbers of one step; tensors of one element are fine."""
        numbers = {name: float(value) for name, value in values.items()}
        self._stream.write(json.dumps({"step": step, **numbers}) + "\n")
        self._stream.flush()
        if self._writer is not None:
            for name, number in numbers.items():
                self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """Flush and close both outputs."""
        self._stream.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "JsonlLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a log; an incomplete last line, left by a killed run, is left out."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def current_commit() -> str:
    """The commit that is checked out, with "+" where tracked code differs from it; "unknown" outside a checkout."""
    commit, is_dirty = checkout_state("toybox", "training")
    return commit + ("+" if is_dirty and commit != "unknown" else "")


def run_script(main: Callable[[], int]) -> int:
    """Exit code of a training script: `main`'s own, or 2 for input that it cannot use, as one line on stderr."""
    try:
        return main()
    except ObjectComposeError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def progress_bar(total: int, start: int = 0, description: str = "training", is_shown: bool = True) -> tqdm:
    """Bar over optimizer steps that begins at the step that was resumed from; one line per 30 s without a terminal."""
    interval = 0.5 if os.isatty(2) else 30.0
    return tqdm(total=total, initial=start, desc=description, mininterval=interval, unit="step", disable=not is_shown)
