"""Scenes of toybox to learn instances from: one picture each, with a mask for every instance (MIFO, arXiv 2511.00542).

Kinds:

    alike    recolourings of one drawing, side by side: only their colours tell them apart
    unlike   different categories

All identities have hues that no training shows. Captions and prompts name no style and no colour of an object: what an
instance looks like can come from its placeholder only. The test list has each category of the small world once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.prompt_lists import stable_number, stable_sample
from objectcompose.files import write_png
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.identities import HELD_OUT_HUES, Identity, sample_identity
from objectcompose.toybox.scenes import SceneSpec, render_scenes, sample_scene
from objectcompose.training.box_crops import overlap
from objectcompose.training.reference_samples import pil_picture


ALIKE, UNLIKE = "alike", "unlike"
#: Scenes of a split by kind.
INSTANCE_SCENES = {"dev": {ALIKE: 2, UNLIKE: 1}, "test": {ALIKE: 8, UNLIKE: 4}}
INSTANCES = 2
#: Every instance shows at least this share of the picture (the paper's pictures: 0.15), no two boxes overlap more.
LEAST_SHOWN, LARGEST_OVERLAP = 0.08, 0.05
#: Orders of colour channels that no hue rotation gives: the second look-alike has one of them beside its hue.
_MIRRORED = ((0, 2, 1), (1, 0, 2), (2, 1, 0))


@dataclass(frozen=True, eq=False)
class ToyboxInstances:
    """One scene.

    Attributes:
        name: of the scene, such as "test-alike-3".
        kind: `ALIKE` or `UNLIKE`.
        words: category of each instance.
        picture: the only one that is learned from.
        masks: (N, S, S), {0, 1}: what can be seen of each instance.
        boxes: xyxy fractions around the masks.
        spec: its description.
    """

    name: str
    kind: str
    words: tuple[str, ...]
    picture: Image.Image
    masks: torch.Tensor
    boxes: tuple[tuple[float, ...], ...]
    spec: SceneSpec

    def save(self, folder: Path) -> Path:
        """Write `img.png`, `mask0.png`, `mask1.png`, ..., as `learn_mifo --data` reads them; returns the folder."""
        write_png(folder / "img.png", self.picture)
        for number, mask in enumerate(self.masks):
            write_png(folder / f"mask{number}.png", Image.fromarray((mask * 255).byte().numpy()))
        return folder


def toybox_instances(preset: Preset, split: str, kinds: Sequence[str] = (ALIKE, UNLIKE)) -> list[ToyboxInstances]:
    """A split's scenes, look-alikes first.

    Args:
        preset: the world.
        split: "dev" or "test".
        kinds: of them.

    Raises:
        ObjectComposeError: an unknown split or kind.
    """
    if split not in INSTANCE_SCENES:
        raise ObjectComposeError(f"`split` must be one of {', '.join(INSTANCE_SCENES)}, got {split!r}.")
    unknown = sorted(set(kinds) - {ALIKE, UNLIKE})
    if unknown or not kinds:
        raise ObjectComposeError(f"`kinds` must be of {ALIKE}, {UNLIKE}, got {list(kinds)}.")
    return [
        _make_scene(preset, split, kind, number) for kind in kinds for number in range(INSTANCE_SCENES[split][kind])
    ]


def _make_scene(preset: Preset, split: str, kind: str, number: int) -> ToyboxInstances:
    """The first of a row of drawn scenes that shows its instances large and apart."""
    rng = np.random.default_rng(stable_number("instances", split, kind, number))
    identities = _look_alikes(preset, split, number, rng) if kind == ALIKE else _others(preset, split, number, rng)
    for trial in count():
        assert trial < 10_000, f"{split} {kind} {number} finds no scene"
        spec = sample_scene(preset, stable_number("instance scene", split, kind, number, trial), identities=identities)
        scene = render_scenes(preset, [spec])
        boxes = scene.boxes[0].tolist()
        nearest = max((overlap(*pair) for pair in combinations(boxes, 2)), default=0)
        if scene.visible[0].mean((1, 2)).min() >= LEAST_SHOWN and nearest <= LARGEST_OVERLAP:
            break
    return ToyboxInstances(
        f"{split}-{kind}-{number}",
        kind,
        tuple(identity.category for identity in spec.identities),
        pil_picture(scene.pixels[0]),
        scene.visible[0],
        tuple(tuple(box) for box in boxes),
        spec,
    )


def _look_alikes(preset: Preset, split: str, number: int, rng: np.random.Generator) -> list[Identity]:
    """One drawing twice, in colours far apart, both of them unseen."""
    category = stable_sample(preset.categories, len(preset.categories), "look-alikes", split)[number]
    first = sample_identity(preset, category, rng, unseen=True)
    low, high = HELD_OUT_HUES
    mirrored = _MIRRORED[int(rng.integers(len(_MIRRORED)))]
    second = Identity(category, first.style, float(rng.uniform(low, high)), mirrored, float(rng.uniform(0.7, 1.15)))
    return [Identity(category, first.style, first.hue, brightness=first.brightness), second]


def _others(preset: Preset, split: str, number: int, rng: np.random.Generator) -> list[Identity]:
    names = stable_sample(preset.categories, INSTANCES, "unlike", split, number)
    return [sample_identity(preset, name, rng, unseen=True) for name in names]
