"""The shared loop: draws that depend on the place in the run alone, resume, accumulation, NaN."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from objectcompose.errors import CheckpointError, NonFiniteError, ObjectComposeError
from objectcompose.training import loop
from objectcompose.training.common import Checkpointer, read_log
from objectcompose.training.loop import SCHEDULES, LoopOptions, draws_of_batch, run_loop


DATA = torch.randn(10, 3, generator=torch.Generator().manual_seed(7))


def options(folder: Path, **changes) -> LoopOptions:
    base = LoopOptions(
        folder, max_train_steps=6, train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.05
    )
    return replace(base, **{"checkpointing_steps": 2, "validation_steps": 3, "ema_decay": 0.9, **changes})


def train(
    chosen: LoopOptions, stop_at: int | None = None, poison_at: int | None = None, validate=None
) -> torch.Tensor:
    """A noisy regression; returns the trained weight."""
    weight = torch.nn.Parameter(torch.ones(3))
    calls = 0

    @contextmanager
    def losses(draws):
        nonlocal calls
        step, calls = calls // chosen.gradient_accumulation_steps, calls + 1
        if step == stop_at:
            raise KeyboardInterrupt
        rows = torch.stack([DATA[draw.index] + torch.randn(3, generator=draw.generator) for draw in draws])
        loss = (rows @ weight).square().mean()
        if step == poison_at:
            loss = loss * float("nan")
        yield {"loss": loss, "size": weight.detach().norm()}

    watch = None if validate is None else lambda step: validate(step, weight.detach().clone())
    run_loop(Accelerator(cpu=True), {"weight": weight}, losses, len(DATA), chosen, watch)
    return weight.detach()


def test_draws_do_not_depend_on_how_a_step_is_cut(tmp_path):
    def drawn(batch_size: int, accumulation: int, world: int) -> list[tuple[int, float]]:
        chosen = options(tmp_path, train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
        return [
            (draw.index, float(torch.rand((), generator=draw.generator)))
            for micro_step in range(accumulation)
            for rank in range(world)
            for draw in draws_of_batch(3, micro_step, chosen, len(DATA), rank, world)
        ]

    assert drawn(1, 8, 1) == drawn(4, 2, 1) == drawn(8, 1, 1) == drawn(2, 2, 2)
    assert drawn(8, 1, 1) != [*reversed(drawn(8, 1, 1))]


def test_resumed_equals_unbroken(tmp_path):
    unbroken = train(options(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path / "b"), stop_at=3)
    torch.manual_seed(99)
    assert Checkpointer(tmp_path / "b" / "checkpoints").steps() == [2]
    # the second part counts its own steps from 0, so nothing stops it
    assert torch.equal(train(options(tmp_path / "b")), unbroken)
    lines = read_log(tmp_path / "b" / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines == read_log(tmp_path / "a" / "log.jsonl")


def test_what_is_loaded_stays_on_the_cpu_and_goes_when_it_is_in_place(tmp_path, monkeypatch):
    chosen = options(tmp_path / "a", ema_decay=None)
    unbroken = train(chosen)
    broken = replace(chosen, output_dir=tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        train(broken, stop_at=3)
    loaded, latest = [], Checkpointer.latest

    def watched(self):
        step, state = latest(self)
        loaded.append(weakref.ref(state["weights"]["weight"]))
        assert {state["rng"]["torch"].device.type, state["weights"]["weight"].device.type} == {"cpu"}
        return step, state

    monkeypatch.setattr(Checkpointer, "latest", watched)
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))  # stands for a GPU: no value survives there
    alive: list[bool] = []
    weight = train(broken, validate=lambda *_: alive.append(loaded[0]() is not None))
    assert torch.equal(weight, unbroken) and alive and not any(alive)


def test_a_second_loop_unscales_gradients_once(tmp_path, monkeypatch):
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))

    @contextmanager
    def losses(draws):
        yield {"loss": (first * second).sum()}

    def run(accelerator: Accelerator, names: str) -> float:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # what fp16 has on a GPU
        accelerator.native_amp = True
        second.requires_grad_("b" in names)
        chosen = options(tmp_path / names, max_train_steps=1, learning_rate=1e-9)
        run_loop(accelerator, {name: {"a": first, "b": second}[name] for name in names}, losses, 1, chosen)
        return read_log(tmp_path / names / "log.jsonl")[0]["grad_norm"]

    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    accelerator = Accelerator(cpu=True)
    assert run(accelerator, "a") == pytest.approx(3**0.5)
    assert run(accelerator, "ab") == pytest.approx(6**0.5)


def test_gradients_are_averaged_in_chunks(monkeypatch):
    sizes, values = [], torch.arange(20.0)

    def reduce(self, tensor, kind):  # two processes whose gradients are alike but for a factor of 3
        sizes.append(tensor.nbytes)
        return (tensor + 3 * tensor) / 2

    monkeypatch.setattr(loop, "REDUCED_BYTES", 40)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "reduce", reduce)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2, 2), (1,), (11,), (1,))]
    parameters.append(torch.nn.Parameter(torch.zeros(9)))  # takes no part in the step
    for parameter, part in zip(parameters, values.split([3, 4, 1, 11, 1]), strict=False):
        parameter.grad = part.view_as(parameter).clone()
    loop._average_gradients(Accelerator(cpu=True), parameters)
    assert sizes == [32, 44, 4] and parameters[-1].grad is None
    assert torch.equal(torch.cat([parameter.grad.flatten() for parameter in parameters[:-1]]), 2 * values)


def test_batch_equals_accumulated_singles(tmp_path):
    whole = train(options(tmp_path / "a", train_batch_size=4, gradient_accumulation_steps=1))
    singles = train(options(tmp_path / "b", train_batch_size=1, gradient_accumulation_steps=4))
    torch.testing.assert_close(whole, singles, rtol=1e-5, atol=1e-6)


def test_finished_run_trains_no_further(tmp_path):
    first = train(options(tmp_path))
    assert torch.equal(train(options(tmp_path), stop_at=0), first)


def test_validation_sees_the_average_and_changes_nothing(tmp_path):
    seen: dict[int, torch.Tensor] = {}
    plain = train(options(tmp_path / "a"))
    assert torch.equal(train(options(tmp_path / "b"), validate=seen.__setitem__), plain)
    assert list(seen) == [3, 6] and torch.equal(seen[6], plain)  # the average is what is left at the end
    unaveraged = train(options(tmp_path / "c", ema_decay=None))
    assert not torch.equal(unaveraged, plain)
    assert torch.equal(Checkpointer(tmp_path / "b" / "checkpoints").latest()[1]["weights"]["weight"], unaveraged)


def test_nan_stops_before_the_weights(tmp_path):
    with pytest.raises(NonFiniteError, match="step 3"):
        train(options(tmp_path), poison_at=3)
    step, state = Checkpointer(tmp_path / "checkpoints").latest()
    assert step == 2 and state["weights"]["weight"].isfinite().all()


def test_checkpoint_of_another_run_is_refused(tmp_path):
    train(options(tmp_path))
    with pytest.raises(CheckpointError, match="state"):
        train(options(tmp_path, ema_decay=None, max_train_steps=9))


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    train(options(tmp_path))
    with pytest.raises(CheckpointError, match="`max_train_steps` must be at least the 6 steps .* got 5"):
        train(options(tmp_path, max_train_steps=5))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_runs(tmp_path, schedule):
    assert train(options(tmp_path, lr_scheduler=schedule, max_train_steps=2, lr_warmup_steps=1)).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_train_steps": 0}, {"train_batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")},
        {"seed": -1}, {"report_to": "paper"}, {"gradient_accumulation_steps": 0}, {"validation_steps": 0},
        {"ema_decay": 1.0}, {"weight_decay": float("nan")}, {"lr_warmup_steps": -1},
        {"lr_scheduler": "piecewise_constant"},
    ],
)  # fmt: skip
def test_bad_options(tmp_path, changes):
    with pytest.raises(ObjectComposeError, match=next(iter(changes))):
        options(tmp_path, **changes)
