"""Boxes of a picture that is cropped to a square and mirrored: which of them stay, and where they lie then."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from objectcompose.training.reference_augmentation import Box


#: Share of its area that a box may lose at most.
MAX_LOST = 0.4
#: Share of the square that a box may have.
LEAST_AREA, LARGEST_AREA = 0.02, 0.7
#: Of two boxes that overlap more, the larger one stays.
MAX_OVERLAP = 0.8


def central_square(size: tuple[int, int]) -> Box:
    """The largest square in the middle of a picture (width, height): xyxy fractions of its sides."""
    return _square(size, 0.5)


def random_square(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """A largest square anywhere in a picture (width, height): xyxy fractions of its sides."""
    return _square(size, float(rng.random()))


def _square(size: tuple[int, int], place: float) -> Box:
    width, height = (min(size) / side for side in size)
    left, top = place * (1 - width), place * (1 - height)
    return left, top, left + width, top + height


def mirrored_box(box: Box) -> Box:
    """The box in a picture mirrored left to right."""
    return 1 - box[2], box[1], 1 - box[0], box[3]


def box_in_square(box: Box, square: Box) -> tuple[Box | None, float]:
    """What a square shows of a box.

    Returns:
        The box in fractions of the square, clipped (None: nothing of it), and the share of its area that is there.
    """
    x0, y0 = max(box[0], square[0]), max(box[1], square[1])
    x1, y1 = min(box[2], square[2]), min(box[3], square[3])
    if x0 >= x1 or y0 >= y1:
        return None, 0.0
    share = box_area((x0, y0, x1, y1)) / box_area(box)
    width, height = square[2] - square[0], square[3] - square[1]
    edges = ((x0 - square[0]) / width, (y0 - square[1]) / height, (x1 - square[0]) / width, (y1 - square[1]) / height)
    x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in edges)  # rounding
    return (x0, y0, x1, y1), share


def boxes_in_square(boxes: Sequence[Box], square: Box) -> list[tuple[int, Box]]:
    """The boxes that can be trained on, by number, in fractions of the square: most of each is in it, its area is
    neither tiny nor almost everything, and no larger one covers the same."""
    found = []
    for number, box in enumerate(boxes):
        inside, share = box_in_square(box, square)
        if inside is not None and share >= 1 - MAX_LOST and LEAST_AREA <= box_area(inside) <= LARGEST_AREA:
            found.append((number, inside))
    kept: list[tuple[int, Box]] = []
    for number, box in sorted(found, key=lambda pair: -box_area(pair[1])):
        if all(overlap(box, other) <= MAX_OVERLAP for _, other in kept):
            kept.append((number, box))
    return sorted(kept)


def box_area(box: Box) -> float:
    """Area of a box, in the units of its sides."""
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(first: Box, second: Box) -> float:
    """Intersection over union, in [0, 1]."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (box_area(first) + box_area(second) - width * height)
