"""Table, drawing, reference pictures and pasted layouts of the page: plain functions, no models and no browser."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, ObjectComposeError, RegionError
from objectcompose.examples.app_canvas import CANVAS_SIDE, MAX_OBJECTS, Drawing, mask_box, read_drawing, write_drawing
from objectcompose.examples.app_page import layout_pasted, references_drawn
from objectcompose.examples.app_scene import (
    drawing_after_table,
    first_scene,
    read_scene,
    show_scene,
    table_after_drawing,
    table_row,
)
from objectcompose.layout import Layout, SceneObject
from objectcompose.toybox.categories import PRESETS


PROMPT = "a photo of a dog and a corgi"
LEFT, RIGHT = (0.0, 0.1, 0.5, 0.9), (0.5, 0.1, 1.0, 0.9)
CPU = PRESETS["cpu"]


def table_of(*rows):
    return [*rows, *(table_row(index) for index in range(len(rows), MAX_OBJECTS))]


def test_drawings_travel_as_text():
    mask = torch.zeros(CANVAS_SIDE, CANVAS_SIDE)
    mask[64:128, 32:40] = 1
    drawing = Drawing((LEFT, None, (0.12, 0.25, 0.16, 0.5), None, None), (None, None, mask, None, None))
    found = read_drawing(write_drawing(drawing, ["dog"] * MAX_OBJECTS))
    assert found.boxes == drawing.boxes
    assert [one is None for one in found.masks] == [True, True, False, True, True]
    assert torch.equal(found.masks[2], mask)
    assert read_drawing("").boxes == (None,) * MAX_OBJECTS


def test_the_box_around_a_mask_lies_on_whole_hundredths():
    mask = torch.zeros(256, 256)
    mask[255, 0] = 1
    assert mask_box(mask) == (0.0, 0.99, 0.01, 1.0)


def test_a_mask_without_a_box_gets_the_one_around_it():
    mask = torch.zeros(256, 256)
    mask[:128, :64] = 1
    text = json.loads(write_drawing(Drawing(masks=(mask, *[None] * 4)), [""] * MAX_OBJECTS))
    assert read_drawing(json.dumps(text)).boxes[0] == (0.0, 0.0, 0.25, 0.5)


def _drawn(boxes=None, masks=None):
    nothing = [None] * MAX_OBJECTS
    return json.dumps({"boxes": [*(boxes or []), *nothing][:5], "masks": [*(masks or []), *nothing][:5]})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", LayoutError),
        ("[]", LayoutError),
        ('{"boxes": 3, "masks": 4}', LayoutError),
        ('{"boxes": [], "masks": []}', LayoutError),
        ("[" * 100_000, LayoutError),
        ("x" * 500_000, LayoutError),
        (7, LayoutError),
        (_drawn([[0, 0, 2, 1]]), LayoutError),
        (_drawn(["box"]), LayoutError),
        (_drawn(None, ["mask"]), RegionError),
        (_drawn(None, [[1]]), RegionError),
        (_drawn(None, ["data:image/png;base64,////"]), RegionError),
    ],
)
def test_broken_drawings_are_refused(text, error):
    with pytest.raises(error):
        read_drawing(text)


def test_masks_of_another_size_are_refused():
    content = io.BytesIO()
    Image.new("RGBA", (CANVAS_SIDE, CANVAS_SIDE + 1), "white").save(content, format="PNG")
    with pytest.raises(RegionError, match=r"`mask of object 1` must have sides of 256 pixels, got \(256, 257\)"):
        read_drawing(_drawn(None, ["data:image/png;base64," + base64.b64encode(content.getvalue()).decode()]))


def test_table_and_drawing_follow_each_other():
    table = table_of(table_row(0, "dog"), table_row(1, "corgi", RIGHT, 0.5, 2))
    mask = torch.ones(CANVAS_SIDE, CANVAS_SIDE)
    drawing = Drawing((LEFT, None, None, None, None), (mask, None, None, None, None))
    drawn = table_after_drawing(table, drawing)
    assert drawn[0] == [1, "dog", *LEFT, 1.0, 0] and drawn[1] == [2, "corgi", "", "", "", "", 0.5, 2]

    same = drawing_after_table(drawing, drawn)
    assert same.boxes == drawing.boxes and same.masks[0] is mask
    edited = [[1, "dog", "0", "0.1", "0.4", "0.9", "", ""], *drawn[1:]]  # cells come back as text
    moved = drawing_after_table(drawing, edited)
    assert moved.boxes[0] == (0.0, 0.1, 0.4, 0.9) and moved.masks[0] is None
    unfinished = [[1, "dog", "0", "", None, float("nan"), 1, 0], *drawn[1:]]
    assert drawing_after_table(drawing, unfinished).boxes[0] is None


def test_a_row_is_an_object_and_an_empty_row_is_none():
    table = table_of(table_row(0), [2, " dog ", "0.5", "0.1", "1", ".9", "", "2"], [3, "<asset0>", *[None] * 6])
    layout = read_scene(PROMPT, table, Drawing(), [None] * MAX_OBJECTS)
    assert layout.objects == (SceneObject(phrase="dog", box=RIGHT, order=2), SceneObject(token="<asset0>"))
    assert read_scene(PROMPT, table_of(), Drawing(), [None] * MAX_OBJECTS).objects == ()


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([1, "dog", "0", "0", "half", "1", 1, 0], "object 1: `box` must be a number, got 'half'"),
        ([1, "dog", "0", "0", "1", "", 1, 0], "object 1: `box` must have all of x0, y0, x1 and y1"),
        ([1, "dog", "0", "0", "64", "64", 1, 0], "object 1: `box` must lie in"),
        ([1, "dog", "0.5", "0", "0.4", "1", 1, 0], "object 1: `box` must have x0 < x1"),
        ([1, "dog", "", "", "", "", "-1", 0], "object 1: `scale` must be at least 0"),
        ([1, "dog", "", "", "", "", "inf", 0], "object 1: `scale` must hold finite numbers"),
        ([1, "dog", "", "", "", "", "1", "0.5"], "object 1: `order` must be a whole number"),
        ([1, "dog"], "`table` must have 5 rows of 8 cells"),
    ],
)
def test_cells_that_cannot_be_used_are_named(cells, message):
    with pytest.raises(LayoutError) as caught:
        read_scene(PROMPT, table_of(cells), Drawing(), [None] * MAX_OBJECTS)
    assert str(caught.value).startswith(message)


def test_a_broken_reference_picture_is_named(tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ImageInputError, match="object 2: `image` must be a readable"):
        read_scene(PROMPT, table_of(), Drawing(), [None, str(tmp_path / "no.png"), None, None, None])


@pytest.mark.parametrize(
    "text",
    [
        "",
        None,
        "{",
        "\ud800",
        '{"schema_version": 1}',
        '{"schema_version": 1, "prompt": "x", "objects": [{"image": "/etc/hostname"}]}',
        '{"schema_version": 1, "prompt": "x", "objects": [{"mask": "../secret.png"}]}',
        json.dumps({"schema_version": 1, "prompt": "x", "objects": [{"phrase": "x"}] * 6}),
        '{"schema_version": 1, "prompt": "x", "objects": [{"phrase": "x", "token": "x"}]}',
    ],
)
def test_layouts_that_cannot_be_pasted_are_refused(text, tmp_path):
    with pytest.raises(ObjectComposeError):
        layout_pasted(text, tmp_path)
    assert not list(tmp_path.glob("pasted*"))


def test_masks_of_other_proportions_are_refused():
    with pytest.raises(LayoutError, match="must be square"):
        show_scene(Layout("x", (SceneObject(phrase="x", mask=torch.ones(8, 9)),)))


def test_the_first_scene_suits_every_method():
    scene = first_scene(CPU)
    layout = read_scene(scene.prompt, scene.table, scene.drawing, scene.references)
    assert all(item.phrase in layout.prompt and item.box and item.image.mode == "RGBA" for item in layout.objects)
    assert len(layout.objects) == 2


def test_references_are_drawn_for_the_names_that_toybox_knows():
    name = CPU.categories[0]
    table = table_of(table_row(0, f"a red {name}"), table_row(1, "nothing known"))
    found = references_drawn(CPU, table, 3, ["old 1", "old 2", None, None, None])
    assert found[0].mode == "RGBA" and found[1:] == ["old 2", None, None, None]
    again, other = (references_drawn(CPU, table, seed, [None] * MAX_OBJECTS)[0] for seed in (3, 4))
    assert np.array_equal(np.asarray(found[0]), np.asarray(again))
    assert not np.array_equal(np.asarray(found[0]), np.asarray(other))
    with pytest.raises(ObjectComposeError, match="`seed`"):
        references_drawn(CPU, table, -1, [None] * MAX_OBJECTS)
    with pytest.raises(LayoutError, match=name):
        references_drawn(CPU, table_of(table_row(0, "nothing known")), 3, [None] * MAX_OBJECTS)
