"""Layouts to be measured by: toybox's lists, those from files, moved boxes, crops and what looks at them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.evaluation.crop_similarity import crop_of_box, toybox_encoders
from objectcompose.evaluation.layout_cases import file_layouts, jittered_layouts, layouts_digest
from objectcompose.evaluation.toybox_layouts import LARGEST_OVERLAP, toybox_layouts
from objectcompose.layout import Layout, SceneObject, save_layout
from objectcompose.toybox.categories import PRESETS
from objectcompose.training.box_crops import overlap
from tests.pipelines.conformance.rows import picture


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def facts(cases):
    boxes = [[[round(edge * 64) for edge in item.box] for item in case.objects] for case in cases]
    named = [[case.record.id, case.record.text, case.record.categories, case.record.kind] for case in cases]
    return hashlib.sha256(
        json.dumps([[*one, box] for one, box in zip(named, boxes, strict=True)]).encode()
    ).hexdigest()


def test_toybox_layouts_are_what_they_say():
    cases = toybox_layouts(PRESETS["cpu"], "dev", 8)
    assert [case.record.kind for case in cases] == ["seen", "unseen"] * 4
    assert [len(case.objects) for case in cases] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert layouts_digest(cases) == layouts_digest(toybox_layouts(PRESETS["cpu"], "dev", 8))
    for case in cases:
        boxes = [item.box for item in case.objects]
        pairs = [(one, two) for number, one in enumerate(boxes) for two in boxes[:number]]
        assert all(overlap(*pair) <= LARGEST_OVERLAP for pair in pairs)
        assert all(item.image.mode == "RGBA" and item.phrase in case.record.text for item in case.objects)
        assert case.truth.size == case.rivals.size and case.truth.tobytes() != case.rivals.tobytes()
        difference = np.abs(np.asarray(case.truth, dtype=int) - np.asarray(case.rivals, dtype=int)).max(-1)
        for box in boxes:
            difference[round(box[1] * 64) : round(box[3] * 64), round(box[0] * 64) : round(box[2] * 64)] = 0
        assert difference.mean() < 2  # the same scene but for what is in the boxes, and their soft edges
    with pytest.raises(ObjectComposeError, match="split"):
        toybox_layouts(PRESETS["cpu"], "train")


def test_rivals_of_unseen_identities_are_as_far_as_those_of_seen_ones():
    apart = {"seen": [], "unseen": []}
    for case in toybox_layouts(PRESETS["cpu"], "dev", 24):
        pictures = [np.asarray(picture, dtype=int) for picture in (case.truth, case.rivals)]
        apart[case.record.kind].append(np.abs(pictures[0] - pictures[1]).mean())
    assert np.mean(apart["unseen"]) > 0.75 * np.mean(apart["seen"])  # rivals of the held-out hues: below a half


@pytest.mark.parametrize("objects", [2, 5, 10, 20])
def test_layouts_of_any_number_of_objects(objects):
    cases = toybox_layouts(PRESETS["cpu"], "test", 4, objects)
    assert [len(case.objects) for case in cases] == [objects] * 4
    assert [case.record.kind for case in cases] == ["seen", "unseen"] * 2
    for case in cases:
        boxes = [item.box for item in case.objects]
        pairs = [(one, two) for number, one in enumerate(boxes) for two in boxes[:number]]
        assert max(overlap(*pair) for pair in pairs) <= LARGEST_OVERLAP
        assert set(case.record.categories) == {item.phrase for item in case.objects}
        assert all(case.record.text.count(name) == 1 for name in case.record.categories)
    assert len({case.record.id for case in cases}) == 4


def test_one_object_left_and_right():
    left, right = (toybox_layouts(PRESETS["cpu"], side, 4) for side in ("left", "right"))
    assert [case.record for case in left] == [case.record for case in right]  # equal ids: equal noise
    for one, other in zip(left, right, strict=True):
        [first], [second] = one.objects, other.objects
        assert first.image.tobytes() == second.image.tobytes()
        moved = np.array(second.box) - np.array(first.box)
        assert moved == pytest.approx([0.5, 0, 0.5, 0], abs=2 / 64) and first.box[2] <= 0.6 <= second.box[2]


def test_numbers_of_objects_that_no_layout_has_are_refused():
    for split, objects in (("test", 0), ("test", 21), ("left", 1)):
        with pytest.raises(ObjectComposeError, match="`objects` must lie in"):
            toybox_layouts(PRESETS["cpu"], split, 2, objects)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("dev", "6b04d01f7fd4165dff67a6f6b10aa3d4a8de5b48b0e8ae0f15efa3778e076a92"),
        ("test", "92dbb83cce20735b0245c2f56a8fc0b48f032691710d484048a2dded80cd8e6c"),
    ],
)
def test_lists_stay_what_they_are(split, digest):
    assert facts(toybox_layouts(PRESETS["cpu"], split)) == digest


def test_layouts_from_files(tmp_path):
    dog = SceneObject(phrase="dog", image=picture("red"), box=LEFT)
    save_layout(
        Layout("a dog and a dog", (dog, SceneObject(phrase="dog", image=picture("blue"), box=RIGHT))),
        tmp_path / "b.json",
    )
    save_layout(Layout("a dog", (dog,)), tmp_path / "a.json")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    cases = file_layouts(tmp_path)
    assert [case.record.id for case in cases] == ["a", "b"]
    assert cases[0].truth is None and cases[0].rivals is None and cases[1].truth.size == (20, 20)
    assert cases[1].record.categories == ("dog",) and len(cases[1].objects) == 2
    assert layouts_digest(cases) != layouts_digest(cases[:1])
    save_layout(Layout("a dog", (SceneObject(phrase="dog", box=LEFT),)), tmp_path / "c.json")
    with pytest.raises(LayoutError, match="lacks image"):
        file_layouts(tmp_path)
    with pytest.raises(LayoutError, match="got none"):
        file_layouts(tmp_path / "empty")


def test_rivals_of_files_are_the_next_instances_of_their_categories(tmp_path):
    def write(name, colours, phrases=("dog", "dog")):
        image = Image.new("RGB", (20, 10), colours[0])
        image.paste(colours[1], (10, 0, 20, 10))
        image.save(tmp_path / f"{name}.png")
        objects = [SceneObject(phrase=phrase, image=picture("red"), box=box)
                   for phrase, box in zip(phrases, (LEFT, RIGHT), strict=True)]  # fmt: skip
        save_layout(Layout("a dog", objects), tmp_path / f"{name}.json")

    write("a", ("red", "blue"), ("dog", "cup"))
    write("b", ("green", "white"), ("cup", "dog"))
    write("c", ("black", "black"), ("dog", "car"))
    a, b, c = file_layouts(tmp_path)
    assert [a.rivals.getpixel((x, 5)) for x in (2, 17)] == [(255, 255, 255), (0, 128, 0)]  # b's dog, b's cup
    assert [b.rivals.getpixel((x, 5)) for x in (2, 17)] == [(0, 0, 255), (0, 0, 0)]  # a's cup, c's dog
    assert c.rivals is None and a.truth.getpixel((2, 5)) == (255, 0, 0)  # there is one car only


def test_boxes_are_moved_within_their_share():
    cases = toybox_layouts(PRESETS["cpu"], "dev", 8)
    assert layouts_digest(jittered_layouts(cases, 0.0)) == layouts_digest(cases)
    near, far = jittered_layouts(cases, 0.05), jittered_layouts(cases, 0.2)
    assert layouts_digest(far) == layouts_digest(jittered_layouts(cases, 0.2))
    moves = []
    for case, small, large in zip(cases, near, far, strict=True):
        for item, one, other in zip(case.objects, small.objects, large.objects, strict=True):
            sides = np.array([item.box[2] - item.box[0], item.box[3] - item.box[1]] * 2)
            steps = [(np.array(moved.box) - item.box) / sides for moved in (one, other)]
            assert np.abs(steps[0]).max() <= 0.05 + 1e-6 and np.abs(steps[1]).max() <= 0.2 + 1e-6
            inside = (np.array(other.box) > 0) & (np.array(other.box) < 1)
            assert steps[1][inside] == pytest.approx(4 * steps[0][inside], abs=1e-6)  # further the same way
            moves += steps[1].tolist()
        assert case.truth is small.truth
    assert np.std(moves) > 0.08
    with pytest.raises(ObjectComposeError, match=r"`--box-jitter` must lie in \[0, 0.49\], got 0.5"):
        jittered_layouts(cases, 0.5)


def test_crops_and_encoders():
    image = Image.new("RGB", (64, 32), "white")
    image.paste("red", (32, 8, 64, 24))
    crop = crop_of_box(image, (0.5, 0.25, 1.0, 0.75))
    assert crop.size == (32, 16) and crop.getcolors() == [(512, (255, 0, 0))]
    assert crop_of_box(image, (0.999, 0.999, 1.0, 1.0)).size == (1, 1)
    cases = toybox_layouts(PRESETS["cpu"], "dev", 8)[2:]
    for encoder in toybox_encoders("cpu"):
        own, others = [], []
        for case in cases:
            crops = [crop_of_box(case.truth, item.box) for item in case.objects]
            table = encoder.cosines(crops, [item.image for item in case.objects])
            assert encoder.cosines(crops, crops).diagonal().tolist() == pytest.approx([1.0] * len(crops), abs=1e-5)
            is_own = torch.eye(len(crops), dtype=torch.bool)
            own += table[is_own].tolist()
            others += table[~is_own].tolist()
        # in a tight crop a neighbour may show, which disturbs the judge least
        assert np.mean(own) > 0.8 and np.mean(others) < 0.4, encoder.name
        assert encoder.name != "identity" or min(own) > 0.75
