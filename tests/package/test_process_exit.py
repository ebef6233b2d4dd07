"""How a launched process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest


PROGRAM = """
import atexit, torch
atexit.register(lambda: print("group at exit:", torch.distributed.is_initialized()))  # runs last
from objectcompose.processes import process_state
from objectcompose.training.common import start_training
{start}
print("group before:", torch.distributed.is_initialized())
"""


@pytest.mark.parametrize("start", ["process_state('cpu')", "start_training(seed=0, cpu=True)"])
def test_process_leaves_its_group_before_the_interpreter_ends(tmp_path, start):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(start=start), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", str(program)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["group before: True", "group at exit: False"]
