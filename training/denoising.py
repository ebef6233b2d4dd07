"""What a diffusion model is trained to predict, and the noise of a batch from each sample's own draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from objectcompose.errors import ObjectComposeError
from objectcompose.training.caption_encoding import draw_latent
from objectcompose.training.loop import Draw, draw_noise


@dataclass(frozen=True, eq=False)
class DenoisingTask:
    """What the UNet sees of a batch, and what it is to say.

    Attributes:
        noisy: `(B, C, h, w)`, noised latents.
        timesteps: `(B,)`.
        target: `(B, C, h, w)`, see `denoising_target`.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor


def check_prediction_type(scheduler: Any) -> None:
    """Raise `ObjectComposeError` unless the scheduler's model predicts noise or velocity."""
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ObjectComposeError(
            f"the scheduler's `prediction_type` must be 'epsilon' or 'v_prediction', got {prediction!r}."
        )


def denoising_target(
    scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Noise, or velocity where the scheduler says so, `(B, C, h, w)`.

    Args:
        scheduler: passed `check_prediction_type`.
        clean, noise: `(B, C, h, w)`.
        timesteps: `(B,)`.
    """
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    return noise


def denoising_task(
    draws: Sequence[Draw], moments: torch.Tensor, scheduler: Any, scaling_factor: float
) -> DenoisingTask:
    """Draw latents, noise and timesteps, uniform over all of the scheduler's.

    Args:
        draws: of the batch; their generators move on.
        moments: `(B, 2 * C, h, w)`, of the autoencoder, on the UNet's device.
        scheduler: passed `check_prediction_type`.
        scaling_factor: of the latents.
    """
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    all_steps = range(scheduler.config.num_train_timesteps)
    posterior, noise, timesteps = draw_noise(draws, shape, all_steps, moments.device)
    clean = draw_latent(moments, posterior, scaling_factor)
    target = denoising_target(scheduler, clean, noise, timesteps)
    return DenoisingTask(scheduler.add_noise(clean, noise, timesteps), timesteps, target)
