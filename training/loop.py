"""The training loop that the methods share: any number of processes, exact resume, one generator per sample.

Everything random in a step comes from generators that are seeded by the sample's place in the run (`Draw`). So a run
that was killed goes on bit for bit, and neither the size of a micro-batch nor the number of processes changes what is
drawn: two processes do what one does with twice the accumulation.

Gradients are averaged over processes after the backward passes, without a wrapper around the model: a pass that leaves
the model early (`run_until`), or trains parameters that a step does not touch, needs no special case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.optimization import SchedulerType, get_scheduler

from objectcompose.errors import CheckpointError, NonFiniteError, ObjectComposeError
from objectcompose.training.common import (
    CHECKPOINT_FOLDER,
    MIXED_PRECISIONS,
    Checkpointer,
    JsonlLogger,
    collect_state,
    create_ema,
    progress_bar,
    shuffled_batch,
)


LossDict = Mapping[str, torch.Tensor]
#: Those of diffusers that need nothing but the numbers of steps.
SCHEDULES = tuple(one.value for one in SchedulerType if one != SchedulerType.PIECEWISE_CONSTANT)
#: Gradients that are averaged over processes at once: each byte is there three times while that lasts.
REDUCED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Draw:
    """One sample of a step.

    Attributes:
        index: of the sample in the data set.
        generator: on the CPU, for all that is random about this sample in this step.
        step: the optimizer step, from 0, for losses that change during a run.
    """

    index: int
    generator: torch.Generator
    step: int = 0


@dataclass(frozen=True)
class LoopOptions:
    """What a run of the loop needs to know; see `add_loop_arguments` for defaults.

    Raises:
        ObjectComposeError: a number is out of range.
    """

    output_dir: Path
    max_train_steps: int
    train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    weight_decay: float = 1e-2
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    checkpointing_steps: int = 500
    validation_steps: int = 500
    seed: int = 0
    report_to: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "validation_steps",
        ):
            if getattr(self, name) < 1:
                raise ObjectComposeError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ObjectComposeError(f"`{name}` must be finite and above 0, got {getattr(self, name)}.")
        for name in ("adam_beta2", "ema_decay"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ObjectComposeError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name in ("weight_decay", "lr_warmup_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ObjectComposeError(f"`{name}` must be finite and at least 0, got {getattr(self, name)}.")
        if self.lr_scheduler not in SCHEDULES:
            raise ObjectComposeError(
                f"`lr_scheduler` must be one of {', '.join(SCHEDULES)}, got {self.lr_scheduler!r}."
            )
        if self.report_to not in (None, "tensorboard"):
            raise ObjectComposeError(f"`report_to` must be 'tensorboard' or nothing, got {self.report_to!r}.")
        if self.seed < 0:
            raise ObjectComposeError(f"`seed` must be at least 0, got {self.seed}.")


def add_loop_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Enter the loop's options into a parser; `defaults` are the method's own."""
    group = parser.add_argument_group("training loop")
    known: dict[str, tuple[Any, Any, str]] = {
        "output_dir": (Path, Path("outputs/training"), "checkpoints, log, validation pictures and the result"),
        "max_train_steps": (int, 1000, "optimizer steps"),
        "train_batch_size": (int, 1, "samples of a micro-batch, per process"),
        "gradient_accumulation_steps": (int, 1, "micro-batches of a step"),
        "learning_rate": (float, 1e-5, "of AdamW, as it is: nothing multiplies it"),
        "lr_scheduler": (str, "constant", f"a schedule of diffusers: {', '.join(SCHEDULES)}"),
        "lr_warmup_steps": (int, 0, "steps of warm-up, where the schedule has one"),
        "weight_decay": (float, 1e-2, "of AdamW"),
        "adam_beta2": (float, 0.999, "second moment's decay of AdamW"),
        "max_grad_norm": (float, 1.0, "gradients are clipped to this norm"),
        "ema_decay": (float, None, "export an exponential moving average of the weights"),
        "checkpointing_steps": (int, 500, "steps between checkpoints; the newest two are kept"),
        "validation_steps": (int, 500, "steps between validation pictures"),
        "seed": (int, 0, "of data order, noise and timesteps"),
        "report_to": (str, None, "'tensorboard' writes there too"),
    }
    for name, (kind, default, text) in known.items():
        group.add_argument(f"--{name}", type=kind, default=defaults.pop(name, default), help=text)
    if defaults:
        raise TypeError(f"unknown options of the loop: {sorted(defaults)}")
    group.add_argument("--mixed_precision", choices=MIXED_PRECISIONS, help="losses stay in fp32; none: accelerate's")


def loop_options(args: argparse.Namespace) -> LoopOptions:
    """The loop's options among parsed arguments."""
    return LoopOptions(**{name: getattr(args, name) for name in LoopOptions.__dataclass_fields__})


def draws_of_batch(
    step: int, micro_step: int, options: LoopOptions, dataset_size: int, rank: int = 0, world: int = 1
) -> list[Draw]:
    """The samples of one process in one micro-batch.

    Args:
        step: optimizer step, from 0.
        micro_step: in [0, gradient_accumulation_steps).
        options: of the loop.
        dataset_size: samples in the data set.
        rank: of the process, in [0, world).
        world: number of processes.
    """
    size = options.train_batch_size
    per_step = size * world * options.gradient_accumulation_steps
    order = shuffled_batch(step, dataset_size, per_step, options.seed)
    first = (micro_step * world + rank) * size
    draws = []
    for place in range(first, first + size):
        mixed = np.random.SeedSequence([options.seed, step, place, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        draws.append(Draw(int(order[place]), torch.Generator().manual_seed(int(mixed)), step))
    return draws


def draw_noise(
    draws: Sequence[Draw], shape: Sequence[int], timesteps: range, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is random about the latents of a batch, each row from its own draw.

    Args:
        draws: of the batch.
        shape: (C, h, w).
        timesteps: to draw from, uniformly.
        device: of the results.

    Returns:
        Two standard normal tensors (B, C, h, w), and timesteps (B,).
    """
    normal, steps = [], []
    for draw in draws:
        normal.append(torch.randn(2, *shape, generator=draw.generator))
        steps.append(torch.randint(timesteps.start, timesteps.stop, (), generator=draw.generator))
    first, second = torch.stack(normal, dim=1).to(device)
    return first, second, torch.stack(steps).to(device)


def check_loss_weights(**weights: float) -> None:
    """Raise `ObjectComposeError` unless weights of losses are finite, at least 0, and one of them is above 0."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ObjectComposeError(f"`{name}` must be finite and at least 0, got {weight}.")
    if not any(weights.values()):
        raise ObjectComposeError(f"one of {', '.join(f'`{name}`' for name in weights)} must be above 0.")


class NamedParameters:
    """Trained parameters under their names, with the `state_dict` that a checkpoint needs."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.parameters = dict(parameters)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name to tensor."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy values in.

        Raises:
            ValueError: names or shapes are others.
        """
        if set(state) != set(self.parameters):
            raise ValueError(f"it trains {len(self.parameters)} parameters, the state has {len(state)} or other ones")
        for name, parameter in self.parameters.items():
            if parameter.shape != state[name].shape:
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}, the state {tuple(state[name].shape)}")
            parameter.copy_(state[name])


def run_loop(
    accelerator: Accelerator,
    parameters: Mapping[str, torch.nn.Parameter],
    losses_of_batch: Callable[[Sequence[Draw]], AbstractContextManager[LossDict]],
    dataset_size: int,
    options: LoopOptions,
    validate: Callable[[int], None] | None = None,
) -> int:
    """Train until `options.max_train_steps`, going on from the newest checkpoint in the output folder.

    Args:
        accelerator: of `start_training`.
        parameters: what is trained, in fp32, by name; the same in all processes afterwards. With `ema_decay` they
            hold the average at the end.
        losses_of_batch: a context manager from the samples to losses, scalars that are means over these samples.
            "loss" is minimised, the others are logged. The backward pass runs inside the context, so that parts stay
            installed while checkpointed blocks are computed again.
        dataset_size: samples in the data set.
        options: of the loop.
        validate: called with the step every `validation_steps` and at the end, in the main process, with the averaged
            weights if there are any.

    Returns:
        Steps done before this call.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the checkpoints before it are there.
        CheckpointError: the newest checkpoint cannot be read, trains other parameters, or is beyond the last step.
    """
    trained = list(parameters.values())
    for parameter in trained:
        broadcast(parameter.data, from_process=0)
    adamw = torch.optim.AdamW(
        trained, lr=options.learning_rate, betas=(0.9, options.adam_beta2), weight_decay=options.weight_decay
    )
    schedule = get_scheduler(
        options.lr_scheduler,
        adamw,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )
    optimizer = accelerator.prepare(adamw)
    parts: dict[str, Any] = {"weights": NamedParameters(parameters), "optimizer": optimizer, "schedule": schedule}
    ema = None
    if options.ema_decay is not None:
        ema = parts["ema"] = create_ema(torch.nn.ParameterList(trained), options.ema_decay)
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    checkpoints = Checkpointer(options.output_dir / CHECKPOINT_FOLDER)
    start = max(checkpoints.steps(), default=0)
    if start > options.max_train_steps:
        raise CheckpointError(
            f"`max_train_steps` must be at least the {start} steps that {options.output_dir} has done, got"
            f" {options.max_train_steps}."
        )
    checkpoints.restore(**parts)
    if ema is not None:
        ema.to(accelerator.device)
    bar = progress_bar(options.max_train_steps, start, is_shown=accelerator.is_main_process)
    with _Log(accelerator, options, start) as log, bar:
        for step in range(start, options.max_train_steps):
            sums: dict[str, torch.Tensor] = {}
            for micro_step in range(options.gradient_accumulation_steps):
                draws = draws_of_batch(
                    step, micro_step, options, dataset_size, accelerator.process_index, accelerator.num_processes
                )
                with losses_of_batch(draws) as losses:
                    accelerator.backward(losses["loss"] / options.gradient_accumulation_steps)
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach().float()
            means = _mean_over_processes(accelerator, sums, options.gradient_accumulation_steps)
            _average_gradients(accelerator, trained)
            norm = accelerator.clip_grad_norm_(trained, options.max_grad_norm)
            _check_finite(accelerator, step, means["loss"], norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if ema is not None:
                ema.step(trained)
            done = step + 1
            bar.update()
            log.write(done, **means, grad_norm=norm, learning_rate=schedule.get_last_lr()[0])
            is_last = done == options.max_train_steps
            if (done % options.checkpointing_steps == 0 or is_last) and accelerator.is_main_process:
                checkpoints.save(done, collect_state(**parts))
            if validate is not None and (done % options.validation_steps == 0 or is_last):
                _validate(accelerator, validate, done, ema, trained)
    if ema is not None:
        ema.copy_to(trained)
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # it unscales the gradients of every optimizer that it knows, also of a loop before
    return start


def _mean_over_processes(accelerator: Accelerator, sums: Mapping[str, torch.Tensor], count: int) -> dict[str, float]:
    return {name: float(accelerator.reduce(value / count, "mean")) for name, value in sums.items()}


def _average_gradients(accelerator: Accelerator, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Reductions of several gradients each; which parameters have one is the same in all processes."""
    if accelerator.num_processes == 1:
        return
    for gradients in _chunks([parameter.grad for parameter in parameters if parameter.grad is not None]):
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive tensors of at most `REDUCED_BYTES` together; larger ones alone."""
    chunk: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if chunk and size + tensor.nbytes > REDUCED_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(tensor)
        size += tensor.nbytes
    if chunk:
        yield chunk


def _check_finite(accelerator: Accelerator, step: int, loss: float, norm: torch.Tensor) -> None:
    if not np.isfinite(loss):
        raise NonFiniteError(f"the loss of step {step} is {loss}; the weights are those of the step before.")
    # with a scaler (fp16) an overflow is expected now and then: that step is left out
    if accelerator.scaler is None and not torch.isfinite(norm):
        raise NonFiniteError(f"the gradient of step {step} has norm {float(norm)}; the weights are unchanged.")


def _validate(
    accelerator: Accelerator,
    validate: Callable[[int], None],
    step: int,
    ema: Any,
    trained: Sequence[torch.nn.Parameter],
) -> None:
    if accelerator.is_main_process:
        if ema is not None:
            ema.store(trained)
            ema.copy_to(trained)
        with torch.no_grad():
            validate(step)
        if ema is not None:
            ema.restore(trained)
    accelerator.wait_for_everyone()


class _Log:
    """The main process's log; the other processes write nothing."""

    def __init__(self, accelerator: Accelerator, options: LoopOptions, start: int) -> None:
        self._logger = None
        if accelerator.is_main_process:
            tensorboard = options.output_dir / "tensorboard" if options.report_to == "tensorboard" else None
            self._logger = JsonlLogger(options.output_dir / "log.jsonl", resume_step=start, tensorboard=tensorboard)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._logger is not None:
            self._logger.close()

    def write(self, step: int, **values: Any) -> None:
        """Numbers of one step."""
        if self._logger is not None:
            self._logger.log(step, **values)
