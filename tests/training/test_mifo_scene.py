"""The picture that MIFO learns from: geometry, mask files, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, RegionError
from objectcompose.grounding.detection import Detection
from objectcompose.grounding.grounder import Grounder
from objectcompose.grounding.toybox_truth import ToyboxTruth
from objectcompose.toybox.categories import PRESETS
from objectcompose.training.mifo_scene import make_scene, masks_of_phrases, read_instance_mask, scene_files


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
