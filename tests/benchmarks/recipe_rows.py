"""Rows as the recipes keep them, few and made up, for all arms that the results page knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from benchmarks.results_methods import CONTROLS, LEARNING_ARMS, LOCREF_ARMS, STREAM_ARMS, TOKENCOMPOSE_ARMS


Row = dict[str, Any]
#: (arm, number of the row) -> how good it is, in [0, 1].
Goodness = Callable[[str, int], float]
NAMES = ("dog", "car", "clock", "cup", "banana")


def tokencompose_rows(good: Goodness, count: int = 2) -> list[Row]:
    """Pictures of lists, maps, distances and times."""
    rows: list[Row] = []
    for arm, number in product(TOKENCOMPOSE_ARMS, range(count)):
        for case, named in (("test", NAMES), ("pairs", NAMES[:2]), ("single", NAMES[:1])):
            found = named[: round(good(arm, number) * len(named))]
            rows.append({"case": case, "arm": arm, "prompt": f"p{number}", "round": 0, "named": named, "found": found})
        score = good(arm, number)
        facts = {"sample": number, "phrase": "dog", "t": 200, "iou": score, "inside": score}
        rows.append({"case": "map", "arm": arm, **facts})
    for arm in TOKENCOMPOSE_ARMS:
        distance = 10 * (1 - good(arm, 0))
        rows.append({"case": "fd", "arm": arm, "value": distance, "left_out": [distance - 0.1, distance + 0.1]})
    for (arm, ratio), number in product((("tokencompose", 1.0), ("attend_and_excite", 3.2)), range(7)):
        rows.append({"case": "seconds", "arm": arm, "pair": number, "seconds_a": ratio, "seconds_b": 1.0})
    return rows


def locref_rows(good: Goodness, count: int = 4) -> list[Row]:
    """Pictures of layouts with two objects; true scenes and those of rivals for each case."""
    cases = {"full": ("n2", "n5", "n10", "n20", "jitter5", "jitter10", "jitter20", "left", "right"), "text": ("left",)}
    cases["text"] += ("right",)
    cases |= {arm: cases["full"][:-2] for arm in ("ceiling", "floor")}
    rows = []
    for arm in LOCREF_ARMS:
        for case, number in product(("test", *cases.get(arm, ())), range(count)):
            boxes, names = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)], list(NAMES[:2])
            if case in ("left", "right"):
                boxes, names = [boxes[case == "right"]], names[:1]
            own = {"ceiling": 0.9, "floor": 0.3}.get(arm, good(arm, number))
            found = [
                {"category": name, "score": 0.9, "box": box} for name, box in zip(names, boxes, strict=True)
            ]  # one of the two is found by arms that are not good
            table = [[own if one == other else 0.2 for other in names] for one in names]
            facts = {"case": case, "arm": arm, "layout": f"{number}", "round": 0, "categories": names}
            kept = found if own > 0.5 or len(found) == 1 else found[:1]
            rows.append(
                {
                    **facts,
                    "kind": "unseen" if number % 2 else "seen",
                    "boxes": boxes,
                    "found": kept,
                    "cosines": {name: table for name in ("identity", "clip_i", "dino")},
                    "outside": {name: [0.1] * len(names) for name in ("identity", "clip_i", "dino")},
                }
            )
    return rows


def object_prompt_rows(good: Goodness, count: int = 2) -> list[Row]:
    """Objects of sets of two to six, of five look-alikes and of three with a part hidden, and times."""
    rows: list[Row] = []
    arms = [("streams", arm) for arm in STREAM_ARMS]
    arms += [("guidance", arm) for arm in ("text", "unguided", "masks", "guided", "guided_fast")]
    kinds = [*((objects, "seen") for objects in (2, 3, 4, 5, 6)), (5, "look-alikes"), (3, "occluded")]
    for (case, arm), (objects, kind), number, turn in product(arms, kinds, range(count), range(2)):
        score = good(arm, number)
        facts = {"case": case, "arm": arm, "set": f"{kind}-{objects}-{number}", "round": turn, "object": 0}
        seen = {"segment": 0, "dino": score, "clip": score, "identity": score, "identity_floor": 0.1}
        more = {"matching_accuracy": float(score > 0.5), "category": 1.0, "copies": 0, "overlap": 0.0}
        away = 0.25 * (1 - score) * (1 if turn else -1)
        rows.append({**facts, "kind": kind, "count": objects, **seen, **more, "x": 0.5 + away, "y": 0.5})
    for arm, number in product(("unguided", "masks", "guided", "guided_fast"), range(7)):
        seconds = {"seconds_a": 2.0, "seconds_b": 1.0, "seconds_segment": 0.1}
        rows.append({"case": "seconds", "arm": arm, "pair": number, **seconds})
    return rows


def mifo_rows(good: Goodness, count: int = 2) -> list[Row]:
    """Pictures of scenes of both kinds by all arms, and the attention of the learning arms."""
    rows: list[Row] = []
    arms = [("learning", arm) for arm in LEARNING_ARMS] + [("synthesis", arm) for arm in CONTROLS]
    for (case, arm), kind, number in product(arms, ("alike", "unlike"), range(count)):
        score, scene = good(arm, number), f"{kind}-{number}"
        table = [[score, 0.2], [0.2, score]]
        facts = {"arm": arm, "scene": scene, "kind": kind}
        seen: Row = {"sim_c": 0.3, "dino": table, "identity": table, "background": [0.1, 0.1]}
        seen |= {"leakage": 1 - score, "placed": [True, score > 0.5]}
        rows.append({"case": case, **facts, "prompt": f"{scene}-0", "round": 0, **seen})
        if case == "learning":
            rows.append({"case": "attention", **facts, "noise": "200-0", "instance": 0, "inside": score})
    return rows


def equally_good(arm: str, number: int) -> float:
    """Every arm at every row: nothing to resample, so that figures cost nothing."""
    return 0.6


ROWS: dict[str, Callable[[Goodness], Sequence[Row]]] = {
    "tokencompose_toybox": tokencompose_rows,
    "locref_toybox": locref_rows,
    "locref_ablations_toybox": locref_rows,
    "object_prompt_toybox": object_prompt_rows,
    "mifo_toybox": mifo_rows,
}
