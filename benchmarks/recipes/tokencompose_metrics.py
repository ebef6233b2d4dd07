"""Figures of the TokenCompose recipe from its rows."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measure import ratio_of_pairs
from benchmarks.recipes.common import Row, metrics_of_arm, paired_metrics
from objectcompose.evaluation.multigen import multigen_metrics
from objectcompose.evaluation.report import share_metrics
from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics


#: (arm, arm it is compared with) and how the pair is called.
COMPARISONS = {
    "tokencompose_ldm": ("tokencompose", "ldm"),
    "tokencompose_base": ("tokencompose", "base"),
    "sepen_base": ("sepen", "base"),
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
            found |= share_metrics(name, hits, [row["prompt"] for row in cases[case]])
    if "map" in cases:
        samples = [row["sample"] for row in cases["map"]]
        for field in ("iou", "inside"):
            values = [row[field] for row in cases["map"]]
            found |= interval_metrics(f"map_{field}", bootstrap_mean(values, groups=samples))
    for row in cases.get("fd", []):
        found |= {key.replace("value", "fd_judge"): row[key] for key in row if key.startswith("value")}
    if "seconds" in cases:
        ratio = ratio_of_pairs(*([row[side] for row in cases["seconds"]] for side in ("seconds_a", "seconds_b")))
        metrics |= {f"seconds_ratio.{arm}": ratio.ratio, f"seconds_ratio.{arm}.iqr": ratio.iqr}
        metrics[f"seconds_ratio.{arm}.valid"] = ratio.valid
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
