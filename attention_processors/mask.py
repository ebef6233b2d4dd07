"""Mask parts: which keys a query may see.

`KeyMask` is a table per query cell and key, for cross-attention, whose keys are few. `RegionKeyMask` is the box rule
of self-attention (Bounded Attention, which MIFO adopts: arXiv 2511.00542, section 3.3): a cell of a region sees its
own regions and the background, a background cell sees everything. At 64 x 64 cells a table would have 16.8 million
entries, and fused kernels expand it further, so that rule is kept as few groups of queries with one list of keys
each, and the keys are gathered. Masks of several parts combine by AND. A query that sees no key gets zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from objectcompose.errors import PartConflictError, RegionError


#: Of the largest grid for which a table of all pairs of cells may be built.
MAX_DENSE_CELLS = 1024


def region_weights(regions: Any, num_tokens: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Regions on the grid that has `num_tokens` cells, flattened.

    Args:
        regions: a float tensor `(N, h, w)` or `(B, N, h, w)`, a mapping from the number of cells to such a tensor, or
            an object with `at_tokens(num_tokens, device)` that returns one. Values in [0, 1], 1 = inside.
        num_tokens: cells of the attention layer's grid.
        device: where the result lives; the regions' own device when None.

    Returns:
        float32 `(B | 1, N, num_tokens)`.

    Raises:
        RegionError: the regions do not exist on a grid of that many cells, or have the wrong number of axes.
    """
    if hasattr(regions, "at_tokens"):
        grid = regions.at_tokens(num_tokens, device)
    elif isinstance(regions, Mapping):
        if num_tokens not in regions:
            raise RegionError(f"`regions` has no grid of {num_tokens} cells, only of {sorted(regions)} cells.")
        grid = regions[num_tokens]
    else:
        grid = regions
    if grid.ndim not in (3, 4):
        raise RegionError(f"`regions` must have shape (N, h, w) or (B, N, h, w), got {tuple(grid.shape)}.")
    if grid.shape[-2] * grid.shape[-1] != num_tokens:
        raise RegionError(
            f"`regions` of {grid.shape[-2]} x {grid.shape[-1]} cells do not fit a layer of {num_tokens} cells;"
            " pass one grid per resolution or an object with `at_tokens`."
        )
    flat = grid.flatten(-2).to(device=device, dtype=torch.float32)
    return flat if flat.ndim == 3 else flat[None]


def rows_of_batch(rows: slice | None, batch_size: int) -> range:
    """The batch rows that a part's `rows` chooses (all of them for None).

    Raises:
        PartConflictError: it chooses none, such as the conditional half of a call without guidance.
    """
    chosen = range(batch_size) if rows is None else range(batch_size)[rows]
    if not len(chosen):
        raise PartConflictError(f"`rows` of a part must choose some of the {batch_size} batch rows, got {rows}.")
    return chosen


class GroupedVisibility:
    """Which keys each query sees, as few groups: query `x` sees key `y` where `visible[labels[x], y]`.

    Args:
        labels: int64 `(Q,)`, the group of each query.
        visible: bool `(G, K)`, the keys that a group sees.
    """

    def __init__(self, labels: torch.Tensor, visible: torch.Tensor):
        self.labels = labels.detach().cpu()
        self.visible = visible.detach().cpu()
        self._plans: dict[torch.device, tuple[list[tuple[torch.Tensor, torch.Tensor | None]], torch.Tensor]] = {}
        self._tables: dict[torch.device, torch.Tensor] = {}
        self._intersections: dict[int, tuple[GroupedVisibility, GroupedVisibility]] = {}

    @classmethod
    def from_regions(cls, members: torch.Tensor) -> GroupedVisibility:
        """The box rule for `members`, bool `(N, Q)`: a region's cell sees its own and the background."""
        members = members.detach().cpu()
        if not len(members):  # all is background
            num_cells = members.shape[1]
            return cls(torch.zeros(num_cells, dtype=torch.int64), torch.ones(1, num_cells, dtype=torch.bool))
        patterns, labels = torch.unique(members.T, dim=0, return_inverse=True)  # (G, N), (Q,)
        background_keys = ~members.any(0)  # (Q,)
        own_keys = (patterns.float() @ members.float()) > 0  # (G, Q)
        background_group = ~patterns.any(1, keepdim=True)  # (G, 1)
        return cls(labels, own_keys | background_keys | background_group)

    def intersect(self, other: GroupedVisibility) -> GroupedVisibility:
        """Both at once (AND); kept, since every layer of one resolution asks for the same pair."""
        known = self._intersections.get(id(other))
        if known is not None:
            return known[1]
        pairs, labels = torch.unique(torch.stack([self.labels, other.labels]), dim=1, return_inverse=True)
        both = GroupedVisibility(labels, self.visible[pairs[0]] & other.visible[pairs[1]])
        self._intersections[id(other)] = (other, both)  # holding `other` keeps its id from being used again
        return both

    def dense(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The whole table, bool `(Q, K)`; for small grids only. Built once per device."""
        device = torch.device(device)
        if device not in self._tables:
            self._tables[device] = self.visible[self.labels].to(device)
        return self._tables[device]

    def plan(self, device: torch.device) -> tuple[list[tuple[torch.Tensor, torch.Tensor | None]], torch.Tensor]:
        """Per group its query indices and key indices (None: all keys), and the order that undoes the grouping."""
        if device not in self._plans:
            groups, order = [], []
            for group, keys in enumerate(self.visible):
                queries = (self.labels == group).nonzero()[:, 0]
                if len(queries) == 0:
                    continue
                order.append(queries)
                groups.append((queries.to(device), None if bool(keys.all()) else keys.nonzero()[:, 0].to(device)))
            self._plans[device] = (groups, torch.argsort(torch.cat(order)).to(device))
        return self._plans[device]


class KeyMask:
    """A table of visibility for cross-attention.

    Args:
        visible: bool `(K,)`, `(Q, K)` or `(B, Q, K)`: True where query cell Q may see key K; or a mapping from the
            number of query cells to such a tensor, or an object with `at_tokens(num_tokens, device)` returning one
            (a table, not regions). Best on the model's device: from elsewhere it is copied in every call.
        layers: which layers, a regex or a list of names.
        rows: the batch rows it holds for (such as the conditional half, `slice(1, None)` of two); None is all. Other
            rows see every key. A 3-D table has one entry per chosen row, or one for all.
    """

    kind = "mask"
    attention = "any"
    gathered = False

    def __init__(self, visible: Any, layers: str | Sequence[str] = r"attn2$", rows: slice | None = None):
        self.visible = visible
        self.layers = layers
        self.rows = rows

    def prepare(self, num_tokens: int, device: torch.device | str) -> None:
        """Build what one grid needs, which a compiled pass cannot (`compiled.prepare_parts`)."""
        if hasattr(self.visible, "at_tokens"):
            self.visible.at_tokens(num_tokens, torch.device(device))

    def table(self, batch_size: int, num_tokens: int, num_keys: int, device: torch.device) -> torch.Tensor:
        """Visibility of one call, bool, broadcastable to `(B, Q, K)`.

        Raises:
            RegionError: the table does not fit the layer's queries, keys or batch.
        """
        visible = self.visible
        if hasattr(visible, "at_tokens"):
            visible = visible.at_tokens(num_tokens, device)
        elif isinstance(visible, Mapping):
            if num_tokens not in visible:
                raise RegionError(f"`visible` has no table for {num_tokens} query cells, only for {sorted(visible)}.")
            visible = visible[num_tokens]
        visible = visible.to(device=device, dtype=torch.bool)
        while visible.ndim < 3:
            visible = visible[None]
        chosen = rows_of_batch(self.rows, batch_size)
        rows, queries, keys = visible.shape
        if keys != num_keys or queries not in (1, num_tokens) or rows not in (1, len(chosen)):
            raise RegionError(
                f"`visible` must broadcast to ({len(chosen)}, {num_tokens}, {num_keys}) (rows, query cells, keys),"
                f" got {tuple(visible.shape)}."
            )
        if self.rows is None:
            return visible
        everywhere = visible.new_ones(batch_size, queries, keys)
        everywhere[self.rows] = visible
        return everywhere


class RegionKeyMask:
    """The box rule for self-attention, without a table of all pairs of cells.

    A cell inside regions sees the cells of those regions and the background; a background cell sees every cell.
    Regions may overlap. A cell belongs to a region where its value is above 0.

    Args:
        regions: as for `region_weights`; with a batch axis it has one entry per chosen row, or one per row of each
            guidance half, which are `[uncond, cond]` one after the other.
        layers: which layers, a regex or a list of names.
        rows: the batch rows it holds for; None is all.
    """

    kind = "mask"
    attention = "self"
    gathered = True

    def __init__(self, regions: Any, layers: str | Sequence[str] = r"attn1$", rows: slice | None = None):
        self._regions = regions
        self.layers = layers
        self.rows = rows
        self._grouped: dict[int, list[GroupedVisibility]] = {}

    @property
    def regions(self) -> Any:
        """The regions; assign new ones to change them (what was built from the old ones is dropped)."""
        return self._regions

    @regions.setter
    def regions(self, regions: Any) -> None:
        self._regions = regions
        self._grouped = {}

    def prepare(self, num_tokens: int, device: torch.device | str) -> None:
        """Build what one grid needs, which a compiled pass cannot (`compiled.prepare_parts`)."""
        for group in self._groups_of_grid(num_tokens):
            group.plan(torch.device(device))
            if num_tokens <= MAX_DENSE_CELLS:
                group.dense(device)

    def groups(self, batch_size: int, num_tokens: int) -> list[GroupedVisibility | None]:
        """Per batch row what its queries see; None where this mask says nothing.

        Raises:
            RegionError: the regions do not fit the grid or the batch.
        """
        grouped = self._groups_of_grid(num_tokens)
        chosen = rows_of_batch(self.rows, batch_size)
        if len(grouped) != 1 and len(chosen) not in (len(grouped), 2 * len(grouped)):
            raise RegionError(f"`regions` has {len(grouped)} batch rows, the mask holds for {len(chosen)}.")
        per_row: list[GroupedVisibility | None] = [None] * batch_size
        for position, row in enumerate(chosen):
            per_row[row] = grouped[position % len(grouped)]
        return per_row

    def _groups_of_grid(self, num_tokens: int) -> list[GroupedVisibility]:
        """One entry per row of the regions."""
        if num_tokens not in self._grouped:
            members = region_weights(self._regions, num_tokens, "cpu") > 0  # (B | 1, N, Q)
            # Rows of equal regions (guidance halves, several pictures of a prompt) are attended in one call.
            contents = [row.numpy().tobytes() for row in members]
            distinct = dict(zip(contents, members, strict=True))
            built = {content: GroupedVisibility.from_regions(row) for content, row in distinct.items()}
            self._grouped[num_tokens] = [built[content] for content in contents]
        return self._grouped[num_tokens]


def intersect_row_groups(
    masks: Sequence[list[GroupedVisibility | None]],
) -> list[GroupedVisibility | None]:
    """AND of several masks' groups, row by row."""
    combined = list(masks[0])
    for groups in masks[1:]:
        for row, group in enumerate(groups):
            known = combined[row]
            if known is None or group is None:
                combined[row] = known or group
            else:
                combined[row] = known.intersect(group)
    return combined
