"""What grounding finds, and how it becomes a layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from objectcompose.errors import LayoutError, PhraseNotFoundError, RegionError
from objectcompose.layout import Layout, SceneObject, prompt_of_phrases
from objectcompose.layout_fields import check_box, finite_number, shown_value


Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Detection:
    """One thing in a picture.

    Attributes:
        phrase: the phrase that it was found for, as it was given; None from `segment`, which reads no text.
        box: (x0, y0, x1, y1), fractions in [0, 1] of width and height, origin top left.
        mask: (H, W) float32 of {0, 1} on the CPU, at the picture's size; None from a detector without segmenter.
        score: how sure the model is, in [0, 1].

    Raises:
        LayoutError: the box or the score breaks its rule.
        RegionError: the mask is not (H, W).
    """

    phrase: str | None
    box: Box
    mask: torch.Tensor | None
    score: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", check_box(self.box))
        score = finite_number(self.score, "score")
        if not 0.0 <= score <= 1.0:
            raise LayoutError(f"`score` must lie in [0, 1], got {score}.")
        object.__setattr__(self, "score", score)
        if self.mask is not None and (not isinstance(self.mask, torch.Tensor) or self.mask.ndim != 2):
            raise RegionError(f"`mask` must be a tensor of shape (H, W), got {shown_value(self.mask)}.")


def box_of_mask(mask: torch.Tensor) -> Box | None:
    """The tight box, xyxy fractions, around what is not 0 in a mask (H, W); None where it is 0 everywhere."""
    height, width = mask.shape
    rows, columns = mask.amax(1).nonzero().flatten(), mask.amax(0).nonzero().flatten()
    if len(rows) == 0:
        return None
    return (
        float(columns[0]) / width,
        float(rows[0]) / height,
        float(columns[-1] + 1) / width,
        float(rows[-1] + 1) / height,
    )


def box_within_picture(corners: Iterable[float]) -> Box | None:
    """A predicted box cut off at the picture's border; None where nothing of it is inside or it is not finite."""
    numbers = [float(corner) for corner in corners]
    if not all(math.isfinite(number) for number in numbers):
        return None
    x0, y0, x1, y1 = (min(max(number, 0.0), 1.0) for number in numbers)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def sorted_detections(found: Iterable[Detection], phrases: Sequence[str]) -> list[Detection]:
    """Detections in the order of their phrases, the surest of a phrase first, ties by box: always the same order."""
    places = {phrase: place for place, phrase in enumerate(phrases)}
    return sorted(found, key=lambda one: (places.get(one.phrase or "", -1), -one.score, one.box))


def merge_detections(found: Sequence[Detection]) -> list[Detection]:
    """One detection per phrase: the union of its masks, or of its boxes where a mask is missing or empty.

    TokenCompose supervises a noun with the union of all its instances (arXiv:2312.03626, data generation).

    Args:
        found: detections of one picture.

    Returns:
        In the order in which the phrases first occur; the score is the best of the phrase.
    """
    groups: dict[str | None, list[Detection]] = {}
    for one in found:
        groups.setdefault(one.phrase, []).append(one)
    return [_union_of_detections(phrase, group) for phrase, group in groups.items()]


def _union_of_detections(phrase: str | None, group: Sequence[Detection]) -> Detection:
    masks = [one.mask for one in group if one.mask is not None and bool(one.mask.any())]
    mask = torch.stack(masks).amax(0) if len(masks) == len(group) else None
    box = None if mask is None else box_of_mask(mask)
    if box is None:
        corners = torch.tensor([one.box for one in group], dtype=torch.float64)
        x0, y0 = corners[:, :2].amin(0).tolist()
        x1, y1 = corners[:, 2:].amax(0).tolist()
        box = (x0, y0, x1, y1)
    return Detection(phrase, box, mask, max(one.score for one in group))


def detections_to_layout(found: Sequence[Detection], prompt: str | None = None) -> Layout:
    """A layout that every pipeline accepts, with one object per phrase (see `merge_detections`).

    Args:
        found: detections of one picture, each with a phrase.
        prompt: text of the whole picture, which must contain each phrase; None: "a photo of a dog and a cup".

    Raises:
        LayoutError: a detection has no phrase.
        PhraseNotFoundError: a phrase is not in the prompt.
    """
    merged = merge_detections(found)
    phrases = [one.phrase for one in merged if one.phrase is not None]
    if len(phrases) < len(merged):
        raise LayoutError("`found` must hold detections with a phrase: `segment` gives none.")
    if prompt is None:
        prompt = prompt_of_phrases(phrases)
    check_prompt_holds(prompt, phrases)
    objects = [SceneObject(phrase=one.phrase, box=one.box, mask=one.mask) for one in merged]
    return Layout(prompt=prompt, objects=tuple(objects))


def check_prompt_holds(prompt: str, phrases: Iterable[str]) -> None:
    """Check that each phrase stands in the prompt, whatever its case; raises PhraseNotFoundError."""
    for phrase in phrases:
        if phrase.lower() not in prompt.lower():
            raise PhraseNotFoundError(f"`prompt` must contain each phrase; {phrase!r} is not in {prompt!r}.")
