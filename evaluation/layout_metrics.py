"""Are objects where their boxes are? Average precision by COCO's rules, and cosines between crops and references.

The average precision is computed here and not by pycocotools: which box matches which does not depend on the other
pictures, so a bootstrap over pictures reuses the matches, while COCOeval would match again for each draw. The tests
hold it equal to COCOeval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from objectcompose.evaluation.report import share_metrics


Box = Sequence[float]
Row = Mapping[str, Any]
#: Where a reference is looked for; see `cosines_of_rows`.
Place = Literal["own", "others", "outside"]
#: COCO's thresholds of intersection over union, and the recalls at which precision is read.
OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100
RESAMPLES = 1000


@dataclass(frozen=True)
class Matches:
    """Detections of one category in one picture.

    Attributes:
        scores: (D,), best first.
        is_hit: (10, D), whether each matches a wanted box at each threshold.
        wanted: number of boxes of this category that should be there.
    """

    scores: np.ndarray
    is_hit: np.ndarray
    wanted: int


def overlaps_of(found: Sequence[Box], wanted: Sequence[Box]) -> np.ndarray:
    """Intersection over union of boxes (xyxy): (D, G)."""
    first, second = (
        np.reshape(np.array(found, dtype=float), (-1, 1, 4)),
        np.reshape(np.array(wanted, float), (1, -1, 4)),
    )
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    shared = sides.clip(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (first, second)]
    return shared / (areas[0] + areas[1] - shared)


def match_boxes(found: Sequence[tuple[float, Box]], wanted: Sequence[Box]) -> Matches:
    """Match detections, best first, each to the free box that it overlaps most, as COCO does.

    Args:
        found: score and box of each detection.
        wanted: the boxes that should be there.
    """
    order = np.argsort([-score for score, _ in found], kind="mergesort")[:MAX_DETECTIONS]
    ranked = [found[number] for number in order]
    table = overlaps_of([box for _, box in ranked], wanted)
    is_hit = np.zeros((len(OVERLAPS), len(ranked)), dtype=bool)
    for level, least in enumerate(OVERLAPS):
        is_free = np.ones(len(wanted), dtype=bool)
        for number, row in enumerate(table):
            candidates = np.where(is_free, row, -1.0)
            if len(candidates) and candidates.max() >= min(least, 1 - 1e-10):
                best = len(candidates) - 1 - int(candidates[::-1].argmax())  # of equal ones the last, as there
                is_free[best], is_hit[level, number] = False, True
    return Matches(np.array([score for score, _ in ranked], dtype=float), is_hit, len(wanted))


def average_precisions(pictures: Sequence[Matches], counts: np.ndarray | None = None) -> np.ndarray:
    """Mean over 101 recalls of the best precision at that recall or a higher one: (R, 10), one per threshold.

    Args:
        pictures: of one category.
        counts: (R, pictures), how often each picture counts in each of R draws; None: each once, R = 1.

    Returns:
        NaN in draws that have no box to be found.
    """
    counts = np.ones((1, len(pictures))) if counts is None else counts
    scores = np.concatenate([one.scores for one in pictures])
    order = np.argsort(-scores, kind="mergesort")
    is_hit = np.concatenate([one.is_hit for one in pictures], axis=1)[:, order]
    weights = counts[:, np.repeat(np.arange(len(pictures)), [len(one.scores) for one in pictures])[order]]
    wanted = counts @ np.array([one.wanted for one in pictures], dtype=float)
    seen, levels = weights.cumsum(1).clip(min=1), []
    for hits in is_hit:
        found = (weights * hits).cumsum(1)
        precision = np.maximum.accumulate((found / seen)[:, ::-1], axis=1)[:, ::-1]
        # how many of the recalls are reached by a detection and by none before it; recall 0 is by the first
        reached = np.searchsorted(RECALLS, found / wanted.clip(min=1)[:, None], side="right")
        levels.append((precision * np.diff(reached, axis=1, prepend=0)).sum(1) / len(RECALLS))
    return np.where(wanted[:, None] > 0, np.stack(levels, axis=1), np.nan)


def matches_of_row(categories: Sequence[str], boxes: Sequence[Box], found: Sequence[Row]) -> dict[str, Matches]:
    """Matches of one picture by category, those of its layout; what is found beside them counts nowhere.

    Args:
        categories: of the layout's objects.
        boxes: of the same.
        found: with `category`, `score` and `box`.
    """
    matches = {}
    for category in dict.fromkeys(categories):
        wanted = [box for name, box in zip(categories, boxes, strict=True) if name == category]
        seen = [(one["score"], one["box"]) for one in found if one["category"] == category]
        matches[category] = match_boxes(seen, wanted)
    return matches


def mean_precisions(rows: Sequence[Mapping[str, Matches]], counts: np.ndarray | None = None) -> np.ndarray:
    """AP50 and AP[.50:.95] in [0, 1], means over the categories that have a box to be found: (R, 2).

    Args:
        rows: of `matches_of_row`, one per picture.
        counts: see `average_precisions`.
    """
    nothing = match_boxes([], [])
    tables = [
        average_precisions([row.get(category, nothing) for row in rows], counts)
        for category in dict.fromkeys(name for row in rows for name in row)
    ]
    table = np.nanmean(np.stack(tables), axis=0)
    return np.stack([table[:, 0], table.mean(1)], axis=1)


def precision_metrics(name: str, rows: Sequence[Mapping[str, Matches]], groups: Sequence[object]) -> dict[str, float]:
    """`<name>ap50` and `<name>ap` in per cent, with bootstrap intervals where there are two groups or more.

    Args:
        name: prefix.
        rows: of `matches_of_row`.
        groups: one label per row, such as its layout; rows of a group are drawn together.
    """
    counts, names = _drawn_counts(groups), (f"{name}ap50", f"{name}ap")
    drawn = None if counts is None else mean_precisions(rows, counts)
    return _bounded(names, mean_precisions(rows)[0], drawn)


def precision_differences(
    name: str,
    ours: Sequence[Mapping[str, Matches]],
    theirs: Sequence[Mapping[str, Matches]],
    groups: Sequence[object],
) -> dict[str, float]:
    """`ap50_diff.<name>` and `ap_diff.<name>`: ours less theirs in percentage points, from the same draws.

    Args:
        name: of the pair.
        ours, theirs: of `matches_of_row`, row by row of the same layouts and noise.
        groups: as in `precision_metrics`.
    """
    counts, names = _drawn_counts(groups), (f"ap50_diff.{name}", f"ap_diff.{name}")
    drawn = None if counts is None else mean_precisions(ours, counts) - mean_precisions(theirs, counts)
    return _bounded(names, (mean_precisions(ours) - mean_precisions(theirs))[0], drawn)


def _drawn_counts(groups: Sequence[object]) -> np.ndarray | None:
    """How often each row counts in each of the bootstrap's draws, (R, rows); None of fewer than two groups."""
    labels = list(dict.fromkeys(groups))
    if len(labels) < 2:
        return None
    drawn = np.random.default_rng(0).multinomial(len(labels), [1 / len(labels)] * len(labels), size=RESAMPLES)
    place = {label: number for number, label in enumerate(labels)}
    return drawn[:, [place[group] for group in groups]].astype(float)


def _bounded(names: Sequence[str], values: np.ndarray, drawn: np.ndarray | None) -> dict[str, float]:
    """Values (K,) in per cent, with the bounds of draws (R, K)."""
    metrics = {name: 100 * float(value) for name, value in zip(names, values, strict=True)}
    if drawn is None:
        return metrics
    bounds = 100 * np.nanquantile(drawn, [0.025, 0.975], axis=0)
    for (key, value), low, high in zip(list(metrics.items()), *bounds, strict=True):
        # no mean of rows: in a small sample the value itself may lie outside by a hair
        metrics |= {f"{key}.lo": min(float(low), value), f"{key}.hi": max(float(high), value)}
    return metrics


@dataclass(frozen=True)
class Cosines:
    """Cosines of some pictures.

    Attributes:
        values: one for each pair of a crop and a reference.
        layouts: the layout of each.
    """

    values: list[float]
    layouts: list[Any]


def cosines_of_rows(rows: Sequence[Row], encoder: str, source: str | None = None, place: Place = "own") -> Cosines:
    """Cosines of references with what is seen in a place.

    Args:
        rows: as in `layout_metrics`; those without `outside` have nothing to say of that place.
        encoder: of the pictures.
        source: "truth" or "rivals" of the rows; None: the painted pictures.
        place: a reference's "own" box, the boxes of "others", or "outside": all of the picture but its own box.
    """
    values: list[float] = []
    layouts: list[Any] = []
    for row in rows:
        seen = row if source is None else row[source]
        chosen = [] if seen is None else _cosines_at(seen, encoder, place)
        values += chosen
        layouts += [row["layout"]] * len(chosen)
    return Cosines(values, layouts)


def _cosines_at(seen: Row, encoder: str, place: Place) -> list[float]:
    if place == "outside":
        return list(seen.get("outside", {}).get(encoder, []))
    table = np.array(seen["cosines"][encoder])
    is_own = np.eye(len(table), dtype=bool)
    return table[is_own if place == "own" else ~is_own].tolist() if table.size else []


def way_metrics(name: str, similar: Cosines, floor: Cosines, ceiling: Cosines) -> dict[str, float]:
    """(similarity - floor) / (ceiling - floor) of the means, in per cent, with its bootstrap interval over layouts.

    Args:
        name: of the metric.
        similar, floor, ceiling: of the same layouts.

    Returns:
        Nothing where the ceiling is not above the floor, which leaves no way to go.
    """
    labels = list(dict.fromkeys(similar.layouts))
    counts, draws = _drawn_counts(labels), [np.ones((1, len(labels)))]
    draws += [] if counts is None else [counts]
    means = []
    for one in (similar, floor, ceiling):
        sums, sizes = np.zeros(len(labels)), np.zeros(len(labels))
        for value, label in zip(one.values, one.layouts, strict=True):
            sums[labels.index(label)] += value
            sizes[labels.index(label)] += 1
        means.append([drawn @ sums / (drawn @ sizes) for drawn in draws])
    if (means[2][0] <= means[1][0]).any():
        return {}
    ways = [(own - low) / np.where(high > low, high - low, np.nan) for own, low, high in zip(*means, strict=True)]
    return _bounded((name,), ways[0], None if counts is None else ways[1][:, None])


def shift_metrics(name: str, left: Sequence[Row], right: Sequence[Row]) -> dict[str, float]:
    """How far objects move with their boxes, as a share of how far the boxes move, in per cent.

    Args:
        name: of the metric.
        left, right: rows of layouts with one object, the same ones, painted from the same noise.

    Returns:
        The mean, an object that is not found in both pictures counting as one that did not move; 100: all follow.
    """
    others = {(row["layout"], row["round"]): row for row in right}
    shares = []
    for row in left:
        other = others[row["layout"], row["round"]]
        before, after = _found_place(row), _found_place(other)
        boxes = [(one["boxes"][0][0] + one["boxes"][0][2]) / 2 for one in (row, other)]
        moved = 0.0 if before is None or after is None else after - before
        shares.append(moved / (boxes[1] - boxes[0]))
    return share_metrics(name, shares, [row["layout"] for row in left])


def _found_place(row: Row) -> float | None:
    """Horizontal centre of the best detection of the row's object; None if there is none."""
    found = [one for one in row["found"] if one["category"] == row["categories"][0]]
    best = max(found, key=lambda one: one["score"], default=None)
    return None if best is None else (best["box"][0] + best["box"][2]) / 2


def layout_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """All figures, over all rows and for each kind alone (`<kind>.`), in per cent.

    `ap50`, `ap`: of the detector's boxes; with `ceiling.` before them: in the true scenes. For each encoder of crops:
    `similarity` of an object's box to its reference, its `ceiling` (true scene), its `floor` (the scene with other
    instances of the same categories), the `way` from floor to ceiling that it has come, `leakage`, a box's similarity
    to the references of other boxes, and `leakage_outside`, a reference's similarity to the picture without its box;
    the two are `true_leakage` and `true_leakage_outside` in the true scene.

    Args:
        rows: one per picture: `layout`, `round`, `kind`, `categories`, `boxes`, `found`, `cosines`, encoder to
            (box, reference), and `outside`, encoder to one for each reference; and `truth` and `rivals`, which have
            `found`, `cosines` and `outside` too, or None.
    """
    metrics: dict[str, float] = {}
    for kind in ("", *sorted({row["kind"] for row in rows} - {""})):
        counted = [row for row in rows if not kind or row["kind"] == kind]
        metrics |= _metrics_of_kind(f"{kind}." if kind else "", counted)
    return metrics


def matches_of_rows(rows: Sequence[Row], source: str | None = None) -> list[dict[str, Matches]]:
    """`matches_of_row` of each row, or of its "truth"."""
    return [
        matches_of_row(row["categories"], row["boxes"], (row if source is None else row[source])["found"])
        for row in rows
    ]


def _metrics_of_kind(prefix: str, rows: Sequence[Row]) -> dict[str, float]:
    once = list({row["layout"]: row for row in reversed(rows)}.values())[::-1]  # true scenes count once
    metrics = precision_metrics(prefix, matches_of_rows(rows), [row["layout"] for row in rows])
    known = [row for row in once if row["truth"] is not None]
    if known:
        found = matches_of_rows(known, "truth")
        metrics |= precision_metrics(f"{prefix}ceiling.", found, [row["layout"] for row in known])
    sources: tuple[tuple[str, str | None, Sequence[Row], Place], ...] = (
        ("similarity", None, rows, "own"),
        ("ceiling", "truth", once, "own"),
        ("floor", "rivals", once, "own"),
        ("leakage", None, rows, "others"),
        ("true_leakage", "truth", once, "others"),
        ("leakage_outside", None, rows, "outside"),
        ("true_leakage_outside", "truth", once, "outside"),
    )
    for encoder in rows[0]["cosines"]:
        name = f"{prefix}{encoder}."
        own: dict[str, Cosines] = {}
        for key, source, counted, place in sources:
            own[key] = cosines_of_rows(counted, encoder, source, place)
            if own[key].values:
                metrics |= share_metrics(f"{name}{key}", own[key].values, own[key].layouts)
        if {*own["similarity"].layouts} == {*own["floor"].layouts} == {*own["ceiling"].layouts}:
            metrics |= way_metrics(f"{name}way", own["similarity"], own["floor"], own["ceiling"])
    return metrics
