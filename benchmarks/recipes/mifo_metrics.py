"""Figures of the MIFO recipe from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.recipes.common import Row, metrics_of_arm, paired_metrics
from objectcompose.evaluation.disentangle_metrics import disentangle_metrics, picture_figures
from objectcompose.evaluation.report import share_metrics


LEARNING, SYNTHESIS, ATTENTION = "learning", "synthesis", "attention"
#: Endings of arms that go on with stage 2: without and with class pictures.
STAGE2, PRIOR = "_stage2", "_prior"
#: (arm, arm it is compared with) and how the pair is called; with either stage 2 likewise.
LEARNING_PAIRS = {
    "reward_penalty_reward": ("reward_penalty", "reward"),
    "reward_penalty_penalty": ("reward_penalty", "penalty"),
    "reward_penalty_none": ("reward_penalty", "none"),
    "reward_penalty_separate": ("reward_penalty", "separate"),
}
SYNTHESIS_PAIRS = {
    "full_no_control": ("full", "no_control"),
    "full_in_box": ("full", "in_box"),
    "full_no_decay": ("full", "no_decay"),
    "full_no_refinement": ("full", "no_refinement"),
    "self_only_full": ("self_only", "full"),
    "cross_only_full": ("cross_only", "full"),
    "self_only_cross_only": ("self_only", "cross_only"),
}
#: Figures that pairs are compared by; shares in per cent.
COMPARED = ("sim_d", "nsim_d", "identity", "other_identity")
COMPARED_SHARES = ("identity_mixed_up", "leakage", "shown", "placed")


def metrics_of_rows(rows: Sequence[Row]) -> dict[str, float]:
    """All figures.

    `<figure>.<arm>[.<kind>]` of the learning arms, `synthesis.<figure>.<arm>[.<kind>]` of the synthesis arms,
    `map_inside.<arm>[.<kind>]` (share of a placeholder's attention within its mask, per cent), and
    `<figure>_diff.<pair>[.<kind>]` of those pairs whose arms are there.
    """
    metrics: dict[str, float] = {}
    for case, prefix in ((LEARNING, ""), (SYNTHESIS, "synthesis.")):
        by_arm = _by_arm(rows, case)
        for arm, own in by_arm.items():
            figures = metrics_of_arm(disentangle_metrics(own), arm)
            metrics |= {f"{prefix}{name}": value for name, value in figures.items()}
        pairs = _with_stages(LEARNING_PAIRS) if case == LEARNING else SYNTHESIS_PAIRS
        for pair, (ours, theirs) in pairs.items():
            if ours in by_arm and theirs in by_arm:
                for kind, *sides in _kinds(by_arm[ours], by_arm[theirs]):
                    metrics |= _differences(prefix, f"{pair}{kind}", *sides)
    return metrics | _attention_metrics(_by_arm(rows, ATTENTION))


def _with_stages(pairs: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    second = {
        f"{name}{ending}": (f"{ours}{ending}", f"{theirs}{ending}")
        for name, (ours, theirs) in pairs.items()
        for ending in (STAGE2, PRIOR)
    }
    arms = sorted({arm for pair in pairs.values() for arm in pair})
    stages = {f"{arm}_stages": (f"{arm}{STAGE2}", arm) for arm in arms}  # what stage 2 adds
    classes = {f"{arm}_classes": (f"{arm}{PRIOR}", f"{arm}{STAGE2}") for arm in arms}  # what class pictures change
    return {**pairs, **second, **stages, **classes}


def _by_arm(rows: Sequence[Row], case: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["case"] == case:
            found.setdefault(row["arm"], []).append(row)
    return found


def _kinds(*sides: Sequence[Row]) -> list[tuple[Any, ...]]:
    """(ending, rows of each side): all rows, then those of each kind where there are several."""
    kinds = sorted({row["kind"] for row in sides[0]} - {""})
    chosen = [("", *sides)]
    for kind in kinds:
        chosen.append((f".{kind}", *([row for row in side if row["kind"] == kind] for side in sides)))
    return chosen


def _group(rows: Sequence[Row]) -> str:
    """What is drawn together: scenes, or prompts where there is one scene."""
    return "scene" if len({row["scene"] for row in rows}) > 1 else "prompt"


def _differences(prefix: str, pair: str, ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in (*COMPARED, *COMPARED_SHARES):
        sides = [
            [{**row, "value": figures[name]} for row in side if name in (figures := picture_figures(row))]
            for side in (ours, theirs)
        ]
        there = [{(row["prompt"], row["round"]) for row in side} for side in sides]
        both = there[0] & there[1]  # leakage is of pictures in which something is seen on both sides
        first, second = ([row for row in side if (row["prompt"], row["round"]) in both] for side in sides)
        if first and len({row[_group(first)] for row in first}) > 1:
            factor = 100.0 if name in COMPARED_SHARES else 1.0
            metrics |= paired_metrics(
                f"{prefix}{name}_diff.{pair}",
                first,
                second,
                lambda row, factor=factor: factor * row["value"],
                ("prompt", "round"),
                _group(first),
            )
    return metrics


def _attention_metrics(by_arm: dict[str, list[Row]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for arm, own in by_arm.items():
        for kind, rows in _kinds(own):
            groups = [row["scene"] for row in rows]
            metrics |= share_metrics(f"map_inside.{arm}{kind}", [row["inside"] for row in rows], groups)
    for pair, (ours, theirs) in _with_stages(LEARNING_PAIRS).items():
        if ours in by_arm and theirs in by_arm:
            for kind, first, second in _kinds(by_arm[ours], by_arm[theirs]):
                group = "scene" if len({row["scene"] for row in first}) > 1 else "noise"
                metrics |= paired_metrics(
                    f"map_inside_diff.{pair}{kind}",
                    first,
                    second,
                    lambda row: 100 * row["inside"],
                    ("scene", "noise", "instance"),
                    group,
                )
    return metrics
