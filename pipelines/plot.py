"""Pictures that show where a phrase was looked at: an attention map over the picture, with the object's box.

Only PIL and numpy are needed. With matplotlib installed any of its colour maps can be named; "heat" is built in.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from objectcompose.errors import ImageInputError, ObjectComposeError
from objectcompose.files import write_png
from objectcompose.layout import as_scene_objects
from objectcompose.pipelines.pipeline_output import ComposeOutput


# black, violet, red, orange, pale yellow: dark to bright, also for colour-blind eyes and in grey
_HEAT_COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float64)

_BOX_COLOUR = (120, 255, 160)


def colour_map(values: np.ndarray, name: str = "heat") -> np.ndarray:
    """Colours for values in [0, 1]: `(h, w)` to `(h, w, 3)`, uint8.

    Raises:
        ObjectComposeError: `name` is neither "heat" nor a colour map of an installed matplotlib.
    """
    if name == "heat":
        stops = np.linspace(0.0, 1.0, len(_HEAT_COLOURS))
        channels = [np.interp(values, stops, _HEAT_COLOURS[:, channel]) for channel in range(3)]
        return np.stack(channels, axis=-1).round().astype(np.uint8)
    try:
        import matplotlib
    except ImportError:
        raise ObjectComposeError(f'`colours` must be "heat" without matplotlib, got {name!r}.') from None
    if name not in matplotlib.colormaps:
        raise ObjectComposeError(f'`colours` must be "heat" or a colour map of matplotlib, got {name!r}.')
    return matplotlib.colormaps[name](values, bytes=True)[..., :3]


def overlay_map(
    image: Image.Image,
    attention_map: torch.Tensor | np.ndarray | None = None,
    box: Sequence[float] | None = None,
    opacity: float = 0.6,
    colours: str = "heat",
) -> Image.Image:
    """A picture with an attention map over it and a box on top.

    Args:
        image: the picture, any size.
        attention_map: shape `(h, w)`, at least 0; its largest value becomes the brightest colour. None: no map.
        box: xyxy, fractions in [0, 1] of width and height. None: no box.
        opacity: of the map, in [0, 1].
        colours: "heat", or the name of a colour map of matplotlib.

    Returns:
        A new RGB picture of the same size.

    Raises:
        ImageInputError: the map is not two-dimensional or not finite.
        ObjectComposeError: `opacity` or `colours` is unusable.
    """
    if not 0.0 <= opacity <= 1.0:
        raise ObjectComposeError(f"`opacity` must lie in [0, 1], got {opacity!r}.")
    picture = image.convert("RGB")
    if attention_map is not None:
        values = np.asarray(torch.as_tensor(attention_map).detach().float().cpu(), dtype=np.float32)
        if values.ndim != 2 or not np.isfinite(values).all():
            raise ImageInputError(f"`attention_map` must be finite and of shape (h, w), got shape {values.shape}.")
        largest = values.max()
        values = values.clip(0) / largest if largest > 0 else np.zeros_like(values)
        smooth = Image.fromarray(values).resize(picture.size, Image.Resampling.BILINEAR)
        heat = Image.fromarray(colour_map(np.asarray(smooth).clip(0, 1), colours))
        picture = Image.blend(picture, heat, opacity)
    if box is not None:
        _draw_box(picture, box)
    return picture


def draw_layout(image: Image.Image, objects: Any) -> Image.Image:
    """A picture with the place and the name of each object drawn on it; objects without a place are left out.

    Args:
        image: the picture, any size.
        objects: `SceneObject`s or dicts in layout-JSON form; a mask is drawn as a tint.

    Returns:
        A new RGB picture of the same size.

    Raises:
        LayoutError: `objects` breaks the schema.
    """
    picture = image.convert("RGB")
    for item in as_scene_objects(objects, 1)[0]:
        corner: Sequence[int] | None = None
        if item.mask is not None:
            mask = Image.fromarray((np.asarray(item.mask) * 96).astype(np.uint8)).resize(picture.size)
            picture.paste(_BOX_COLOUR, mask=mask)
            corner = (mask.getbbox() or (0, 0))[:2]
        if item.box is not None:
            _draw_box(picture, item.box)
            corner = tuple(round(fraction * side) for fraction, side in zip(item.box[:2], picture.size, strict=True))
        name = item.phrase if item.phrase is not None else item.token
        if corner is not None and name is not None:
            place = (corner[0] + 2, corner[1] + 1)
            ImageDraw.Draw(picture).text(place, name, fill=_BOX_COLOUR, stroke_width=1, stroke_fill=(0, 0, 0))
    return picture


def _draw_box(picture: Image.Image, box: Sequence[float]) -> None:
    width, height = picture.size
    x0, y0, x1, y1 = (
        round(fraction * (side - 1)) for fraction, side in zip(box, (width, height, width, height), strict=True)
    )
    draw, line = ImageDraw.Draw(picture), max(1, min(width, height) // 128)
    # a dark line around the bright one keeps the box visible on any picture
    draw.rectangle((x0, y0, x1, y1), outline=(0, 0, 0), width=2 * line)
    draw.rectangle((x0, y0, x1, y1), outline=_BOX_COLOUR, width=line)


def overlay_output(output: ComposeOutput, opacity: float = 0.6, colours: str = "heat") -> list[dict[str, Image.Image]]:
    """Overlays of a whole pipeline output: per picture, one for the label of each object.

    Objects without a phrase have neither label nor map, and no overlay.

    Raises:
        ObjectComposeError: the output has no attention maps or its `images` are not PIL images.
    """
    if output.attention is None or output.objects is None:
        raise ObjectComposeError("`output` has no attention maps: call the pipeline with `return_attention=True`.")
    if not all(isinstance(image, Image.Image) for image in output.images):
        raise ObjectComposeError('`output.images` must be PIL images: call the pipeline with `output_type="pil"`.')
    rows = zip(output.images, output.objects, output.attention, strict=True)
    return [
        {item.label: overlay_map(image, maps[item.label], item.box, opacity, colours) for item in placed if item.label}
        for image, placed, maps in rows
    ]


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a PNG so that the file is there whole or not at all; missing folders are made.

    Raises:
        ImageInputError: the path cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(target, image)
    except OSError as error:
        raise ImageInputError(f"`path` {str(target)!r} cannot be written: {error.strerror or error}.") from error
    return target
