"""Figures of the LocRef recipe from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.recipes.common import Row, metrics_of_arm, paired_metrics
from objectcompose.evaluation.layout_metrics import (
    Place,
    cosines_of_rows,
    matches_of_row,
    matches_of_rows,
    precision_differences,
    precision_metrics,
    shift_metrics,
    way_metrics,
)
from objectcompose.evaluation.report import share_metrics
from objectcompose.evaluation.toybox_layouts import LEFT, RIGHT, SEEN, UNSEEN


CEILING, FLOOR = "ceiling", "floor"
#: (figure, encoder, where it looks), of cosines.
FIGURES: tuple[tuple[str, str, Place], ...] = (
    ("clip_i", "clip_i", "own"),
    ("dino", "dino", "own"),
    ("leakage", "identity", "others"),
    ("leakage_outside", "identity", "outside"),
    ("identity", "identity", "own"),
)
TEST = "test"
#: What `full` is compared with, on the same layouts and noise.
COMPARED = (
    "text_replaced", "no_mask", "no_mask_switch", "coords", "no_composite", "no_projection", "flat_weights", "text",
    "ip_adapter_masks",
)  # fmt: skip


def slim_rows(arm: str, case: str, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows of `objectcompose evaluate layout` as the result file keeps them.

    True scenes and scenes of rivals become rows of their own, those of the arms "ceiling" and "floor"; what the
    detector finds of other categories than the layout's counts nowhere and is left out.

    Args:
        arm: that painted.
        case: which layouts these are: "test", "left", "right", or "n10", "jitter5" and so on.
        rows: the command's.
    """
    kept: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        facts = {
            "case": case, "layout": row["layout"], "kind": row["kind"], "categories": row["categories"],
            "boxes": [[round(edge, 5) for edge in box] for box in row["boxes"]],
        }  # fmt: skip
        kept[arm, row["layout"], row["round"]] = {"arm": arm, "round": row["round"], **facts, **_seen(row, row)}
        for name, source in ((CEILING, "truth"), (FLOOR, "rivals")):
            kept[name, row["layout"], 0] = {"arm": name, "round": 0, **facts, **_seen(row, row[source])}
    return list(kept.values())


def _seen(row: Mapping[str, Any], seen: Mapping[str, Any]) -> Row:
    found = [
        {
            "category": one["category"],
            "score": round(one["score"], 4),
            "box": [round(edge, 5) for edge in one["box"]],
        }
        for one in seen["found"]
        if one["category"] in row["categories"]
    ]
    cosines = {
        name: [[round(value, 4) for value in line] for line in table] for name, table in seen["cosines"].items()
    }
    outside = {name: [round(value, 4) for value in values] for name, values in seen.get("outside", {}).items()}
    return {"found": found, "cosines": cosines, "outside": outside}


def unique_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows without repetitions: every arm brings the true scenes of its layouts."""
    return list({(row["arm"], row["case"], row["layout"], row["round"]): row for row in rows}.values())


def metrics_of_rows(rows: Sequence[Row]) -> dict[str, float]:
    """All figures, in per cent.

    `ap50`, `ap`, `identity_seen`, `identity_unseen`, `clip_i`, `dino`, `leakage`, `leakage_outside` for each arm on
    the test layouts, "ceiling" and "floor" among them; `identity_way.<arm>`, the way from floor to ceiling of unseen
    identities, and `identity_way_seen.<arm>`; `ap50.<arm>_<case>` and so on for other layouts, of all identities;
    `shift.<arm>`, see `shift_metrics`; and `ap50_diff.full_<arm>`, `identity_diff...`, `clip_i_diff...`,
    `leakage_diff...`, `leakage_outside_diff...`, in percentage points. What no row can tell has no figure.
    """
    by_arm: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {}).setdefault(row["case"], []).append(row)
    metrics: dict[str, float] = {}
    for other in COMPARED:
        if all(TEST in by_arm.get(name, {}) for name in ("full", other)):
            metrics |= _difference_metrics(f"full_{other}", by_arm["full"][TEST], by_arm[other][TEST])
    for arm, cases in by_arm.items():
        for case in [name for name in cases if name not in (LEFT, RIGHT)]:
            name = arm if case == TEST else f"{arm}_{case}"
            metrics |= _arm_metrics(name, cases[case], with_identities=case == TEST)
            if arm == FLOOR:  # all objects are in their boxes there too: the floor of places is another one
                metrics |= _place_metrics(name, _displaced(by_arm[CEILING][case]))
            if arm not in (CEILING, FLOOR):
                sides = cases[case], by_arm[FLOOR][case], by_arm[CEILING][case]
                if case == TEST:
                    metrics |= _way(f"identity_way.{name}", *sides, UNSEEN)
                    metrics |= _way(f"identity_way_seen.{name}", *sides, SEEN)
                else:
                    metrics |= _way(f"identity_way.{name}", *sides)
        if LEFT in cases and arm not in (CEILING, FLOOR):
            metrics |= shift_metrics(f"shift.{arm}", cases[LEFT], cases[RIGHT])
    return metrics


def _place_metrics(arm: str, rows: Sequence[Row]) -> dict[str, float]:
    return metrics_of_arm(precision_metrics("", matches_of_rows(rows), [row["layout"] for row in rows]), arm)


def _arm_metrics(arm: str, rows: Sequence[Row], with_identities: bool) -> dict[str, float]:
    metrics = _place_metrics(arm, rows)
    named = [(name, encoder, place, rows) for name, encoder, place in FIGURES]
    if with_identities:
        for kind in (SEEN, UNSEEN):
            named.append((f"identity_{kind}", "identity", "own", [row for row in rows if row["kind"] == kind]))
    for name, encoder, place, counted in named:
        found = cosines_of_rows(counted, encoder, place=place)
        if found.values:
            metrics |= share_metrics(f"{name}.{arm}", found.values, found.layouts)
    return metrics


def _way(
    name: str, rows: Sequence[Row], floor: Sequence[Row], ceiling: Sequence[Row], kind: str | None = None
) -> dict[str, float]:
    """Of layouts of one kind of identities, or of all."""
    sides = [[row for row in side if kind is None or row["kind"] == kind] for side in (rows, floor, ceiling)]
    if not sides[0]:
        return {}
    return way_metrics(name, *(cosines_of_rows(side, "identity") for side in sides))


def _displaced(rows: Sequence[Row]) -> list[Row]:
    """True scenes held against the boxes of the next layout with as many objects: all is there, but elsewhere."""
    found = []
    for row in rows:
        alike = [one for one in rows if len(one["boxes"]) == len(row["boxes"])]
        number = next(place for place, one in enumerate(alike) if one is row)
        found.append({**row, "boxes": alike[(number + 1) % len(alike)]["boxes"]})
    return found


def _mean_cosine(row: Row, encoder: str, place: Place) -> float | None:
    """In per cent; None of a row that says nothing of that place."""
    values = cosines_of_rows([row], encoder, place=place).values
    return 100 * sum(values) / len(values) if values else None


def _difference_metrics(name: str, ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, float]:
    keys = [(row["layout"], row["round"]) for row in ours]
    other = {(row["layout"], row["round"]): row for row in theirs}
    assert set(keys) == set(other), f"{name}: the arms have other rows"
    matches = [
        [matches_of_row(row["categories"], row["boxes"], row["found"]) for row in side]
        for side in (ours, [other[key] for key in keys])
    ]
    metrics = precision_differences(name, *matches, [layout for layout, _ in keys])
    for figure, encoder, place in FIGURES:
        if figure == "dino":
            continue
        value = partial(_mean_cosine, encoder=encoder, place=place)
        # one object has no others
        told = [(row, other[key]) for row, key in zip(ours, keys, strict=True)]
        told = [pair for pair in told if None not in map(value, pair)]
        if len({row["layout"] for row, _ in told}) > 1:
            sides = ([pair[side] for pair in told] for side in range(2))
            metrics |= paired_metrics(f"{figure}_diff.{name}", *sides, value, ("layout", "round"), "layout")
    return metrics
