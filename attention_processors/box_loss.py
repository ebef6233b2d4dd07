"""Box control by guidance (MIFO, arXiv 2511.00542, section 3.3): the loss on attention and its two schedules.

Pure functions. The masses come from `RegionMassProbe` (self-attention on the cells of a box) and `TokenMapProbe`
(cross-attention on the tokens of a subject and the end token), measured on the conditional half under the masks of
the guidance pass. Everything runs in float32.

Schedules are given for a run of 50 steps, of which the first 15 are guided, as the paper has it. Other runs keep the
ratios: a guided step stands where its share of the guided steps puts it among those 15.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from objectcompose.attention_processors.losses import box_masses, box_penalty_loss, box_reward_loss
from objectcompose.errors import ObjectComposeError


#: Of 50 steps the paper guides the first 15; schedules count in these units.
REFERENCE_STEPS = 50
REFERENCE_GUIDED_STEPS = 15


@dataclass(frozen=True)
class BoxLoss:
    """The loss of one guidance pass.

    Attributes:
        total: what is minimised, per picture, `(B,)`, float32, from 0.
        reward: its in-box share alone, weighted like the total, `(B,)`.
    """

    total: torch.Tensor
    reward: torch.Tensor


def penalty_weight(
    position: float,
    maximum: float = 0.4,
    middle: float = 0.1,
    minimum: float = 0.01,
    linear_steps: float = 3.0,
    total_steps: float = float(REFERENCE_GUIDED_STEPS),
) -> float:
    """Weight of the out-of-box penalty (MIFO, equation 11): linear to `middle`, then a cosine to `minimum`.

    Args:
        position: the guided step, counted from 1; may lie between steps.
        maximum: at position 1.
        middle: at position `linear_steps`.
        minimum: from position `total_steps` on.
        linear_steps: where the linear part ends, at least 1.
        total_steps: where the cosine ends.
    """
    if position <= linear_steps:
        share = (position - 1) / (linear_steps - 1) if linear_steps > 1 else 1.0
        return maximum + (middle - maximum) * share
    if position >= total_steps:
        return minimum
    share = (position - linear_steps) / (total_steps - linear_steps)
    return minimum + (middle - minimum) * 0.5 * (1 + math.cos(math.pi * share))


def descent_step_size(step: int, guided_steps: int, first: float = 8.0, last: float = 2.0) -> float:
    """Step size of the descent on the latents (MIFO, equation 15): linear from `first` towards `last`.

    Args:
        step: the guided step, from 0 to `guided_steps - 1`; `last` would be that of step `guided_steps`.
        guided_steps: how many there are.
        first, last: for latents of unit variance, as Stable Diffusion's UNet reads them, and a loss that is a sum.
    """
    return first + (last - first) * step / guided_steps


def schedule_position(step: int, guided_steps: int) -> float:
    """Where guided step `step` (from 0) of `guided_steps` stands among the paper's 15, counted from 1."""
    return 1 + step * REFERENCE_GUIDED_STEPS / guided_steps


def scaled_steps(reference: int, num_steps: int) -> int:
    """`reference` of 50 steps, in a run of `num_steps`: rounded, at least 1, at most all of them."""
    return min(max(math.floor(reference * num_steps / REFERENCE_STEPS + 0.5), 1), num_steps)


def mean_box_masses(masses: Mapping[str, torch.Tensor], regions: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """In-box and out-of-box mass, F and G, averaged over the layers of one kind.

    Layers of different grids are averaged as they are, so the finest counts most; sums over heads and cells come
    before, ratios after (MIFO, equations 6 to 10).

    Args:
        masses: layer name to `(B, heads, HW, S)`; see `box_masses`.
        regions: the boxes on every layer's grid, as for `region_weights`.

    Returns:
        F and G, float32 `(B, S)`.

    Raises:
        ObjectComposeError: there is no layer.
    """
    if not masses:
        raise ObjectComposeError("`masses` must hold at least one layer, got none.")
    pairs = [box_masses(mass, regions) for mass in masses.values()]
    return torch.stack([inside for inside, _ in pairs]).mean(0), torch.stack([outside for _, outside in pairs]).mean(0)


def subject_token_mass(maps: Mapping[str, torch.Tensor], owners: torch.Tensor) -> dict[str, torch.Tensor]:
    """Attention on all tokens of each subject, from the maps of single tokens.

    Args:
        maps: layer name to `(B, heads, HW, T)`.
        owners: `(B, T, S)`, 1 where token T counts for subject S; the end token counts for every subject.

    Returns:
        Layer name to `(B, heads, HW, S)`, float32 also under `torch.autocast`.
    """
    with torch.autocast(owners.device.type, enabled=False):
        return {name: torch.einsum("bhqt,bts->bhqs", columns, owners.to(columns)) for name, columns in maps.items()}


def box_control_loss(
    masses: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    weights: Mapping[str, float],
    penalty: float,
    present: torch.Tensor,
    background_factor: torch.Tensor | float = 1.0,
) -> BoxLoss:
    """Reward and penalty of both kinds of attention, summed over subjects (MIFO, equations 12 to 14).

    Args:
        masses: "cross" and "self" (or one of them) to F and G, `(B, S)` each; see `mean_box_masses`.
        weights: the weight of each of these kinds.
        penalty: weight of the out-of-box penalty, from 0.
        present: `(B, S)`, 0 for padded subjects.
        background_factor: 1, or the number of subjects `(B, 1)` for Bounded Attention's reward.

    Raises:
        ObjectComposeError: no kind of attention.
    """
    if not masses:
        raise ObjectComposeError('`masses` must hold "cross" or "self", got neither.')
    counted = present.float()
    total = reward = torch.zeros(len(counted), device=counted.device)
    for kind, (inside, outside) in masses.items():
        in_box = (box_reward_loss(inside, outside, background_factor) * counted).sum(1)
        out_of_box = (box_penalty_loss(outside) * counted).sum(1)
        reward = reward + weights[kind] * in_box
        total = total + weights[kind] * (in_box + penalty * out_of_box)
    return BoxLoss(total, reward)
