"""What the figures of composition are: identities kept, objects told apart, layouts that vary.

Definitions (the paper's text gives none; these are the method spec's, section 10):

    DINOcomp            A picture's segments and the prompts are paired one to one so that the sum of their DINO
                        cosines is largest, without a threshold; the mean over prompts of the pair's cosine; 0 for a
                        prompt that no segment was left for.
    CLIPcomp            Of the same pairs the cosine of CLIP's picture embeddings; 0 likewise.
    identity            Of the same pairs the cosine of the judge's identity embeddings; 0 likewise. Its floor is that
                        of the prompt with other identities of its category, its ceiling that of the same identity in
                        another pose, both rendered alone; identity_gain is identity less floor, prompt by prompt.
                        Of an occluded reference the judge, unlike DINO and CLIP, sees the whole object.
    matching_accuracy   Share of prompts whose segment the judge finds more like this prompt than like any other
                        prompt of the set; unmatched ones count as wrong. Chance is one by the number of objects.
    category            Share of prompts whose segment the judge names as the prompt's category.
    match_rate          Share of prompts whose pair has a DINO cosine of at least the guidance's threshold.
    copies              Per picture, further segments that reach this threshold with some prompt.
    diversity           Over the pictures of one set and one of its objects, where it was matched in two or more:
                        spread of the centre (root of summed variances, in sides of the picture), of the size (standard
                        deviation of log2 of the root of the area), of the rotation (circular, degrees) and of the flip
                        (0 none, 1 half of them mirrored). `diversity` alone is the mean of those that are known, each
                        in units of `WORLD_SPREADS`: 1 is as varied as the world itself.
    diversity_lpips     Mean LPIPS over pairs of one set's pictures; only with its weights.

Cosines and shares of `.overlapping` are over objects whose segment's box lies in another object's by more than
`OVERLAP_SHARE`, `.apart` over all others that have a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.report import share_metrics
from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics
from objectcompose.pipelines.object_matching import SIMILARITY_THRESHOLD, match_objects


Row = dict[str, Any]
#: Figures that are means over rows in [-1, 1], and those that are shares.
COSINES = ("dino", "clip", "identity", "identity_floor", "identity_ceiling", "identity_gain")
COSINE_NAMES = {"dino": "dino_comp", "clip": "clip_comp"}
SHARES = ("matching_accuracy", "category", "match_rate")
#: What eight of the world's own scenes of one set have, sets of two to four; a test measures them.
WORLD_SPREADS = {"centre": 0.25, "size": 0.10, "rotation": 22.0, "flip": 0.73}
#: Objects overlap when so much of the one's box lies in the other's.
OVERLAP_SHARE = 0.1


def pair_rows(
    dino: torch.Tensor,
    clip: torch.Tensor,
    judge: torch.Tensor | None = None,
    is_category: Sequence[Sequence[bool]] | None = None,
    threshold: float = SIMILARITY_THRESHOLD,
) -> list[Row]:
    """What became of each prompt of one picture.

    Args:
        dino, clip, judge: cosines (N, M) of N prompts and M segments; M may be 0.
        is_category: whether the judge names segment m as prompt n's category, N lists of M; None without a judge.
        threshold: DINO cosine of an accepted pair.

    Returns:
        N rows: `segment` (its number or None), `dino`, `clip`, `match_rate` (0 or 1), `copies`, and with a judge
        `identity`, `matching_accuracy` and `category`.

    Raises:
        ObjectComposeError: shapes differ.
        NonFiniteError: a cosine is not finite.
    """
    if dino.shape != clip.shape or (judge is not None and judge.shape != dino.shape):
        raise ObjectComposeError("`dino`, `clip` and `judge` must be of the same prompts and segments.")
    pairs = match_objects(dino, -np.inf)
    taken = {segment for segment, _ in pairs}
    free = [segment for segment in range(dino.shape[1]) if segment not in taken]
    copied = [int(dino[:, segment].argmax()) for segment in free if float(dino[:, segment].max()) >= threshold]
    rows = []
    for number, (segment, cosine) in enumerate(pairs):
        row: Row = {
            "segment": segment,
            "dino": 0.0 if cosine is None else cosine,
            "clip": 0.0 if segment is None else float(clip[number, segment]),
            "match_rate": float(cosine is not None and cosine >= threshold),
            "copies": copied.count(number),
        }
        if judge is not None and is_category is not None:
            row["identity"] = 0.0 if segment is None else float(judge[number, segment])
            is_own = segment is not None and int(judge[:, segment].argmax()) == number
            row["matching_accuracy"] = float(is_own)
            row["category"] = float(segment is not None and is_category[number][segment])
        rows.append(row)
    return rows


def composition_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """All figures, over everything, per number of objects and per kind of set.

    Args:
        rows: of `pair_rows` with `set`, `round`, `object`, `kind`, `count`, and where they were estimated `x`, `y`,
            `size`, `rotation` (degrees), `flip` (0 or 1), `identity_floor`, `identity_ceiling` and `overlap` (share
            of the segment's box in another one's); and rows of `lpips_rows`.

    Raises:
        ObjectComposeError: no rows of objects.
    """
    distances, rows = [row for row in rows if "lpips" in row], [with_gain(row) for row in rows if "lpips" not in row]
    if not rows:
        raise ObjectComposeError("`rows` must hold at least one object, got none.")
    metrics = _figures(rows, "") | _mean("diversity_lpips", distances, "lpips")
    for count in sorted({row["count"] for row in rows}):
        metrics |= _figures([row for row in rows if row["count"] == count], f".n{count}")
        of_count = [row for row in distances if row["count"] == count]
        metrics |= _mean(f"diversity_lpips.n{count}", of_count, "lpips")
    kinds = sorted({row["kind"] for row in rows})
    for kind in kinds if len(kinds) > 1 else []:
        metrics |= _figures([row for row in rows if row["kind"] == kind], f".{kind.replace('-', '_')}")
    placed = [row for row in rows if row.get("overlap") is not None]
    overlapping = [row for row in placed if row["overlap"] > OVERLAP_SHARE]
    if overlapping and len(overlapping) < len(placed):
        metrics |= _means(overlapping, ".overlapping")
        metrics |= _means([row for row in placed if row["overlap"] <= OVERLAP_SHARE], ".apart")
    return metrics


def with_gain(row: Mapping[str, Any]) -> Row:
    """The row with `identity_gain`, where identity and its floor are known."""
    if row.get("identity") is None or row.get("identity_floor") is None:
        return dict(row)
    return {**row, "identity_gain": row["identity"] - row["identity_floor"]}


def overlap_of_boxes(boxes: Sequence[Sequence[float] | None]) -> list[float | None]:
    """Largest share of each box (xyxy) that lies in one of the others; None where there is no box."""

    def shared(one: Sequence[float], other: Sequence[float]) -> float:
        width = min(one[2], other[2]) - max(one[0], other[0])
        height = min(one[3], other[3]) - max(one[1], other[1])
        return max(width, 0.0) * max(height, 0.0) / max((one[2] - one[0]) * (one[3] - one[1]), 1e-12)

    shares: list[float | None] = []
    for place, box in enumerate(boxes):
        others = [one for other, one in enumerate(boxes) if other != place and one is not None]
        shares.append(None if box is None else max((shared(box, one) for one in others), default=0.0))
    return shares


def _figures(rows: Sequence[Mapping[str, Any]], ending: str) -> dict[str, float]:
    metrics = _means(rows, ending)
    pictures = len({(row["set"], row["round"]) for row in rows})
    metrics[f"copies{ending}"] = sum(row["copies"] for row in rows) / pictures
    return metrics | _diversity(rows, ending)


def _means(rows: Sequence[Mapping[str, Any]], ending: str) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in COSINES:
        found = [row for row in rows if row.get(name) is not None]
        metrics |= _mean(COSINE_NAMES.get(name, name) + ending, found, name)
    for name in SHARES:
        found = [row for row in rows if row.get(name) is not None]
        if found:
            metrics |= share_metrics(name + ending, [row[name] for row in found], [row["set"] for row in found])
    return metrics


def _mean(name: str, rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """Mean with an interval over sets, where there are two or more."""
    values, groups = [float(row[key]) for row in rows], [row["set"] for row in rows]
    if not values:
        return {}
    if len(set(groups)) < 2:
        return {name: sum(values) / len(values)}
    return interval_metrics(name, bootstrap_mean(values, groups=groups))


# ---- diversity


def spread_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """How one object of one set varies over its pictures: a row for each that was matched in two or more.

    Returns:
        `set`, `object`, those of `centre`, `size`, `rotation` and `flip` that are known, and `diversity`, their mean
        in units of `WORLD_SPREADS`.
    """
    spreads: dict[str, tuple[tuple[str, ...], Callable[..., float]]] = {
        "centre": (("x", "y"), centre_spread),
        "size": (("size",), size_spread),
        "rotation": (("rotation",), rotation_spread),
        "flip": (("flip",), flip_spread),
    }
    found: list[Row] = []
    for (label, number), group in sorted(_by_object(rows).items()):
        known: Row = {}
        for name, (keys, spread) in spreads.items():
            seen = [row for row in group if all(row.get(key) is not None for key in keys)]
            if len(seen) >= 2:
                known[name] = spread(*([row[key] for row in seen] for key in keys))
        if known:
            units = [value / WORLD_SPREADS[name] for name, value in known.items()]
            found.append({"set": label, "object": number, **known, "diversity": sum(units) / len(units)})
    return found


def _diversity(rows: Sequence[Mapping[str, Any]], ending: str) -> dict[str, float]:
    found = spread_rows(rows)
    metrics: dict[str, float] = {}
    for name in ("diversity", *WORLD_SPREADS):
        label = name if name == "diversity" else f"diversity_{name}"
        metrics |= _mean(label + ending, [row for row in found if name in row], name)
    return metrics


def _by_object(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["object"]), []).append(row)
    return groups


def centre_spread(x: Sequence[float], y: Sequence[float]) -> float:
    """Root of the summed variances, in sides of the picture."""
    return float(np.sqrt(np.var(x) + np.var(y)))


def size_spread(sizes: Sequence[float]) -> float:
    """Standard deviation in doublings of the side; sizes are shares of the picture's area, above 0."""
    return float(np.std(0.5 * np.log2(sizes)))


def rotation_spread(degrees: Sequence[float]) -> float:
    """Circular standard deviation, degrees."""
    length = float(np.abs(np.exp(1j * np.deg2rad(degrees)).mean()))
    return float(np.rad2deg(np.sqrt(max(-2 * np.log(max(length, 1e-12)), 0.0))))


def flip_spread(flips: Sequence[float]) -> float:
    """0 where all look one way, 1 where half of them are mirrored."""
    share = float(np.mean(flips))
    return 2 * min(share, 1 - share)
