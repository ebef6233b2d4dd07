"""Scenes for training toybox's models: rendered once in parallel, kept as compact tensors, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch.utils.data import DataLoader, Dataset

from objectcompose.files import write_atomically
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.scenes import MAX_OBJECTS, render_scenes, sample_scene


#: First number of every scene's seed: the splits never share a scene. The judge sees scenes of its own.
SPLIT_SEEDS = {"train": 0, "judge": 1, "test": 2, "dev": 3}
_CHUNK = 64


@dataclass
class ScenePool:
    """Rendered scenes of one split.

    Attributes:
        pixels: (N, 3, S, S) uint8.
        owner: (N, S, S) uint8: 0 for background, n + 1 where object n is seen.
        categories: (N, 5) int64: index into the preset's categories, -1 where there is no object.
        captions: N strings.
    """

    pixels: torch.Tensor
    owner: torch.Tensor
    categories: torch.Tensor
    captions: list[str]

    def images(self, indices: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """Pictures (B, 3, S, S) in [0, 1]."""
        return self.pixels[indices].to(device).float().div_(255)

    def category_maps(self, indices: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """Class of each pixel (B, S, S): 0 for background, c + 1 for category c."""
        owner, categories = self.owner[indices].to(device).long(), self.categories[indices].to(device)
        table = torch.cat([torch.zeros_like(categories[:, :1]), categories + 1], dim=1)
        return table.gather(1, owner.flatten(1)).view_as(owner)


class _Chunks(Dataset):
    def __init__(self, preset: Preset, split: str, count: int) -> None:
        self.preset, self.seed, self.count = preset, SPLIT_SEEDS[split], count

    def __len__(self) -> int:
        return -(-self.count // _CHUNK)

    def __getitem__(self, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        torch.set_num_threads(1)
        indices = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, self.count))
        batch = render_scenes(self.preset, [sample_scene(self.preset, (self.seed, index)) for index in indices])
        numbers = torch.arange(1, batch.visible.shape[1] + 1)[None, :, None, None]
        owner = (batch.visible * numbers).sum(1).byte()
        categories = torch.full((len(indices), MAX_OBJECTS), -1)
        for row, spec in enumerate(batch.specs):
            for n, identity in enumerate(spec.identities):
                categories[row, n] = self.preset.categories.index(identity.category)
        pixels = (batch.pixels * 255).round().byte()
        return pixels.numpy(), owner.numpy(), categories.numpy(), batch.captions


def scene_pool(preset: Preset, split: str, count: int, cache: Path, workers: int | None = None) -> ScenePool:
    """The first `count` scenes of a split, from the cache when they are there.

    Args:
        preset: the world.
        split: one of `SPLIT_SEEDS`.
        count: number of scenes.
        cache: folder for the rendered tensors; made when missing. Processes may share it.
        workers: processes that render; by default one per core (a GPU machine's 16 render 32,000 scenes in seconds).
    """
    world = hashlib.sha256(repr(preset).encode()).hexdigest()[:8]
    path = cache / f"{preset.name}-{world}-{split}-{count}.safetensors"
    try:
        return _read_pool(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass  # not there, or not whole
    cache.mkdir(parents=True, exist_ok=True)
    chunks = DataLoader(_Chunks(preset, split, count), batch_size=None, num_workers=workers or os.cpu_count() or 1)
    pixels, owner, categories, captions = zip(*chunks, strict=True)
    parts = {"pixels": pixels, "owner": owner, "categories": categories}
    tensors = {name: torch.cat([torch.as_tensor(part) for part in chunk]) for name, chunk in parts.items()}
    texts = json.dumps([caption for chunk in captions for caption in chunk])
    write_atomically(path, save(tensors, metadata={"captions": texts}))
    return _read_pool(path)


def _read_pool(path: Path) -> ScenePool:
    with safe_open(path, "pt") as file:
        captions = json.loads((file.metadata() or {})["captions"])
    return ScenePool(**load_file(path), captions=captions)
