"""Which layers box control reads, chosen by name.

MIFO reads Stable Diffusion's middle (8 x 8 cells of 64 x 64 latents) and first decoder block with attention (16 x 16)
for the loss, and the latter for mask refinement. Other UNets have other depths, so the rule is by the grid: of the
decoder's levels with attention the one whose shorter side is nearest to 16 cells, for the loss together with the next
coarser level of middle and decoder. On Stable Diffusion 1.x and 2.x that gives the authors' layers at every picture
size. What lies deeper in the decoder is not run in a guidance pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from objectcompose.attention_processors.install import layer_levels, match_layers
from objectcompose.attention_processors.regions import grids_of
from objectcompose.errors import LayerNotFoundError


#: Shorter side, in cells, of the grid whose attention tells objects from one another best.
MAP_GRID_SIDE = 16


@dataclass(frozen=True)
class ControlLayers:
    """Names of the layers that box control reads.

    Attributes:
        loss: self- and cross-attention layers of the loss.
        maps: those whose maps refine the masks, all of one grid.
        map_grid: that grid, (h, w).
    """

    loss: tuple[str, ...]
    maps: tuple[str, ...]
    map_grid: tuple[int, int]

    def of_kind(self, names: tuple[str, ...], unet: Any, kind: Any) -> list[str]:
        """Those of `names` that are layers of self- or of cross-attention."""
        of_that_kind = set(match_layers(unet, "", kind))
        return [name for name in names if name in of_that_kind]


def control_layers(unet: Any, canvas: tuple[int, int]) -> ControlLayers:
    """The layers for latents of a size.

    Args:
        unet: a diffusers UNet.
        canvas: (h, w) of the latents, the finest grid.

    Raises:
        LayerNotFoundError: the model has no decoder layers with attention.
    """
    levels = {name: level for name, level in layer_levels(unet).items() if not name.startswith("down_blocks.")}
    in_decoder = sorted({level for name, level in levels.items() if name.startswith("up_blocks.")}, reverse=True)
    if not in_decoder:
        raise LayerNotFoundError("box control needs a UNet with attention in `up_blocks`, got a model without.")
    grids = grids_of(*canvas, max(levels.values()) + 1)
    # Coarser levels come first, so of two equally near ones the cheaper is taken.
    chosen = min(in_decoder, key=lambda level: round(abs(math.log2(min(grids[level]) / MAP_GRID_SIDE)), 6))
    loss = tuple(name for name, level in levels.items() if level in (chosen, chosen + 1))
    maps = tuple(name for name in loss if levels[name] == chosen and name.startswith("up_blocks."))
    return ControlLayers(loss, maps, grids[chosen])
