"""Where references go: LocRef-Diffusion's composite image, and the regions of its attention.

LocRef-Diffusion (arXiv:2411.15252) shows the image encoder one picture in which all references lie in their boxes,
since a picture tells places better than coordinates do. The paper leaves open how references are fitted and who is in
front; here one order decides both what is pasted over what and whose a cell is: higher `order` first, then the smaller
box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from objectcompose.attention_processors.regions import RegionPyramid, front_order, region_area
from objectcompose.pipelines.reference_images import cut_out_pixels, resize_pixels


#: Sides of the composite image in pixels, before the one resize to the encoder's: at 224 thin boxes would alias.
COMPOSITE_SIDE = 512
#: A reference whose proportions differ from its box's by more than this factor is fitted, not stretched, into it.
MAX_STRETCH = 1.5


def composite_image(
    objects: Sequence[Any], canvas: tuple[int, int], colour: torch.Tensor, side: int = COMPOSITE_SIDE
) -> torch.Tensor:
    """All references in their boxes on one square that stands for the whole canvas.

    A reference fills its box, stretched; where the proportions differ too much it is fitted into the box, centred,
    with the canvas' colour around it. Boxes are opaque, so that one in front hides what is behind it everywhere.

    Args:
        objects: objects with `image`, `box` and `order`.
        canvas: height and width of the picture to be made, in pixels; proportions are judged there, and squashed with
            the canvas.
        colour: RGB in [0, 1] of the empty canvas, `(3,)`.
        side: sides of the result, in pixels.

    Returns:
        `(3, side, side)`, float32 in [0, 1].
    """
    pixels = colour.float()[:, None, None].repeat(1, side, side)
    areas = [region_area(item.box) for item in objects]
    for index in reversed(front_order([item.order for item in objects], areas)):
        item = objects[index]
        left, right = _pixel_span(item.box[0], item.box[2], side)
        top, bottom = _pixel_span(item.box[1], item.box[3], side)
        reference = cut_out_pixels(item.image, colour)
        rows, columns = _pasted_size(reference.shape[-2:], item.box, canvas, (bottom - top, right - left))
        pixels[:, top:bottom, left:right] = colour.float()[:, None, None]
        top, left = top + (bottom - top - rows) // 2, left + (right - left - columns) // 2
        pixels[:, top : top + rows, left : left + columns] = resize_pixels(reference, (rows, columns))
    return pixels


def _pixel_span(start: float, stop: float, side: int) -> tuple[int, int]:
    """First pixel of a box's side and the one after its last; at least one pixel."""
    first = min(round(start * side), side - 1)
    return first, max(round(stop * side), first + 1)


def _pasted_size(
    size: Sequence[int], box: Sequence[float], canvas: tuple[int, int], span: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns that a reference of `size` takes of its box, which has `span` rows and columns."""
    height, width = size
    box_height, box_width = (box[3] - box[1]) * canvas[0], (box[2] - box[0]) * canvas[1]
    stretch = (width / height) / (box_width / box_height)
    if 1 / MAX_STRETCH <= stretch <= MAX_STRETCH:
        return span
    factor = min(box_height / height, box_width / width)
    rows = round(span[0] * height * factor / box_height)
    columns = round(span[1] * width * factor / box_width)
    return max(rows, 1), max(columns, 1)


def reference_regions(objects: Sequence[Any], latent_size: tuple[int, int]) -> RegionPyramid:
    """The exclusive regions of one picture's references: every cell that a box touches, owned by the one in front.

    Args:
        objects: objects with `box` and `order`; may be none.
        latent_size: height and width of the latents, the finest grid.

    Raises:
        RegionError: the finest grid cannot give each box a cell of its own.
    """
    boxes, orders = [item.box for item in objects], [item.order for item in objects]
    return RegionPyramid(boxes, latent_size, rule="cover", orders=orders, exclusive=True)
