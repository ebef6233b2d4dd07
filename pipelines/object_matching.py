"""Which part of a picture shows which of the prompted objects.

Compositional guidance of VisualComposer (arXiv:2501.01424, section 3.4): the picture is cut into segments, segments
and prompts are embedded with DINOv2, and a one-to-one assignment (Hungarian) pairs them. The paper's text leaves open
which segments count, how crops are made and when a pair is refused; the rules here are the method spec's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment

from objectcompose.errors import CheckpointError, NonFiniteError, ObjectComposeError, RegionError
from objectcompose.layout_fields import shown_value
from objectcompose.pipelines.reference_images import fit_pixels, normalize_pixels


#: Cosine similarity from which on a prompt and a segment are taken for one object.
SIMILARITY_THRESHOLD = 0.35
#: Free space around what DINO looks at, as a share of its longer side.
CROP_MARGIN = 0.1
#: Segments count from this share of the picture up to that one.
LEAST_SEGMENT, LARGEST_SEGMENT = 0.01, 0.8
#: Two masks above this intersection over union are one segment.
DUPLICATE_IOU = 0.7
#: A segment that lies in a larger one by more than this share is a part of it.
PART_SHARE = 0.9
#: DINOv2's own statistics (ImageNet's) and side, for encoders that come without a processor.
DINO_PIXEL_MEAN, DINO_PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_SIDE = 224


@dataclass(frozen=True, eq=False)
class ObjectMatch:
    """What matching found for one prompt.

    Attributes:
        mask: its segment `(H, W)`, float32 {0, 1} on the CPU; None where it is unmatched.
        similarity: cosine of prompt and assigned segment, in [-1, 1], also of a pair below the threshold; None where
            no segment was left for the prompt.
    """

    mask: torch.Tensor | None
    similarity: float | None


# ---- segments


def check_segmenter(segmenter: Any, has_phrases: bool) -> None:
    """Raise unless `segmenter` can cut a picture into segments, by phrases or without.

    Args:
        segmenter: an object with `segment(picture)`, or with `ground(picture, phrases, on_missing)` as `Grounder` has.
        has_phrases: whether every object has a phrase.

    Raises:
        ObjectComposeError: it can do neither with what is given.
    """
    if segmenter is None:
        raise ObjectComposeError("`segmenter` is needed for `compositional_guidance=True`, got None.")
    if (has_phrases and _finds_phrases(segmenter)) or _segments_alone(segmenter):
        return
    need = "a `phrase` of every object, or a segmenter that works without text"
    if not _finds_phrases(segmenter):
        need = "a method `segment(picture)`, or `ground(picture, phrases, on_missing)`"
    raise ObjectComposeError(f"`segmenter` needs {need}, got {shown_value(segmenter)}.")


def _finds_phrases(segmenter: Any) -> bool:
    """By its methods, never by its class: a flattened pipeline knows no `Grounder`."""
    return callable(getattr(segmenter, "ground", None)) and getattr(segmenter, "detector", segmenter) is not None


def _segments_alone(segmenter: Any) -> bool:
    model = getattr(segmenter, "segmenter", None) or getattr(segmenter, "detector", None) or segmenter
    return callable(getattr(segmenter, "segment", None)) and callable(getattr(model, "segment", None))


def find_segments(segmenter: Any, picture: Image.Image, phrases: Sequence[str] | None) -> torch.Tensor:
    """The segments of a picture that may be objects.

    Args:
        segmenter: see `check_segmenter`. Its result is a list (or one tensor) of masks `(H, W)` at the picture's size,
            or of things with `mask` and, optionally, `score`, as `Detection` has.
        picture: PIL image, RGB.
        phrases: what is to be found, where every object has a phrase; else None.

    Returns:
        float32 `(M, H, W)` of {0, 1} on the CPU, the surest first; M may be 0.

    Raises:
        ObjectComposeError: it returns something else.
        RegionError, NonFiniteError: a mask has another size, or values that are no numbers.
    """
    by_phrases = phrases is not None and _finds_phrases(segmenter)
    if by_phrases:
        found = segmenter.ground(picture, list(dict.fromkeys(phrases or ())), on_missing="skip")
    else:
        found = segmenter.segment(picture)
    masks, scores = _masks_and_scores(found, (picture.height, picture.width))
    return masks[keep_segments(masks, scores, drop_parts=not by_phrases)]


def _masks_and_scores(found: Any, size: tuple[int, int]) -> tuple[torch.Tensor, list[float]]:
    if not isinstance(found, (list, tuple, torch.Tensor, np.ndarray)):
        raise ObjectComposeError(f"`segmenter` must return a list of masks (H, W), got {shown_value(found)}.")
    masks, scores = [torch.zeros(0, *size)], []
    for index, one in enumerate(found):
        raw = getattr(one, "mask", one)
        if raw is None or isinstance(raw, (str, bytes, dict)):
            raise ObjectComposeError(
                f"`segmenter` must return masks, got a result {index} without one: {shown_value(one)}. A detector that"
                " only makes boxes needs a segmenter beside it."
            )
        mask = torch.as_tensor(np.asarray(raw) if not isinstance(raw, torch.Tensor) else raw).detach().cpu().float()
        if tuple(mask.shape) != size:
            raise RegionError(
                f"`segmenter` must return masks of the picture's size {size}, got shape {tuple(mask.shape)}."
            )
        if not torch.isfinite(mask).all():
            raise NonFiniteError(f"`segmenter` returned a mask (number {index}) with NaN or infinite values.")
        masks.append((mask > 0.5).float()[None])
        scores.append(float(getattr(one, "score", 1.0)))
    return torch.cat(masks), scores


def keep_segments(masks: torch.Tensor, scores: Sequence[float], drop_parts: bool = True) -> list[int]:
    """Which masks are segments of their own: neither specks nor walls, nor duplicates, nor parts of others.

    Args:
        masks: `(M, H, W)`, {0, 1}.
        scores: how sure each is; of duplicates the surest stays.
        drop_parts: drop what lies in a larger one; for masks that were found without text.

    Returns:
        Indices, the surest first.
    """
    areas = masks.flatten(1).sum(1)
    share = areas / max(masks[0].numel(), 1) if len(masks) else areas
    kept: list[int] = []
    for index in sorted(range(len(masks)), key=lambda place: (-scores[place], place)):
        if not LEAST_SEGMENT <= float(share[index]) <= LARGEST_SEGMENT:
            continue
        common = [float((masks[index] * masks[other]).sum()) for other in kept]
        union = [float(areas[index] + areas[other]) - both for other, both in zip(kept, common, strict=True)]
        if all(both <= DUPLICATE_IOU * whole for both, whole in zip(common, union, strict=True)):
            kept.append(index)
    if not drop_parts:
        return kept
    return [
        index
        for index in kept
        if not any(
            areas[other] > areas[index] and (masks[index] * masks[other]).sum() > PART_SHARE * areas[index]
            for other in kept
        )
    ]


# ---- embeddings


def dino_side(dino: Any, processor: Any = None) -> int:
    """Side of the square crops that DINO reads, in pixels: what its processor says, else 224 or the model's own.

    Raises:
        CheckpointError: there is no DINO, or the side is no multiple of its patches.
    """
    if dino is None:
        raise CheckpointError("`dino` is needed for `compositional_guidance=True`: a Dinov2Model, got None.")
    side = min(int(dino.config.image_size), DINO_SIDE)
    if processor is not None:
        side = int(dict(processor.crop_size)["height"])
    if side % int(dino.config.patch_size):
        raise CheckpointError(f"`dino` reads patches of {dino.config.patch_size} pixels, which do not divide {side}.")
    return side


def dino_statistics(processor: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation `(3,)` of DINO's pixels in [0, 1]; ImageNet's without a processor."""
    if processor is None:
        return torch.tensor(DINO_PIXEL_MEAN), torch.tensor(DINO_PIXEL_STD)
    return torch.tensor(processor.image_mean), torch.tensor(processor.image_std)


def segment_pixels(picture: torch.Tensor, mask: torch.Tensor, size: int, colour: torch.Tensor) -> torch.Tensor:
    """What a segment shows, prepared as prompts are: cut out onto one colour, its box in a square with a margin.

    Args:
        picture: `(3, H, W)` in [0, 1]; the result is differentiable in it.
        mask: `(H, W)`, {0, 1}, not empty.
        size: sides of the result, in pixels.
        colour: RGB in [0, 1], `(3,)`.

    Returns:
        `(3, size, size)` in [0, 1].

    Raises:
        RegionError: the mask is empty.
    """
    top, bottom, left, right = mask_bounds(mask)
    inside = mask.to(picture)
    cut_out = picture * inside + colour.to(picture)[:, None, None] * (1 - inside)
    return fit_pixels(cut_out[:, top:bottom, left:right], (size, size), colour, CROP_MARGIN)


def mask_bounds(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what a mask `(H, W)` marks, in pixels; bottom and right are just outside.

    Raises:
        RegionError: the mask is empty.
    """
    rows, columns = mask.amax(1).nonzero().flatten(), mask.amax(0).nonzero().flatten()
    if not len(rows):
        raise RegionError("`mask` must mark at least one pixel, got an empty one.")
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def embed_crops(
    dino: Any, crops: torch.Tensor, statistics: tuple[torch.Tensor, torch.Tensor], device: torch.device | str
) -> torch.Tensor:
    """DINO's class tokens `(M, D)` of crops `(M, 3, S, S)` in [0, 1], float32, of length 1."""
    pixels = normalize_pixels(crops.float(), *statistics).to(device, dino.dtype)
    return F.normalize(dino(pixel_values=pixels).pooler_output.float(), dim=-1)


# ---- assignment


def match_objects(similarity: torch.Tensor, threshold: float) -> list[tuple[int | None, float | None]]:
    """Pair prompts and segments one to one so that the sum of similarities is largest, then refuse weak pairs.

    Args:
        similarity: `(N, M)`, prompts by segments.
        threshold: least similarity of a pair.

    Returns:
        Per prompt the index of its segment, or None, and the similarity of the pair, also of a refused one; None
        where there were fewer segments than prompts and this prompt got none.

    Raises:
        NonFiniteError: a similarity is NaN or infinite.
    """
    if not torch.isfinite(similarity).all():
        raise NonFiniteError("`similarity` holds NaN or infinite values.")
    table = similarity.detach().cpu().double().numpy()
    pairs: list[tuple[int | None, float | None]] = [(None, None)] * len(table)
    for prompt, segment in zip(*linear_sum_assignment(table, maximize=True), strict=True):
        found = float(table[prompt, segment])
        pairs[prompt] = (int(segment) if found >= threshold else None, found)
    return pairs


def match_segments(
    masks: torch.Tensor, segment_features: torch.Tensor, prompt_features: torch.Tensor, threshold: float
) -> list[ObjectMatch]:
    """`match_objects` on features of length 1: `(M, D)` of the segments `(M, H, W)` and `(N, D)` of the prompts."""
    pairs = match_objects(prompt_features @ segment_features.T, threshold)
    return [ObjectMatch(None if segment is None else masks[segment], found) for segment, found in pairs]
