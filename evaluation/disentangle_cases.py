"""What disentanglement is measured on: one picture's instances, prompts that put them elsewhere, and boxes.

The prompts are MIFO's ten editing templates (arXiv 2511.00542, table 3), each naming all instances. Toybox's base
knows none of their places, so it has ten of its own: those that its captions name. The boxes are a row of equal ones
(two rows from four instances on), and who stands where changes from prompt to prompt, so that an instance is measured
apart from the place where it was learned.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from objectcompose.errors import LayoutError
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.evaluation.toybox_instance_scenes import ToyboxInstances
from objectcompose.layout_fields import check_picture
from objectcompose.toybox.backgrounds import COLOURS, GROUNDS
from objectcompose.training.mifo_scene import make_scene, scene_files


EDITING_TEMPLATES = (
    "a photo of {} at the beach",
    "a photo of {} in the jungle",
    "a photo of {} in the snow",
    "a photo of {} in the street",
    "a photo of {} on top of a pink fabric",
    "a photo of {} floating on top of water",
    "a photo of {} on top of a wooden floor",
    "a photo of {} with a city in the background",
    "a photo of {} with a mountain in the background",
    "a photo of {} with the Eiffel tower in the background",
)
TOYBOX_TEMPLATES = (
    "a photo of {}",
    *(f"a photo of {{}} on the {name}" for name in GROUNDS),
    *(f"a photo of {{}} on a {name} background" for name in COLOURS),
)
_FILL = 0.88  # of a column's width, and of a row's height, that a box takes at most


@dataclass(frozen=True, eq=False)
class InstanceCase:
    """The instances of one picture.

    Attributes:
        name: in the prompts' ids.
        kind: what figures are broken down by; may be empty.
        tokens: placeholder of each instance.
        words: what each is, in words; for the text that a picture is compared with.
        references: RGBA, the instances cut out of the picture.
    """

    name: str
    kind: str
    tokens: tuple[str, ...]
    words: tuple[str, ...]
    references: tuple[Image.Image, ...]


@dataclass(frozen=True)
class EditingPrompt:
    """One prompt of a case.

    Attributes:
        record: its id and the text with placeholders.
        caption: the same with words in their place.
        boxes: of the instances, xyxy fractions.
    """

    record: PromptRecord
    caption: str
    boxes: tuple[tuple[float, float, float, float], ...]


def toybox_case(scene: ToyboxInstances) -> InstanceCase:
    """The case of a toybox scene."""
    tokens = tuple(f"<asset{number}>" for number in range(len(scene.words)))
    return InstanceCase(scene.name, scene.kind, tokens, scene.words, cut_outs(scene.picture, scene.masks))


def file_case(folder: Path, tokens: Sequence[str], words: Sequence[str] | None, size: int) -> InstanceCase:
    """The case of a folder that `learn_mifo --data` reads.

    Args:
        folder: with `img.*` and `mask0.*`, `mask1.*`, ...
        tokens: placeholders, one per mask.
        words: what the instances are; None: "object" for each.
        size: pixels to resize the shorter side to.

    Raises:
        LayoutError: the folder lacks something, or there are more or fewer tokens or words than masks.
        RegionError: masks that cannot be used.
        ImageInputError: a file cannot be read.
    """
    image, masks = scene_files(folder)
    scene = make_scene(image, masks, size)
    count = len(scene.masks)
    for name, given in (("--learned", tokens), ("--words", words)):
        if given is not None and len(given) != count:
            raise LayoutError(f"`{name}` must have one entry per mask ({count}), got {len(given)}: {list(given)}.")
    values = ((scene.pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    references = cut_outs(Image.fromarray(values), scene.masks)
    return InstanceCase("scene", "", tuple(tokens), tuple(words or ["object"] * count), references)


def cut_outs(picture: Image.Image, masks: torch.Tensor) -> tuple[Image.Image, ...]:
    """The picture with each mask (N, H, W) as its alpha channel, RGBA."""
    pixels = np.asarray(check_picture(picture).convert("RGB"))
    alphas = (masks * 255).byte().numpy()
    return tuple(Image.fromarray(np.concatenate([pixels, alpha[..., None]], axis=-1), "RGBA") for alpha in alphas)


def editing_prompts(
    case: InstanceCase, templates: Sequence[str], limit: int | None = None
) -> dict[str, EditingPrompt]:
    """A case's prompts by id, one per template.

    Args:
        case: the instances.
        templates: each with `{}` where the instances are named.
        limit: only the first ones.
    """
    found = {}
    for number, template in enumerate(templates[:limit]):
        record = PromptRecord(f"{case.name}-{number}", template.format(" and ".join(case.tokens)), kind=case.kind)
        caption = template.format(" and ".join(case.words))
        found[record.id] = EditingPrompt(record, caption, boxes_of_prompt(len(case.tokens), number))
    return found


def boxes_of_prompt(count: int, number: int) -> tuple[tuple[float, float, float, float], ...]:
    """Boxes of `count` instances in a prompt, squares that do not touch; instances move on by one from one to the
    next."""
    rows = 1 if count < 4 else 2
    columns = math.ceil(count / rows)
    side = _FILL / max(columns, rows, 2)  # one or two of them leave room for a background
    boxes = []
    for instance in range(count):
        row, column = divmod((instance + number) % count, columns)
        x, y = (column + 0.5) / columns, (row + 0.5) / rows
        boxes.append((x - side / 2, y - side / 2, x + side / 2, y + side / 2))
    return tuple(boxes)


def objects_of_prompt(case: InstanceCase, prompt: EditingPrompt) -> list[dict[str, Any]]:
    """The objects of a call."""
    return [{"token": token, "box": box} for token, box in zip(case.tokens, prompt.boxes, strict=True)]


def case_digest(case: InstanceCase, prompts: Sequence[EditingPrompt]) -> str:
    """32 hex digits that change with any reference, caption or box."""
    digest = hashlib.sha256(
        json.dumps(
            [[prompt.record.id, prompt.record.text, prompt.caption, prompt.boxes] for prompt in prompts]
        ).encode()
    )
    for reference in case.references:
        digest.update(repr(reference.size).encode() + reference.tobytes())
    return digest.hexdigest()[:32]
