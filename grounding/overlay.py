"""Pictures of what grounding found: masks in colours, boxes and their phrases, over the picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from objectcompose.grounding.detection import Detection


#: Told apart also by colour-blind eyes (after Okabe and Ito).
OVERLAY_COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
_MIN_OVERLAY_SIDE = 512


def overlay_detections(
    picture: Image.Image, found: Sequence[Detection], opacity: float = 0.45, with_scores: bool = True
) -> Image.Image:
    """A picture with its detections drawn on it, one colour per phrase (without phrases: one per detection).

    Args:
        picture: RGB.
        found: its detections.
        opacity: of the masks, in [0, 1].
        with_scores: write each score behind its phrase.

    Returns:
        A new RGB picture; a small one is enlarged by a whole factor until its longer side has 512 pixels or so, or the
        words could not be read.
    """
    names = [one.phrase if one.phrase is not None else number for number, one in enumerate(found)]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    colours = [OVERLAY_COLOURS[places[name] % len(OVERLAY_COLOURS)] for name in names]
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32).copy()
    for one, colour in zip(found, colours, strict=True):
        if one.mask is not None:
            inside = one.mask.numpy() > 0
            pixels[inside] = (1 - opacity) * pixels[inside] + opacity * np.array(colour, dtype=np.float32)
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    factor = max(1, _MIN_OVERLAY_SIDE // max(drawn.size))
    drawn = drawn.resize((drawn.width * factor, drawn.height * factor), Image.Resampling.NEAREST)
    for one, colour in zip(found, colours, strict=True):
        _draw_detection(drawn, one, colour, with_scores)
    return drawn


def _draw_detection(drawn: Image.Image, one: Detection, colour: tuple[int, int, int], with_score: bool) -> None:
    width, height = drawn.size
    draw, line = ImageDraw.Draw(drawn), max(2, min(width, height) // 200)
    x0, y0, x1, y1 = (round(part * (side - 1)) for part, side in zip(one.box, (width, height) * 2, strict=True))
    draw.rectangle((x0, y0, x1, y1), outline=colour, width=line)
    if one.phrase is None:
        return
    font = ImageFont.load_default(max(12, min(width, height) // 30))
    words = f"{one.phrase} {one.score:.2f}" if with_score else one.phrase
    left, top, right, bottom = draw.textbbox((0, 0), words, font=font)
    x, y = min(x0, max(0, width - (right - left) - 4)), max(0, y0 - (bottom - top) - 6)
    draw.rectangle((x, y, x + right - left + 4, y + bottom - top + 6), fill=colour)
    draw.text((x + 2 - left, y + 3 - top), words, fill=(0, 0, 0), font=font)
