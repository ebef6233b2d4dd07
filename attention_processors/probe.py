"""Probe parts: what a layer attends to, written down while it runs.

`TokenMapProbe` gives the attention of every cell to chosen text tokens (cross-attention): exact columns of the softmax
over the 77 or so keys, in float32. `RegionMassProbe` gives the attention of every cell to regions of the picture
(self-attention): a second fused call whose values are the regions' indicators, so that no table of all pairs of cells
exists. The indicators are padded to the width of a head, because a kernel that materialises is chosen for other
widths. `CellMapProbe` gives the whole table between cells, for grids of a few hundred cells only, where clustering
needs it.

Results are assigned under the layer's name, never appended: gradient checkpointing runs a layer twice. They are
differentiable. Masks of the same layer are in force; a cell that sees no key has zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.columns import softmax_columns
from objectcompose.attention_processors.mask import MAX_DENSE_CELLS, region_weights
from objectcompose.attention_processors.processor import AttentionCall
from objectcompose.errors import ObjectComposeError, PromptTooLongError, RegionError


class TokenMapProbe:
    """Attention of every cell to chosen tokens of the prompt.

    Args:
        token_indices: positions in the encoded prompt (BOS = 0), one list for all batch rows or one list per measured
            row; shorter lists are padded, a padded column is 0.
        layers: which cross-attention layers, a regex or a list of names.
        head_mean: mean over the heads, or every head.
        rows: the batch rows to measure, such as the conditional half; None is all.

    Attributes:
        maps: layer name to probabilities in [0, 1], float32 `(rows, HW, T)`, or `(rows, heads, HW, T)` per head.

    Raises:
        ObjectComposeError: no token is given, or a position is negative.
    """

    kind = "probe"
    attention = "cross"

    def __init__(
        self,
        token_indices: Sequence[int] | Sequence[Sequence[int]],
        layers: str | Sequence[str] = r"attn2$",
        head_mean: bool = True,
        rows: slice | None = None,
    ):
        per_row = [list(row) if isinstance(row, Sequence) else [int(row)] for row in token_indices]
        self._is_shared = all(not isinstance(row, Sequence) for row in token_indices)
        if self._is_shared:
            per_row = [[index for row in per_row for index in row]]
        width = max((len(row) for row in per_row), default=0)
        if width == 0 or any(index < 0 for row in per_row for index in row):
            raise ObjectComposeError(f"`token_indices` must hold positions from 0 on, got {token_indices!r}.")
        self._indices = torch.tensor([row + [0] * (width - len(row)) for row in per_row])  # (rows | 1, T)
        self._is_token = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in per_row])
        self._last_index = max(index for row in per_row for index in row)
        self._has_padding = any(len(row) < width for row in per_row)
        self.token_indices = token_indices
        self.layers = layers
        self.head_mean = head_mean
        self.rows = rows
        self.maps: dict[str, torch.Tensor] = {}
        self._is_held = False

    def clear(self) -> None:
        """Forget what was measured, and the graph behind it."""
        self.maps.clear()
        self._is_held = False

    def hold(self) -> None:
        """Keep what was measured until it is cleared, whatever the layers compute from now on.

        For training with gradient checkpointing: the backward pass runs every block again, and maps of that second run
        would keep its graph, with all that a checkpoint was to save, alive.
        """
        self._is_held = True

    def measure(self, call: AttentionCall) -> None:
        """Store this call's columns.

        Raises:
            PromptTooLongError: a position lies beyond the text states.
            ObjectComposeError: there is one list per row, but not as many as measured rows.
        """
        num_keys = call.key.shape[2]
        if self._last_index >= num_keys:
            raise PromptTooLongError(
                f"`token_indices` names position {self._last_index}, the text states have {num_keys} positions."
            )
        with torch.autocast(call.query.device.type, enabled=False):
            measured = call.select(self.rows)
            query, key = measured.query.float(), measured.key.float()
            if not self._is_shared and len(query) != len(self._indices):
                raise ObjectComposeError(
                    f"`token_indices` has lists for {len(self._indices)} rows, measured are {len(query)}."
                )
            # They stay there: one copy per device, not per layer and step.
            self._indices, self._is_token = self._indices.to(query.device), self._is_token.to(query.device)
            bias, sees_any = measured.logit_bias()
            maps = softmax_columns(query, key, self._indices, query.shape[-1] ** -0.5, bias)  # (rows, heads, HW, T)
            if sees_any is not None:
                maps = torch.where(sees_any, maps, torch.zeros_like(maps))
            if self._has_padding:
                maps = maps * self._is_token[:, None, None, :]
            maps = maps.mean(1) if self.head_mean else maps
        if not self._is_held:  # computed all the same: a checkpoint wants the same operations again
            self.maps[call.name] = maps


class RegionMassProbe:
    """Attention mass of every cell on regions of the picture (self-attention).

    Args:
        regions: as for `region_weights`, `(R, h, w)` or one set per measured row; values in [0, 1].
        layers: which self-attention layers, a regex or a list of names.
        head_mean: mean over the heads (axis kept, length 1), or every head.
        rows: the batch rows to measure; None is all.

    Attributes:
        mass: layer name to the share of a cell's attention that falls into each region, float32 `(rows, heads | 1,
            HW, R)`.
    """

    kind = "probe"
    attention = "self"

    def __init__(
        self,
        regions: Any,
        layers: str | Sequence[str] = r"attn1$",
        head_mean: bool = True,
        rows: slice | None = None,
    ):
        self._regions = regions
        self.layers = layers
        self.head_mean = head_mean
        self.rows = rows
        self.mass: dict[str, torch.Tensor] = {}
        self._indicators: dict[tuple[int, torch.device], torch.Tensor] = {}

    @property
    def regions(self) -> Any:
        """The regions; assign new ones to change them (what was built from the old ones is dropped)."""
        return self._regions

    @regions.setter
    def regions(self, regions: Any) -> None:
        self._regions = regions
        self._indicators = {}

    def clear(self) -> None:
        """Forget what was measured, and the graph behind it."""
        self.mass.clear()

    def measure(self, call: AttentionCall) -> None:
        """Store this call's mass.

        Raises:
            RegionError: the regions do not fit the grid or the measured rows.
        """
        measured = call.select(self.rows)
        indicators = self._values(measured)  # (rows | 1, 1, K, R)
        batch_size, heads, _, width = measured.query.shape
        pieces = []
        for values in indicators.to(measured.query.dtype).split(width, dim=-1):
            padded = F.pad(values, (0, width - values.shape[-1])).expand(batch_size, heads, -1, -1)
            mass = measured.attend(padded)[..., : values.shape[-1]].float()
            pieces.append(mass.mean(1, keepdim=True) if self.head_mean else mass)
        self.mass[call.name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def prepare(self, num_tokens: int, device: torch.device | str) -> None:
        """Build what one grid needs, which a compiled pass cannot (`compiled.prepare_parts`)."""
        device = torch.device(device)
        if (num_tokens, device) not in self._indicators:
            weights = region_weights(self._regions, num_tokens, device)  # (rows | 1, R, K)
            self._indicators[num_tokens, device] = weights.transpose(1, 2)[:, None]

    def _values(self, call: AttentionCall) -> torch.Tensor:
        self.prepare(call.num_tokens, call.query.device)
        values = self._indicators[call.num_tokens, call.query.device]
        if values.shape[0] not in (1, call.batch_size):
            raise RegionError(f"`regions` has {values.shape[0]} batch rows, measured are {call.batch_size}.")
        return values


class CellMapProbe:
    """Attention between all cells of a small grid, averaged over heads (self-attention).

    The one probe with a table of all pairs of cells: clustering needs every entry. A grid of 16 x 16 cells has 65,536,
    less than the layer's own activations; larger grids are refused, since the table grows with the square.

    Args:
        layers: which self-attention layers, a regex or a list of names.
        rows: the batch rows to measure, such as the conditional half; None is all.
        max_cells: the largest grid that is measured.

    Attributes:
        maps: layer name to probabilities in [0, 1], float32 `(rows, HW, HW)`: from each cell (axis 1) to each cell.
    """

    kind = "probe"
    attention = "self"

    def __init__(self, layers: str | Sequence[str], rows: slice | None = None, max_cells: int = MAX_DENSE_CELLS):
        self.layers = layers
        self.rows = rows
        self.max_cells = max_cells
        self.maps: dict[str, torch.Tensor] = {}

    def clear(self) -> None:
        """Forget what was measured, and the graph behind it."""
        self.maps.clear()

    def measure(self, call: AttentionCall) -> None:
        """Store this call's table.

        Raises:
            RegionError: the grid has more than `max_cells` cells.
        """
        if call.num_tokens > self.max_cells:
            raise RegionError(
                f"`layers` of a cell map must have at most {self.max_cells} cells, {call.name} has {call.num_tokens}."
            )
        with torch.autocast(call.query.device.type, enabled=False):
            logits, sees_any = call.select(self.rows).logits()  # (rows, heads, HW, HW)
            maps = logits.softmax(-1)
            if sees_any is not None:
                maps = torch.where(sees_any, maps, torch.zeros_like(maps))
            self.maps[call.name] = maps.mean(1)
