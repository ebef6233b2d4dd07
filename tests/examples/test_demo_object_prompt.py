"""The demo's row of ObjectPrompt, on the toybox with its committed adapter."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.examples.demo_object_prompt import DEMO_RUNS, object_prompt_row
from objectcompose.examples.gallery import save_gallery
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.toybox.judge import Judge


@pytest.mark.slow
def test_the_row_shows_prompts_both_runs_and_what_was_matched(tmp_path):
    pipeline, counted = load_checkpoint(device="cpu"), []
    before = {name: weight.clone() for name, weight in pipeline.unet.named_parameters()}
    processors = dict(pipeline.unet.attn_processors)
    row, entries = object_prompt_row(pipeline, Judge.load(), (11, 12), 12, SimpleNamespace(update=counted.append))
    assert sum(counted) == DEMO_RUNS * 12 * 2
    assert len(row.images) == len(entries) == 2 and json.loads(json.dumps(entries)) == entries
    for entry, (second_prompt, first, matched, final) in zip(entries, row.overlays, strict=True):
        assert entry["weights"] == "ObjectPrompt" and len(entry["present"]) == len(entry["matched"]) == 2
        assert second_prompt.size == first.size == final.size
        is_matched = any(cosine is not None for cosine in entry["matched"].values())
        plain = first.resize(matched.size, Image.Resampling.BILINEAR)
        assert is_matched == (not np.array_equal(np.asarray(plain), np.asarray(matched)))
        assert not is_matched or not np.array_equal(np.asarray(first), np.asarray(final))
    assert any(cosine is not None for entry in entries for cosine in entry["matched"].values())
    assert all(torch.equal(weight, before[name]) for name, weight in pipeline.unet.named_parameters())
    assert {name: type(one) for name, one in pipeline.unet.attn_processors.items()} == {
        name: type(one) for name, one in processors.items()
    }
    assert save_gallery([row], tmp_path / "row.png").is_file()
