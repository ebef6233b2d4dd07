"""Lists of prompts that follow from a rule, where a protocol has no file or it is not at hand.

Choices are made by SHA-256, not by a generator of random numbers: no release of Python or numpy changes a list. The
tests hold the digest of each, so that a list stays what it was when something was measured on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import combinations

from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.category_names import (
    COCO_CATEGORIES,
    PAIR_ANIMALS,
    PAIR_COLOURS,
    PAIR_OBJECTS,
    PAIR_WORN_OBJECTS,
)
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.toybox.scenes import with_article


SPATIAL_RELATIONS = ("to the left of", "to the right of", "above", "below")


def stable_number(*parts: object) -> int:
    """A whole number in [0, 2**63) that follows from the parts alone, the same everywhere."""
    text = json.dumps(parts, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stable_sample(items: Sequence[str], count: int, *seed: object) -> list[str]:
    """`count` different items in an order of their own, drawn uniformly by the seed.

    Raises:
        ObjectComposeError: there are fewer items.
    """
    if len(items) < count:
        raise ObjectComposeError(f"`items` must be at least {count} to draw so many, got {len(items)}.")
    return sorted(items, key=lambda item: stable_number(*seed, item))[:count]


def multigen_prompts(
    categories: Sequence[str] = COCO_CATEGORIES, count: int = 1000, objects: int = 5, seed: int = 0
) -> list[PromptRecord]:
    """Prompts as MULTIGEN samples them (TokenCompose, arXiv:2312.03626, section 4.2): different categories, uniformly.

    The official list was drawn otherwise: figures on this one agree with published ones within noise only. The
    article is always "a", as there.

    Args:
        categories: names to draw from.
        count: number of prompts.
        objects: categories in a prompt, at least 2.
        seed: of the draws.
    """
    if objects < 2 or count < 1:
        raise ObjectComposeError(f"`objects` must be at least 2 and `count` at least 1, got {objects} and {count}.")
    records = []
    for number in range(count):
        names = stable_sample(categories, objects, "multigen", seed, number)
        listed = [f"a {name}" for name in names]
        text = f"a photo of {', '.join(listed[:-1])}{',' if objects > 2 else ''} and {listed[-1]}."
        records.append(PromptRecord(str(number), text, tuple(names)))
    return records


def spatial_prompts(categories: Sequence[str] = COCO_CATEGORIES) -> list[PromptRecord]:
    """SR2D's prompts (VISOR, arXiv:2212.10015): every ordered pair of categories in each of four relations.

    Returns:
        "a dog to the left of an apple" and so on, 25,280 for COCO's categories; `kind` is the relation.
    """
    texts = [
        (f"{with_article(one)} {relation} {with_article(other)}", (one, other), relation)
        for first, second in combinations(categories, 2)
        for relation in SPATIAL_RELATIONS
        for one, other in ((first, second), (second, first))
    ]
    return [PromptRecord(str(number), *row) for number, row in enumerate(texts)]


def pair_prompts() -> list[PromptRecord]:
    """The 276 pairs of Attend-and-Excite (arXiv:2301.13826), as Separate-and-Enhance evaluates on them.

    66 pairs of animals, 144 of an animal and an object, 66 of objects. Colours are drawn by a fixed rule, since the
    published list's are not known here; the articles follow the word behind them.
    """
    rows = [
        (f"{with_article(first)} and {with_article(second)}", (first, second), "animal-animal")
        for first, second in combinations(PAIR_ANIMALS, 2)
    ]
    for animal in PAIR_ANIMALS:
        for thing in PAIR_OBJECTS:
            if thing in PAIR_WORN_OBJECTS:
                text = f"{with_article(animal)} with a {thing}"
            else:
                text = f"{with_article(animal)} and {_coloured(thing, animal)}"
            rows.append((text, (animal, thing), "animal-object"))
    rows += [
        (f"{_coloured(first, second)} and {_coloured(second, first)}", (first, second), "object-object")
        for first, second in combinations(PAIR_OBJECTS, 2)
    ]
    return [PromptRecord(str(number), *row) for number, row in enumerate(rows)]


def _coloured(thing: str, other: str) -> str:
    colour = PAIR_COLOURS[stable_number("pairs", thing, other) % len(PAIR_COLOURS)]
    return f"{with_article(colour)} {thing}"
