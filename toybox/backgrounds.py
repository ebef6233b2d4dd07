"""Backgrounds of scenes: gradients, ground and sky, soft noise, stripes; each with the words a caption may use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


#: Muted colours that captions can name: objects stay the most saturated thing in a scene.
COLOURS: dict[str, tuple[float, float, float]] = {
    "grey": (0.72, 0.72, 0.72),
    "blue": (0.62, 0.74, 0.88),
    "green": (0.66, 0.80, 0.62),
    "yellow": (0.92, 0.87, 0.64),
    "pink": (0.92, 0.76, 0.80),
    "brown": (0.70, 0.60, 0.50),
}
GROUNDS: dict[str, tuple[float, float, float]] = {
    "grass": (0.50, 0.68, 0.42),
    "sand": (0.86, 0.78, 0.60),
    "snow": (0.93, 0.94, 0.97),
}
KINDS = ("gradient", "ground", "noise", "stripes")


@dataclass(frozen=True)
class Background:
    """A background.

    Attributes:
        kind: one of `KINDS`.
        words: what a caption says of it.
        first, second: RGB colours in [0, 1].
        angle: direction of the gradient or the stripes, radians.
        level: horizon height or stripe period, fraction of the canvas.
        seed: of the noise.
    """

    kind: str
    words: str
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    angle: float
    level: float
    seed: int


def _shift(colour: tuple[float, float, float], rng: np.random.Generator, amount: float) -> tuple[float, float, float]:
    r, g, b = np.clip(np.array(colour) + rng.uniform(-amount, amount, 3), 0, 1)
    return float(r), float(g), float(b)


def sample_background(rng: np.random.Generator) -> Background:
    """Draw a background."""
    kind = str(rng.choice(KINDS))
    angle, seed = float(rng.uniform(0, 2 * math.pi)), int(rng.integers(2**31))
    if kind == "ground":
        name = str(rng.choice(list(GROUNDS)))
        sky = _shift(COLOURS["blue"], rng, 0.05)
        return Background(
            kind, f"on the {name}", _shift(GROUNDS[name], rng, 0.04), sky, angle, float(rng.uniform(0.35, 0.65)), seed
        )
    name = str(rng.choice(list(COLOURS)))
    first = _shift(COLOURS[name], rng, 0.03)
    second = _shift(COLOURS[name], rng, 0.08)
    if kind == "stripes":
        second = (0.86 * first[0], 0.86 * first[1], 0.86 * first[2])
        words = f"on a striped {name} background"
    else:
        words = f"on a {name} background"
    return Background(kind, words, first, second, angle, float(rng.uniform(0.12, 0.25)), seed)


def render_backgrounds(backgrounds: list[Background], side: int) -> torch.Tensor:
    """Backgrounds as pictures (B, 3, side, side), in [0, 1]."""
    axis = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    weights = torch.stack([_weight(background, x, y) for background in backgrounds])[:, None]
    first = torch.tensor([background.first for background in backgrounds])[:, :, None, None]
    second = torch.tensor([background.second for background in backgrounds])[:, :, None, None]
    return first * (1 - weights) + second * weights


def _weight(background: Background, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The second colour's share in each pixel."""
    along = math.cos(background.angle) * (x - 0.5) + math.sin(background.angle) * (y - 0.5)
    if background.kind == "gradient":
        return (along + 0.5).clamp(0, 1)
    if background.kind == "ground":
        return (y < background.level).float()
    if background.kind == "stripes":
        return (torch.sin(2 * math.pi * along / background.level) > 0).float()
    coarse = torch.from_numpy(np.random.default_rng(background.seed).random((1, 1, 5, 5), dtype=np.float32))
    return F.interpolate(coarse, size=x.shape, mode="bicubic", align_corners=True)[0, 0].clamp(0, 1)
