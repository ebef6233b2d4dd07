"""The demo's row of MIFO, on the toybox with its committed instances."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from objectcompose.examples.demo_mifo import DEMO_RUNS, instance_pipeline, mifo_row
from objectcompose.examples.gallery import save_gallery
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.toybox.judge import Judge


@pytest.mark.slow
def test_the_row_shows_what_was_learned_and_both_ways_of_painting_it(tmp_path):
    pipeline, counted = load_checkpoint(device="cpu"), []
    before = {name: weight.clone() for name, weight in pipeline.unet.named_parameters()}
    words = len(pipeline.tokenizer)
    row, entries = mifo_row(pipeline, Judge.load(), (11, 12), 8, SimpleNamespace(update=counted.append))
    assert sum(counted) == DEMO_RUNS * 8 * 2
    assert len(row.images) == 1 + len(entries) == 5 and json.loads(json.dumps(entries)) == entries
    assert [entry["weights"] for entry in entries] == ["MIFO"] * 2 + ["MIFO without box control"] * 2
    for controlled, plain in zip(entries[:2], entries[2:], strict=True):
        assert controlled["seed"] == plain["seed"] and controlled["instances"] != plain["instances"]
    # the base is as it was: what the instances change is copied
    assert all(torch.equal(weight, before[name]) for name, weight in pipeline.unet.named_parameters())
    assert len(pipeline.tokenizer) == words
    assert save_gallery([row], tmp_path / "row.png").is_file()


def test_the_committed_instances_are_of_the_committed_base():
    pipeline = load_checkpoint(device="cpu")
    ours, names = instance_pipeline(pipeline)
    assert names == ["<asset0>", "<asset1>"] and not set(names) & set(pipeline.tokenizer.get_vocab())
    assert set(names) <= set(ours.tokenizer.get_vocab())
