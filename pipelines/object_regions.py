"""Where each prompted object may act once its segment is known: the -inf masks of compositional guidance.

VisualComposer (arXiv:2501.01424), section 3.4: attention logits of a prompt outside its segment are -inf. Matched
prompts get their segment; all others, a background prompt among them, share what no segment claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.regions import rasterize, token_grid


#: A cell belongs to a region from this coverage on; at the border to what no segment claims, both sides see it.
HARD_BORDER, SOFT_BORDER = 0.5, 0.25

#: Per picture and slot: a mask (H, W), or None for everywhere. Fewer slots than others: the rest is empty.
SlotMasks = Sequence[Sequence[torch.Tensor | None]]


def slot_masks(matched: Sequence[torch.Tensor | None], num_others: int = 0) -> list[torch.Tensor | None]:
    """The masks of one picture's slots.

    Args:
        matched: per object its segment `(H, W)`, {0, 1}, or None.
        num_others: further slots that are never matched (a background prompt).

    Returns:
        `len(matched) + num_others` masks: the segments, and for all others what no segment claims, which may be
        empty. Without any segment every slot is None: everywhere.
    """
    segments = [mask for mask in matched if mask is not None]
    if not segments:
        return [None] * (len(matched) + num_others)
    unclaimed = 1 - torch.stack(segments).amax(0)
    return [*(unclaimed if mask is None else mask for mask in matched), *[unclaimed] * num_others]


def dilated_masks(masks: SlotMasks, canvas: tuple[int, int], cells: int) -> list[list[torch.Tensor | None]]:
    """The masks on the canvas' grid, grown by a number of its cells in every direction."""

    def grown(mask: torch.Tensor | None) -> torch.Tensor | None:
        if mask is None or not mask.any():
            return mask
        return F.max_pool2d(rasterize(mask, canvas, "round")[None, None], 2 * cells + 1, 1, cells)[0, 0]

    return [[grown(mask) for mask in row] for row in masks]


class SlotRegions:
    """The slots' cells on every grid of the UNet, {0, 1}, as `Branch` asks for them.

    A cell belongs to a slot that covers half of it. At borders between a segment and what no segment claims a quarter
    is enough, so that both sides see these cells: otherwise objects would look cut out. Between two segments it is
    not: there objects would leak. No mask vanishes: it has at least the cell that it covers most.

    Args:
        masks: per picture its slots.
        canvas: (h, w), sides of the latents.
        is_free: per picture and slot, whether its mask is what no segment claims.
        halves: how often the pictures stand in the batch: 2 for `[uncond, cond]`.
    """

    def __init__(
        self, masks: SlotMasks, canvas: tuple[int, int], is_free: Sequence[Sequence[bool]], halves: int = 1
    ) -> None:
        self.masks, self.canvas, self.halves = masks, canvas, halves
        self.is_free = [torch.tensor(row) for row in is_free]
        self.num_slots = max(len(row) for row in masks)

    def at_tokens(self, num_tokens: int, device: Any = None) -> torch.Tensor:
        """`(halves * pictures, slots, h, w)` on the grid of `num_tokens` cells."""
        grid = token_grid(num_tokens, *self.canvas)
        regions = torch.zeros(len(self.masks), self.num_slots, *grid)
        for picture, row in enumerate(self.masks):
            regions[picture, : len(row)] = _cells_of(row, self.is_free[picture], grid)
        return regions.repeat(self.halves, 1, 1, 1).to(device)


def _cells_of(masks: Sequence[torch.Tensor | None], is_free: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """`(slots, h, w)`, {0, 1}: the cells of one picture's slots."""
    shares = torch.stack([_share_of(mask, grid) for mask in masks])
    cells = shares >= HARD_BORDER
    if is_free.any():
        touched = shares >= SOFT_BORDER
        segments = (touched & ~is_free[:, None, None]).sum(0)  # how many touch the cell
        cells |= touched & (is_free[:, None, None] | (segments == 1))
    for share, own in zip(shares, cells, strict=True):
        if share.any() and not own.any():
            own.view(-1)[int(share.argmax())] = True
    return cells.float()


def _share_of(mask: torch.Tensor | None, grid: tuple[int, int]) -> torch.Tensor:
    """`(h, w)`, in [0, 1]: how much of each cell the mask covers; masks may be empty here."""
    if mask is None:
        return torch.ones(grid)
    return rasterize(mask, grid, "area") if mask.any() else torch.zeros(grid)
