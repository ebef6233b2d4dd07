"""Ground truth of toybox's scenes, and toybox's CLIPSeg against it."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from objectcompose.errors import CheckpointError, ImageInputError, ObjectComposeError
from objectcompose.grounding.detection import box_of_mask, merge_detections
from objectcompose.grounding.grounder import Grounder, load_grounder
from objectcompose.grounding.toybox_truth import ToyboxTruth, load_toybox_truth
from objectcompose.toybox.categories import PRESETS
from objectcompose.toybox.scenes import render_scenes, sample_scene, with_article
from objectcompose.toybox.weights import active_preset, toybox_path


CPU = PRESETS["cpu"]
SEEDS = [(2, number) for number in range(12)]


@pytest.fixture(scope="module")
def truth() -> ToyboxTruth:
    return ToyboxTruth(CPU, SEEDS)


def test_truth_is_what_was_rendered(truth):
    scenes = render_scenes(CPU, [sample_scene(CPU, seed) for seed in SEEDS])
    categories = [[one.category for one in spec.identities] for spec in scenes.specs]
    phrases = [[with_article(name) for name in dict.fromkeys(names)] for names in categories]
    found = Grounder(truth).ground_batch(truth.pictures, phrases, "skip")
    assert max(map(len, categories)) > 1
    for row, names in enumerate(categories):
        visible = {name: scenes.visible[row, place] for place, name in enumerate(names)}
        assert len(found[row]) == sum(bool(mask.any()) for mask in visible.values())
        for one in found[row]:
            mask = visible[one.phrase.partition(" ")[2]]
            assert torch.equal(one.mask, mask) and one.box == box_of_mask(mask) and one.score == 1.0


def test_what_is_not_there_has_no_hit(truth):
    shown = {name.category for name in sample_scene(CPU, SEEDS[0]).identities}
    absent = next(name for name in CPU.categories if name not in shown)
    assert Grounder(truth).ground(truth.pictures[0], [f"the {absent}"], "skip") == []
    with pytest.raises(ObjectComposeError, match="nothing was found"):
        Grounder(truth).ground(truth.pictures[0], [f"a photo of {with_article(absent)}"])


def test_parts_without_text(truth):
    parts = Grounder(truth).segment_batch(truth.pictures)
    assert all(1 <= len(row) <= 5 and all(one.phrase is None for one in row) for row in parts)


def test_other_pictures_and_words(truth):
    with pytest.raises(ImageInputError, match="scenes of this ToyboxTruth"):
        Grounder(truth).ground(Image.new("RGB", (64, 64)), ["a dog"])
    with pytest.raises(ObjectComposeError, match="car, dog.*'a zebra'"):
        Grounder(truth).ground(truth.pictures[0], ["a zebra"])


def test_truth_of_a_folder(truth, tmp_path):
    path = truth.save(tmp_path)
    for source in (path, tmp_path):
        again = load_grounder("toybox", source, device="cpu")
        assert again.identity() == truth.identity() != ToyboxTruth(CPU, SEEDS[1:]).identity()
        assert again.segment(tmp_path / "00003.png")
    assert len(list(tmp_path.glob("*.png"))) == len(SEEDS)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"preset": "huge", "seeds": []}', *(
        json.dumps({"preset": "cpu", "seeds": seeds}) for seeds in ([-1], [1.5], [[]], ["1"], [[1, True]], 3)
    )],
)  # fmt: skip
def test_broken_seeds(content, tmp_path):
    (tmp_path / "scenes.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"scenes\.json"):
        load_toybox_truth(tmp_path, device=torch.device("cpu"), dtype=torch.float32)


def test_missing_seeds(tmp_path):
    for source in (None, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"scenes\.json"):
            load_toybox_truth(source, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.slow
def test_clipseg_finds_what_is_there():
    """Real weights against true masks: scenes that nothing was trained on."""
    preset = active_preset()
    truth = ToyboxTruth(preset, [(2, number) for number in range(10_000, 10_032)])
    phrases = [with_article(name) for name in preset.categories[:8]]
    asked = [phrases] * len(truth.pictures)
    expected = Grounder(truth).ground_batch(truth.pictures, asked, "skip")
    found = load_grounder("clipseg", toybox_path("clipseg"), device="cpu").ground_batch(truth.pictures, asked, "skip")
    overlaps, right, total = [], 0, 0
    for wanted, seen in zip(expected, found, strict=True):
        masks = {one.phrase: one.mask for one in merge_detections(wanted)}
        guesses = {one.phrase: one.mask for one in merge_detections(seen)}
        for phrase in phrases:
            right += (phrase in masks) == (phrase in guesses)
            total += 1
            if phrase in masks:
                guess = guesses.get(phrase, torch.zeros_like(masks[phrase]))
                overlaps.append(float((guess * masks[phrase]).sum() / (guess + masks[phrase]).clamp(max=1).sum()))
    assert right / total > 0.8
    assert len(overlaps) > 20 and sum(overlaps) / len(overlaps) > 0.4
