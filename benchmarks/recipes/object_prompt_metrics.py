"""Figures of the ObjectPrompt recipe from its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.measure import ratio_metrics, ratio_of_pairs
from benchmarks.recipes.common import Row, paired_metrics
from objectcompose.evaluation.composition_metrics import OVERLAP_SHARE, WORLD_SPREADS, spread_rows, with_gain
from objectcompose.evaluation.report import share_metrics
from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics


STREAM_ARMS = ("coarse", "fine", "mixed", "swapped")
GUIDANCE_ARMS = ("text", "unguided", "masks", "guided", "guided_fast")
#: Pairs of them whose difference is stated.
COMPARED_GUIDANCE = (
    ("unguided", "text"), ("masks", "unguided"), ("guided", "unguided"), ("guided_fast", "unguided"),
    ("guided", "masks"), ("guided", "guided_fast"),
)  # fmt: skip
#: Sets whose objects have different categories, and whose references are whole.
DISTINCT_KINDS = ("seen", "unseen", "unseen-pair")
#: Coarse and fine are told apart, and what mixed keeps of them is stated, from so many standard errors on.
LEAST_STANDARD_ERRORS = 4.0
_IN_INTERVAL = 2 * 1.96  # standard errors between the bounds of a 95 % interval
_PAIR = ("set", "round", "object")


def metrics_of_rows(rows: Sequence[Row]) -> dict[str, float | bool]:
    """All figures: `<metric>.<arm>`, with `_<part>` behind the arm for parts of the sets, and differences of pairs."""
    by_case: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        one = row if row["case"] == "seconds" else with_gain(row)
        by_case.setdefault(row["case"], {}).setdefault(row["arm"], []).append(one)
    streams, guidance = by_case.get("streams", {}), by_case.get("guidance", {})
    metrics: dict[str, float | bool] = {}
    for arm, own in streams.items():
        metrics |= _stream_metrics(arm, own)
    for arm, own in guidance.items():
        metrics |= _guidance_metrics(arm, own)
    metrics |= _trade_off(streams)
    for ours, theirs in COMPARED_GUIDANCE:
        if ours in guidance and theirs in guidance:
            metrics |= _guidance_differences(f"{ours}_{theirs}", guidance[ours], guidance[theirs])
    for arm, own in by_case.get("seconds", {}).items():
        metrics |= _seconds_metrics(arm, own)
    return metrics


def distinct_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of sets of `DISTINCT_KINDS`."""
    return [row for row in rows if row["kind"] in DISTINCT_KINDS]


def _mean(name: str, rows: Sequence[Mapping[str, Any]], field: str) -> dict[str, float]:
    """Mean with its bounds over sets, where there are two sets or more."""
    values = [float(row[field]) for row in rows if row.get(field) is not None]
    groups = [row["set"] for row in rows if row.get(field) is not None]
    if len(set(groups)) < 2:
        return {name: sum(values) / len(values)} if values else {}
    return interval_metrics(name, bootstrap_mean(values, groups=groups))


def _share(name: str, rows: Sequence[Row], field: str) -> dict[str, float]:
    found = [row for row in rows if row.get(field) is not None]
    return share_metrics(name, [row[field] for row in found], [row["set"] for row in found]) if found else {}


def _parts(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Parts of the distinct sets, by the ending of their figures: kinds, and numbers of objects."""
    parts = {f"_{kind.replace('-', '_')}": [row for row in rows if row["kind"] == kind] for kind in DISTINCT_KINDS}
    counts = sorted({row["count"] for row in rows})
    return parts | {f"_n{count}": [row for row in rows if row["count"] == count] for count in counts}


def _stream_metrics(arm: str, rows: list[Row]) -> dict[str, float]:
    """What one arm of the ablation of keys and values keeps, and how its layouts vary."""
    metrics = _mean(f"identity.{arm}", rows, "identity_gain") | _mean(f"dinocomp.{arm}", rows, "dino")
    metrics |= _mean(f"clipcomp.{arm}", rows, "clip") | _share(f"category.{arm}", rows, "category")
    for ending, part in _parts(rows).items():
        metrics |= _mean(f"identity.{arm}{ending}", part, "identity_gain")
    spreads = spread_rows(rows)
    metrics |= _mean(f"diversity.{arm}", spreads, "diversity")
    for name in WORLD_SPREADS:
        metrics |= _mean(f"diversity_{name}.{arm}", spreads, name)
    return metrics


def _guidance_metrics(arm: str, rows: list[Row]) -> dict[str, float]:
    distinct = distinct_rows(rows)
    parts = {"": distinct, **_parts(distinct)}
    for ending, kind in (("_lookalike", "look-alikes"), ("_occluded", "occluded")):
        parts[ending] = [row for row in rows if row["kind"] == kind]
    placed = [row for row in distinct if row.get("overlap") is not None]
    parts["_overlapping"] = [row for row in placed if row["overlap"] > OVERLAP_SHARE]
    parts["_apart"] = [row for row in placed if row["overlap"] <= OVERLAP_SHARE]
    metrics: dict[str, float] = {}
    for ending, part in parts.items():
        for name, field in (("dinocomp", "dino"), ("clipcomp", "clip"), ("identity", "identity_gain")):
            metrics |= _mean(f"{name}.{arm}{ending}", part, field)
    metrics |= _share(f"category.{arm}", distinct, "category")
    five = [row for row in rows if row["count"] == 5]
    told = {
        "distinct": distinct,
        "distinct5": distinct_rows(five),
        "lookalike5": [row for row in five if row["kind"] == "look-alikes"],
    }
    suffix = "" if arm == "unguided" else f"_{arm}"  # the unguided picture is what guidance has to match
    for name, part in told.items():
        metrics |= _share(f"matching_accuracy.{name}{suffix}", part, "matching_accuracy")
    return metrics


def _difference(
    name: str, ours: Sequence[Row], theirs: Sequence[Row], field: str, pair: Sequence[str] = _PAIR
) -> dict[str, float]:
    """Mean of ours less theirs over the rows that both know, in pairs."""
    known = [
        {tuple(row[key] for key in pair) for row in side if row.get(field) is not None} for side in (ours, theirs)
    ]
    both = known[0] & known[1]
    sides = [[row for row in side if tuple(row[key] for key in pair) in both] for side in (ours, theirs)]
    if len({row["set"] for row in sides[0]}) < 2:
        return {}
    value: Callable[[Row], float] = lambda row: float(row[field])  # noqa: E731
    return paired_metrics(name, sides[0], sides[1], value, pair, "set")


def _trade_off(streams: dict[str, list[Row]]) -> dict[str, float | bool]:
    """Differences of the arms, and what mixed keeps of fine's identity and of coarse's extra diversity."""
    metrics: dict[str, float | bool] = {}
    spreads = {arm: spread_rows(rows) for arm, rows in streams.items()}
    for ours, theirs in (("coarse", "fine"), ("mixed", "fine"), ("mixed", "coarse"), ("mixed", "swapped")):
        if ours in streams and theirs in streams:
            label = f"{ours}_{theirs}"
            metrics |= _difference(f"identity_diff.{label}", streams[ours], streams[theirs], "identity_gain")
            metrics |= _difference(
                f"diversity_diff.{label}", spreads[ours], spreads[theirs], "diversity", ("set", "object")
            )
    for name in ("identity", "diversity"):
        apart, kept = f"{name}_diff.coarse_fine", f"{name}_diff.mixed_fine"
        if f"{apart}.lo" not in metrics or kept not in metrics:
            continue
        error = (metrics[f"{apart}.hi"] - metrics[f"{apart}.lo"]) / _IN_INTERVAL
        differ = bool(error > 0 and abs(metrics[apart]) > LEAST_STANDARD_ERRORS * error)
        metrics[f"trade_off.{name}"] = differ
        if name == "diversity" and differ:
            metrics["kept.diversity"] = metrics[kept] / metrics[apart]
    fine = _mean("value", streams.get("fine", []), "identity_gain").get("value", 0.0)
    if "mixed" in streams and fine > 0:
        metrics["kept.identity"] = _mean("value", streams["mixed"], "identity_gain")["value"] / fine
    return metrics


def _guidance_differences(label: str, ours: list[Row], theirs: list[Row]) -> dict[str, float]:
    """Identity of two arms of guidance on the same sets and noise: all distinct ones, by number, and look-alikes."""
    sides = distinct_rows(ours), distinct_rows(theirs)
    metrics = _difference(f"identity_diff.{label}", *sides, "identity_gain")
    metrics |= _difference(f"dinocomp_diff.{label}", *sides, "dino")
    few = [[row for row in side if row["count"] <= 4] for side in sides]
    metrics |= _difference(f"identity_diff.{label}_n2to4", few[0], few[1], "identity_gain")
    for count in sorted({row["count"] for row in sides[0]}):
        same = [[row for row in side if row["count"] == count] for side in sides]
        metrics |= _difference(f"identity_diff.{label}_n{count}", same[0], same[1], "identity_gain")
    for ending, kind in (("_lookalike", "look-alikes"), ("_occluded", "occluded")):
        same = [[row for row in side if row["kind"] == kind] for side in (ours, theirs)]
        metrics |= _difference(f"identity_diff.{label}{ending}", same[0], same[1], "identity_gain")
    return metrics


def _seconds_metrics(arm: str, rows: list[Row]) -> dict[str, float | bool]:
    """Time of an arm beside plain sampling; segmentation is the user's choice and stands apart."""
    plain = [row["seconds_b"] for row in rows]
    found = ratio_of_pairs([row["seconds_a"] - row["seconds_segment"] for row in rows], plain)
    metrics = ratio_metrics(f"seconds_ratio.{arm}", found)
    if any(row["seconds_segment"] for row in rows):
        apart = ratio_of_pairs([row["seconds_segment"] for row in rows], plain)
        metrics[f"seconds_ratio.{arm}_segmentation"] = apart.ratio
    return metrics
