"""Parts in a compiled UNet: what depends on values is built before the graph runs.

Tables of regions, groups of queries and the like are built when a layer first asks for them, by looking at values,
which a traced graph cannot do. Layers and grids are known before, so all of it can be built ahead; the graph then
finds it, without a break.
"""

from __future__ import annotations

from typing import Any

import torch

from objectcompose.attention_processors.install import attention_layers, layer_levels
from objectcompose.attention_processors.regions import grids_of


def is_compiled(unet: Any) -> bool:
    """Whether `torch.compile` is at work on a model, as a whole or by block."""
    return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in unet.modules())


def prepare_parts(unet: Any, sample: torch.Tensor) -> None:
    """Build what the installed parts of a compiled UNet (`is_compiled`) need for its next pass.

    Args:
        unet: the model.
        sample: what it will be called with, `(B, C, h, w)`.

    Raises:
        RegionError: a part's regions do not fit a grid or the batch.
    """
    levels = layer_levels(unet)
    height, width = sample.shape[-2:]
    grids = grids_of(height, width, 1 + max(levels.values(), default=0))
    for name, module in attention_layers(unet).items():
        parts = getattr(module.processor, "composed_parts", ())
        if parts:
            rows, columns = grids[levels[name]]
            for part in parts:
                if hasattr(part, "prepare"):
                    part.prepare(rows * columns, sample.device)
            replacing = [part for part in parts if part.kind == "branch" and part.mode == "replace"]
            if len(replacing) > 1:
                replacing[0].refuse_overlap(replacing, len(sample), rows * columns, sample.device)
