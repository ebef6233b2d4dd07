"""Reference pictures: from what a user gives to what an image encoder reads, and its features.

Shared by the methods that show objects by pictures, at inference and in training. A picture's alpha channel is the
object's cut-out: it is put on one plain colour, the encoder's mean, whose normalised value is 0. So empty canvas,
margins and the picture that stands for "no reference" all look alike to the encoder. Each picture is resized once,
antialiased, and never cropped to its centre: CLIP's own preparation would cut long objects and whatever lies near the
border of a canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from objectcompose.errors import CheckpointError, ImageInputError, ObjectComposeError


#: Mean and standard deviation of CLIP's pixels in [0, 1], for encoders that come without a feature extractor.
CLIP_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ReferenceFeatures:
    """What an image encoder says of M pictures.

    Attributes:
        pooled: the class token after the last norm, `(M, C)`.
        embeds: `pooled` in the joint space of pictures and text, `(M, D)`.
        grid: hidden states of the last but one layer, class token first, `(M, L, C)`.
    """

    pooled: torch.Tensor
    embeds: torch.Tensor
    grid: torch.Tensor


def encoder_side(image_encoder: Any) -> int:
    """Sides of the square pictures that an image encoder reads, in pixels.

    Raises:
        CheckpointError: there is no image encoder.
    """
    if image_encoder is None:
        raise CheckpointError("`image_encoder` is needed to read reference pictures, got None.")
    return int(image_encoder.config.image_size)


def clip_statistics(feature_extractor: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation `(3,)` of the encoder's pixels in [0, 1]; CLIP's own without a feature extractor."""
    if feature_extractor is None:
        return torch.tensor(CLIP_PIXEL_MEAN), torch.tensor(CLIP_PIXEL_STD)
    return torch.tensor(feature_extractor.image_mean), torch.tensor(feature_extractor.image_std)


def normalize_pixels(pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Pixels `(..., 3, H, W)` in [0, 1] as the encoder reads them; `mean` and `std` from `clip_statistics`."""
    return (pixels - mean.to(pixels)[:, None, None]) / std.to(pixels)[:, None, None]


def cut_out_pixels(image: Image.Image, colour: torch.Tensor, trim: bool = True) -> torch.Tensor:
    """A picture `(3, H, W)` in [0, 1]; transparent places show `colour` `(3,)`.

    Args:
        image: mode RGB, or RGBA with the cut-out as its alpha channel.
        colour: RGB in [0, 1].
        trim: drop the rows and columns around the cut-out that are fully transparent.

    Raises:
        ImageInputError: not a PIL image, or one that is transparent everywhere.
    """
    if not isinstance(image, Image.Image):
        raise ImageInputError(f"`image` must be a PIL image, got {type(image).__name__}.")
    if not image.has_transparency_data:
        return _pixel_tensor(image.convert("RGB"))
    image = image.convert("RGBA")
    bounds = image.getchannel("A").getbbox()
    if bounds is None:
        raise ImageInputError("`image` must show something, got an alpha channel that is 0 everywhere.")
    pixels = _pixel_tensor(image.crop(bounds) if trim else image)
    alpha = pixels[3:]
    return pixels[:3] * alpha + colour.to(pixels)[:, None, None] * (1 - alpha)


def _pixel_tensor(image: Image.Image) -> torch.Tensor:
    """`(channels, H, W)` float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def resize_pixels(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pixels `(C, H, W)` in [0, 1] at another size (h, w): bicubic, antialiased, values kept in [0, 1]."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    resized = F.interpolate(pixels[None], size, mode="bicubic", align_corners=False, antialias=True)
    return resized[0].clamp(0, 1)


def fit_pixels(
    pixels: torch.Tensor, frame: tuple[int, int], colour: torch.Tensor, margin: float = 0.0
) -> torch.Tensor:
    """The whole picture, its proportions kept, centred in a frame (h, w) of one colour: `(3, h, w)`.

    Args:
        pixels: `(3, H, W)` in [0, 1].
        frame: rows and columns of the result.
        colour: RGB in [0, 1], `(3,)`.
        margin: least distance to the frame on every side, as a share of the picture's longer side.
    """
    height, width = pixels.shape[-2:]
    reserve = 2 * margin * max(height, width)
    factor = min(frame[0] / (height + reserve), frame[1] / (width + reserve))
    inner = (max(1, round(height * factor)), max(1, round(width * factor)))
    top, left = (frame[0] - inner[0]) // 2, (frame[1] - inner[1]) // 2
    framed = colour.to(pixels)[:, None, None].repeat(1, *frame)
    framed[:, top : top + inner[0], left : left + inner[1]] = resize_pixels(pixels, inner)
    return framed


def reference_pixels(
    image: Image.Image,
    size: int,
    colour: torch.Tensor | Sequence[float],
    margin: float = 0.0,
    shape: Literal["pad", "stretch"] = "pad",
) -> torch.Tensor:
    """A reference picture as a square, not normalised yet.

    Args:
        image: RGB, or RGBA with the cut-out as its alpha channel.
        size: sides of the result, in pixels.
        colour: RGB in [0, 1] of what the picture leaves open: the encoder's mean (`clip_statistics`).
        margin: with "pad", free space on every side, as a share of the object's longer side; at least 0.
        shape: "pad" keeps the object's proportions, trimmed to its cut-out and centred; "stretch" squashes the whole
            picture, as for pictures of a scene, whose places must stay.

    Returns:
        `(3, size, size)`, float32 in [0, 1].

    Raises:
        ImageInputError: not a PIL image, or one that is transparent everywhere.
        ObjectComposeError: another `shape`, or a negative `margin`.
    """
    if shape not in ("pad", "stretch"):
        raise ObjectComposeError(f'`shape` must be "pad" or "stretch", got {shape!r}.')
    if margin < 0:
        raise ObjectComposeError(f"`margin` must be at least 0, got {margin!r}.")
    colour = torch.as_tensor(colour, dtype=torch.float32)
    pixels = cut_out_pixels(image, colour, trim=shape == "pad")
    if shape == "stretch":
        return resize_pixels(pixels, (size, size))
    return fit_pixels(pixels, (size, size), colour, margin)


def encode_references(image_encoder: Any, pixels: torch.Tensor) -> ReferenceFeatures:
    """All features of M pictures from one pass of the encoder.

    Args:
        image_encoder: a `CLIPVisionModelWithProjection`.
        pixels: normalised, `(M, 3, S, S)`, S as `encoder_side` says, on the device that the encoder runs on.

    Raises:
        CheckpointError: there is no image encoder.
    """
    encoder_side(image_encoder)
    # The model keeps the pooled token to itself. It is overheard, because calling the norm from here would pass by the
    # hooks that offloading puts on the outer model.
    pooled: list[torch.Tensor] = []
    norm = image_encoder.vision_model.post_layernorm
    handle = norm.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    try:
        output = image_encoder(pixels.to(image_encoder.dtype), output_hidden_states=True)
    finally:
        handle.remove()
    return ReferenceFeatures(pooled[0], output.image_embeds, output.hidden_states[-2])


def null_features(image_encoder: Any, device: torch.device | str | None = None) -> ReferenceFeatures:
    """What stands for "no reference", one row: zero vectors, and the grid of an all-zero normalised picture.

    As IP-Adapter has it: adapters that read vectors are trained with zeros, those that read grids with a blank
    picture.

    Args:
        image_encoder: a `CLIPVisionModelWithProjection`.
        device: where the encoder runs; its own when None.

    Raises:
        CheckpointError: there is no image encoder.
    """
    side = encoder_side(image_encoder)
    blank = torch.zeros(1, 3, side, side, device=image_encoder.device if device is None else device)
    features = encode_references(image_encoder, blank)
    return ReferenceFeatures(torch.zeros_like(features.pooled), torch.zeros_like(features.embeds), features.grid)
