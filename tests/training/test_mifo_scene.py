"""The picture that MIFO learns from: geometry, mask files, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, ObjectNotFoundError, RegionError
from objectcompose.grounding.detection import Detection, box_of_mask
from objectcompose.grounding.grounder import Grounder, load_grounder
from objectcompose.grounding.toybox_truth import ToyboxTruth
from objectcompose.toybox.categories import PRESETS
from objectcompose.toybox.weights import toybox_path
from objectcompose.training.mifo_scene import (
    SAME_THING_SHARE,
    make_scene,
    masks_of_phrases,
    read_instance_mask,
    scene_files,
)
from tests.training.look_alikes import mask_overlap, two_bears


def two_halves(height=24, width=40):
    masks = torch.zeros(2, height, width).bool()
    masks[0, :, 4 : width // 2], masks[1, :, width // 2 :] = True, True
    return masks


def picture(height=24, width=40):
    """Red grows to the right, green downwards."""
    values = np.zeros((height, width, 3), np.uint8)
    values[..., 0], values[..., 1] = np.linspace(0, 255, width)[None], np.linspace(0, 255, height)[:, None]
    return Image.fromarray(values)


def test_picture_and_masks_are_cropped_alike():
    scene = make_scene(picture(48, 80), two_halves(48, 80), 24)
    assert scene.pixels.shape == (3, 24, 24) and scene.masks.shape == (2, 24, 24)
    # Resized by one half to 24 x 40, of which columns 8 to 32 stay: the border of the masks is in the middle.
    assert torch.equal(scene.masks[0], scene.masks[0][:1].expand(24, -1))
    assert (
        scene.masks[0, 0].tolist() == [1.0] * 12 + [0.0] * 12 and scene.masks[1, 0].tolist() == [0.0] * 12 + [1.0] * 12
    )
    red = (scene.pixels[0, 0] + 1) / 2
    assert red[0] == pytest.approx(8.5 / 40, abs=0.02) and red[-1] == pytest.approx(31.5 / 40, abs=0.02)


def test_squashing_keeps_everything():
    scene = make_scene(picture(24, 48), two_halves(24, 48), 24, fit="squash")
    assert scene.masks[0, 0].tolist() == [0.0] * 2 + [1.0] * 10 + [0.0] * 12


def test_flipping_mirrors_both_and_one_instance_stands_on_grey():
    scene = make_scene(picture(), two_halves(), 24)
    flipped = scene.flipped()
    assert torch.equal(flipped.pixels.flip(-1), scene.pixels) and torch.equal(flipped.masks.flip(-1), scene.masks)
    alone = scene.alone(1).pixels
    assert (alone[:, scene.masks[1] == 0] == 0).all()
    assert torch.equal(alone[:, scene.masks[1] == 1], scene.pixels[:, scene.masks[1] == 1])


def test_mask_files_of_all_kinds(tmp_path):
    mask = two_halves()[0]
    values = (mask.numpy() * 255).astype(np.uint8)
    clear = np.zeros((*values.shape, 4), np.uint8)
    clear[..., 3] = values
    coloured = np.full((*values.shape, 4), 255, np.uint8)
    coloured[..., :3] = values[..., None]
    for name, content in (("l.png", values), ("rgba_alpha.png", clear), ("rgba_colour.png", coloured)):
        Image.fromarray(content).save(tmp_path / name)
        assert torch.equal(read_instance_mask(tmp_path / name), mask), name
    Image.fromarray(values).convert("1").save(tmp_path / "bits.png")
    assert torch.equal(read_instance_mask(tmp_path / "bits.png"), mask)
    Image.fromarray(values).save(tmp_path / "lossy.jpg", quality=60)
    assert (read_instance_mask(tmp_path / "lossy.jpg") == mask).float().mean() > 0.98
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageInputError, match="text.png"):
        read_instance_mask(tmp_path / "text.png")


def test_masks_are_sorted_by_number(tmp_path):
    for name in ("img.jpg", "mask10.png", *(f"mask{number}.png" for number in range(10))):
        (tmp_path / name).touch()
    image, masks = scene_files(tmp_path)
    assert image.name == "img.jpg" and [path.stem for path in masks] == [f"mask{number}" for number in range(11)]
    (tmp_path / "mask3.png").unlink()
    with pytest.raises(LayoutError, match="without gaps"):
        scene_files(tmp_path)
    (tmp_path / "img.png").touch()
    with pytest.raises(LayoutError, match="one picture"):
        scene_files(tmp_path)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ([], LayoutError, "one mask per instance"),
        ([torch.ones(10, 10)], RegionError, r"\(24, 40\), got \(10, 10\)"),
        ([torch.zeros(24, 40)], RegionError, "empty mask"),
        ([two_halves()[0], two_halves()[0]], RegionError, "not overlap"),
        ([torch.nn.functional.pad(torch.ones(24, 3), (0, 37))], RegionError, "of the part that is learned from"),
    ],
)
def test_bad_masks_are_refused(masks, error, message):
    with pytest.raises(error, match=message):
        make_scene(picture(), masks, 24)


def test_touching_edges_are_no_overlap():
    masks = two_halves()
    masks[0, :1] |= masks[1, :1]  # 1 of 24 rows
    assert make_scene(picture(), list(masks), 24).masks.shape[0] == 2


def test_unknown_fit_is_refused():
    with pytest.raises(LayoutError, match="fit"):
        make_scene(picture(), two_halves(), 24, fit="stretch")


class BoxesOnly:
    """A detector that makes no masks."""

    name = "boxes"

    def identity(self):
        return self.name

    def detect(self, pictures, phrases):
        box = (0.1, 0.1, 0.9, 0.9)
        return [[Detection(phrase=one, box=box, mask=None, score=0.5) for one in row] for row in phrases]


def test_masks_from_phrases_are_those_of_the_grounder():
    truth = ToyboxTruth(PRESETS["cpu"], [4])
    names = sorted({detection.phrase for detection in truth.detect(truth.pictures, [PRESETS["cpu"].categories])[0]})
    masks = masks_of_phrases(Grounder(truth), truth.pictures[0], names)
    for name, mask in zip(names, masks, strict=True):
        assert torch.equal(mask, truth.detect(truth.pictures, [[name]])[0][0].mask > 0)
    with pytest.raises(RegionError, match="segmenter"):
        masks_of_phrases(Grounder(BoxesOnly()), truth.pictures[0], names)


# ---- look-alikes: a phrase named more than once


class Hits:
    """A detector that gives what it was told, whatever the picture."""

    name = "hits"

    def __init__(self, *hits):
        self.hits = [Detection(phrase, box_of_mask(mask), mask.float(), score) for phrase, mask, score in hits]

    def identity(self):
        return self.name

    def detect(self, pictures, phrases):
        return [[hit for hit in self.hits if hit.phrase in words] for words in phrases]


@pytest.mark.slow
def test_one_phrase_names_two_look_alikes_for_toyboxs_own_segmenter():
    picture, exact = two_bears()
    grounder = load_grounder("clipseg", toybox_path("clipseg"))
    masks = masks_of_phrases(grounder, picture, ["a teddy bear", "an umbrella", "A  teddy bear"])
    for mask, place in zip(masks, ("left", "umbrella", "right"), strict=True):
        assert mask_overlap(mask, exact[place]) > 0.5, place
    assert len(make_scene(picture, masks, 64).masks) == 3
    with pytest.raises(ObjectNotFoundError, match="names 'a teddy bear' 3 times, and 2 could be told apart"):
        masks_of_phrases(grounder, picture, ["a teddy bear"] * 3)


def test_the_surest_hits_count_and_each_thing_once():
    picture, exact = two_bears()
    again = exact["right"].roll(1, 0)  # the right bear once more
    part = exact["left"].clone()
    part[part.shape[0] * 6 // 10 :] = False  # the left bear's ears
    assert mask_overlap(again, exact["right"]) > SAME_THING_SHARE > mask_overlap(part, exact["left"]) > 0
    hits = [("bear", exact["right"], 0.9), ("bear", again, 0.8), ("bear", exact["left"], 0.7), ("bear", part, 0.6)]
    speck = torch.zeros_like(part)
    speck[:2, :2] = True
    grounder = Grounder(Hits(*hits, ("bear", speck, 0.5)))
    left, right = masks_of_phrases(grounder, picture, ["bear", "bear"])
    assert torch.equal(left, exact["left"]) and torch.equal(right, exact["right"])
    assert torch.equal(masks_of_phrases(grounder, picture, ["bear"])[0], exact["right"])
    assert torch.equal(masks_of_phrases(grounder, picture, ["bear"] * 3)[0], speck)
    with pytest.raises(ObjectNotFoundError, match="'bear' 4 times, and 3 could be told apart"):
        masks_of_phrases(grounder, picture, ["bear"] * 4)
