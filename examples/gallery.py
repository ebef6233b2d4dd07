"""The contact sheet that every example writes its pictures into: PIL only.

A method adds a `GalleryRow`; `save_gallery` lays the rows out below one another.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from objectcompose.errors import ObjectComposeError
from objectcompose.pipelines.plot import save_png


_BACKGROUND, _INK, _FAINT = (250, 250, 248), (30, 32, 36), (110, 114, 120)
_MARGIN, _GAP = 20, 10


@dataclass(frozen=True)
class GalleryRow:
    """One row of the sheet.

    Args:
        title: headline of the row.
        images: the pictures, any size.
        captions: one text under each picture.
        overlays: for each picture the pictures that stand beside it (attention overlays); may be left out.
    """

    title: str
    images: Sequence[Image.Image]
    captions: Sequence[str]
    overlays: Sequence[Sequence[Image.Image]] = field(default=())

    def __post_init__(self) -> None:
        if not self.images:
            raise ObjectComposeError(f"`images` must hold at least one picture, got none in the row {self.title!r}.")
        if len(self.captions) != len(self.images):
            raise ObjectComposeError(
                f"`captions` must hold one text per picture: got {len(self.captions)} for {len(self.images)}."
            )
        if self.overlays and len(self.overlays) != len(self.images):
            raise ObjectComposeError(
                f"`overlays` must hold one list per picture: got {len(self.overlays)} for {len(self.images)}."
            )

    def cells(self) -> list[tuple[list[Image.Image], str]]:
        """Per picture: the picture with its overlays, and the caption."""
        overlays = self.overlays or [()] * len(self.images)
        return [
            ([image, *beside], caption)
            for image, beside, caption in zip(self.images, overlays, self.captions, strict=True)
        ]


def save_gallery(
    rows: Sequence[GalleryRow],
    path: str | os.PathLike[str],
    headline: str = "",
    tile: int = 144,
    max_width: int = 1500,
) -> Path:
    """Write the rows as one PNG (all of it or nothing).

    Args:
        rows: at least one.
        path: the PNG; missing folders are made.
        headline: text at the top of the sheet.
        tile: side in pixels of the square that each picture is fitted into.
        max_width: of the sheet in pixels; a row that is wider goes on below.

    Raises:
        ObjectComposeError: there is no row, or the file cannot be written.
    """
    if not rows:
        raise ObjectComposeError("`rows` must hold at least one row, got none.")
    lines = [line for row in rows for line in _lines_of_row(row, tile, max_width - 2 * _MARGIN)]
    width = max(line.width for line in lines)
    head = _text_block(headline, 22, width, _INK)
    height = head.height + _GAP + sum(line.height for line in lines)
    sheet = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), _BACKGROUND)
    sheet.paste(head, (_MARGIN, _MARGIN))
    top = _MARGIN + head.height + _GAP
    for line in lines:
        sheet.paste(line, (_MARGIN, top))
        top += line.height
    return save_png(sheet, path)


def _lines_of_row(row: GalleryRow, tile: int, width: int) -> list[Image.Image]:
    """The row's title and its cells, broken into lines of at most `width` pixels (a cell is never broken)."""
    cells = [_draw_cell(pictures, caption, tile) for pictures, caption in row.cells()]
    lines: list[list[Image.Image]] = [[]]
    for cell in cells:
        if lines[-1] and sum(other.width + 2 * _GAP for other in lines[-1]) + cell.width > width:
            lines.append([])
        lines[-1].append(cell)
    drawn = []
    for line in lines:
        canvas = Image.new(
            "RGB",
            (sum(cell.width for cell in line) + 2 * _GAP * (len(line) - 1), max(cell.height for cell in line) + _GAP),
            _BACKGROUND,
        )
        left = 0
        for cell in line:
            canvas.paste(cell, (left, 0))
            left += cell.width + 2 * _GAP
        drawn.append(canvas)
    return [_text_block(row.title, 17, max(line.width for line in drawn), _INK), *drawn]


def _draw_cell(pictures: Sequence[Image.Image], caption: str, tile: int) -> Image.Image:
    width = len(pictures) * tile + (len(pictures) - 1) * 2
    text = _text_block(caption, 13, width, _FAINT)
    cell = Image.new("RGB", (width, tile + text.height), _BACKGROUND)
    for index, picture in enumerate(pictures):
        scale = tile / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        # no sharpening filter when enlarging: nobody should take its ringing for the model's work
        filtering = Image.Resampling.BILINEAR if scale > 1 else Image.Resampling.LANCZOS
        fitted = picture.convert("RGB").resize(size, filtering)
        cell.paste(fitted, (index * (tile + 2) + (tile - size[0]) // 2, (tile - size[1]) // 2))
    cell.paste(text, (0, tile))
    return cell


def _text_block(text: str, size: int, width: int, colour: tuple[int, int, int]) -> Image.Image:
    """Text broken into lines of at most `width` pixels; of height 0 when there is none."""
    font = ImageFont.load_default(size)
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    step = round(size * 1.35)
    block = Image.new("RGB", (width, step * len(lines) + (4 if lines else 0)), _BACKGROUND)
    draw = ImageDraw.Draw(block)
    for index, line in enumerate(lines):
        draw.text((0, 2 + index * step), line, fill=colour, font=font)
    return block


def on_white(picture: Image.Image) -> Image.Image:
    """An RGBA cut-out on white."""
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white
