"""Sets of object pictures in toybox's world: what ObjectPrompt is asked to paint, the same for every model.

A set is a prompt and two to six identities, each with a reference picture in a pose of its own. Kinds:

    seen         different categories, identities as training draws them, no pair that training never shows
    unseen       the same with identities that training never shows
    unseen-pair  a pair of categories is among them that training never shows together
    look-alikes  recolourings of one drawing, hues evenly apart, so that only colours tell them apart
    occluded     as seen, but each reference is the visible part of an object that another one hides a third of

Categories are chosen by SHA-256 and identities by numpy from a seed of the set's own; no set is in both splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, count

import numpy as np
import torch
from PIL import Image

from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.prompt_lists import stable_number, stable_sample
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.toybox.categories import Preset, held_out_drawings, held_out_pairs
from objectcompose.toybox.identities import HELD_OUT_HUES, Identity, sample_identity
from objectcompose.toybox.scenes import Pose, list_objects, render_objects, render_references


SET_KINDS = ("seen", "unseen", "unseen-pair", "look-alikes", "occluded")
SET_COUNTS = (2, 3, 4, 5, 6)
#: Sets for each kind and number of objects.
SETS_PER_COUNT = {"dev": 2, "test": 4}
#: Share of an object that is hidden on its reference picture, as nearly as places of the other one allow.
HIDDEN_SHARE = 1 / 3
_HIDING_DISTANCES = tuple(0.08 * place for place in range(10))  # of the centres, in sides of the picture


@dataclass(frozen=True)
class ObjectSet:
    """A prompt and the identities of its objects, in the prompt's order.

    Attributes:
        record: the prompt; its `kind` is the set's.
        identities: two to six.
    """

    record: PromptRecord
    identities: tuple[Identity, ...]

    def reference(self, preset: Preset, number: int, pose: int = 0, is_whole: bool = False) -> Image.Image:
        """The reference picture of one object: RGBA, at the preset's size; another `pose` shows it in another one.

        Of an occluded set it shows what is seen of the object, unless `is_whole`.
        """
        seed = stable_number("reference", self.record.id, number, pose) % 2**31
        picture = reference_picture(preset, self.identities[number], seed)
        if self.record.kind != "occluded" or is_whole:
            return picture
        return occluded_picture(preset, picture, self.identities[number].category, seed)


def reference_picture(preset: Preset, identity: Identity, seed: int) -> Image.Image:
    """An identity alone in a pose that follows from the seed: RGBA."""
    rendered = render_references(preset, [identity], [seed])[0]
    return Image.fromarray((rendered * 255).round().byte().permute(1, 2, 0).numpy(), "RGBA")


def occluded_picture(preset: Preset, picture: Image.Image, category: str, seed: int) -> Image.Image:
    """What is left of a cut-out behind another object, about a third of it missing.

    Args:
        preset: the world.
        picture: RGBA cut-out.
        category: of what it shows; the object before it is of another one.
        seed: decides which, and from which side it comes.
    """
    rng = np.random.default_rng((seed, 11))
    others = [name for name in preset.categories if name != category]
    before = sample_identity(preset, others[int(rng.integers(len(others)))], rng)
    angle, turn = rng.uniform(0, 2 * np.pi), float(rng.uniform(-60, 60))
    places = [(0.5 + away * np.cos(angle), 0.5 + away * np.sin(angle)) for away in _HIDING_DISTANCES]
    poses = [Pose(float(x), float(y), diameter=0.72, rotation=turn) for x, y in places]
    cover = render_objects(preset, [before] * len(poses), poses, picture.width)[:, 3]
    alpha = torch.from_numpy(np.array(picture.getchannel("A"), dtype=np.float32)) / 255
    hidden = (cover * alpha).flatten(1).sum(1) / alpha.sum()
    left = alpha * (1 - cover[int((hidden - HIDDEN_SHARE).abs().argmin())])
    shown = picture.copy()
    shown.putalpha(Image.fromarray((left * 255).round().byte().numpy()))
    return shown


def toybox_object_sets(
    preset: Preset,
    split: str,
    counts: Sequence[int] = SET_COUNTS,
    kinds: Sequence[str] = SET_KINDS,
    per_count: int | None = None,
) -> list[ObjectSet]:
    """A split's sets, kinds and numbers of objects in turn, so that a list's beginning is as mixed as the whole.

    Args:
        preset: the world.
        split: "dev" or "test".
        counts: numbers of objects, of `SET_COUNTS`.
        kinds: of `SET_KINDS`.
        per_count: sets for each kind and number; default: `SETS_PER_COUNT`.

    Raises:
        ObjectComposeError: an unknown split, kind or number of objects, or `per_count` below 1.
    """
    if split not in SETS_PER_COUNT:
        raise ObjectComposeError(f"`split` must be one of {', '.join(SETS_PER_COUNT)}, got {split!r}.")
    for name, given, known in (("counts", counts, SET_COUNTS), ("kinds", kinds, SET_KINDS)):
        if not given or not set(given) <= set(known):
            raise ObjectComposeError(f"`{name}` must be of {', '.join(map(str, known))}, got {list(given)}.")
    wanted = SETS_PER_COUNT[split] if per_count is None else per_count
    if wanted < 1:
        raise ObjectComposeError(f"`per_count` must be at least 1, got {wanted}.")
    return [
        _make_set(preset, split, kind, objects, number)
        for number in range(wanted)
        for objects in counts
        for kind in kinds
    ]


def _make_set(preset: Preset, split: str, kind: str, objects: int, number: int) -> ObjectSet:
    seed = stable_number("object set", split, kind, objects, number)
    rng = np.random.default_rng(seed)
    if kind == "look-alikes":
        category = preset.categories[seed % len(preset.categories)]
        identities = _recolourings(preset, category, objects, rng)
    else:
        categories = _categories(preset, kind, objects, seed)
        identities = [sample_identity(preset, category, rng, kind == "unseen") for category in categories]
    names = [identity.category for identity in identities]
    record = PromptRecord(
        f"{split}-{kind}-{objects}-{number:03d}",
        f"a photo of {list_objects(names)}",
        tuple(dict.fromkeys(names)),
        kind,
    )
    return ObjectSet(record, tuple(identities))


def _categories(preset: Preset, kind: str, objects: int, seed: int) -> list[str]:
    """Different categories with a held-out pair among them, or without any."""
    held_out = held_out_pairs(preset)
    for draw in count():
        names = stable_sample(preset.categories, objects, seed, draw)
        has_pair = any(frozenset(pair) in held_out for pair in combinations(names, 2))
        if has_pair == (kind == "unseen-pair"):
            return names
        assert draw < 100_000, f"there are no {objects} categories of kind {kind}"
    raise AssertionError("unreachable")


def _recolourings(preset: Preset, category: str, objects: int, rng: np.random.Generator) -> list[Identity]:
    """One drawing that training shows, in hues that training shows."""
    held_out = held_out_drawings(preset)
    styles = [style for style in preset.styles if (category, style) not in held_out]
    low, high = HELD_OUT_HUES
    step = (360.0 - (high - low)) / objects
    first = high + float(rng.uniform(0, step))
    style = str(rng.choice(styles))
    hues = [(first + place * step) % 360.0 for place in rng.permutation(objects)]
    return [Identity(category, style, float(hue)) for hue in hues]
