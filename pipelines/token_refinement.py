"""Refinement of appearance tokens while sampling, so that a segment looks more like its prompt.

VisualComposer (arXiv:2501.01424), section 3.4: a loss on DINO features between a generated segment and its prompt is
propagated back through the model and updates the appearance tokens only. Its text leaves decoding, steps and step
size open; the rules here are the method spec's (section 7). At step k, with x0 predicted in one step from the
conditional half and decoded to pixels,

    loss = sum_i 1 - cos(DINO(crop_i(m_i * picture + (1 - m_i) * colour)), DINO(prompt_i))
    A_i <- A_i - 0.02 |A_i| g_i / |g_i|,  then back into the ball |A_i - A0_i| <= 0.15 |A0_i|

Steps are normalised because dx0/deps grows with the noise level, by an order of magnitude over the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from objectcompose.errors import ObjectComposeError


#: Number of updates, and the timesteps between which they lie: before, x0 is a blur; after, identity is settled.
REFINEMENT_STEPS = 8
REFINEMENT_START, REFINEMENT_END = 750.0, 250.0
#: Length of an update and radius of the ball around the original tokens, relative to the tokens' norm.
REFINEMENT_STEP_SIZE, REFINEMENT_RADIUS = 0.02, 0.15
#: An object whose loss rises this often in a row is done.
REFINEMENT_PATIENCE = 2
#: fp16 gradients would underflow otherwise; updates are normalised, so the factor drops out.
HALF_LOSS_SCALE = 2.0**10

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def refinement_indices(timesteps: Sequence[float] | torch.Tensor, count: int) -> list[int]:
    """Which iterations of a schedule refine: those nearest to `count` timesteps evenly between 750 and 250.

    Each at most once, so a short schedule has fewer; iterations outside the range never do.

    Args:
        timesteps: of the schedule, descending.
        count: number of updates, from 0.

    Returns:
        Indices, ascending.
    """
    times = [float(time) for time in timesteps]
    inside = [index for index, time in enumerate(times) if REFINEMENT_END <= time <= REFINEMENT_START]
    if not inside or count == 0:
        return []
    gap = (REFINEMENT_START - REFINEMENT_END) / max(count - 1, 1)
    targets = [REFINEMENT_START - gap * place for place in range(count)]
    if count == 1:
        targets = [(REFINEMENT_START + REFINEMENT_END) / 2]
    # min: of the iterations of one timestep (schedulers of second order have two) the first
    return sorted({min(inside, key=lambda index: (abs(times[index] - target), index)) for target in targets})


def signal_share(scheduler: Any, timestep: float) -> float:
    """abar of a timestep, in (0, 1], between whole timesteps by the noise level sqrt((1 - abar) / abar).

    Raises:
        ObjectComposeError: a scheduler without `alphas_cumprod`.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ObjectComposeError(f"`scheduler` must know its `alphas_cumprod`, got {type(scheduler).__name__}.")
    shares = scheduler.alphas_cumprod
    lower = min(max(math.floor(float(timestep)), 0), len(shares) - 1)
    upper = min(lower + 1, len(shares) - 1)
    first, second = (math.sqrt((1 - share) / share) for share in (float(shares[lower]), float(shares[upper])))
    sigma = first + (float(timestep) - lower) * (second - first)
    return 1 / (1 + sigma**2)


def predict_clean_latents(
    noisy: torch.Tensor, prediction: torch.Tensor, share: float, prediction_type: str
) -> torch.Tensor:
    """x0 in one step, in float32.

    Args:
        noisy: z_t as the model reads it, of variance 1: `(M, C, h, w)`.
        prediction: of the model, same shape.
        share: abar of the timestep; see `signal_share`.
        prediction_type: one of `PREDICTION_TYPES`.
    """
    noisy, prediction = noisy.float(), prediction.float()
    signal, noise = math.sqrt(share), math.sqrt(1 - share)
    if prediction_type == "epsilon":
        return (noisy - noise * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * noisy - noise * prediction
    return prediction


def refined_tokens(tokens: torch.Tensor, gradients: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """One update of each object's tokens, and back into the ball around its originals.

    Args:
        tokens, gradients, originals: float32 `(M, T, C)`; norms are over the tokens of one object.
    """
    norms = tokens.flatten(1).norm(dim=1)[:, None, None]
    slopes = gradients.flatten(1).norm(dim=1)[:, None, None]
    moved = tokens - REFINEMENT_STEP_SIZE * norms * gradients / (slopes + 1e-8)
    away = moved - originals
    radius = REFINEMENT_RADIUS * originals.flatten(1).norm(dim=1)[:, None, None]
    distance = away.flatten(1).norm(dim=1)[:, None, None]
    return originals + away * (radius / distance.clamp(min=1e-12)).clamp(max=1.0)


class TokenRefinement:
    """The tokens of the objects that are refined, and when each of them stops.

    Args:
        tokens: `(M, T, C)`; kept in float32.

    Attributes:
        tokens: the current ones.
        active: bool `(M,)`: which are still refined.
        losses: per object its loss at each step it took part in.
    """

    def __init__(self, tokens: torch.Tensor):
        self.originals = tokens.detach().float().clone()
        self.tokens = self.originals.clone()
        self.active = torch.ones(len(tokens), dtype=torch.bool)
        self.losses: list[list[float]] = [[] for _ in range(len(tokens))]
        self._best = self.originals.clone()

    def update(self, losses: torch.Tensor, gradients: torch.Tensor) -> None:
        """Take one step with losses `(M,)` and gradients `(M, T, C)` of the current tokens.

        An object stops for good, with the tokens of its least loss, when its loss rose twice in a row, or when loss or
        gradient are no numbers any more (in half precision).
        """
        stepped = refined_tokens(self.tokens, gradients.float(), self.originals)
        for index in range(len(self.tokens)):
            if not self.active[index]:
                continue
            history, loss = self.losses[index], float(losses[index])
            usable = math.isfinite(loss) and bool(torch.isfinite(gradients[index]).all())
            if usable:
                if not history or loss < min(history):
                    self._best[index] = self.tokens[index]
                history.append(loss)
            recent = history[-REFINEMENT_PATIENCE - 1 :]
            rises = sum(later > earlier for earlier, later in zip(recent, recent[1:], strict=False))
            if not usable or rises == REFINEMENT_PATIENCE:
                self.active[index] = False
                self.tokens[index] = self._best[index]
            else:
                self.tokens[index] = stepped[index]
