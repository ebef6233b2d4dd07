"""Composite image and regions: the same boxes in the same order, squashed with the canvas, and nothing lost."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from objectcompose.errors import RegionError
from objectcompose.layout import SceneObject
from objectcompose.pipelines.reference_layout import COMPOSITE_SIDE, composite_image, reference_regions


GREY = torch.tensor([0.5, 0.25, 0.75])
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
SQUARE = (64, 64)


def solid(index: int, box, order: int = 0, size: tuple[int, int] = (16, 16)) -> SceneObject:
    return SceneObject(image=Image.new("RGB", size, COLOURS[index]), box=box, order=order)


def is_colour(pixels: torch.Tensor, colour) -> torch.Tensor:
    """bool `(H, W)`: where pixels show a colour."""
    wanted = torch.as_tensor(colour, dtype=torch.float32)
    wanted = wanted / 255 if wanted.max() > 1 else wanted
    return ((pixels - wanted[:, None, None]).abs() < 0.02).all(0)


OVERLAPS = {
    "smaller in front": [solid(0, (0.0, 0.0, 0.75, 0.75)), solid(1, (0.25, 0.25, 0.5, 0.5))],
    "order in front": [solid(0, (0.0, 0.0, 0.75, 0.75), order=1), solid(1, (0.5, 0.25, 1.0, 0.5))],
    "three": [
        solid(0, (0.0, 0.0, 1.0, 0.5), order=-1),
        solid(1, (0.25, 0.25, 0.75, 1.0), order=2),
        solid(2, (0.5, 0.0, 1.0, 1.0)),
    ],
    "first of equals": [solid(0, (0.0, 0.0, 0.5, 0.5)), solid(1, (0.25, 0.25, 0.75, 0.75))],
}


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("grid", [(8, 8), (4, 12)])
def test_what_is_seen_on_the_canvas_owns_the_cell(name, grid):
    objects = OVERLAPS[name]
    canvas = (grid[0] * 8, grid[1] * 8)
    regions = reference_regions(objects, grid).at(grid)
    # stretched, so that every reference fills its box
    objects = [solid(index, item.box, item.order, _size_of(item.box, canvas)) for index, item in enumerate(objects)]
    pixels = composite_image(objects, canvas, GREY)
    rows = (torch.arange(grid[0]) * 2 + 1) * COMPOSITE_SIDE // (2 * grid[0])
    columns = (torch.arange(grid[1]) * 2 + 1) * COMPOSITE_SIDE // (2 * grid[1])
    centres = pixels[:, rows][:, :, columns]
    for index, region in enumerate(regions):
        assert torch.equal(is_colour(centres, COLOURS[index]), region > 0)
    assert torch.equal(is_colour(centres, GREY), regions.sum(0) == 0)


def _size_of(box, canvas) -> tuple[int, int]:
    return round((box[2] - box[0]) * canvas[1]), round((box[3] - box[1]) * canvas[0])


def test_an_empty_canvas_is_of_one_colour():
    assert is_colour(composite_image([], SQUARE, GREY), GREY).all()
    assert reference_regions([], (4, 6)).at((4, 6)).shape == (0, 4, 6)


def test_a_box_is_filled_where_proportions_are_similar():
    pixels = composite_image([solid(0, (0.25, 0.5, 0.75, 1.0), size=(14, 10))], SQUARE, GREY)
    seen = is_colour(pixels, COLOURS[0])
    assert seen[256:, 128:384].all() and seen.sum() == 256 * 256


@pytest.mark.parametrize(
    ("size", "rows", "columns"), [((40, 10), (352, 416), (128, 384)), ((10, 40), (256, 512), (224, 288))]
)
def test_other_proportions_are_fitted_and_centred(size, rows, columns):
    pixels = composite_image([solid(0, (0.25, 0.5, 0.75, 1.0), size=size)], SQUARE, GREY)
    seen = is_colour(pixels, COLOURS[0])
    assert seen[rows[0] : rows[1], columns[0] : columns[1]].all()
    assert seen.sum() == (rows[1] - rows[0]) * (columns[1] - columns[0])


def test_proportions_are_those_of_the_picture_to_be_made():
    """On a canvas twice as wide as high a square reference fits a box that is square there, if not in fractions."""
    square_there = (0.25, 0.0, 0.5, 0.5)
    seen = is_colour(composite_image([solid(0, square_there)], (64, 128), GREY), COLOURS[0])
    assert seen[:256, 128:256].all() and seen.sum() == 256 * 128
    wide_there = (0.0, 0.0, 0.5, 0.5)
    seen = is_colour(composite_image([solid(0, wide_there)], (64, 128), GREY), COLOURS[0])
    assert seen[:256, 64:192].all() and seen.sum() == 256 * 128  # squashed with the canvas


def test_a_box_in_front_hides_what_is_behind_even_where_it_shows_nothing():
    """As in the regions: a cell belongs to the box, not to the cut-out in it."""
    narrow = Image.new("RGBA", (40, 40))
    narrow.paste((0, 255, 0, 255), (18, 0, 22, 40))
    objects = [solid(0, (0.0, 0.0, 1.0, 1.0)), SceneObject(image=narrow, box=(0.0, 0.0, 0.5, 1.0), order=1)]
    pixels = composite_image(objects, SQUARE, GREY)
    left, right = pixels[:, :, :256], pixels[:, :, 256:]
    assert not is_colour(left, COLOURS[0]).any() and is_colour(right, COLOURS[0]).all()
    assert is_colour(left, COLOURS[1]).any() and is_colour(left, GREY).float().mean() > 0.5


def test_cut_outs_are_trimmed_before_they_are_pasted():
    small = Image.new("RGBA", (100, 100))
    small.paste((255, 0, 0, 255), (70, 70, 80, 80))
    pixels = composite_image([SceneObject(image=small, box=(0.5, 0.5, 1.0, 1.0))], SQUARE, GREY)
    assert is_colour(pixels, COLOURS[0])[256:, 256:].all()


@pytest.mark.parametrize("box", [(0.4999, 0.0, 0.5, 1.0), (0.9999, 0.9999, 1.0, 1.0), (0.0, 0.0, 0.0001, 0.0001)])
def test_tiny_boxes_leave_a_pixel_and_a_cell(box):
    assert is_colour(composite_image([solid(0, box)], SQUARE, GREY), COLOURS[0]).any()
    pyramid = reference_regions([solid(0, box)], (9, 5))
    assert all(pyramid.at(grid).sum() >= 1 for grid in [(9, 5), (5, 3), (3, 2)])


def test_boxes_that_the_finest_grid_cannot_hold_are_refused():
    with pytest.raises(RegionError, match="5 regions"):
        reference_regions([solid(0, (0.0, 0.0, 0.4, 0.4)) for _ in range(5)], (4, 4))


def test_order_of_the_list_changes_nothing():
    objects = OVERLAPS["three"]
    shuffled = [objects[2], objects[0], objects[1]]
    assert torch.equal(composite_image(objects, SQUARE, GREY), composite_image(shuffled, SQUARE, GREY))
    regions, moved = reference_regions(objects, (6, 7)).at((6, 7)), reference_regions(shuffled, (6, 7)).at((6, 7))
    assert torch.equal(regions[[2, 0, 1]], moved)
