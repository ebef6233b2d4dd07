"""How reference pictures take the place of text inside their boxes: LocRef-Diffusion's fusion, as branch parts.

LocRef-Diffusion (arXiv:2411.15252), section III.C, per cross-attention layer, with T the attention to the text, CI
that to the composite image and RI that to the references, each inside its own region:

    HS = T * BM + (gamma * T + ci_scale * CI + ri_scale * RI) * FM        FM: the union of the regions, BM = 1 - FM

That is the attention core's sum with one replacing branch (CI on FM, with gamma) and one adding branch (RI, whose
regions lie in FM). Without a composite image RI itself replaces. All references are attended in one call: their
regions are exclusive, so a table of who sees which key is the same as one softmax per object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from objectcompose.attention_processors.branch import Branch, KeysValues


@dataclass(frozen=True)
class FusionSettings:
    """Strengths and switches of the fusion.

    Attributes:
        ci_scale: strength of the composite image, or of what stands in for it.
        ri_scale: strength of the references.
        gamma: share of the text that stays inside the regions; 0 is the paper's formula.
        region_mask: each reference acts in its own region; False lets all of them act in all regions (an ablation).
    """

    ci_scale: float = 1.0
    ri_scale: float = 1.0
    gamma: float = 0.0
    region_mask: bool = True


class ForegroundRegions:
    """The union of the regions of each batch row, once or once for each of its objects.

    Args:
        regions: has `at_tokens(num_tokens, device)`, giving `(B, N, h, w)`, and `valid`, bool `(B, N)`.
        per_object: `(B, N, h, w)`, empty where an object is padding; else `(B, 1, h, w)`.
    """

    def __init__(self, regions: Any, per_object: bool = False):
        self.regions = regions
        self.per_object = per_object

    def at_tokens(self, num_tokens: int, device: torch.device | str | None = None) -> torch.Tensor:
        """The union on the grid of `num_tokens` cells, float32 of {0, 1}."""
        union = (self.regions.at_tokens(num_tokens, device) > 0).any(1, keepdim=True).float()
        if not self.per_object:
            return union
        return union * self.regions.valid.to(union)[:, :, None, None]


def fusion_parts(
    keys_values: Mapping[str, KeysValues],
    regions: Any,
    settings: FusionSettings,
    scales: torch.Tensor | None = None,
    composite_per_object: bool = False,
    rows: slice | None = None,
) -> list[Branch]:
    """The branches of the fusion.

    Args:
        keys_values: "references": per layer keys and values `(B, N * T, C)`, objects in order, T tokens each; and, if
            there is one, "composite": those of the composite image, `(B, S, C)`.
        regions: a `RegionPyramidBatch` of exclusive regions, `(B, N, h, w)` on each grid.
        settings: strengths and switches.
        scales: strength of each reference, `(B, N)`, on the model's device; None: all 1. They multiply RI alone: in
            the region of a reference of scale 0 the text still gives way, so one that is off is not among these.
        composite_per_object: "composite" holds S / N tokens for each object (its coordinates, say), which those of
            padded slots must not be seen of.
        rows: the batch rows to act on, B of them; None is all.
    """
    everywhere = ForegroundRegions(regions, per_object=True)
    parts = []
    composite = keys_values.get("composite")
    if composite is not None:
        parts.append(
            Branch(
                composite,
                regions=everywhere if composite_per_object else ForegroundRegions(regions),
                scale=settings.ci_scale,
                mode="replace",
                gamma=settings.gamma,
                overlap="joint",
                rows=rows,
            )
        )
    parts.append(
        Branch(
            keys_values["references"],
            regions=regions if settings.region_mask else everywhere,
            scale=settings.ri_scale if scales is None else scales * settings.ri_scale,
            mode="replace" if composite is None else "add",
            gamma=settings.gamma,
            overlap="folded" if settings.region_mask else "joint",
            rows=rows,
        )
    )
    return parts
