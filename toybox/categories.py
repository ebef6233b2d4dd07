"""The 63 categories of toybox, its three styles, and the fixed lists that split them.

The names are COCO's. A *drawing* is one category in one style; an *identity* (see `objectcompose.toybox.scenes`) is a
drawing with a recolouring.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


#: Category name -> Unicode code of the emoji that pictures it (file stem in the source packages).
CATEGORY_CODES: dict[str, str] = {
    "person": "1f9cd",
    "bicycle": "1f6b2",
    "car": "1f697",
    "motorcycle": "1f3cd-fe0f",
    "airplane": "2708-fe0f",
    "bus": "1f68c",
    "train": "1f686",
    "truck": "1f69a",
    "boat": "26f5",
    "traffic light": "1f6a6",
    "stop sign": "1f6d1",
    "bird": "1f426",
    "cat": "1f408",
    "dog": "1f415",
    "horse": "1f40e",
    "sheep": "1f411",
    "cow": "1f404",
    "elephant": "1f418",
    "bear": "1f43b",
    "zebra": "1f993",
    "giraffe": "1f992",
    "backpack": "1f392",
    "umbrella": "2602-fe0f",
    "handbag": "1f45c",
    "tie": "1f454",
    "suitcase": "1f9f3",
    "frisbee": "1f94f",
    "sports ball": "26bd",
    "kite": "1fa81",
    "skateboard": "1f6f9",
    "bottle": "1f37e",
    "wine glass": "1f377",
    "cup": "2615",
    "fork": "1f374",
    "knife": "1f52a",
    "spoon": "1f944",
    "bowl": "1f963",
    "banana": "1f34c",
    "apple": "1f34e",
    "sandwich": "1f96a",
    "orange": "1f34a",
    "broccoli": "1f966",
    "carrot": "1f955",
    "hot dog": "1f32d",
    "pizza": "1f355",
    "donut": "1f369",
    "cake": "1f382",
    "chair": "1fa91",
    "couch": "1f6cb-fe0f",
    "potted plant": "1fab4",
    "bed": "1f6cf-fe0f",
    "toilet": "1f6bd",
    "tv": "1f4fa",
    "laptop": "1f4bb",
    "mouse": "1f5b1-fe0f",
    "keyboard": "2328-fe0f",
    "cell phone": "1f4f1",
    "book": "1f4d5",
    "clock": "23f0",
    "vase": "1f3fa",
    "scissors": "2702-fe0f",
    "teddy bear": "1f9f8",
    "toothbrush": "1faa5",
}

CATEGORIES: tuple[str, ...] = tuple(CATEGORY_CODES)
STYLES: tuple[str, ...] = ("fluent", "noto", "twemoji")


@dataclass(frozen=True)
class Preset:
    """A world's size: which categories and styles exist in it, and how large its pictures are.

    Attributes:
        name: `"cpu"` or `"gpu"`.
        categories: the category names that captions use.
        styles: the drawing styles that occur.
        image_size: side of a scene in pixels.
    """

    name: str
    categories: tuple[str, ...]
    styles: tuple[str, ...]
    image_size: int


#: Eight categories whose outlines differ at first sight, for a world that two CPU cores can learn.
CPU_CATEGORIES = ("car", "dog", "umbrella", "banana", "clock", "teddy bear", "wine glass", "pizza")

PRESETS: dict[str, Preset] = {
    "cpu": Preset("cpu", CPU_CATEGORIES, ("fluent",), 64),
    "gpu": Preset("gpu", CATEGORIES, STYLES, 128),
}


def held_out_drawings(preset: Preset, count: int = 16) -> frozenset[tuple[str, str]]:
    """`(category, style)` drawings that training never shows (a fixed list; none where a category has one drawing)."""
    if len(preset.styles) == 1:
        return frozenset()
    drawings = [(category, style) for category in preset.categories for style in preset.styles]
    chosen: dict[str, tuple[str, str]] = {}  # at most one per category, so that the category itself stays learnable
    for category, style in random.Random(20_312).sample(drawings, len(drawings)):
        chosen.setdefault(category, (category, style))
    return frozenset(list(chosen.values())[:count])


def held_out_pairs(preset: Preset, count: int = 24) -> frozenset[frozenset[str]]:
    """Unordered category pairs that never share a training scene (fixed list, at most a sixth of all pairs)."""
    names = preset.categories
    pairs = [frozenset((a, b)) for i, a in enumerate(names) for b in names[i + 1 :]]
    return frozenset(random.Random(24_24).sample(pairs, min(count, len(pairs) // 6)))
