"""Prompts of the toybox: fixed lists for tuning ("dev"), for results ("test"), and pairs that training never shows.

No combination of categories is in both lists, so that what is tuned on one says nothing about the other; "dev" names
no pair that is held out from training. The wording is that of the training captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, count

from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.prompt_lists import stable_number, stable_sample
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.toybox.categories import Preset, held_out_pairs
from objectcompose.toybox.scenes import list_objects


#: Numbers of objects that prompts name.
OBJECT_COUNTS = (2, 3, 4, 5)
#: Prompts for each number of objects.
PROMPTS_PER_COUNT = {"dev": 12, "test": 32}
#: Pairs beside the held-out ones in `toybox_pairs`, at most.
SEEN_PAIRS = 24
HELD_OUT, SEEN = "held-out", "seen"


def split_of_categories(preset: Preset, names: Sequence[str]) -> str:
    """The split that a combination of categories belongs to, in whatever order: "dev" or "test", about 1 to 2."""
    held_out = _held_out(preset)
    if any(frozenset(pair) in held_out for pair in combinations(names, 2)):
        return "test"
    return "dev" if stable_number("split", *sorted(names)) % 3 == 0 else "test"


def toybox_prompts(preset: Preset, split: str, per_count: int | None = None) -> list[PromptRecord]:
    """A split's prompts, 2 to 5 objects in turn, so that a list's beginning is as mixed as the whole.

    Args:
        preset: the world.
        split: "dev" or "test".
        per_count: prompts for each number of objects; default: `PROMPTS_PER_COUNT`.

    Returns:
        Records with `kind` "2 objects" and so on. A combination comes again, in another order, only where a small
        world has no further one.

    Raises:
        ObjectComposeError: an unknown split, or a number below 1.
    """
    if split not in PROMPTS_PER_COUNT:
        raise ObjectComposeError(f"`split` must be one of {', '.join(PROMPTS_PER_COUNT)}, got {split!r}.")
    wanted = PROMPTS_PER_COUNT[split] if per_count is None else per_count
    if wanted < 1:
        raise ObjectComposeError(f"`per_count` must be at least 1, got {wanted}.")
    lists = {objects: _combinations(preset, split, objects, wanted) for objects in OBJECT_COUNTS}
    return [
        _record(f"{split}-{objects}-{number:03d}", lists[objects][number], f"{objects} objects")
        for number in range(wanted)
        for objects in OBJECT_COUNTS
    ]


def toybox_pairs(preset: Preset) -> list[PromptRecord]:
    """Every held-out pair and some of the test split's others, each in both orders; `kind` says which."""
    names = preset.categories
    held_out = _held_out(preset)
    pairs = [tuple(sorted(pair, key=names.index)) for pair in held_out]
    rows = [(pair, HELD_OUT) for pair in sorted(pairs, key=lambda pair: [names.index(name) for name in pair])]
    seen = [
        pair
        for pair in combinations(names, 2)
        if frozenset(pair) not in held_out and split_of_categories(preset, pair) == "test"
    ]
    seen.sort(key=lambda pair: stable_number("seen", *pair))
    rows += [(pair, SEEN) for pair in seen[:SEEN_PAIRS]]
    ordered = [(order, kind) for pair, kind in rows for order in (pair, pair[::-1])]
    return [_record(f"pair-{number:03d}", order, kind) for number, (order, kind) in enumerate(ordered)]


@lru_cache(maxsize=4)
def _held_out(preset: Preset) -> frozenset[frozenset[str]]:
    return held_out_pairs(preset)


def _combinations(preset: Preset, split: str, objects: int, wanted: int) -> list[tuple[str, ...]]:
    """`wanted` lists of categories, different as sets for as long as 200 draws in a row find a new one."""
    found: list[tuple[str, ...]] = []
    sets: set[frozenset[str]] = set()
    fruitless = 0
    for draw in count():
        names = tuple(stable_sample(preset.categories, objects, "toybox", objects, draw))
        if split_of_categories(preset, names) != split:
            assert draw < 100_000, f"{split} has no combination of {objects}"
            continue
        is_new = frozenset(names) not in sets
        fruitless = 0 if is_new else fruitless + 1
        if is_new or (fruitless > 200 and names not in found):
            found.append(names)
            sets.add(frozenset(names))
        if len(found) == wanted:
            break
    return found


def _record(identifier: str, names: Sequence[str], kind: str) -> PromptRecord:
    return PromptRecord(identifier, f"a photo of {list_objects(tuple(names))}", tuple(names), kind)
