"""Layouts to be measured by: prompts with boxes and references, true scenes, and scenes of look-alikes.

Those of toybox are a fixed list: scenes of splits that nothing was trained on, whose references show the identities in
another pose. Half of the layouts have identities that no training shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, count
from pathlib import Path

import numpy as np
from PIL import Image

from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.evaluation.toybox_prompts import split_of_categories
from objectcompose.layout import SceneObject, load_layout
from objectcompose.layout_fields import check_picture
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.identities import sample_identity
from objectcompose.toybox.scenes import SceneBatch, SceneSpec, render_scenes, sample_scene
from objectcompose.training.box_crops import overlap
from objectcompose.training.reference_samples import pil_picture, reference_views
from objectcompose.training.toybox_data import SPLIT_SEEDS


#: Layouts of each split.
LAYOUTS = {"dev": 24, "test": 96}
#: Numbers of objects, in turn.
OBJECT_NUMBERS = (1, 2, 3, 4)
SEEN, UNSEEN = "seen", "unseen"
#: Every object shows at least this share of the picture, and no two boxes overlap more than this.
LEAST_SHOWN, LARGEST_OVERLAP = 0.02, 0.3
_FIRST_SCENE = 500_000  # of a split; lower numbers are scenes of other figures


@dataclass(frozen=True, eq=False)
class LayoutCase:
    """One layout.

    Attributes:
        record: prompt, categories, and `kind` "seen" or "unseen" (empty for layouts from files).
        objects: with `phrase` (the category), `image` and `box`.
        truth: the scene that the boxes are from; None where there is none.
        rivals: the same scene with other identities of the same categories; None likewise.
    """

    record: PromptRecord
    objects: tuple[SceneObject, ...]
    truth: Image.Image | None = None
    rivals: Image.Image | None = None


def toybox_layouts(preset: Preset, split: str, limit: int | None = None) -> list[LayoutCase]:
    """A split's layouts: 1 to 4 objects in turn, seen and unseen identities in turn.

    Args:
        preset: the world.
        split: "dev" or "test"; no two or more categories are together in both.
        limit: only the first ones.

    Raises:
        ObjectComposeError: an unknown split.
    """
    if split not in LAYOUTS:
        raise ObjectComposeError(f"`split` must be one of {', '.join(LAYOUTS)}, got {split!r}.")
    total = LAYOUTS[split] if limit is None else min(limit, LAYOUTS[split])
    return [_toybox_case(preset, split, number) for number in range(total)]


def _toybox_case(preset: Preset, split: str, number: int) -> LayoutCase:
    objects = OBJECT_NUMBERS[number // 2 % len(OBJECT_NUMBERS)]
    kind = (SEEN, UNSEEN)[number % 2]
    spec, scene = _first_usable_scene(preset, split, number, objects, kind == UNSEEN)
    rng = np.random.default_rng((SPLIT_SEEDS[split], _FIRST_SCENE + number, 1))
    views = reference_views(preset, list(spec.identities), rng, background_share=0.0)
    others = []
    for identity in spec.identities:
        other = identity
        while other == identity:
            other = sample_identity(preset, identity.category, rng, unseen=kind == UNSEEN)
        others.append(other)
    rivals = render_scenes(preset, [dataclasses.replace(spec, identities=tuple(others))])
    categories = tuple(identity.category for identity in spec.identities)
    return LayoutCase(
        PromptRecord(f"{split}-layout-{number:03d}", spec.caption, categories, kind),
        tuple(
            SceneObject(phrase=category, image=view, box=box)
            for category, view, box in zip(categories, views, scene.boxes[0].tolist(), strict=True)
        ),
        pil_picture(scene.pixels[0]),
        pil_picture(rivals.pixels[0]),
    )


def _first_usable_scene(
    preset: Preset, split: str, number: int, objects: int, unseen: bool
) -> tuple[SceneSpec, SceneBatch]:
    """The first of a row of scenes that shows all its objects well enough, each with a box of its own."""
    for trial in count():
        assert trial < 10_000, f"{split} layout {number} finds no scene"
        seed = (SPLIT_SEEDS[split], _FIRST_SCENE + number, 0, trial)
        rng = np.random.default_rng(seed)
        categories = [str(name) for name in rng.choice(preset.categories, size=objects, replace=False)]
        if objects > 1 and split_of_categories(preset, categories) != split:
            continue
        spec = sample_scene(preset, seed, categories, unseen=unseen)
        scene = render_scenes(preset, [spec])
        overlaps = [overlap(*pair) for pair in combinations(scene.boxes[0].tolist(), 2)]
        if scene.visible[0].mean((1, 2)).min() >= LEAST_SHOWN and max(overlaps, default=0) <= LARGEST_OVERLAP:
            return spec, scene
    raise AssertionError


def file_layouts(folder: Path, limit: int | None = None) -> list[LayoutCase]:
    """Layouts from files: every `<name>.json` of a folder, its true scene beside it as `<name>.png` or `.jpg`, if any.

    Args:
        folder: of files that `save_layout` writes; all objects have `phrase`, `image` and `box`.
        limit: only the first ones, by name.

    Raises:
        LayoutError: there is none, or one lacks what is needed.
        ImageInputError: a picture cannot be read.
    """
    paths = sorted(folder.glob("*.json"))[:limit]
    if not paths:
        raise LayoutError(f"`--layouts` {folder} must hold layout files (*.json), got none.")
    cases = []
    for path in paths:
        layout = load_layout(path)
        for index, item in enumerate(layout.objects):
            missing = [name for name in ("phrase", "image", "box") if getattr(item, name) is None]
            if missing:
                raise LayoutError(
                    f"`{path}` must give every object a phrase, an image and a box; objects[{index}]"
                    f" lacks {', '.join(missing)}."
                )
        if not layout.objects:
            raise LayoutError(f"`{path}` must have at least one object, got none.")
        categories = tuple(dict.fromkeys(item.phrase or "" for item in layout.objects))
        truths = [path.with_suffix(suffix) for suffix in (".png", ".jpg") if path.with_suffix(suffix).is_file()]
        truth = check_picture(truths[0], str(truths[0])).convert("RGB") if truths else None
        cases.append(LayoutCase(PromptRecord(path.stem, layout.prompt, categories), tuple(layout.objects), truth))
    return cases


def layouts_digest(cases: Sequence[LayoutCase]) -> str:
    """64 hex digits that change with any prompt, box, strength, order or reference."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(json.dumps([case.record.id, case.record.text]).encode())
        for item in case.objects:
            facts = [item.phrase, item.box, item.scale, item.order, item.image.mode, item.image.size]
            digest.update(json.dumps(facts).encode() + item.image.tobytes())
    return digest.hexdigest()
