"""Grounded captions on disk, written as `objectcompose ground-captions` writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from objectcompose.training.grounded_captions import write_metadata, write_record


Sample = tuple[str, Path, str, Sequence[tuple[str, torch.Tensor | None]]]


def write_records(root: Path, samples: Iterable[Sample]) -> None:
    """A whole data set: id, picture's file, caption, nouns with masks of each sample."""
    write_metadata(root, [write_record(root, *sample) for sample in samples])
