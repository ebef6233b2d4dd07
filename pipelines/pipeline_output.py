"""What a pipeline call returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import BaseOutput


@dataclass(frozen=True)
class PlacedObject:
    """What a pipeline made of one object of one picture.

    Attributes:
        phrase: the object's phrase as given, or None.
        label: the name under which `ComposeOutput.attention` lists it: the phrase, with " #2", " #3" ... for repeats.
        token_indices: positions of the phrase in the encoded prompt; the start token is 0.
        box: the object's place, xyxy in fractions of width and height, or None where none is known.
        unused: fields of the object that were given and that this pipeline cannot use.
        matched: whether a segment of the picture was taken for the object; None where nothing was matched at all.
        similarity: cosine in [-1, 1] of the object's picture and the segment it was paired with, also where the pair
            was refused; None without a pair.
        region: the matched segment, float32 {0, 1}, `(H, W)`, on the CPU; None without one.
        refinement_losses: how far the segment was from the object's picture (1 - cosine) at each step that refined it.
    """

    phrase: str | None = None
    label: str = ""
    token_indices: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    unused: tuple[str, ...] = ()
    matched: bool | None = None
    similarity: float | None = None
    region: torch.Tensor | None = field(default=None, compare=False)  # tensors have no plain equality
    refinement_losses: tuple[float, ...] = ()


@dataclass
class ComposeOutput(BaseOutput):
    """Output of every pipeline of the package.

    Attributes:
        images: list of B PIL images; or an array `(B, H, W, 3)` in [0, 1]; or a tensor `(B, 3, H, W)` in [0, 1]; or
            latents `(B, C, h, w)`, as `output_type` says. B counts pictures: prompts times `num_images_per_prompt`.
        nsfw_content_detected: B verdicts of the safety checker, or None without one.
        objects: per picture, what became of each object, in the order given; None when no objects were given.
        attention: per picture, a map `(h, w)`, float32 on the CPU, for the `label` of each object: the mean over the
            chosen layers and steps of the attention that the phrase's tokens receive from each place, in [0, 1]. None
            unless `return_attention` was set.
    """

    images: Any  # which of the kinds above it is depends on `output_type`, beyond what a type checker follows
    nsfw_content_detected: list[bool] | None = None
    objects: list[list[PlacedObject]] | None = None
    attention: list[dict[str, torch.Tensor]] | None = None


@dataclass
class LocRefOutput(ComposeOutput):
    """Output of `LocRefPipeline`.

    Attributes:
        composite: per picture the composite image that the adapter saw, a square of the whole canvas; None unless
            `return_composite` was set.
    """

    composite: list[Any] | None = None
