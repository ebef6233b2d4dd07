"""Checkpoints, exact resume after SIGKILL, logs, data order, card."""

import argparse
import json
import random
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from objectcompose.errors import CheckpointError, MissingPackageError, ObjectComposeError
from objectcompose.processes import process_state
from objectcompose.training.common import (
    CHECKPOINT_FOLDER,
    Checkpointer,
    JsonlLogger,
    check_same_run,
    collect_state,
    create_ema,
    read_log,
    restore_rng,
    restore_state,
    rng_state,
    run_script,
    shuffled_batch,
    start_training,
)
from objectcompose.training.loop import add_loop_arguments
from objectcompose.training.runs import start_run
from objectcompose.training.trainable import select_trainable
from tests.tiny import tiny_unet


SCRIPT = '''
"""Trains three numbers; with a third argument, a sleep per step leaves time to be killed."""
import sys, time
from pathlib import Path
import torch
from objectcompose.training import common

folder, total, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
accelerator = common.start_training(seed=5, cpu=True)
model = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Dropout(0.3), torch.nn.Linear(7, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
ema = common.create_ema(model, 0.9)
model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
parts = {"model": accelerator.unwrap_model(model), "optimizer": optimizer, "schedule": schedule, "ema": ema}
checkpointer = common.Checkpointer(folder, keep=2)
found = checkpointer.latest()
start = 0
if found:
    start, state = found
    common.restore_state(state, **parts)
logger = common.JsonlLogger(folder / "log.jsonl", resume_step=start if found else None)
data = torch.arange(33.0).reshape(11, 3)
for step in range(start, total):
    inputs = data[common.shuffled_batch(step, 11, 4, seed=5)]
    loss = model(inputs + torch.randn(4, 3)).pow(2).mean()
    accelerator.backward(loss)
    optimizer.step(); schedule.step(); optimizer.zero_grad()
    ema.step(parts["model"].parameters())
    logger.log(step + 1, loss=loss)
    checkpointer.save(step + 1, common.collect_state(**parts))
    time.sleep(pause)
'''


def _run(script: Path, folder: Path, total: int, pause: float = 0.0) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-P", str(script), str(folder), str(total), str(pause)])


def _files(folder: Path) -> tuple[dict, dict]:
    step, state = Checkpointer(folder).latest()
    return step, state


def _assert_equal(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            _assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            _assert_equal(one, other)
    else:
        assert first == second


def test_killed_run_resumes_bit_for_bit(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    assert _run(script, tmp_path / "whole", 12).wait(120) == 0
    killed = _run(script, tmp_path / "killed", 12, pause=0.1)
    stop_after = random.randrange(1, 9)
    deadline = time.monotonic() + 120
    while (Checkpointer(tmp_path / "killed").steps() or [0])[-1] < stop_after:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert Checkpointer(tmp_path / "killed").steps()[-1] < 12
    assert _run(script, tmp_path / "killed", 12).wait(120) == 0
    _assert_equal(_files(tmp_path / "whole"), _files(tmp_path / "killed"))
    assert read_log(tmp_path / "whole" / "log.jsonl") == read_log(tmp_path / "killed" / "log.jsonl")


def test_checkpoints_are_kept_replaced_and_cleaned(tmp_path):
    checkpointer = Checkpointer(tmp_path / "run", keep=2)
    assert checkpointer.latest() is None and checkpointer.steps() == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".partial-left").mkdir()
    for step in (1, 2, 10):
        checkpointer.save(step, {"value": step})
    checkpointer.save(10, {"value": 11})
    assert checkpointer.steps() == [2, 10] and checkpointer.latest() == (10, {"value": 11})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000002", "step-00000010"]


def test_weights_are_safetensors_also_when_tied(tmp_path):
    shared = torch.ones(2, 3)
    folder = Checkpointer(tmp_path).save(3, {"model": {"a": shared, "b": shared}, "lr": 0.1, "empty": {}})
    assert load_file(folder / "model.safetensors").keys() == {"a", "b"}
    step, state = Checkpointer(tmp_path).latest()
    assert step == 3 and state["lr"] == 0.1 and state["empty"] == {} and torch.equal(state["model"]["b"], shared)


def test_failed_save_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"value": 1})
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpointer.save(2, {"value": 2})
    assert checkpointer.latest() == (1, {"value": 1})


def test_torn_and_unsafe_checkpoints_are_typed_errors(tmp_path):
    folder = Checkpointer(tmp_path).save(1, {"model": {"a": torch.ones(5)}, "value": 1})
    state = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(state[: len(state) // 2])
    with pytest.raises(CheckpointError, match="step-00000001"):
        Checkpointer(tmp_path).latest()
    torch.save({"value": Path("x")}, folder / "state.pt")
    with pytest.raises(CheckpointError, match="safe to load"):
        Checkpointer(tmp_path).latest()
    (folder / "state.pt").write_bytes(state)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpointer(tmp_path).latest()


def test_state_of_another_model_is_refused():
    state = collect_state(model=torch.nn.Linear(2, 3))
    with pytest.raises(CheckpointError, match="does not fit `model`"):
        restore_state(state, model=torch.nn.Linear(2, 5))
    with pytest.raises(CheckpointError, match="must hold"):
        restore_state(state, model=torch.nn.Linear(2, 3), ema=None)


def test_random_generators_come_back():
    start_training(seed=3, cpu=True)
    state = rng_state()
    first = (random.random(), np.random.rand(3).tolist(), torch.randn(3).tolist())
    restore_rng(state)
    assert first == (random.random(), np.random.rand(3).tolist(), torch.randn(3).tolist())


@pytest.fixture
def fresh_accelerate():
    """Accelerate as in a new process; it keeps what the first accelerator was made with."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_launcher_chooses_the_precision_where_the_script_does_not(fresh_accelerate, monkeypatch):
    script = argparse.ArgumentParser()
    add_loop_arguments(script)

    def precision(*more: str) -> str:
        AcceleratorState._reset_state()
        run = start_run(script.parse_args(["--output_dir", "out", *more]), "script", list(more))
        assert run.settings["mixed_precision"] == run.accelerator.mixed_precision
        return run.settings["mixed_precision"]

    assert precision() == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert precision() == "bf16" and precision("--mixed_precision", "no") == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ObjectComposeError, match="`mixed_precision` must be one of no, fp16, bf16, got 'fp8'"):
        precision()


@pytest.mark.parametrize("start", [lambda: start_training(seed=0, cpu=True), lambda: process_state("cpu")])
def test_processes_wait_for_one_another_for_hours(start, fresh_accelerate, monkeypatch):
    class Begun(Exception):
        pass

    def begin(*_, **settings):
        raise Begun(settings["timeout"])

    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for name, value in told.items():  # as a launcher does
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    with pytest.raises(Begun) as begun:
        start()
    assert begun.value.args[0] >= timedelta(hours=12)


def test_data_order_covers_each_epoch_once():
    indices = torch.cat([shuffled_batch(step, 11, 4, seed=2) for step in range(11)]).reshape(4, 11)
    for epoch in indices:
        assert sorted(epoch.tolist()) == list(range(11))
    assert len({tuple(epoch.tolist()) for epoch in indices}) == 4
    assert not torch.equal(shuffled_batch(0, 11, 11, seed=1), shuffled_batch(1, 11, 11, seed=0))


def test_ema_follows_the_parameters():
    model = torch.nn.Linear(2, 2)
    ema = create_ema(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(4.0)
    for _ in range(200):
        ema.step(model.parameters())
    assert torch.allclose(ema.shadow_params[0], model.weight, atol=1e-4)


def test_log_drops_what_was_written_after_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonlLogger(path) as logger:
        for step in (1, 2, 3):
            logger.log(step, loss=torch.tensor(step / 2))
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    with JsonlLogger(path, resume_step=2) as logger:
        logger.log(3, loss=9.0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: Checkpointer("x", keep=0), "keep"),
        (lambda: Checkpointer("x").save(-1, {}), "step"),
        (lambda: create_ema(torch.nn.Linear(1, 1), 1.0), "decay"),
        (lambda: shuffled_batch(0, 0, 1, 0), "dataset_size"),
        (lambda: start_training(seed=0, mixed_precision="fp16", cpu=True), "fp16"),
    ],
)
def test_bad_arguments_are_typed_errors(call, word):
    with pytest.raises(ObjectComposeError, match=word):
        call()


def test_a_folder_goes_on_with_its_own_run_only(tmp_path):
    check_same_run(tmp_path, {"script": "a", "rate": 1.0, "sizes": (1, 2)})
    check_same_run(tmp_path, {"script": "a", "rate": 2.0, "sizes": (1, 2)})  # nothing was trained yet
    Checkpointer(tmp_path / CHECKPOINT_FOLDER).save(3, {"x": torch.ones(1)})
    check_same_run(tmp_path, {"script": "a", "rate": 2.0, "sizes": (1, 2)})
    with pytest.raises(CheckpointError, match="rate is 2.0 there and 1.0 here; script is 'a' there and 'b' here"):
        check_same_run(tmp_path, {"script": "b", "rate": 1.0, "sizes": (1, 2)})
    with pytest.raises(CheckpointError, match="rate is 2.0 there and None here"):
        check_same_run(tmp_path, {"script": "a", "sizes": (1, 2)})
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(CheckpointError, match="run.json` cannot be read"):
        check_same_run(tmp_path, {"script": "a"})
    (tmp_path / "run.json").unlink()
    with pytest.raises(CheckpointError, match="has checkpoints, but no `run.json`.*Take another folder, or remove"):
        check_same_run(tmp_path, {"script": "a"})


def test_a_run_file_of_before_is_accepted_and_held_to_what_it_lacked(tmp_path):
    later = {"script": "a", "max_train_steps": 6, "base_digest": "b", "data_digest": "d"}
    check_same_run(tmp_path, {"script": "a"})
    Checkpointer(tmp_path / CHECKPOINT_FOLDER).save(3, {"x": torch.ones(1)})
    check_same_run(tmp_path, later)
    assert json.loads((tmp_path / "run.json").read_text()) == later
    for name, value in {"max_train_steps": 7, "data_digest": "e", "base_digest": "f"}.items():
        with pytest.raises(CheckpointError, match=f"{name} is .* there and {value!r} here"):
            check_same_run(tmp_path, later | {name: value})


def test_extras_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingPackageError, match="peft.*pip install"):
        select_trainable(tiny_unet(), "lora")
    with pytest.raises(MissingPackageError, match="tensorboard.*pip install"):
        JsonlLogger(tmp_path / "log.jsonl", tensorboard=tmp_path)


def test_scripts_say_bad_input_in_one_line(capsys):
    def refuse() -> int:
        raise CheckpointError("`base` is\nmissing.")

    assert run_script(refuse) == 2 and run_script(lambda: 0) == 0
    assert capsys.readouterr().err == "error: `base` is missing.\n"
