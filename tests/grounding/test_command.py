"""`objectcompose ground` on a tiny CLIPSeg: what it writes, what `generate` makes of it, folders, and bad input."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.__main__ import main
from objectcompose.grounding import command
from objectcompose.grounding.cache import CACHE_VARIABLE
from objectcompose.grounding.overlay import overlay_detections
from objectcompose.layout import load_layout
from objectcompose.toybox.weights import ENVIRONMENT_VARIABLE
from tests.grounding import helpers
from tests.pipelines.helpers import compose_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clipseg")
    for part in helpers.clipseg():
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, size in (("a.png", (48, 48)), ("a.jpg", (48, 48)), ("more/b.webp", (64, 40)), ("more/c.png", (48, 48))):
        helpers.picture(len(name) + ord(name[-1]), *size).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    return folder


def ground(model, source, out, *arguments):
    common = ["--backend", "clipseg", "--model", model, "--device", "cpu", "--threshold", "0.45", "--out", str(out)]
    return main(["ground", str(source), *arguments, *common])


def test_one_picture(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert ground(model, photos / "a.png", out, "a dog", "a wine glass", "--option", "min_area=0.05") == 0
    report = json.loads((out / "detections.json").read_text())
    assert {one["phrase"] for one in report["detections"]} == {"a dog", "a wine glass"} and report["missing"] == []
    assert capsys.readouterr().out.strip() == f"{len(report['detections'])} found: {out}"
    layout = load_layout(out / "layout.json")
    assert layout.prompt == "a photo of a dog and a wine glass"
    for obj in layout.objects:
        masks = [out / one["mask"] for one in report["detections"] if one["phrase"] == obj.phrase]
        union = np.max([np.asarray(Image.open(path)) for path in masks], axis=0)
        assert set(np.unique(union)) <= {0, 255} and np.array_equal(union > 0, obj.mask.numpy() > 0)
    assert Image.open(out / "overlay.png").size == (480, 480)


def test_generate_accepts_the_layout(model, photos, tmp_path):
    out = tmp_path / "out"
    assert ground(model, photos / "a.png", out, "a dog", "a cup", "--prompt", "a cup on a table with a dog") == 0
    checkpoint = tmp_path / "checkpoint"
    compose_pipeline().save_pretrained(checkpoint)
    made = tmp_path / "made.png"
    arguments = ["--layout", str(out / "layout.json"), "--model", str(checkpoint), "--steps", "2", "--device", "cpu"]
    assert main(["generate", *arguments, "--attention", "--out", str(made)]) == 0
    assert made.is_file() and (tmp_path / "made_attention_1.png").is_file()


def written(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_folder_resumes(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert ground(model, photos, out, "a dog", "--no-cache", "--batch-size", "3") == 0
    assert "4 of 4 pictures done" in capsys.readouterr().out
    index = json.loads((out / "index.json").read_text())["pictures"]
    assert [row["picture"] for row in index] == ["a.jpg", "a.png", "more/b.webp", "more/c.png"]
    assert all((out / row["picture"] / "layout.json").is_file() and row["found"] > 0 for row in index)
    before = written(out)
    (out / "a.jpg" / "detections.json").write_text("{")  # as a crash might leave it
    (out / "a.png" / "overlay.png").unlink()
    helpers.picture(99, 64, 40).save(photos / "more" / "b.webp")
    assert ground(model, photos, out, "a dog", "--no-cache") == 0
    after = written(out)
    done = {name for name in after if name != "index.json" and after[name] != before.get(name)}
    assert {str(Path(name).parts[:-1][0]) for name in done} == {"a.jpg", "a.png", "more"}
    assert not any(name.startswith("more/c.png") for name in done)
    assert ground(model, photos, out, "a dog", "--no-cache") == 0
    assert {name for name, time in written(out).items() if time != after[name]} == {"index.json"}


def test_other_phrases_leave_nothing_stale(model, photos, tmp_path):
    out = tmp_path / "out"
    for phrase in ("a dog", "a cup"):
        assert ground(model, photos / "a.png", out, phrase) == 0
    assert all("a_cup" in path.name for path in (out / "masks").iterdir())
    assert [obj.phrase for obj in load_layout(out / "layout.json").objects] == ["a cup"]


def test_cache_serves_other_output_folders(model, photos, tmp_path, cache, monkeypatch):
    assert ground(model, photos / "a.png", tmp_path / "one", "a dog") == 0
    assert len(list((cache / "grounding").rglob("*.safetensors"))) == 1
    monkeypatch.setattr(command.Grounder, "_detected", None)  # whoever asks the model now fails
    assert ground(model, photos / "a.png", tmp_path / "two", "a dog") == 0
    for name in ("detections.json", "layout.json", "overlay.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_unreadable_pictures_of_a_folder(model, photos, tmp_path, capsys):
    (photos / "broken.png").write_text("no picture")
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(photos / "deep.png")
    assert ground(model, photos, tmp_path / "out", "a dog") == 1
    shown = capsys.readouterr().out
    assert "broken.png" in shown and "I;16" in shown and "4 of 6 pictures done" in shown
    rows = json.loads((tmp_path / "out" / "index.json").read_text())["pictures"]
    assert [row["picture"] for row in rows if "error" in row] == ["broken.png", "deep.png"]


def test_phrase_without_hit(model, photos, tmp_path, capsys):
    nothing = ["--option", "min_area=1"]
    assert ground(model, photos / "a.png", tmp_path / "out", "a dog", *nothing) == 2
    assert "nothing was found for ['a dog']" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert ground(model, photos / "a.png", tmp_path / "out", "a dog", *nothing, "--on-missing", "skip") == 0
    assert load_layout(tmp_path / "out" / "layout.json").objects == ()
    assert ground(model, photos, tmp_path / "all", "a dog", *nothing) == 0  # a folder goes on
    rows = json.loads((tmp_path / "all" / "index.json").read_text())["pictures"]
    assert all(row["missing"] == ["a dog"] for row in rows)
    assert ground(model, photos, tmp_path / "all", "a dog", *nothing, "--on-missing", "error") == 2


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ("notes.txt", ["a dog"], "readable"),
        ("missing.png", ["a dog"], "readable"),
        ("a.png", [""], "visible character"),
        ("a.png", ["a dog", "A dog"], "twice"),
        ("a.png", ["a dog", "--prompt", "a cup"], "`prompt` must contain"),
        ("a.png", ["a dog", "--threshold", "2"], "`threshold`"),
        ("a.png", ["a dog", "--batch-size", "0"], "--batch-size"),
        ("a.png", ["a dog", "--option", "min_area"], "NAME=VALUE"),
        ("a.png", ["a dog", "--option", "size=3"], "min_area"),
        ("a.png", ["a dog", "--device", "tpu"], "`device`"),
        ("a.png", ["a dog", "--segmenter-model", "x"], "`segmenter` must be named"),
        ("a.png", [], "needs a segmenter"),
        ("more", ["a dog", "--model", "nowhere/"], "cannot be loaded|config.json"),
    ],
)
def test_bad_input_is_one_line(source, arguments, words, model, photos, tmp_path, capsys):
    (photos / "tiny.png").unlink(missing_ok=True)
    common = ["--backend", "clipseg", "--model", model, "--out", str(tmp_path / "out"), "--no-cache"]
    assert main(["ground", str(photos / source), *common, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("objectcompose ground: ") and any(word in error for word in words.split("|"))
    assert not (tmp_path / "out" / "detections.json").exists()


def test_folder_without_pictures(model, tmp_path, capsys):
    assert ground(model, tmp_path, tmp_path / "out", "a dog") == 2
    assert ".webp" in capsys.readouterr().err


def test_output_that_cannot_be_written(model, photos, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert ground(model, photos / "a.png", tmp_path / "file", "a dog") == 2
    assert "`--out` must be a folder" in capsys.readouterr().err
    assert ground(model, photos, tmp_path / "file", "a dog") == 2


def test_output_inside_the_folder(model, photos):
    for _ in range(2):  # the second run must not ground the first one's masks
        assert ground(model, photos, photos / "out", "a dog") == 0
        assert len(json.loads((photos / "out" / "index.json").read_text())["pictures"]) == 4


def test_all_parts_without_phrases(photos, tmp_path):
    sam = tmp_path / "sam"
    for part in helpers.sam():
        part.save_pretrained(sam)
    options = [f"--segmenter-option={pair}" for pair in ("points_per_side=3", "min_quality=-10", "min_stability=0")]
    arguments = ["--segmenter", "sam", "--segmenter-model", str(sam), *options, "--device", "cpu"]
    assert main(["ground", str(photos / "a.png"), *arguments, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert report["detections"] and all(one["phrase"] is None for one in report["detections"])
    assert not (tmp_path / "out" / "layout.json").exists()


def test_without_backend_toybox_is_asked(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    assert main(["ground", str(photos / "a.png"), "a dog", "--out", str(tmp_path / "out")]) == 2
    assert "toybox.json" in capsys.readouterr().err


def test_overlay_shows_masks_and_boxes():
    from objectcompose.grounding.detection import Detection

    picture = Image.new("RGB", (640, 512), (10, 10, 10))
    mask = torch.zeros(512, 640)
    mask[200:400, 100:300] = 1
    drawn = np.asarray(overlay_detections(picture, [Detection("a dog", (0.1, 0.3, 0.5, 0.8), mask, 0.9)]), int)
    assert drawn.shape == (512, 640, 3)
    assert (drawn[300, 200] > 60).any() and (drawn[480, 600] == 10).all()
    assert (np.abs(drawn[153:156, 200] - (230, 159, 0)).sum(-1) == 0).any()


@pytest.mark.slow
def test_readme_commands(tmp_path, monkeypatch):
    """The README's lines as they stand there, with toybox's weights."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Boxes and masks from a picture\n\n```sh\n(.*?)```", text, re.S)[1].replace("\\\n", " ")
    commands = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("objectcompose")]
    assert [one[0] for one in commands] == ["generate", "ground", "generate"]
    monkeypatch.chdir(tmp_path)
    for arguments in commands:
        assert main(arguments) == 0
    assert Path("outputs/again.png").is_file() and Path("outputs/ground/overlay.png").is_file()


@pytest.mark.slow
def test_two_processes_share_a_folder(model, photos, tmp_path):
    """Each picture is done once, and by both processes together; the main one writes the index."""
    out = tmp_path / "out"
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program += ["-m", "objectcompose", "ground", str(photos), "a dog", "--out", str(out), "--device", "cpu"]
    program += ["--backend", "clipseg", "--model", model, "--threshold", "0.45", "--no-cache"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("pictures done") == 1 and "4 of 4" in done.stdout
    assert len(json.loads((out / "index.json").read_text())["pictures"]) == 4
    alone = tmp_path / "alone"
    assert ground(model, photos, alone, "a dog", "--no-cache") == 0
    assert written(alone).keys() == written(out).keys()
    for name in ("a.jpg", "a.png", "more/b.webp", "more/c.png"):
        ours, theirs = (json.loads((folder / name / "detections.json").read_text()) for folder in (alone, out))
        for one, other in zip(ours.pop("detections"), theirs.pop("detections"), strict=True):
            assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-5) and one == other
        assert ours == theirs
