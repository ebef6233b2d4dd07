"""Overlays: what is bright, where the box is, and that files appear whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, ObjectComposeError
from objectcompose.pipelines.pipeline_output import ComposeOutput, PlacedObject
from objectcompose.pipelines.plot import colour_map, draw_layout, overlay_map, overlay_output, save_png
from tests.pipelines.helpers import compose_pipeline, sample


GREY = Image.new("RGB", (40, 24), (100, 100, 100))


def brightness(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=float)


def test_the_map_is_brightest_where_it_is_largest():
    attention = torch.zeros(6, 10)
    attention[4, 8] = 0.03
    overlay = overlay_map(GREY, attention)
    assert overlay.size == (40, 24) and overlay.mode == "RGB"
    row, column = np.unravel_index(brightness(overlay).argmax(), (24, 40))
    assert 16 <= row < 20 and 32 <= column < 36
    assert GREY.getpixel((0, 0)) == (100, 100, 100)  # the picture itself is left alone


def test_opacity_goes_from_the_picture_to_the_map():
    attention = np.linspace(0, 1, 60).reshape(6, 10)
    assert np.array_equal(np.asarray(overlay_map(GREY, attention, opacity=0)), np.asarray(GREY))
    full = np.asarray(overlay_map(GREY, attention, opacity=1))
    assert np.array_equal(full, np.asarray(overlay_map(Image.new("RGB", (40, 24)), attention, opacity=1)))


def test_a_map_of_zeros_is_dark():
    assert brightness(overlay_map(GREY, torch.zeros(3, 5), opacity=1)).max() < 5


def test_the_box_is_drawn_at_its_fractions():
    overlay = np.asarray(overlay_map(GREY, box=(0.25, 0.5, 0.75, 1.0)), dtype=int)
    rows, columns = np.nonzero((overlay != 100).any(-1))
    assert (rows.min(), rows.max()) == (12, 23) and (columns.min(), columns.max()) == (10, 29)


def test_colours():
    assert colour_map(np.array([[0.0, 1.0]])).tolist() == [[[0, 0, 4], [252, 255, 164]]]
    pytest.importorskip("matplotlib")
    assert colour_map(np.zeros((2, 3)), "viridis").shape == (2, 3, 3)
    with pytest.raises(ObjectComposeError, match="colours"):
        colour_map(np.zeros((2, 3)), "no such colours")


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.full((2, 3), torch.nan)])
def test_bad_maps_are_refused(bad):
    with pytest.raises(ImageInputError, match="attention_map"):
        overlay_map(GREY, bad)
    with pytest.raises(ObjectComposeError, match="opacity"):
        overlay_map(GREY, torch.zeros(2, 2), opacity=2)


def test_overlays_of_an_output():
    output = sample(
        compose_pipeline(),
        objects=[{"phrase": "a dog", "box": (0, 0, 1, 1)}, {"phrase": "corgi"}],
        return_attention=True,
        output_type="pil",
        num_images_per_prompt=2,
    )
    overlays = overlay_output(output)
    assert [list(row) for row in overlays] == [["a dog", "corgi"]] * 2
    assert all(image.size == (32, 32) for row in overlays for image in row.values())


def test_objects_without_a_phrase_have_no_overlay():
    placed = [[PlacedObject(box=(0, 0, 1, 1)), PlacedObject("dog", "dog", (1,)), PlacedObject(box=(0, 0, 0.5, 1))]]
    overlays = overlay_output(ComposeOutput([GREY], None, placed, [{"dog": torch.ones(2, 2)}]))
    assert [list(row) for row in overlays] == [["dog"]]


def test_overlays_need_maps_and_pictures():
    with pytest.raises(ObjectComposeError, match="return_attention"):
        overlay_output(ComposeOutput(images=[GREY]))
    placed = [[PlacedObject("dog", "dog", (1,))]]
    with pytest.raises(ObjectComposeError, match="PIL"):
        overlay_output(ComposeOutput(torch.zeros(1, 3, 4, 4), None, placed, [{"dog": torch.zeros(2, 2)}]))


def test_png_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = save_png(GREY, tmp_path / "new" / "a.png")
    assert Image.open(target).size == (40, 24)
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ImageInputError, match="cannot be written"):
        save_png(GREY, tmp_path / "new" / "b.png")
    assert [path.name for path in target.parent.iterdir()] == ["a.png"]


def test_layout_is_drawn_with_boxes_masks_and_names():
    mask = np.zeros((12, 20))
    mask[6:, :10] = 1
    drawn = draw_layout(GREY, [{"phrase": "dog", "box": [0.5, 0.25, 1, 1]}, {"mask": mask}, {"phrase": "nowhere"}])
    changed = (np.asarray(drawn) != 100).any(-1)
    assert drawn.size == GREY.size and GREY.getpixel((30, 6)) == (100, 100, 100)
    assert changed[6, 20:].all() and changed[6:, 39].all()  # the box's upper and right sides
    assert changed[13:23, 1:19].all() and not changed[:11, :19].any()  # the mask, and nothing outside
    without_name = draw_layout(GREY, [{"box": [0.5, 0.25, 1, 1]}, {"mask": mask}])
    assert not np.array_equal(np.asarray(without_name), np.asarray(drawn))


def test_layouts_that_break_the_schema_are_refused():
    with pytest.raises(LayoutError, match="colour"):
        draw_layout(GREY, [{"colour": "red"}])
