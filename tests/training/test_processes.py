"""The trainers by two processes on CPUs: they do what one does, and go on after one of the two was killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch

from objectcompose.evaluation.toybox_instance_scenes import ALIKE, toybox_instances
from objectcompose.toybox.categories import PRESETS
from objectcompose.training.common import Checkpointer, read_log
from tests.training import test_learn_mifo, test_locref_training, test_train_object_prompt, test_trainers
from tests.training.locref_data import write_base, write_coco


pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STEPS = 12


def write_scene(folder: Path) -> Path:
    """One picture with masks."""
    folder.mkdir()
    toybox_instances(PRESETS["cpu"], "dev", [ALIKE])[0].save(folder)
    return folder


@dataclass(frozen=True)
class Trainer:
    """A training script on tiny models.

    Attributes:
        write_data: into a folder; returns what `arguments` wants.
        arguments: from base, data, output folder and further arguments.
        parts: folders of the output folder that have checkpoints and a log, as they come in a run.
    """

    write_data: Callable
    arguments: Callable
    parts: tuple[str, ...] = ("",)


TRAINERS = {
    "train_token_compose": Trainer(test_trainers.write_captions, test_trainers.token_compose),
    "train_locref": Trainer(write_coco, test_locref_training.arguments),
    "train_object_prompt": Trainer(test_trainers.write_captions, test_train_object_prompt.arguments),
    "learn_mifo": Trainer(
        lambda folder: write_scene(folder / "scene"), test_learn_mifo.arguments, ("stage1", "stage2")
    ),
}


@dataclass(frozen=True)
class Run:
    """A trainer, its arguments without those of the output folder, and what two processes left unbroken."""

    script: str
    command: Callable
    unbroken: Path

    def parts(self, out: Path) -> list[Path]:
        return [out / part for part in TRAINERS[self.script].parts]


@pytest.fixture(scope="module", params=TRAINERS)
def run(request, tmp_path_factory) -> Run:
    trainer, folder = TRAINERS[request.param], tmp_path_factory.mktemp(request.param)
    base, data = write_base(folder / "base"), trainer.write_data(folder)

    def command(out: Path, *more: str) -> list[str]:
        steps = ["--max_train_steps", str(STEPS), "--checkpointing_steps", "2", "--gradient_accumulation_steps", "1"]
        steps += ["--stage2_steps", str(STEPS), "--max_train_steps", "4"] if request.param == "learn_mifo" else []
        return trainer.arguments(base, data, out, *steps, *more)

    made = Run(request.param, command, folder / "unbroken")
    finish(launched(made, made.unbroken))
    return made


def launched(run: Run, out: Path) -> list[str]:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*program, "-m", f"objectcompose.training.{run.script}", *run.command(out)]


def finish(command: list[str]) -> None:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-8000:]


def weights(part: Path) -> dict[str, torch.Tensor]:
    return Checkpointer(part / "checkpoints").latest()[1]["weights"]


def test_two_processes_equal_one_with_twice_the_accumulation(run, tmp_path):
    main = import_module(f"objectcompose.training.{run.script}").main
    assert main(run.command(tmp_path, "--gradient_accumulation_steps", "2")) == 0
    for one, two in zip(run.parts(tmp_path), run.parts(run.unbroken), strict=True):
        for line, other in zip(read_log(one / "log.jsonl"), read_log(two / "log.jsonl"), strict=True):
            assert line == pytest.approx(other, rel=1e-5, abs=1e-7)
        first, second = weights(one), weights(two)
        assert first.keys() == second.keys()
        # AdamW makes steps of rounding where a gradient is 0 but for it, as a bias before a softmax has it
        assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def test_one_of_two_killed_and_resumed_equals_unbroken(run, tmp_path):
    *done, killed = run.parts(tmp_path)
    step = random.randrange(3, 7)
    print(f"killed at step {step}")
    test_trainers.run_until_step(launched(run, tmp_path), killed, step, ENVIRONMENT, only_one_worker=True)
    assert 0 < Checkpointer(killed / "checkpoints").steps()[-1] < STEPS
    finish(launched(run, tmp_path))
    for part, unbroken in zip([*done, killed], run.parts(run.unbroken), strict=True):
        first, second = weights(part), weights(unbroken)
        assert all(torch.equal(first[name], second[name]) for name in second)
        assert read_log(part / "log.jsonl") == read_log(unbroken / "log.jsonl")
