"""Where an object's keys are looked at: maps of ObjectPrompt's branch, which say how a layout came about.

Keys are what the coarse stream is for (arXiv:2501.01424, section 3.2): each cell's softmax over the tokens of all
objects says whom the cell belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from objectcompose.attention_processors.processor import AttentionCall, split_heads
from objectcompose.attention_processors.regions import token_grid
from objectcompose.errors import ObjectComposeError
from objectcompose.layout import as_scene_objects


class ObjectKeyProbe:
    """A probe part: attention of every cell to each object's tokens, as a running mean over layers and forwards.

    For sampling, where a layer runs once per forward; the last rows of a batch are measured, its conditional half.

    Args:
        keys: per layer the keys of P pictures, `(P, N * T, C)`.
        num_objects: N.
        latent_size: height and width of the latents, the grid of the maps.
    """

    kind = "probe"
    attention = "cross"

    def __init__(self, keys: Mapping[str, torch.Tensor], num_objects: int, latent_size: tuple[int, int]) -> None:
        self.keys, self.num_objects, self.latent_size = dict(keys), num_objects, latent_size
        self.layers = list(keys)
        self._sum: torch.Tensor | None = None
        self._count = 0

    def clear(self) -> None:
        """Forget what was measured."""
        self._sum, self._count = None, 0

    @torch.no_grad()
    def measure(self, call: AttentionCall) -> None:
        """Add one layer's maps."""
        keys = self.keys[call.name].to(call.query.device, torch.float32)
        query = call.query[-len(keys) :].float()
        logits = query @ split_heads(keys, call.heads).transpose(-1, -2) * query.shape[-1] ** -0.5
        shares = logits.softmax(-1).unflatten(-1, (self.num_objects, -1)).sum(-1).mean(1)  # (P, HW, N)
        maps = shares.transpose(1, 2).unflatten(-1, token_grid(call.num_tokens, *self.latent_size))
        maps = F.interpolate(maps, self.latent_size, mode="bilinear", align_corners=False)
        self._sum = maps if self._sum is None else self._sum + maps
        self._count += 1

    @property
    def maps(self) -> torch.Tensor:
        """`(P, N, h, w)` in [0, 1], float32 on the CPU; a cell's values sum to 1."""
        assert self._sum is not None, "nothing was measured"
        return (self._sum / self._count).cpu()


def paint_with_key_maps(
    pipeline: Any, prompt: str, objects: Sequence[Any], **arguments: Any
) -> tuple[Image.Image, torch.Tensor]:
    """One picture without guidance, and where each object's keys were looked at.

    Args:
        pipeline: an `ObjectPromptPipeline` with its adapter.
        prompt, objects: of one picture.
        arguments: further ones of the call.

    Returns:
        The picture, and maps `(N, h, w)` in [0, 1].

    Raises:
        ObjectComposeError: no object has a strength, or see the pipeline.
    """
    rows = as_scene_objects(list(objects), 1)
    with torch.no_grad():
        branch = pipeline.prompt_branch(rows, [None], 1)
    if branch is None:
        raise ObjectComposeError("`objects` must have one with a `scale` above 0, got none.")
    keys = {name: key[1:] for name, (key, _) in branch.part.keys_values.items()}  # without the unconditional row
    sides = zip(("height", "width"), pipeline.default_size(), strict=True)
    height, width = (arguments.get(name) or default for name, default in sides)
    probe = ObjectKeyProbe(keys, len(rows[0]), pipeline.latent_size(height, width))
    output = pipeline(prompt, objects=rows[0], parts=[*arguments.pop("parts", ()), probe], **arguments)
    return output.images[0], probe.maps[0]
