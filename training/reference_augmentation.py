"""How references are varied in training, so that an adapter learns identities and does not copy pictures.

LocRef-Diffusion (arXiv:2411.15252) trains on crops of the very picture that is to be painted. Without these changes
the model would paste them. One draw changes a reference both by itself and in the composite image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageEnhance

from objectcompose.errors import ObjectComposeError


Box: TypeAlias = tuple[float, float, float, float]


@dataclass(frozen=True)
class ReferenceAugmentation:
    """Strengths; all 0, and `crop` 1, leave everything as it is.

    Attributes:
        flip: probability of a mirrored reference, in [0, 1].
        colour: brightness, contrast and saturation are each multiplied by a factor in [1 - colour, 1 + colour].
        crop: least share of the reference's area that a random crop of its proportions keeps, in (0, 1].
        rotation: largest angle, degrees, in [0, 180].
        box: sides of boxes move by at most this share of the box's width or height, in [0, 0.49].

    Raises:
        ObjectComposeError: a strength is out of range.
    """

    flip: float = 0.5
    colour: float = 0.2
    crop: float = 0.8
    rotation: float = 10.0
    box: float = 0.03

    def __post_init__(self) -> None:
        limits = {
            "flip": (0, 1),
            "colour": (0, 1),
            "crop": (0.01, 1),
            "rotation": (0, 180),
            "box": (0, 0.49),
        }  # below a half no box vanishes
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ObjectComposeError(
                    f"`{name}` of the augmentation must lie in [{low}, {high}], got {getattr(self, name)}."
                )

    def vary_picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A changed copy; what a rotation leaves open is transparent.

        Args:
            image: RGB or RGBA.
            rng: what is drawn does not depend on the picture.
        """
        is_flipped, angle = rng.random() < self.flip, rng.uniform(-self.rotation, self.rotation)
        side = float(np.sqrt(rng.uniform(self.crop, 1)))
        left, top = rng.random(2) * (1 - side)
        factors = rng.uniform(1 - self.colour, 1 + self.colour, 3).tolist()
        width, height = image.size
        if side < 1:
            corners = (left * width, top * height, (left + side) * width, (top + side) * height)
            x0, y0, x1, y1 = (round(corner) for corner in corners)
            cropped = image.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
            image = cropped if shows_something(cropped) else image
        if is_flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = _vary_colours(image, factors)
        if self.rotation:
            image = image.convert("RGBA").rotate(angle, Image.Resampling.BICUBIC, expand=True)
        return image

    def vary_box(self, box: Box, rng: np.random.Generator) -> Box:
        """A box whose sides moved, still on the canvas and never empty."""
        shifts = rng.uniform(-self.box, self.box, 4)
        sides = np.array([box[2] - box[0], box[3] - box[1]] * 2)
        x0, y0, x1, y1 = (np.array(box) + shifts * sides).clip(0, 1).tolist()
        return x0, y0, x1, y1


def shows_something(image: Image.Image) -> bool:
    """Whether any pixel is not fully transparent."""
    return image.mode != "RGBA" or image.getchannel("A").getbbox() is not None


def _vary_colours(image: Image.Image, factors: Sequence[float]) -> Image.Image:
    colours = image.convert("RGB")
    for kind, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        if factor != 1:
            colours = kind(colours).enhance(factor)
    if image.mode == "RGBA":
        colours.putalpha(image.getchannel("A"))
    return colours
