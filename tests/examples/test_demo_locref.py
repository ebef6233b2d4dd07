"""The demo's row of LocRef, on the toybox with its committed adapter."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from objectcompose.examples.demo_locref import DEMO_RUNS, LOCREF_SCENES, demo_objects, locref_row, mirrored
from objectcompose.examples.gallery import save_gallery
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.toybox.categories import PRESETS
from objectcompose.toybox.judge import Judge


def test_scenes_are_layouts_in_every_world():
    for preset in PRESETS.values():
        for number in range(len(LOCREF_SCENES)):
            objects = demo_objects(preset, number)
            again = demo_objects(preset, number)
            assert [item.image.tobytes() for item in objects] == [item.image.tobytes() for item in again]
            assert all(item.image.mode == "RGBA" and item.phrase in preset.categories for item in objects)
            for item in objects:
                assert mirrored(item).box[1::2] == item.box[1::2]
                assert mirrored(mirrored(item)).box == pytest.approx(item.box)


@pytest.mark.slow
def test_the_row_shows_references_layouts_and_both_pictures(tmp_path):
    pipeline, counted = load_checkpoint(device="cpu"), []
    before = {name: weight.clone() for name, weight in pipeline.unet.named_parameters()}
    processors = {name: type(one) for name, one in pipeline.unet.attn_processors.items()}
    row, entries = locref_row(pipeline, Judge.load(), (11, 12), 12, SimpleNamespace(update=counted.append))
    assert sum(counted) == DEMO_RUNS * 12 * 2
    assert len(row.images) == len(entries) == 4 and json.loads(json.dumps(entries)) == entries
    for entry, beside in zip(entries, row.overlays, strict=True):
        assert entry["weights"] == "LocRef" and len(entry["objects"]) == 2
        assert all(0 <= one["overlap"] <= 1 and -1 <= one["similarity"] <= 1 for one in entry["objects"])
        assert len(beside) in (1, 3)  # layout and picture; references only the first time
    first, second = (np.asarray(row.overlays[place][-1], dtype=int) for place in (0, 2))
    assert np.abs(first - second).mean() > 2
    assert [entry["seed"] for entry in entries] == [11, 12, 11, 12]
    assert all(torch.equal(weight, before[name]) for name, weight in pipeline.unet.named_parameters())
    assert {name: type(one) for name, one in pipeline.unet.attn_processors.items()} == processors
    assert save_gallery([row], tmp_path / "row.png").is_file()
