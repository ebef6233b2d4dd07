"""The contact sheet, and the demo on a tiny model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.adapters.base_identity import identify_base
from objectcompose.adapters.unet_delta import UNetDelta
from objectcompose.errors import ObjectComposeError
from objectcompose.examples.demo import DEMO_SCENES, DEMO_SEEDS, DemoScene, MethodRow, demo_scenes, run_demo
from objectcompose.examples.gallery import GalleryRow, save_gallery
from tests.pipelines.helpers import compose_pipeline


RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (16, 8), "blue")


def count(path, colour):
    return int((np.asarray(Image.open(path)) == colour).all(-1).sum())


def test_pictures_are_fitted_into_their_tiles(tmp_path):
    path = save_gallery([GalleryRow("row", [RED, BLUE], ["", ""], [[BLUE], []])], tmp_path / "sheet.png", tile=40)
    assert count(path, (255, 0, 0)) == 40 * 40
    assert count(path, (0, 0, 255)) == 2 * 40 * 20


def test_long_rows_and_captions_are_broken_into_lines(tmp_path):
    row = GalleryRow("title", [RED] * 9, ["a long caption that needs several lines"] * 9)
    path = save_gallery([row], tmp_path / "sheet.png", tile=40, max_width=200)
    assert Image.open(path).width <= 200
    assert count(path, (255, 0, 0)) == 9 * 40 * 40


def test_rows_are_checked(tmp_path):
    with pytest.raises(ObjectComposeError, match="captions"):
        GalleryRow("row", [RED], [])
    with pytest.raises(ObjectComposeError, match="overlays"):
        GalleryRow("row", [RED], [""], [[], []])
    with pytest.raises(ObjectComposeError, match="images"):
        GalleryRow("row", [], [])
    with pytest.raises(ObjectComposeError, match="rows"):
        save_gallery([], tmp_path / "sheet.png")


def test_demo_scenes_name_one_two_and_three_objects():
    scenes = demo_scenes(["dog", "cat", "cup", "car", "bear", "bird", "table", "wine glass"])
    assert {len(scene.categories) for scene in scenes} == {1, 2, 3} and len(scenes) == len(DEMO_SCENES)
    assert all(len(set(scene.categories)) == len(scene.categories) for scene in scenes)
    assert scenes[0].prompt == "a photo of a dog"


class DogJudge:
    """Finds a dog in every picture."""

    def detect(self, images):
        assert images.shape[1:] == (3, 32, 32) and 0 <= images.min() <= images.max() <= 1
        return [[SimpleNamespace(category="dog", box=(0.0, 0.25, 0.5, 1.0), score=0.75)] for _ in images]


def test_demo_writes_gallery_and_report(tmp_path):
    scenes = [DemoScene("a photo of a dog", ("dog",)), DemoScene("a photo of a dog and a cup", ("dog", "cup"))]
    pipeline = compose_pipeline()
    before = {name: value.detach().clone() for name, value in pipeline.unet.named_parameters()}
    after = {name: value + 0.1 if name.endswith("attn2.to_k.weight") else value for name, value in before.items()}
    tuning = UNetDelta.between(before, after, identify_base(pipeline.unet))

    def paint_row(pipeline, judge, seeds, steps, progress):
        progress.update(len(seeds) * steps)
        return GalleryRow("more", [RED], [""]), [{"weights": "more", "seed": seeds[0], "steps": steps}]

    method = MethodRow(paint_row, runs=1)
    report = run_demo(pipeline, DogJudge(), tuning, scenes, tmp_path, steps=2, tuned_scenes=(1,), methods=[method])
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.named_parameters())
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery.png", "overview.png", "report.json"]
    assert report["all_objects_found"] == {"1": 1.0, "2": 0.0}
    assert report["pictures"].pop() == {"weights": "more", "seed": DEMO_SEEDS[0], "steps": 2}
    assert [entry["seed"] for entry in report["pictures"]] == [*DEMO_SEEDS] * 3
    assert [entry["weights"] for entry in report["pictures"]] == ["base"] * 4 + ["TokenCompose"] * 2
    last = report["pictures"][-1]
    assert last["present"] == {"dog": True, "cup": False}
    assert last["found"] == [{"category": "dog", "score": 0.75, "box": [0.0, 0.25, 0.5, 1.0]}]
    assert Image.open(tmp_path / "gallery.png").width > 500
