"""Samples for training with references and boxes: a picture, its caption, and objects with box and reference.

What is random about a sample (crop, caption, views) comes from a generator that is given, so that a sample has any
number of variants, each of which can be made again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from objectcompose.errors import ObjectComposeError
from objectcompose.layout import SceneObject
from objectcompose.toybox.backgrounds import render_backgrounds, sample_background
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.scenes import SceneSpec, render_references, render_scenes, sample_scene
from objectcompose.training.runs import digest_of
from objectcompose.training.toybox_data import SPLIT_SEEDS


#: Objects of which less than this share of the canvas can be seen are no references.
_LEAST_VISIBLE = 0.008


@dataclass(frozen=True, eq=False)
class ReferenceSample:
    """What is trained on.

    Attributes:
        pixels: (3, H, W) in [-1, 1].
        caption: the prompt.
        objects: at least one, each with `image` and `box`.
    """

    pixels: torch.Tensor
    caption: str
    objects: tuple[SceneObject, ...]


class ReferenceDataset(Protocol):
    """Samples by number, each with a key that changes whenever its content does."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> ReferenceSample:
        """A variant of a sample, all that is random about it from `rng`."""
        ...

    def key(self, index: int) -> str:
        """Hex digest of all that variants of the sample follow from."""
        ...

    def digest(self) -> str:
        """Names all samples; quickly, so pictures in files by their sizes in bytes alone."""
        ...


class ToyboxReferences:
    """Scenes of the toybox; a reference shows the object's identity in another pose, half of them as a cut-out.

    Args:
        preset: the world.
        count: number of scenes, at least 1.
        split: of `training.toybox_data.SPLIT_SEEDS`.

    Raises:
        ObjectComposeError: `count` is below 1.
    """

    def __init__(self, preset: Preset, count: int, split: str = "train") -> None:
        if count < 1:
            raise ObjectComposeError(f"`toybox_scenes` must be at least 1, got {count}.")
        self.preset, self.count, self.split = preset, count, split

    def __len__(self) -> int:
        return self.count

    def spec(self, index: int) -> SceneSpec:
        """Description of a scene."""
        return sample_scene(self.preset, (SPLIT_SEEDS[self.split], index))

    def sample(self, index: int, rng: np.random.Generator) -> ReferenceSample:
        """One scene with new views of its objects."""
        spec = self.spec(index)
        scene = render_scenes(self.preset, [spec])
        shares = scene.visible[0].mean((1, 2))
        seen = [number for number, share in enumerate(shares.tolist()) if share >= _LEAST_VISIBLE]
        views = reference_views(self.preset, [spec.identities[number] for number in seen], rng)
        objects = [
            SceneObject(
                phrase=spec.identities[number].category, image=view, box=tuple(scene.boxes[0, number].tolist())
            )
            for number, view in zip(seen, views, strict=True)
        ]
        return ReferenceSample(scene.pixels[0] * 2 - 1, spec.caption, tuple(objects))

    def key(self, index: int) -> str:
        """Digest of the world and the scene's description."""
        return hashlib.sha256(repr((self.preset, self.spec(index))).encode()).hexdigest()

    def digest(self) -> str:
        """See `ReferenceDataset`."""
        return digest_of([repr((self.preset, self.count, self.split)).encode()])


def reference_views(
    preset: Preset, identities: list, rng: np.random.Generator, background_share: float = 0.5
) -> list[Image.Image]:
    """A view of each identity in a pose of its own: a cut-out (RGBA), or on a background (RGB).

    Args:
        preset: the world.
        identities: what to show.
        rng: draws poses and backgrounds.
        background_share: share of views with a background, in [0, 1].
    """
    views = render_references(preset, identities, [int(seed) for seed in rng.integers(2**31, size=len(identities))])
    backgrounds = render_backgrounds([sample_background(rng) for _ in identities], preset.image_size)
    pictures = []
    for view, background, draw in zip(views, backgrounds, rng.random(len(identities)), strict=True):
        picture = pil_picture(view)
        if draw < background_share:  # a tight crop, as photographs are cropped by boxes
            on_background = pil_picture(view[:3] * view[3:] + background * (1 - view[3:]))
            picture = on_background.crop(picture.getchannel("A").getbbox())
        pictures.append(picture)
    return pictures


def pil_picture(pixels: torch.Tensor) -> Image.Image:
    """Pixels (3 or 4, H, W) in [0, 1] as a PIL image of mode RGB or RGBA."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels[None]))[0]
