"""From what stands on the page (table, drawing, reference pictures) to a layout, and back.

The table has one row per object: number, phrase, box (four cells), scale, order. Drawing and table say the same: each
edit of one is carried over to the other.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.examples.app_canvas import MAX_OBJECTS, Box, Drawing, mask_box
from objectcompose.files import write_atomically
from objectcompose.layout import Layout, SceneObject, load_layout
from objectcompose.layout_fields import check_box, finite_number, shown_value
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.identities import sample_identity
from objectcompose.toybox.scenes import list_objects, render_references


TABLE_HEADERS = ("", "phrase", "x0", "y0", "x1", "y1", "scale", "order")
_BOX_COLUMNS = slice(2, 6)
_REFERENCE_SIDE = 128
_FIRST_OBJECTS = (5, 2)  # places in the list of categories, which every preset has

Table = list[list[Any]]


@dataclass(frozen=True)
class PageScene:
    """What the left half of the page shows of a scene.

    Attributes:
        prompt: the text.
        table: `MAX_OBJECTS` rows.
        drawing: boxes and masks of the same objects.
        references: as many pictures, or None.
    """

    prompt: str
    table: Table
    drawing: Drawing
    references: tuple[Image.Image | None, ...]


def table_row(index: int, phrase: str = "", box: Box | None = None, scale: float = 1.0, order: int = 0) -> list[Any]:
    """One row of the table; cells of a box that is not known are empty."""
    return [index + 1, phrase, *(("",) * 4 if box is None else box), scale, order]


def check_table(table: Any) -> Table:
    """The table, if it has the rows and columns that the page gave it.

    Raises:
        LayoutError: it has others.
    """
    sizes = [len(row) for row in table] if isinstance(table, list) else []
    if sizes != [len(TABLE_HEADERS)] * MAX_OBJECTS:
        raise LayoutError(f"`table` must have {MAX_OBJECTS} rows of {len(TABLE_HEADERS)} cells, got {sizes}.")
    return table


def table_phrases(table: Table) -> list[str]:
    """The phrase of each row, "" where there is none."""
    return [_cell(row[1]) for row in check_table(table)]


def table_after_drawing(table: Table, drawing: Drawing) -> Table:
    """The table with the boxes that are drawn."""
    return [
        [*row[:2], *(("",) * 4 if box is None else box), *row[6:]]
        for row, box in zip(check_table(table), drawing.boxes, strict=True)
    ]


def drawing_after_table(drawing: Drawing, table: Table) -> Drawing:
    """The drawing with the table's boxes; a mask goes when its box is edited. Unfinished boxes are left out."""
    boxes, masks = [], []
    for row, old, mask in zip(check_table(table), drawing.boxes, drawing.masks, strict=True):
        try:
            box = _row_box(row, "box")
        except ObjectComposeError:  # the user has not finished; painting will say so
            box = None
        boxes.append(box)
        masks.append(mask if box == old else None)
    return Drawing(tuple(boxes), tuple(masks))


def read_scene(prompt: Any, table: Table, drawing: Drawing, references: Sequence[Any]) -> Layout:
    """The layout that the page describes; rows with nothing in them are left out.

    Args:
        prompt: the text.
        table: rows as the user left them.
        drawing: for the masks.
        references: path or PIL image of each row's reference picture, or None.

    Raises:
        ObjectComposeError: a cell, a picture or the prompt cannot be used; the message names the object's number.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise LayoutError(f"`prompt` must hold at least one visible character, got {shown_value(prompt)}.")
    objects = []
    for index, (row, mask, image) in enumerate(zip(check_table(table), drawing.masks, references, strict=True)):
        phrase = _cell(row[1]).strip()
        try:
            box = _row_box(row, "box")
            if not phrase and box is None and mask is None and image is None:
                continue
            is_token = phrase.startswith("<") and phrase.endswith(">")  # a learned placeholder
            order = _number(row[7], "order", 0.0)
            fields: dict[str, Any] = {
                "token" if is_token else "phrase": phrase or None,
                "scale": _number(row[6], "scale", 1.0),
                "order": int(order) if order.is_integer() else order,  # `SceneObject` refuses fractions
            }
            objects.append(SceneObject(**fields, image=image, mask=mask, box=box))
        except ObjectComposeError as error:
            raise type(error)(f"object {index + 1}: {error}") from None
    return Layout(prompt=prompt, objects=tuple(objects))


def show_scene(layout: Layout) -> PageScene:
    """The page's form of a layout.

    Raises:
        LayoutError: more objects than the page has room for, or a mask that is not square.
    """
    if len(layout.objects) > MAX_OBJECTS:
        raise LayoutError(f"`objects` must be at most {MAX_OBJECTS} on this page, got {len(layout.objects)}.")
    table = [table_row(index) for index in range(MAX_OBJECTS)]
    drawing = Drawing()
    boxes, masks, references = list(drawing.boxes), list(drawing.masks), [None] * MAX_OBJECTS
    for index, item in enumerate(layout.objects):
        if item.phrase is not None and item.token is not None:
            raise LayoutError(f"objects[{index}] must have either `phrase` or `token` on this page, got both.")
        if item.mask is not None and item.mask.shape[0] != item.mask.shape[1]:
            raise LayoutError(f"`mask` of objects[{index}] must be square, got shape {tuple(item.mask.shape)}.")
        boxes[index] = mask_box(item.mask) if item.box is None and item.mask is not None else item.box
        masks[index], references[index] = item.mask, item.image
        name = item.phrase or item.token or ""
        table[index] = table_row(index, name, boxes[index], item.scale, item.order)
    return PageScene(layout.prompt, table, Drawing(tuple(boxes), tuple(masks)), tuple(references))


def paste_layout(text: Any, folder: Path) -> Layout:
    """A layout from pasted JSON; its pictures are those of layouts that this page wrote into `folder`.

    Raises:
        ObjectComposeError: see `load_layout`.
    """
    if not isinstance(text, str) or not text.strip():
        raise LayoutError("paste a layout first: there is no text.")
    file = folder / f"pasted-{uuid.uuid4().hex[:8]}.json"  # there, since pictures are looked for beside it
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text.encode())
        return load_layout(file)
    except (OSError, UnicodeEncodeError) as error:
        raise LayoutError(f"the pasted text cannot be kept: {error}.") from None
    finally:
        file.unlink(missing_ok=True)


def first_scene(preset: Preset) -> PageScene:
    """What the page shows at first: two objects of toybox side by side, with a reference picture each."""
    names = [preset.categories[place] for place in _FIRST_OBJECTS]
    boxes: list[Box] = [(0.04, 0.26, 0.5, 0.86), (0.52, 0.26, 0.98, 0.86)]
    objects = [
        SceneObject(phrase=name, box=box, image=toybox_reference(preset, name, seed))
        for seed, (name, box) in enumerate(zip(names, boxes, strict=True))
    ]
    return show_scene(Layout(prompt=f"a photo of {list_objects(names)}", objects=tuple(objects)))


def toybox_reference(preset: Preset, category: str, seed: int) -> Image.Image:
    """A cut-out (RGBA) of one individual of a category, in some pose and colour."""
    identity = sample_identity(preset, category, np.random.default_rng(seed))
    pixels = render_references(preset, [identity], [seed], _REFERENCE_SIDE)[0]
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def toybox_references(preset: Preset, table: Table, seed: int) -> list[Image.Image | None]:
    """A reference picture for each row whose phrase names something that toybox knows.

    Raises:
        LayoutError: no row does.
    """
    found: list[Image.Image | None] = []
    for index, phrase in enumerate(table_phrases(table)):
        named = [name for name in preset.categories if name in phrase]
        category = max(named, key=len, default=None)  # "hot dog" is no dog
        found.append(None if category is None else toybox_reference(preset, category, seed * MAX_OBJECTS + index))
    if not any(found):
        raise LayoutError(f"some phrase must name one of: {', '.join(preset.categories)}.")
    return found


def _cell(value: Any) -> str:
    """A cell as text; empty cells come as None, "" or NaN."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _number(value: Any, name: str, default: float) -> float:
    text = _cell(value).strip()
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        raise LayoutError(f"`{name}` must be a number, got {shown_value(value)}.") from None
    return finite_number(number, name)


def _row_box(row: Sequence[Any], name: str) -> Box | None:
    """The box of a row; None where all four cells are empty."""
    cells = row[_BOX_COLUMNS]
    if not any(_cell(cell).strip() for cell in cells):
        return None
    if not all(_cell(cell).strip() for cell in cells):
        raise LayoutError(f"`{name}` must have all of x0, y0, x1 and y1, got {shown_value(list(cells))}.")
    return check_box([_number(cell, name, 0.0) for cell in cells], name)
