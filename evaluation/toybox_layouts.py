"""Toybox's layouts: prompts with boxes and references, true scenes, and scenes of look-alikes.

They are fixed lists: scenes of splits that nothing was trained on, whose references show the identities in another
pose. Half of the layouts have identities that no training shows. Beside the lists for tuning ("dev") and for results
("test") there is one with a single object on the left, and the same with it on the right ("left", "right"); and the
first two can be had with any number of objects up to 20 in each layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations, count

import numpy as np

from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.layout_cases import LayoutCase
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.evaluation.toybox_prompts import split_of_categories
from objectcompose.layout import SceneObject
from objectcompose.pipelines.reference_scenes import MAX_LOCREF_OBJECTS
from objectcompose.toybox.backgrounds import sample_background
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.identities import Identity, sample_identity
from objectcompose.toybox.scenes import (
    MAX_OBJECTS,
    Pose,
    SceneBatch,
    SceneSpec,
    list_objects,
    render_scenes,
    sample_pose,
    sample_scene,
)
from objectcompose.training.box_crops import overlap
from objectcompose.training.reference_samples import pil_picture, reference_views
from objectcompose.training.toybox_data import SPLIT_SEEDS


LEFT, RIGHT = "left", "right"
#: Layouts of each split.
LAYOUTS = {"dev": 24, "test": 96, LEFT: 32, RIGHT: 32}
#: Numbers of objects, in turn.
OBJECT_NUMBERS = (1, 2, 3, 4)
SEEN, UNSEEN = "seen", "unseen"
#: Every object shows at least this share of the picture, and no two boxes overlap more than this.
LEAST_SHOWN, LARGEST_OVERLAP = 0.02, 0.3
#: Of the canvas: sides of a drawing's square on the left or right, and where its centre is.
_SIDE_DIAMETER, _SIDE_CENTRES = 0.5, {LEFT: 0.25, RIGHT: 0.75}
#: More objects than a scene has stand in rows and columns, in squares of this share of a column's width.
_CROWD_DIAMETER = 1.1
# first scenes of a split's lists; lower numbers are scenes of other figures
_FIRST_SCENE, _FIRST_SIDE, _FIRST_CROWD, _CROWD_STEP = 500_000, 600_000, 700_000, 10_000


def toybox_layouts(
    preset: Preset, split: str, limit: int | None = None, objects: int | None = None
) -> list[LayoutCase]:
    """A split's layouts, seen and unseen identities in turn.

    Args:
        preset: the world.
        split: "dev" or "test": of no more than 5 objects, no two or more categories are together in both; "left" or
            "right": one object each, equal ids and equal objects in both.
        limit: only the first ones.
        objects: in each layout of "dev" or "test", 1 to 20; None: 1 to 4 in turn. Beyond 5 they are small, stand in
            rows and columns, and categories come again; the prompt names each category once.

    Raises:
        ObjectComposeError: an unknown split, or a number that it cannot have.
    """
    if split not in LAYOUTS:
        raise ObjectComposeError(f"`split` must be one of {', '.join(LAYOUTS)}, got {split!r}.")
    is_side = split in (LEFT, RIGHT)
    if objects is not None and (is_side or not 1 <= objects <= MAX_LOCREF_OBJECTS):
        most = 1 if is_side else MAX_LOCREF_OBJECTS
        raise ObjectComposeError(f"`objects` must lie in [1, {most}] for {split!r}, and be left out for 1.")
    numbers = range(LAYOUTS[split] if limit is None else min(limit, LAYOUTS[split]))
    if is_side:
        return [_side_case(preset, split, number) for number in numbers]
    return [_split_case(preset, split, number, objects) for number in numbers]


def _split_case(preset: Preset, split: str, number: int, objects: int | None) -> LayoutCase:
    kind = (SEEN, UNSEEN)[number % 2]
    first, name = _FIRST_SCENE, f"{split}-layout-{number:03d}"
    if objects is not None:
        first, name = _FIRST_CROWD + _CROWD_STEP * objects, f"{split}-{objects}-objects-{number:03d}"
    seed = (SPLIT_SEEDS[split], first + number)
    if objects is not None and objects > MAX_OBJECTS:
        spec = _crowd(preset, np.random.default_rng((*seed, 0)), objects, kind == UNSEEN)
        scene = render_scenes(preset, [spec])
    else:
        wanted = objects or OBJECT_NUMBERS[number // 2 % len(OBJECT_NUMBERS)]
        spec, scene = _first_usable_scene(preset, split, seed, wanted, kind == UNSEEN)
    return _case_of_scene(preset, name, kind, spec, scene, np.random.default_rng((*seed, 1)))


def _side_case(preset: Preset, side: str, number: int) -> LayoutCase:
    kind, category = (SEEN, UNSEEN)[number % 2], preset.categories[number // 2 % len(preset.categories)]
    rng = np.random.default_rng((SPLIT_SEEDS["test"], _FIRST_SIDE + number))
    identity = sample_identity(preset, category, rng, unseen=kind == UNSEEN)
    pose = dataclasses.replace(sample_pose(rng, _SIDE_DIAMETER), x=_SIDE_CENTRES[side])
    spec = SceneSpec((identity,), (pose,), sample_background(rng), f"a photo of {list_objects([category])}")
    return _case_of_scene(preset, f"side-{number:03d}", kind, spec, render_scenes(preset, [spec]), rng)


def _case_of_scene(
    preset: Preset, name: str, kind: str, spec: SceneSpec, scene: SceneBatch, rng: np.random.Generator
) -> LayoutCase:
    """References from `rng`, then the rivals.

    They are identities that training shows, of unseen objects, too: what a picture that knows nothing of the reference
    would show. Unseen hues are few, so that any two of them look alike.
    """
    views = reference_views(preset, list(spec.identities), rng, background_share=0.0)
    others = []
    for identity in spec.identities:
        other = identity
        while other == identity:
            other = sample_identity(preset, identity.category, rng)
        others.append(other)
    rivals = render_scenes(preset, [dataclasses.replace(spec, identities=tuple(others))])
    categories = tuple(identity.category for identity in spec.identities)
    return LayoutCase(
        PromptRecord(name, spec.caption, tuple(dict.fromkeys(categories)), kind),
        tuple(
            SceneObject(phrase=category, image=view, box=box)
            for category, view, box in zip(categories, views, scene.boxes[0].tolist(), strict=True)
        ),
        pil_picture(scene.pixels[0]),
        pil_picture(rivals.pixels[0]),
    )


def _first_usable_scene(
    preset: Preset, split: str, seed: Sequence[int], objects: int, unseen: bool
) -> tuple[SceneSpec, SceneBatch]:
    """The first of a row of scenes that shows all its objects well enough, each with a box of its own."""
    for trial in count():
        assert trial < 10_000, f"{split} layout {seed} finds no scene"
        drawn = (*seed, 0, trial)
        rng = np.random.default_rng(drawn)
        categories = [str(name) for name in rng.choice(preset.categories, size=objects, replace=False)]
        if objects > 1 and split_of_categories(preset, categories) != split:
            continue
        spec = sample_scene(preset, drawn, categories, unseen=unseen)
        scene = render_scenes(preset, [spec])
        overlaps = [overlap(*pair) for pair in combinations(scene.boxes[0].tolist(), 2)]
        if scene.visible[0].mean((1, 2)).min() >= LEAST_SHOWN and max(overlaps, default=0) <= LARGEST_OVERLAP:
            return spec, scene
    raise AssertionError


def _crowd(preset: Preset, rng: np.random.Generator, objects: int, unseen: bool) -> SceneSpec:
    """Many objects in rows and columns, some places free if there are more; categories as evenly as they go."""
    columns = math.ceil(math.sqrt(objects))
    rows = math.ceil(objects / columns)
    names: list[str] = []
    while len(names) < objects:
        names += [str(name) for name in rng.permutation(preset.categories)]
    identities: list[Identity] = []
    poses: list[Pose] = []
    for name, cell in zip(names, rng.permutation(rows * columns).tolist()[:objects], strict=False):
        row, column = divmod(cell, columns)
        identities.append(sample_identity(preset, name, rng, unseen))
        pose = sample_pose(rng, _CROWD_DIAMETER / columns)
        poses.append(dataclasses.replace(pose, x=(column + 0.5) / columns, y=(row + 0.5) / rows))
    caption = f"a photo of {list_objects(list(dict.fromkeys(names[:objects])))}"
    return SceneSpec(tuple(identities), tuple(poses), sample_background(rng), caption)
