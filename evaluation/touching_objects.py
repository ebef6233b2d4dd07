"""Touching objects of one category, which a segmenter that names pixels sees as one.

The judge's detections are connected components of a category, so look-alikes that touch are one detection. Where a
set asks for more objects of a category than components were found, the category's pixels are divided by position
alone (k-means, started from the points that lie farthest apart): colours, by which look-alikes are then told apart,
play no part. Where the picture shows fewer objects than asked for, pieces of an object result, which resemble no
prompt much: a picture gains nothing by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from objectcompose.toybox.judge import Detection
from objectcompose.toybox.scenes import boxes_of_masks


_ROUNDS = 30


def divide_touching(detections: Sequence[Detection], categories: Sequence[str]) -> list[Detection]:
    """The detections, with those of a category divided where fewer were found than the set has.

    Args:
        detections: of the judge.
        categories: of the set's objects, one entry each.

    Returns:
        Detections in the order of the categories' first ones; those of other categories follow unchanged.
    """
    found: list[Detection] = []
    for category, wanted in Counter(categories).items():
        own = [one for one in detections if one.category == category]
        found += own if not own or len(own) >= wanted else _divided(own, wanted)
    return found + [one for one in detections if one.category not in categories]


def _divided(detections: Sequence[Detection], count: int) -> list[Detection]:
    mask = torch.stack([one.mask for one in detections]).amax(0)
    points = mask.nonzero()
    if len(points) < count:
        return list(detections)
    owner = cluster_points(points.double(), count)
    score = sum(one.score for one in detections) / len(detections)
    pieces = []
    for number in range(count):
        piece = torch.zeros_like(mask)
        piece[tuple(points[owner == number].T)] = 1
        x1, y1, x2, y2 = boxes_of_masks(piece).tolist()
        pieces.append(Detection(detections[0].category, (x1, y1, x2, y2), score, piece))
    return pieces


def cluster_points(points: torch.Tensor, count: int) -> torch.Tensor:
    """k-means, without chance.

    Args:
        points: (P, 2) float64, all different, P at least `count`.
        count: clusters, all of which get a point.

    Returns:
        (P,): number of each point's cluster.
    """
    centres = points[(points - points.mean(0)).square().sum(1).argmax()][None]
    while len(centres) < count:
        centres = torch.cat([centres, points[torch.cdist(points, centres).amin(1).argmax()][None]])
    owner = torch.cdist(points, centres).argmin(1)
    for _ in range(_ROUNDS):
        means = torch.stack([points[owner == number].mean(0) for number in range(count)])
        moved = torch.cdist(points, means).argmin(1)
        if torch.equal(moved, owner) or len(moved.unique()) < count:
            break
        owner = moved
    return owner
