"""Drawings and identities: what an object looks like before it is put into a scene.

An identity is one drawing with one recolouring. Recolourings are sampled without end from a seed and never named in a
caption, so an adapter cannot learn a lookup table, and look-alikes (five recolourings of one dog) come for free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from objectcompose.toybox.categories import Preset, held_out_drawings


PICTURES = Path(__file__).parent / "pictures"
#: Hue rotations (degrees) that no training ever shows: an identity drawn from them is *unseen*.
HELD_OUT_HUES = (280.0, 340.0)
#: Share of objects that keep the colours of their drawing.
NATURAL_SHARE = 0.4
PATTERNS = ("none", "stripes", "dots", "patch")
PATTERN_SHARES = (0.82, 0.06, 0.06, 0.06)
_PERMUTATIONS = ((0, 2, 1), (1, 0, 2), (2, 1, 0))  # the odd ones: a cyclic permutation is a hue rotation already


@dataclass(frozen=True)
class Identity:
    """One drawing with one recolouring.

    Attributes:
        category: name of the category.
        style: drawing style, one of `STYLES`.
        hue: rotation about the grey axis, degrees in [0, 360).
        permutation: order of the colour channels, applied before the rotation.
        brightness: factor on all channels, in [0.7, 1.15].
        pattern: one of `PATTERNS`, drawn inside the mask.
        pattern_seed: integer that fixes the pattern's colour, angle and size.
    """

    category: str
    style: str
    hue: float = 0.0
    permutation: tuple[int, int, int] = (0, 1, 2)
    brightness: float = 1.0
    pattern: str = "none"
    pattern_seed: int = 0


def sample_identity(preset: Preset, category: str, rng: np.random.Generator, unseen: bool = False) -> Identity:
    """Draw an identity of a category: from the training distribution, or from what training never shows.

    Args:
        preset: the world.
        category: one of `preset.categories`.
        rng: source of randomness.
        unseen: take a hue of `HELD_OUT_HUES`, and a held-out drawing where the category has one.
    """
    held_out = held_out_drawings(preset)
    styles = [style for style in preset.styles if ((category, style) in held_out) == unseen]
    style = str(rng.choice(styles or list(preset.styles)))
    pattern = str(rng.choice(PATTERNS, p=PATTERN_SHARES))
    seed = int(rng.integers(2**31))
    low, high = HELD_OUT_HUES
    if unseen:
        return Identity(category, style, float(rng.uniform(low, high)), (0, 1, 2), _brightness(rng), pattern, seed)
    if rng.random() < NATURAL_SHARE:
        return Identity(category, style)
    if rng.random() < 0.25:
        permutation = _PERMUTATIONS[int(rng.integers(len(_PERMUTATIONS)))]
        return Identity(category, style, 0.0, permutation, _brightness(rng), pattern, seed)
    hue = float(rng.uniform(high - 360.0, low) % 360.0)
    return Identity(category, style, hue, (0, 1, 2), _brightness(rng), pattern, seed)


def _brightness(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.7, 1.15))


def colour_matrix(identity: Identity) -> np.ndarray:
    """The (3, 3) matrix that maps the drawing's RGB to the identity's."""
    angle = math.radians(identity.hue)
    cos, sin = math.cos(angle), math.sin(angle)
    third, root = (1.0 - cos) / 3.0, math.sqrt(1.0 / 3.0) * sin
    rotation = np.array(
        [
            [cos + third, third - root, third + root],
            [third + root, cos + third, third - root],
            [third - root, third + root, cos + third],
        ]
    )  # Rodrigues' formula about (1, 1, 1)
    return (identity.brightness * rotation @ np.eye(3)[list(identity.permutation)]).astype(np.float32)


def pattern_layer(identity: Identity, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour (3,) in [0, 1] and opacity (side, side) in [0, 1] of the pattern in the drawing's own frame."""
    rng = np.random.default_rng(identity.pattern_seed)
    colour = rng.uniform(0.0, 1.0, 3).astype(np.float32)
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(axis, axis)
    angle, period = rng.uniform(0, math.pi), rng.uniform(0.35, 0.6)
    along = math.cos(angle) * x + math.sin(angle) * y
    across = -math.sin(angle) * x + math.cos(angle) * y
    if identity.pattern == "stripes":
        shape = np.sin(2 * math.pi * along / period) > 0.2
    elif identity.pattern == "dots":
        shape = np.sin(2 * math.pi * along / period) * np.sin(2 * math.pi * across / period) > 0.3
    elif identity.pattern == "patch":
        centre = rng.uniform(-0.35, 0.35, 2)
        shape = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < rng.uniform(0.25, 0.45) ** 2
    else:
        shape = np.zeros((side, side), dtype=bool)
    return colour, 0.85 * shape.astype(np.float32)


@lru_cache(maxsize=8)
def load_atlas(categories: tuple[str, ...], styles: tuple[str, ...], side: int) -> torch.Tensor:
    """All drawings as one tensor (category, style, 4, side, side): straight RGB and alpha in [0, 1], centred."""
    drawings = torch.zeros(len(categories), len(styles), 4, side, side)
    for i, category in enumerate(categories):
        for j, style in enumerate(styles):
            with Image.open(PICTURES / style / f"{category.replace(' ', '_')}.png") as picture:
                canvas = Image.new("RGBA", (64, 64))
                canvas.paste(picture, ((64 - picture.width) // 2, (64 - picture.height) // 2))
            pixels = torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1).float().div(255)
            premultiplied = torch.cat([pixels[:3] * pixels[3:], pixels[3:]])
            small = F.interpolate(premultiplied[None], size=(side, side), mode="area")[0]
            small[:3] /= small[3:].clamp_min(1e-4)
            drawings[i, j] = small
    return drawings


def render_identities(preset: Preset, identities: list[Identity], side: int) -> torch.Tensor:
    """The identities in their drawings' own frame: (N, 4, side, side), straight RGB and alpha in [0, 1]."""
    atlas = load_atlas(preset.categories, preset.styles, side)
    rows = [preset.categories.index(identity.category) for identity in identities]
    columns = [preset.styles.index(identity.style) for identity in identities]
    drawings = atlas[rows, columns]
    matrices = torch.from_numpy(np.stack([colour_matrix(identity) for identity in identities]))
    colours = torch.einsum("nij,njhw->nihw", matrices, drawings[:, :3])
    for n, identity in enumerate(identities):
        if identity.pattern != "none":
            colour, opacity = pattern_layer(identity, side)
            blend = torch.from_numpy(opacity)
            colours[n] = colours[n] * (1 - blend) + torch.from_numpy(colour)[:, None, None] * blend
    return torch.cat([colours.clamp(0, 1), drawings[:, 3:]], dim=1)
