"""The rules for the single values of a layout: text, boxes, masks, pictures and numbers.

Each function returns the value in the one form that the rest of the package relies on, or raises an error that names
the argument, the rule and the value received.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from objectcompose.errors import ImageInputError, LayoutError, RegionError


_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_PICTURE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_MAX_ORDER = 2**31


def check_text(value: Any, name: str, may_be_empty: bool = False, one_word: bool = False) -> str:
    """`value`, if it is text that a tokenizer can encode; `name` is the argument's name for the message.

    Raises:
        LayoutError: not a string, blank, not valid Unicode, or, for `one_word`, with white space inside.
    """
    if not isinstance(value, str):
        raise LayoutError(f"`{name}` must be a string, got {shown_value(value)}.")
    if not may_be_empty and not value.strip():
        raise LayoutError(f"`{name}` must hold at least one visible character, got {shown_value(value)}.")
    if one_word and value.split() != [value]:
        raise LayoutError(f"`{name}` must be one word without white space, got {shown_value(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise LayoutError(f"`{name}` must be Unicode without lone surrogates, got {shown_value(value)}.") from None
    return value


def check_box(value: Any, name: str = "box") -> tuple[float, float, float, float]:
    """`value` as four floats (x0, y0, x1, y1), fractions in [0, 1] of width and height with x0 < x1 and y0 < y1.

    Raises:
        LayoutError: another number of values, a value that is no finite number in [0, 1], or an empty box.
    """
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        raise LayoutError(f"`{name}` must be four numbers (x0, y0, x1, y1), got {shown_value(value)}.")
    corners = tuple(finite_number(number, name) for number in value)
    if not all(0.0 <= corner <= 1.0 for corner in corners):
        raise LayoutError(f"`{name}` must lie in [0, 1] (fractions of width and height, not pixels), got {corners}.")
    x0, y0, x1, y1 = corners
    if x0 >= x1 or y0 >= y1:
        raise LayoutError(f"`{name}` must have x0 < x1 and y0 < y1, got {corners}.")
    return x0, y0, x1, y1


def check_mask(value: Any, name: str = "mask") -> torch.Tensor:
    """`value` as a float32 tensor `(H, W)` of {0, 1} on the CPU, 1 = object; see `SceneObject` for what is accepted.

    Raises:
        RegionError: not two-dimensional, a value other than 0 and 1 (or 255 in 8 bits), or no 1 at all.
        ImageInputError: the path cannot be read as a PNG of mode "1" or "L".
    """
    if isinstance(value, (str, os.PathLike)):
        value = _open_image(value, name, ("PNG",))
    if isinstance(value, Image.Image):
        if value.mode not in ("1", "L"):
            raise ImageInputError(f'`{name}` must be a picture of mode "1" or "L", got mode {value.mode!r}.')
        value = np.array(value)
    try:
        array = np.array(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise RegionError(f"`{name}` must be an array of shape (H, W), got {shown_value(value)}.") from None
    if array.ndim != 2 or 0 in array.shape:
        raise RegionError(f"`{name}` must have shape (H, W) with at least one pixel, got shape {array.shape}.")
    if array.dtype.kind not in "biuf":
        raise RegionError(f"`{name}` must hold numbers 0 and 1, got values of type {array.dtype}.")
    if array.dtype == np.uint8 and array.max() == 255:
        array = np.where(array == 255, 1, np.where(array == 0, 0, 2))
    wrong = array[(array != 0) & (array != 1)]
    if wrong.size:
        raise RegionError(
            f"`{name}` must hold only 0 and 1 (in 8 bits 255 may stand for 1), got {wrong.size} other values."
        )
    if not array.any():
        raise RegionError(f"`{name}` must mark at least one pixel, got an empty mask of shape {array.shape}.")
    return torch.from_numpy(array.astype(np.float32))


def check_picture(value: Any, name: str = "image") -> Image.Image:
    """`value`, a PIL image or a path, as a PIL image of mode RGB, or RGBA if it has an alpha channel.

    The orientation that a camera noted in the file is applied.

    Raises:
        ImageInputError: neither of the two, not readable as PNG, JPEG, WebP, BMP, GIF or TIFF, of a mode with more
            than 8 bits, or transparent everywhere.
    """
    if isinstance(value, (str, os.PathLike)):
        value = ImageOps.exif_transpose(_open_image(value, name, _PICTURE_FORMATS))
    if not isinstance(value, Image.Image):
        raise ImageInputError(f"`{name}` must be a PIL image or a path, got {shown_value(value)}.")
    if value.mode not in _PICTURE_MODES:
        raise ImageInputError(f"`{name}` must have a mode of {_PICTURE_MODES}, got {value.mode!r}.")
    if 0 in value.size:
        raise ImageInputError(f"`{name}` must have at least one pixel, got size {value.size}.")
    try:
        picture = value.convert("RGBA" if value.has_transparency_data else "RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageInputError(f"`{name}` must be a readable picture: {error}.") from error
    picture.info.clear()  # colour profiles and comments would make equal pictures differ on disk
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema()[1] == 0:
        raise ImageInputError(f"`{name}` must show something, got an alpha channel that is 0 everywhere.")
    return picture


def _open_image(path: str | os.PathLike, name: str, formats: Sequence[str]) -> Image.Image:
    try:
        with Image.open(path, formats=list(formats)) as image:
            image.load()
            return image
    # Damaged files make the decoders raise almost anything (struct.error, SyntaxError, decompression bombs).
    except Exception as error:
        raise ImageInputError(
            f"`{name}` must be a readable {'/'.join(formats)} file, got {shown_value(path)}: {error}."
        ) from None


def finite_number(value: Any, name: str) -> float:
    """`value` as a finite float; True and False are no numbers."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise LayoutError(f"`{name}` must hold numbers, got {shown_value(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise LayoutError(f"`{name}` must hold finite numbers, got {shown_value(value)}.")
    return number


def check_scale(value: Any) -> float:
    """`value` as a float, at least 0."""
    scale = finite_number(value, "scale")
    if scale < 0:
        raise LayoutError(f"`scale` must be at least 0, got {scale}.")
    return scale


def check_order(value: Any) -> int:
    """`value` as an int of at most 32 bits."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise LayoutError(f"`order` must be a whole number, got {shown_value(value)}.")
    if not -_MAX_ORDER <= int(value) < _MAX_ORDER:
        raise LayoutError(f"`order` must fit into 32 bits, got {shown_value(value)}.")
    return int(value)


def shown_value(value: Any) -> str:
    """`value` for an error message: short, and never an error itself."""
    try:
        text = ascii(value) if isinstance(value, str) else repr(value)
    except Exception:
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."
