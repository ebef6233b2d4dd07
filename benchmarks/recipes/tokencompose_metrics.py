"""Figures of the TokenCompose recipe from its rows."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measure import ratio_metrics, ratio_of_pairs
from benchmarks.recipes.common import Row, metrics_of_arm, paired_metrics
from objectcompose.evaluation.frechet import jackknife_metrics
from objectcompose.evaluation.multigen import multigen_metrics
from objectcompose.evaluation.report import share_metrics
from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics


#: (arm, arm it is compared with) and how the pair is called.
COMPARISONS = {
    "tokencompose_ldm": ("tokencompose", "ldm"),
    "tokencompose_base": ("tokencompose", "base"),
    "largest_weights_ldm": ("largest_weights", "ldm"),
    "sepen_base": ("sepen", "base"),
    "sepen_short_base": ("sepen_short", "base"),
}


def metrics_of_rows(rows: Sequence[Row]) -> dict[str, float | bool]:
    """All figures: `<metric>.<arm>`, and `<metric>_diff.<pair>` for those arms that are there."""
    by_arm: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {}).setdefault(row["case"], []).append(row)
    metrics: dict[str, float | bool] = {}
    for arm, cases in by_arm.items():
        metrics |= _arm_metrics(arm, cases)
    for name, (ours, theirs) in COMPARISONS.items():
        if ours in by_arm and theirs in by_arm:
            metrics |= _difference_metrics(name, by_arm[ours], by_arm[theirs])
    return metrics


def _arm_metrics(arm: str, cases: dict[str, list[Row]]) -> dict[str, float | bool]:
    found: dict[str, float] = {}
    metrics: dict[str, float | bool] = {}
    if "test" in cases:
        found |= multigen_metrics(cases["test"])
    for case, name in (("pairs", "object_accuracy"), ("single", "single_object")):
        if case in cases:
            hits = [_is_complete(row) for row in cases[case]]
            # a pair stands in both orders, which are one draw
            found |= share_metrics(name, hits, [" ".join(sorted(row["named"])) for row in cases[case]])
    if "map" in cases:
        samples = [row["sample"] for row in cases["map"]]
        for field in ("iou", "inside"):
            values = [row[field] for row in cases["map"]]
            found |= interval_metrics(f"map_{field}", bootstrap_mean(values, groups=samples))
    for row in cases.get("fd", []):
        found |= jackknife_metrics("fd_judge", row["value"], row["left_out"])
    if "seconds" in cases:
        ratio = ratio_of_pairs(*([row[side] for row in cases["seconds"]] for side in ("seconds_a", "seconds_b")))
        metrics |= ratio_metrics(f"seconds_ratio.{arm}", ratio)
    return {**metrics_of_arm(found, arm), **metrics}


def _is_complete(row: Row) -> float:
    return float(len(row["found"]) == len(row["named"]))


def _difference_metrics(name: str, ours: dict[str, list[Row]], theirs: dict[str, list[Row]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if "test" in ours:
        three = [[row for row in side["test"] if len(row["named"]) >= 3] for side in (ours, theirs)]
        points = paired_metrics(
            f"mg3_diff.{name}", *three, lambda row: 100.0 * (len(row["found"]) >= 3), ("prompt", "round"), "prompt"
        )
        metrics |= points
    if "single" in ours:
        metrics |= paired_metrics(
            f"single_object_diff.{name}",
            ours["single"],
            theirs["single"],
            lambda row: 100 * _is_complete(row),
            ("prompt", "round"),
            "prompt",
        )
    if "fd" in ours and "fd" in theirs:
        metrics |= _distance_ratio(name, ours["fd"][0], theirs["fd"][0])
    for field in ("iou", "inside"):
        metrics |= paired_metrics(
            f"map_{field}_diff.{name}",
            ours["map"],
            theirs["map"],
            lambda row, field=field: row[field],
            ("sample", "phrase", "t"),
            "sample",
        )
    return metrics


def _distance_ratio(name: str, ours: Row, theirs: Row) -> dict[str, float]:
    """Both distances are to the same scenes, by the same captions and noise: blocks are left out of both."""
    left_out = [a / b for a, b in zip(ours["left_out"], theirs["left_out"], strict=True)]
    return jackknife_metrics(f"fd_judge_ratio.{name}", ours["value"] / theirs["value"], left_out)
