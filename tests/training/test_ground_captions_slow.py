"""`objectcompose ground-captions` for real: killed and resumed, by two processes, read by `datasets`, trained on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from objectcompose.__main__ import main
from objectcompose.toybox.weights import active_preset, toybox_path
from objectcompose.training import train_token_compose
from objectcompose.training.common import read_log
from objectcompose.training.grounded_captions import read_records
from tests.training.ground_captions_helpers import content_of, read_report, write_scenes


pytestmark = pytest.mark.slow
COUNT = 48


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, COUNT)
    (folder / "00003.txt").write_text("running quickly")
    (folder / "00020.png").write_bytes((folder / "00020.png").read_bytes()[:100])
    return folder


def arguments(scenes: Path, out: Path) -> list[str]:
    """Toybox's own CLIPSeg; a batch is no divisor of any process's share."""
    return ["ground-captions", str(scenes), "--out", str(out), "--device", "cpu", "--no-cache", "--batch-size", "5"]


@pytest.fixture(scope="module")
def unbroken(scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert main(arguments(scenes, out)) == 1  # one picture cannot be read
    assert len(read_records(out)) == COUNT - 2
    return out


def test_killed_and_resumed_equals_unbroken(scenes, unbroken, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "objectcompose", *arguments(scenes, out)]
    for wanted in (7, 23):  # killed twice
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(20_000):
                if len(list(out.glob("records/*.json"))) >= wanted:
                    break
                assert process.poll() is None, "it ended by itself"
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert wanted <= len(list(out.glob("records/*.json"))) < COUNT
        assert not (out / "coco_gsam_img/train/metadata.jsonl").exists()
    assert main(arguments(scenes, out)) == 1
    assert content_of(out) == content_of(unbroken)


def test_two_processes_equal_one(scenes, unbroken, tmp_path):
    out = tmp_path / "out"
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # the picture that cannot be read makes the exit code 1, which the launcher would call a failure
    whole = tmp_path / "scenes"
    whole.mkdir()
    for path in scenes.iterdir():
        if path.stem != "00020":
            (whole / path.name).write_bytes(path.read_bytes())
    done = subprocess.run(
        [*program, "-m", "objectcompose", *arguments(whole, out)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"of {COUNT - 1} pictures") == 1
    alone = tmp_path / "alone"
    assert main(arguments(whole, alone)) == 0
    assert content_of(out) == content_of(alone)


@pytest.mark.parametrize("folder", ["coco_gsam_img", "coco_gsam_img/train"])
def test_datasets_reads_it(unbroken, tmp_path, folder):
    from datasets import load_dataset

    rows = load_dataset("imagefolder", data_dir=str(unbroken / folder), cache_dir=str(tmp_path), split="train")
    records = {record.image.name: record for record in read_records(unbroken)}
    assert len(rows) == len(records) == COUNT - 2
    found = {Path(image["path"]).name: row for image, row in zip(plain_images(rows), rows, strict=True)}
    assert found.keys() == records.keys()
    for name, row in found.items():
        nouns = [(noun, None if path is None else Path(path).name) for noun, path in row["attn_list"]]
        assert nouns == [(noun, None if path is None else path.name) for noun, path in records[name].nouns]
        assert row["text"] == records[name].caption and row["image"].size == (64, 64)


def plain_images(rows):
    from datasets import Image

    return rows.cast_column("image", Image(decode=False))["image"]


def test_pictures_to_trained_weights(unbroken, tmp_path):
    """The chain: the command's folder, two steps of the trainer, weights that load."""
    base, out = toybox_path("base"), tmp_path / "trained"
    command = ["--pretrained_model", str(base), "--data", str(unbroken), "--output_dir", str(out)]
    command += ["--max_train_steps", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-4"]
    assert train_token_compose.main(command) == 0
    lines = read_log(out / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and all(line["token"] > 0 < line["pixel"] for line in lines)
    trained = UNet2DConditionModel.from_pretrained(out / "weights", subfolder="unet").state_dict()
    plain = UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict()
    assert trained.keys() == plain.keys()
    assert any(not torch.equal(trained[name].float(), plain[name].float()) for name in plain)


def test_toybox_clipseg_finds_most_nouns(unbroken):
    report = read_report(unbroken)
    assert report["nouns"]["share_with_mask"] > 0.8
    assert set(active_preset().categories) >= {one["noun"] for one in report["nouns_without_mask"]}
