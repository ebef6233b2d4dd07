"""Two views of many identities, and the contrastive loss that tells them apart: shared by three toybox encoders."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from objectcompose.toybox.backgrounds import render_backgrounds, sample_background
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.identities import Identity, sample_identity
from objectcompose.toybox.scenes import render_objects, sample_pose
from objectcompose.training.toybox_data import SPLIT_SEEDS


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


class ViewPairs(Dataset):
    """Two views of the identities of each step; item `i` belongs to step `start + i`."""

    def __init__(self, preset: Preset, split: str, count: int, start: int, stop: int) -> None:
        self.preset, self.seed, self.count = preset, SPLIT_SEEDS[split], count
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """First views (N, 3, 64, 64), second views, and the identities' categories (N,)."""
        if get_worker_info() is not None:
            torch.set_num_threads(1)
        seed = (self.seed, self.start + index)
        identities = sample_identities(self.preset, seed, self.count)
        first, second = (render_views(self.preset, identities, (*seed, number)) for number in (1, 2))
        return first, second, torch.tensor([self.preset.categories.index(one.category) for one in identities])


class ViewStream:
    """`ViewPairs` step by step, drawn ahead by worker processes where a GPU would wait for them.

    Args:
        preset: the world.
        split: one of `SPLIT_SEEDS`.
        count: identities in a step.
        steps: of the whole run.
        device: where the views go; on a CPU no workers are started, since the model needs the cores.
    """

    def __init__(self, preset: Preset, split: str, count: int, steps: int, device: torch.device) -> None:
        self._arguments, self._steps, self._device = (preset, split, count), steps, device
        self._workers = (os.cpu_count() or 1) if device.type == "cuda" else 0
        self._next = -1
        self._views: Iterator[tuple[torch.Tensor, ...]] = iter(())

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """First and second views in [0, 1], and categories, of one step; asking for steps in order is quick."""
        if step != self._next:
            pairs = ViewPairs(*self._arguments, step, self._steps)
            # its own generator: the loader must not advance the global one, or a resumed run would differ
            loader = DataLoader(pairs, batch_size=None, num_workers=self._workers, generator=torch.Generator())
            self._views = iter(loader)
        self._next = step + 1
        first, second, categories = (part.to(self._device) for part in next(self._views))
        return first, second, categories
