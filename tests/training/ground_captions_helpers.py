"""Scenes with captions, and `objectcompose ground-captions` on them with toybox's ground truth."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from objectcompose.__main__ import main
from objectcompose.grounding.toybox_truth import ToyboxTruth
from objectcompose.toybox.categories import PRESETS
from objectcompose.toybox.scenes import list_objects, sample_scene


CPU = PRESETS["cpu"]


def write_scenes(folder: Path, count: int) -> ToyboxTruth:
    """Scenes, each with a caption that names all of its objects and nothing else."""
    truth = ToyboxTruth(CPU, [(9, number) for number in range(count)])
    truth.save(folder)
    for number, seed in enumerate(truth.seeds):
        names = [identity.category for identity in sample_scene(CPU, seed).identities]
        (folder / f"{number:05d}.txt").write_text(list_objects(names))
    return truth


def ground_captions(folder: Path, out: Path, *more: str) -> int:
    """The command with the scenes' ground truth as detector."""
    truth = ["--backend", "toybox", "--model", str(folder / "scenes.json")]
    return main(["ground-captions", str(folder), "--out", str(out), "--device", "cpu", "--no-cache", *truth, *more])


def read_report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def content_of(out: Path) -> dict[str, str]:
    """Digest of each file below a folder, hidden ones too."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
