"""`objectcompose ground` by two processes, of which one is killed: going on gives what an unbroken run does."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from objectcompose.__main__ import main
from tests.grounding import helpers


pytestmark = pytest.mark.slow
COUNT = 40


def files(out: Path) -> dict[str, bytes]:
    """Everything written, without what a killed process had not yet put in its place."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def test_one_of_two_killed_and_resumed_equals_unbroken(tmp_path):
    model, photos, unbroken, out = (tmp_path / name for name in ("clipseg", "photos", "unbroken", "out"))
    for part in helpers.clipseg():
        part.save_pretrained(model)
    photos.mkdir()
    for number in range(COUNT):
        helpers.picture(number, 48, 48).save(photos / f"{number:02d}.png")
    # a picture alone in its batch: beside others its scores would be rounded otherwise
    common = ["--backend", "clipseg", "--model", str(model), "--threshold", "0.45", "--batch-size", "1"]
    command = ["ground", str(photos), "a dog", "a cup", *common, "--device", "cpu", "--no-cache", "--out"]
    assert main([*command, str(unbroken)]) == 0

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = [*launch, "-m", "objectcompose", *command, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(60_000):
            if len(list(out.glob("*/detections.json"))) >= 3:
                break
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.005)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        random.choice(workers).kill()
        assert process.wait(120) != 0  # the launcher ends the other one
    finally:
        process.kill()
        process.wait()
    left = {path: path.stat().st_mtime_ns for path in out.glob("*/detections.json")}
    assert 3 <= len(left) < COUNT and not (out / "index.json").exists()
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{COUNT} of {COUNT} pictures done" in done.stdout
    assert all(path.stat().st_mtime_ns == written for path, written in left.items())  # nothing is done twice
    assert len(json.loads((out / "index.json").read_text())["pictures"]) == COUNT
    assert files(out) == files(unbroken)
