"""Tensors that follow from their key alone, kept on disk: what is read back is bit-equal to what would be computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from objectcompose.files import write_atomically


def cached_tensors(
    folder: Path, key: str, required: Collection[str], make: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Named tensors from their file, or made and written when it is not there or not whole.

    Args:
        folder: of all files; made when missing. Processes may share it: files appear whole.
        key: names everything that the tensors follow from.
        required: names that must be in the file.
        make: computes them, on the CPU.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()
    path = folder / digest[:2] / f"{digest}.safetensors"
    try:
        tensors = load_file(path)
        if set(required) <= set(tensors):
            return tensors
    except (OSError, SafetensorError, ValueError):
        pass  # not there, or not whole
    tensors = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    return tensors
