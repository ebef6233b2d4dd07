"""What `objectcompose ground-captions` says about a data set: `report.json` and `contact_sheet.png`."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from objectcompose.grounding.detection import Detection, box_of_mask
from objectcompose.grounding.inputs import plain_phrase
from objectcompose.grounding.overlay import overlay_detections
from objectcompose.layout_fields import check_picture
from objectcompose.training.caption_sources import CaptionedFolder
from objectcompose.training.ground_captions_records import OutcomeFolder, PictureOutcome


#: Pictures on a contact sheet, spread over the data set.
SHEET_PICTURES = 24
_SHEET_COLUMNS = 6
_TILE, _GAP, _LINE = 320, 12, 17
_PAPER, _INK, _WARNING = (250, 250, 248), (60, 62, 66), (150, 60, 20)
_EXAMPLES = 3


def summarize_outcomes(
    source: CaptionedFolder, outcomes: Sequence[PictureOutcome], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What `report.json` says; a function of its arguments alone.

    Shares are of nouns that were looked for, in all captions, also those of pictures that are left out because nothing
    was seen.
    """
    kept = [outcome for outcome in outcomes if outcome.line is not None]
    pairs = [pair for outcome in kept if outcome.line is not None for pair in outcome.line["attn_list"]]
    masked = sum(path is not None for _, path in pairs)
    unmasked = sum(len(outcome.unmasked) + len(outcome.empty) for outcome in outcomes)
    several = sum(len(picture.captions) > 1 for picture in source.pictures)
    left_out = [outcome for outcome in outcomes if outcome.reason is not None]
    return {
        "settings": dict(settings),
        "pictures": {
            "with_captions": len(outcomes),
            "with_several_captions": several,
            "in_training_set": len(kept),
            "left_out": dict(sorted(Counter(str(outcome.reason) for outcome in left_out).items())),
            "without_caption": len(source.without_caption),
            "captions_without_picture": len(source.without_picture),
        },
        "nouns": {
            "looked_for": masked + unmasked,
            "with_mask": masked,
            "share_with_mask": round(masked / (masked + unmasked), 4) if masked + unmasked else None,
            "in_training_set": len(pairs),
            "masks_per_picture": round(masked / len(kept), 4) if kept else None,
            "empty_masks": sum(len(outcome.empty) for outcome in outcomes),
            "masks_outside_the_centre_crop": sum(len(outcome.cropped) for outcome in outcomes),
            "not_among_the_tokens": sum(len(outcome.untokenized) for outcome in outcomes),
        },
        "nouns_without_mask": _counted(outcomes, "unmasked"),
        "empty_masks": _counted(outcomes, "empty"),
        "masks_outside_the_centre_crop": _counted(outcomes, "cropped"),
        "nouns_not_among_the_tokens": _counted(outcomes, "untokenized"),
        "left_out": [
            {name: getattr(outcome, name) for name in ("picture", "reason", "detail", "caption")}
            for outcome in left_out
        ],
        "without_caption": list(source.without_caption),
        "captions_without_picture": list(source.without_picture),
    }


def _counted(outcomes: Sequence[PictureOutcome], field: str) -> list[dict[str, Any]]:
    """Nouns of a field, the most frequent first, each with some of the pictures that it occurs with."""
    pictures: dict[str, list[str]] = {}
    for outcome in outcomes:
        for noun in getattr(outcome, field):
            pictures.setdefault(plain_phrase(noun), []).append(outcome.picture)
    ordered = sorted(pictures.items(), key=lambda one: (-len(one[1]), one[0]))
    return [{"noun": noun, "count": len(names), "pictures": names[:_EXAMPLES]} for noun, names in ordered]


def draw_contact_sheet(folder: OutcomeFolder, outcomes: Sequence[PictureOutcome]) -> Image.Image:
    """Pictures of the training set with their masks, and below each its caption and the nouns without a mask.

    Args:
        folder: where the files are.
        outcomes: at least one that is in the training set.
    """
    kept = [outcome for outcome in outcomes if outcome.line is not None]
    count = min(len(kept), SHEET_PICTURES)
    shown = [kept[index * len(kept) // count] for index in range(count)]
    font = ImageFont.load_default(13)
    tiles = [_draw_tile(folder, outcome, font) for outcome in shown]
    columns = min(count, _SHEET_COLUMNS)
    rows = [tiles[start : start + columns] for start in range(0, count, columns)]
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (columns * (_TILE + _GAP) + _GAP, sum(heights) + _GAP), _PAPER)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for place, tile in enumerate(row):
            sheet.paste(tile, (_GAP + place * (_TILE + _GAP), top))
        top += height
    return sheet


def _draw_tile(folder: OutcomeFolder, outcome: PictureOutcome, font: Any) -> Image.Image:
    assert outcome.line is not None
    path, *masks = folder.files_of(outcome)
    nouns = [noun for noun, mask in outcome.line["attn_list"] if mask is not None]
    found = [_shown_detection(noun, mask) for noun, mask in zip(nouns, masks, strict=True)]
    picture = overlay_detections(check_picture(path).convert("RGB"), found, with_scores=False)
    scale = _TILE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    fitted = picture.resize(size, Image.Resampling.LANCZOS)
    bare = [noun for noun, mask in outcome.line["attn_list"] if mask is None]
    lines = [(line, _INK) for line in textwrap.wrap(outcome.line["text"], 50, max_lines=3)]
    lines += [(line, _WARNING) for line in textwrap.wrap(f"no mask: {', '.join(bare)}", 50, max_lines=2) if bare]
    tile = Image.new("RGB", (_TILE, size[1] + 4 + _LINE * len(lines)), _PAPER)
    tile.paste(fitted, ((_TILE - size[0]) // 2, 0))
    draw = ImageDraw.Draw(tile)
    for number, (line, colour) in enumerate(lines):
        draw.text((0, size[1] + 2 + number * _LINE), line, fill=colour, font=font)
    return tile


def _shown_detection(noun: str, path: Path) -> Detection:
    mask = torch.from_numpy((np.asarray(Image.open(path)) > 0).astype(np.float32))
    return Detection(noun, box_of_mask(mask) or (0.0, 0.0, 1.0, 1.0), mask, 1.0)
