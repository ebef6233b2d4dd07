"""Two views of many identities, and the contrastive loss that tells them apart: shared by three toybox encoders."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from objectcompose.toybox.backgrounds import render_backgrounds, sample_background
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.identities import Identity, sample_identity
from objectcompose.toybox.scenes import render_objects, sample_pose


ENCODER_SIDE = 64  # pixels that the encoders see, in every preset
TEMPERATURE = 0.07


def sample_identities(preset: Preset, seed: tuple[int, ...], count: int, look_alikes: int = 8) -> list[Identity]:
    """Identities in groups of look-alikes: `look_alikes` recolourings of each drawn category."""
    rng = np.random.default_rng(seed)
    categories = [str(rng.choice(preset.categories)) for _ in range(-(-count // look_alikes))]
    return [sample_identity(preset, categories[i // look_alikes], rng) for i in range(count)]


def render_views(preset: Preset, identities: list[Identity], seed: tuple[int, ...]) -> torch.Tensor:
    """One view of each identity in a pose and on a background of its own: (N, 3, 64, 64), in [0, 1].

    Half of the views stand on a neutral grey, as a cut-out reference does.
    """
    rng = np.random.default_rng(seed)
    poses = [sample_pose(rng, float(rng.uniform(0.65, 0.95))) for _ in identities]
    poses = [
        dataclasses.replace(pose, x=0.5 + float(rng.uniform(-0.06, 0.06)), y=0.5 + float(rng.uniform(-0.06, 0.06)))
        for pose in poses
    ]
    layers = render_objects(preset, identities, poses, ENCODER_SIDE)
    backgrounds = render_backgrounds([sample_background(rng) for _ in identities], ENCODER_SIDE)
    neutral = torch.from_numpy(rng.random(len(identities)) < 0.5)
    backgrounds[neutral] = 0.5
    return layers[:, :3] + (1 - layers[:, 3:]) * backgrounds


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """What toybox's encoders and segmenters read: [0, 1] to [-1, 1]."""
    return pixels * 2 - 1


def info_nce(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of rows that belong together.

    Args:
        first, second: embeddings (N, D); row i of one belongs to row i of the other.
    """
    logits = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / TEMPERATURE
    target = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
