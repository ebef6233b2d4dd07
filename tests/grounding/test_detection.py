"""Detections: their rules, masks to boxes, union by phrase, and the layout that comes of them."""

from __future__ import annotations

import pytest
import torch

from objectcompose.errors import LayoutError, PhraseNotFoundError, RegionError
from objectcompose.grounding.detection import (
    Detection,
    box_of_mask,
    box_within_picture,
    detections_to_layout,
    merge_detections,
    sorted_detections,
)
from objectcompose.layout import load_layout, prompt_of_phrases, save_layout


def mask_with(rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(10, 20)
    mask[rows, columns] = 1
    return mask


def detection(phrase, rows, columns, score=0.5) -> Detection:
    mask = mask_with(rows, columns)
    return Detection(phrase, box_of_mask(mask), mask, score)


def test_box_of_mask():
    assert box_of_mask(mask_with(slice(2, 5), slice(4, 20))) == (0.2, 0.2, 1.0, 0.5)
    assert box_of_mask(mask_with(slice(9, 10), slice(0, 1))) == (0.0, 0.9, 0.05, 1.0)
    assert box_of_mask(torch.zeros(3, 4)) is None


def test_predicted_boxes_end_at_the_border():
    assert box_within_picture([-0.5, 0.25, 0.5, 1.5]) == (0.0, 0.25, 0.5, 1.0)
    for nothing in ([1.1, 0, 1.2, 1], [0.5, 0.5, 0.5, 0.9], [0, float("nan"), 1, 1], [0, 0, float("inf"), 1]):
        assert box_within_picture(nothing) is None


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"box": (0.5, 0, 0.5, 1)}, LayoutError, "`box`"),
        ({"box": (0, 0, 64, 64)}, LayoutError, "fractions"),
        ({"score": 1.5}, LayoutError, "`score`"),
        ({"score": float("nan")}, LayoutError, "`score`"),
        ({"mask": torch.ones(1, 3, 3)}, RegionError, "`mask`"),
        ({"mask": [[1]]}, RegionError, "`mask`"),
    ],
)
def test_rules_of_a_detection(values, error, words):
    with pytest.raises(error, match=words):
        Detection(**{"phrase": "a dog", "box": (0, 0, 1, 1), "mask": None, "score": 0.5, **values})


def test_order_does_not_depend_on_the_models():
    boxes = [(0.1 * n, 0, 1, 1) for n in range(4)]
    found = [Detection(p, b, None, s) for p, b, s in zip("baab", boxes, (0.5, 0.2, 0.9, 0.5), strict=True)]
    expected = [found[2], found[1], found[0], found[3]]
    assert sorted_detections(found, ["a", "b"]) == expected == sorted_detections(found[::-1], ["a", "b"])


def test_merging_unites_masks_of_a_phrase():
    first = detection("a dog", slice(0, 2), slice(0, 2), 0.3)
    second = detection("a dog", slice(6, 8), slice(10, 20), 0.8)
    cup = detection("a cup", slice(4, 5), slice(4, 5))
    dog, other = merge_detections([first, cup, second])
    assert (dog.phrase, dog.score, dog.box) == ("a dog", 0.8, (0.0, 0.0, 1.0, 0.8))
    assert torch.equal(dog.mask, torch.maximum(first.mask, second.mask)) and other.box == cup.box


@pytest.mark.parametrize("mask", [None, torch.zeros(10, 20)])
def test_merging_falls_back_to_boxes(mask):
    """A mask that covers only some of the instances would be a wrong region; the boxes cover all."""
    first = detection("a dog", slice(0, 2), slice(0, 2))
    [dog] = merge_detections([first, Detection("a dog", (0.5, 0.5, 0.75, 0.75), mask, 0.9)])
    assert dog.mask is None and dog.box == (0.0, 0.0, 0.75, 0.75)


def test_layout_survives_the_disk(tmp_path):
    found = [detection("a dog", slice(0, 4), slice(0, 4)), Detection("a wine glass", (0.5, 0, 1, 1), None, 0.6)]
    layout = detections_to_layout(found)
    assert layout.prompt == "a photo of a dog and a wine glass"
    assert [obj.box for obj in layout.objects] == [found[0].box, found[1].box]
    assert torch.equal(layout.objects[0].mask, found[0].mask) and layout.objects[1].mask is None
    save_layout(layout, tmp_path / "layout.json")
    assert load_layout(tmp_path / "layout.json") == layout


def test_layout_needs_phrases_of_the_prompt():
    dog = detection("a dog", slice(0, 4), slice(0, 4))
    assert detections_to_layout([dog], "A dog at night").prompt == "A dog at night"
    with pytest.raises(PhraseNotFoundError, match="'a dog'.*'a cat'"):
        detections_to_layout([dog], "a cat")
    with pytest.raises(LayoutError, match="phrase"):
        detections_to_layout([Detection(None, (0, 0, 1, 1), None, 1)])


def test_prompts():
    assert prompt_of_phrases([]) == "" and prompt_of_phrases(["a dog"]) == "a photo of a dog"
    assert prompt_of_phrases(["a dog", "a cup", "birds"]) == "a photo of a dog, a cup and birds"
