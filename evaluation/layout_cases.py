"""Layouts to be measured by: a prompt with boxes and references, the true scene, and a scene of look-alikes.

Those from files are read here; toybox's own are in `toybox_layouts`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.evaluation.crop_similarity import crop_of_box, pixels_of_box
from objectcompose.evaluation.prompt_lists import stable_number
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.layout import SceneObject, load_layout
from objectcompose.layout_fields import check_picture
from objectcompose.training.reference_augmentation import ReferenceAugmentation


#: Largest share of a box's sides by which its edges may be moved; below a half no box vanishes.
MAX_BOX_JITTER = 0.49


@dataclass(frozen=True, eq=False)
class LayoutCase:
    """One layout.

    Attributes:
        record: prompt, categories, and `kind` "seen" or "unseen" (empty for layouts from files).
        objects: with `phrase` (the category), `image` and `box`.
        truth: the scene that the boxes are from; None where there is none.
        rivals: the same scene with other instances of the same categories, of toybox ones that training shows; None
            likewise.
    """

    record: PromptRecord
    objects: tuple[SceneObject, ...]
    truth: Image.Image | None = None
    rivals: Image.Image | None = None


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
    return _with_rivals(cases)


def _with_rivals(cases: Sequence[LayoutCase]) -> list[LayoutCase]:
    """The cases with a scene of rivals: each box shows the next instance of its category, from that one's true scene.

    A case without a true scene, or with an object that is the only one of its category, gets none.
    """
    places = [(case, item) for case in cases if case.truth is not None for item in case.objects]
    found = []
    for case in cases:
        alike = [[place for place in places if place[1].phrase == item.phrase] for item in case.objects]
        if case.truth is None or min(map(len, alike)) < 2:
            found.append(case)
            continue
        scene = case.truth.copy()
        for item, others in sorted(zip(case.objects, alike, strict=True), key=lambda pair: -_area(pair[0])):
            own = next(number for number, place in enumerate(others) if place[1] is item)
            other_case, other = others[(own + 1) % len(others)]
            assert other_case.truth is not None
            left, top, right, bottom = pixels_of_box(scene.size, box_of(item))
            crop = crop_of_box(other_case.truth, box_of(other))
            scene.paste(crop.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        found.append(dataclasses.replace(case, rivals=scene))
    return found


def _area(item: SceneObject) -> float:
    x0, y0, x1, y1 = box_of(item)
    return (x1 - x0) * (y1 - y0)


def box_of(item: SceneObject) -> tuple[float, float, float, float]:
    """The box of a layout's object, which always has one."""
    assert item.box is not None
    return item.box


def jittered_layouts(cases: Sequence[LayoutCase], share: float) -> list[LayoutCase]:
    """The layouts as a hasty user draws them: each edge of a box moved by up to a share of its width or height.

    How the edges move follows from the layout's id: a larger share moves them further the same way.

    Args:
        cases: the layouts.
        share: in [0, 0.49]; 0 leaves all as it is.

    Raises:
        ObjectComposeError: `share` is out of range.
    """
    if not 0 <= share <= MAX_BOX_JITTER:
        raise ObjectComposeError(f"`--box-jitter` must lie in [0, {MAX_BOX_JITTER}], got {share}.")
    move, found = ReferenceAugmentation(box=share).vary_box, []
    for case in cases:
        rng = np.random.default_rng(stable_number("box jitter", case.record.id))
        objects = tuple(dataclasses.replace(item, box=move(box_of(item), rng)) for item in case.objects)
        found.append(dataclasses.replace(case, objects=objects))
    return found


def layouts_digest(cases: Sequence[LayoutCase]) -> str:
    """64 hex digits that change with any prompt, box, strength, order or reference."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(json.dumps([case.record.id, case.record.text]).encode())
        for item in case.objects:
            facts = [item.phrase, item.box, item.scale, item.order, item.image.mode, item.image.size]
            digest.update(json.dumps(facts).encode() + item.image.tobytes())
    return digest.hexdigest()
