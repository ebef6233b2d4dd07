"""Regions on the grids of a UNet: from boxes and masks to cells, who owns a cell, and one region set per resolution.

A grid `(h, w)` divides the canvas into h rows and w columns of equal cells. A UNet halves its grids rounding up, so
the sides of every level follow from the finest one and are never guessed from a number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

from objectcompose.errors import MissingFieldError, RegionError
from objectcompose.layout_fields import check_box, shown_value


RASTER_RULES = ("area", "cover", "round", "point")
# Edges closer than this to a cell border, in cells, count as on it: 0.7 * 10 is 7.000000000000001.
_EDGE_TOLERANCE = 1e-6
# The least share that "area" gives to the best cell of a region too small for a float.
_LEAST_SHARE = 2.0**-23


def rasterize(region: Any, grid: tuple[int, int], rule: str = "area") -> torch.Tensor:
    """A box or a mask on a grid.

    Args:
        region: a box (x0, y0, x1, y1), fractions in [0, 1] of width and height; or a mask `(H, W)`, values in [0, 1],
            at any resolution of the same canvas.
        grid: (h, w), rows and columns of cells.
        rule: what a cell `(i, j)`, which spans rows [i/h, (i+1)/h) and columns [j/w, (j+1)/w) of the canvas, gets:

            - "area": the share of the cell that the region covers, exact, in [0, 1] (a mask counts as squares of
              constant value);
            - "cover": 1 where the region touches the cell's inside at all: rows floor(y0 h) to ceil(y1 h), columns
              alike; for a mask, where any non-zero pixel overlaps the cell;
            - "round": a box's edges move to the nearest cell border, halves upwards: rows floor(y0 h + 1/2) up to but
              without floor(y1 h + 1/2), columns alike; for a mask, 1 where the share is at least one half;
            - "point": 1 where the cell's centre lies in the region, edges y0 and x0 included, y1 and x1 not; for a
              mask, the pixel under the centre, 1 if it is at least one half.

    Returns:
        float32 `(h, w)`, on the mask's device. Never empty: where a rule picks nothing, the cell that is covered most
        is 1 (first such cell by rows). For a box under "round" and "point" that is decided for rows and columns apart.

    Raises:
        RegionError: unknown rule, a grid without cells, or a mask that is empty, not `(H, W)`, or not within [0, 1].
        LayoutError: a box that breaks its rules.
    """
    if rule not in RASTER_RULES:
        raise RegionError(f"`rule` must be one of {RASTER_RULES}, got {shown_value(rule)}.")
    rows, columns = check_grid(grid)
    if isinstance(region, torch.Tensor) and region.ndim == 2:
        return _rasterize_mask(region, rows, columns, rule)
    if isinstance(region, torch.Tensor) and region.shape != (4,):
        raise RegionError(f"`region` must be a box of 4 numbers or a mask (H, W), got shape {tuple(region.shape)}.")
    x0, y0, x1, y1 = check_box(region, "region")
    sides = (_box_side(y0, y1, rows, rule), _box_side(x0, x1, columns, rule))
    cells = torch.outer(*sides)
    if cells.max() < _LEAST_SHARE:
        cells[int(sides[0].argmax()), int(sides[1].argmax())] = _LEAST_SHARE
    return cells.float()


def check_grid(grid: Any) -> tuple[int, int]:
    """`grid` as (rows, columns), both at least 1.

    Raises:
        RegionError: anything else.
    """
    pair = tuple(grid) if isinstance(grid, (tuple, list, torch.Size)) else ()
    if len(pair) != 2 or not all(type(side) is int and side >= 1 for side in pair):
        raise RegionError(f"`grid` must be (rows, columns), two whole numbers of at least 1, got {shown_value(grid)}.")
    return pair[0], pair[1]


def grids_of(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """The grids of a UNet's levels, finest first: each side is halved rounding up, as its down-samplers do.

    Args:
        height, width: sides of the latents, in cells.
        levels: number of levels, at least 1 (a UNet has one per down block).
    """
    grids = [check_grid((height, width))]
    for _ in range(levels - 1):
        height, width = (height + 1) // 2, (width + 1) // 2
        grids.append((height, width))
    return grids


def token_grid(num_tokens: int, height: int, width: int) -> tuple[int, int]:
    """The grid `(h, w)` of `num_tokens` cells that halving a canvas' sides, rounding up, arrives at.

    Raises:
        RegionError: none has so many.
    """
    canvas = (height, width)
    while height * width > num_tokens and height * width > 1:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != num_tokens:
        raise RegionError(
            f"`num_tokens` must be the number of cells of a level of the canvas {canvas}, got {num_tokens}."
        )
    return height, width


def region_area(region: Any) -> float:
    """Share of the canvas that a box or a mask `(H, W)` covers, in (0, 1]."""
    if isinstance(region, torch.Tensor) and region.ndim == 2:
        return float(_checked_soft_mask(region).mean())
    x0, y0, x1, y1 = check_box(region, "region")
    return (x1 - x0) * (y1 - y0)


def front_order(orders: Sequence[int], areas: Sequence[float]) -> list[int]:
    """Indices of the objects from front to back: higher order first, ties: the smaller one, then the earlier one."""
    return sorted(range(len(orders)), key=lambda index: (-orders[index], areas[index], index))


def exclusive_regions(regions: torch.Tensor, orders: Sequence[int], areas: Sequence[float]) -> torch.Tensor:
    """Give each cell to one region at most: the one in front.

    A region that would lose all its cells gets one of them back, so none vanishes: the one that disturbs the others
    least and that it covers most.

    Args:
        regions: `(N, h, w)`, values in [0, 1], none empty.
        orders: `SceneObject.order` of each.
        areas: size of each, in any unit; the smaller one is in front where orders are equal.

    Returns:
        `(N, h, w)`: the regions with 0 in the cells they do not own. No cell is positive in two of them.

    Raises:
        RegionError: the grid has too few cells for each region to keep one, or a region is empty.
    """
    owners = _front_owners(regions, orders, areas)
    if len(regions) and not _all_own_a_cell(owners, len(regions)):
        kept = _one_cell_each(regions, owners)
        if kept is None:
            raise RegionError(
                f"`regions` must leave each of the {len(regions)} regions a cell of its own on the grid "
                f"{tuple(regions.shape[1:])}: there are too many of them in the same cells."
            )
        for index, cell in enumerate(kept):
            owners.view(-1)[cell] = index
    return regions * _ownership(owners, len(regions)).to(regions)


def shared_ownership(regions: torch.Tensor, orders: Sequence[int], areas: Sequence[float]) -> torch.Tensor:
    """Whose a cell is, in shares, for grids that may have fewer cells than regions.

    As `exclusive_regions` where that is possible. Where it is not, each region without a cell becomes a part owner of
    the cell it covers most, and the owners of a cell share it equally.

    Args:
        regions, orders, areas: as in `exclusive_regions`.

    Returns:
        `(N, h, w)`, shares in [0, 1] whose sum over the regions is 1 in every cell that a region reaches and 0 in the
        others. No region is without a share.

    Raises:
        RegionError: a region is empty.
    """
    owners = _front_owners(regions, orders, areas)
    count = len(regions)
    if not count:
        return regions.clone()
    if not _all_own_a_cell(owners, count):
        kept = _one_cell_each(regions, owners)
        if kept is not None:
            for index, cell in enumerate(kept):
                owners.view(-1)[cell] = index
    shares = _ownership(owners, count)
    for index in range(count):
        if not shares[index].any():
            shares[index].view(-1)[int(regions[index].reshape(-1).argmax())] = 1.0
    return (shares / shares.sum(0).clamp(min=1.0)).to(regions)


class RegionPyramid:
    """The regions of one picture on every grid of the UNet; each grid is built once.

    Args:
        regions: boxes and masks, as `rasterize` takes them; may be none.
        canvas: (h, w), the finest grid: the sides of the latents.
        rule: a rule of `rasterize`.
        orders: `SceneObject.order` of each region; None: all 0.
        exclusive: each cell belongs to one region: `exclusive_regions` on the finest grid, and on coarser ones
            `shared_ownership` times the region where they have too few cells for that.

    Raises:
        RegionError: a region breaks a rule or, with `exclusive`, the finest grid cannot hold them all.
    """

    def __init__(
        self,
        regions: Sequence[Any],
        canvas: tuple[int, int],
        rule: str = "area",
        orders: Sequence[int] | None = None,
        exclusive: bool = False,
    ) -> None:
        self.regions, self.canvas, self.rule, self.exclusive = list(regions), check_grid(canvas), rule, exclusive
        self.orders = [0] * len(self.regions) if orders is None else list(orders)
        if len(self.orders) != len(self.regions):
            raise RegionError(f"`orders` must be one per region ({len(self.regions)}), got {len(self.orders)}.")
        self.areas = [region_area(region) for region in self.regions]
        self._built: dict[tuple[int, int], torch.Tensor] = {}
        self._moved: dict[Any, torch.Tensor] = {}
        self.at(self.canvas)

    @classmethod
    def from_objects(cls, objects: Sequence[Any], canvas: tuple[int, int], **options: Any) -> RegionPyramid:
        """The pyramid of `SceneObject`s: the mask of each or else its box, and its order.

        Raises:
            MissingFieldError: an object has neither.
        """
        for index, obj in enumerate(objects):
            if obj.mask is None and obj.box is None:
                raise MissingFieldError(f"`objects[{index}]` must have a `mask` or a `box`, got neither.")
        regions = [obj.box if obj.mask is None else obj.mask for obj in objects]
        return cls(regions, canvas, orders=[obj.order for obj in objects], **options)

    def __len__(self) -> int:
        return len(self.regions)

    def at(self, grid: tuple[int, int], device: Any = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The regions on a grid, `(N, h, w)`, values in [0, 1]; the same tensor for the same arguments."""
        grid = check_grid(grid)
        if grid not in self._built:
            self._built[grid] = self._build(grid)
        if device is None and dtype == torch.float32:
            return self._built[grid]
        key = (grid, str(device), dtype)
        if key not in self._moved:
            self._moved[key] = self._built[grid].to(device=device, dtype=dtype)
        return self._moved[key]

    def at_tokens(self, num_tokens: int, device: Any = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The regions on the level with `num_tokens` cells, as `at` gives them."""
        return self.at(token_grid(num_tokens, *self.canvas), device, dtype)

    def _build(self, grid: tuple[int, int]) -> torch.Tensor:
        if not self.regions:
            return torch.zeros(0, *grid)
        regions = torch.stack([rasterize(region, grid, self.rule).cpu() for region in self.regions])
        if not self.exclusive:
            return regions
        if grid == self.canvas:
            return exclusive_regions(regions, self.orders, self.areas)
        return regions * shared_ownership(regions, self.orders, self.areas)


class RegionPyramidBatch:
    """The region pyramids of a batch, padded with empty regions to the largest number of objects.

    Args:
        pyramids: one per picture, all with the same canvas.
    """

    def __init__(self, pyramids: Sequence[RegionPyramid]) -> None:
        canvases = {pyramid.canvas for pyramid in pyramids}
        if len(canvases) != 1:
            raise RegionError(f"`pyramids` must have one canvas in common, got {sorted(canvases)}.")
        self.pyramids, self.canvas = list(pyramids), canvases.pop()
        self.num_regions = max(len(pyramid) for pyramid in self.pyramids)
        self._padded: dict[Any, torch.Tensor] = {}

    @property
    def valid(self) -> torch.Tensor:
        """bool `(B, N)`: False where a region is padding."""
        counts = torch.tensor([len(pyramid) for pyramid in self.pyramids])
        return torch.arange(self.num_regions)[None] < counts[:, None]

    def at(self, grid: tuple[int, int], device: Any = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The regions on a grid, `(B, N, h, w)`, padding 0."""
        key = (check_grid(grid), str(device), dtype)
        if key not in self._padded:
            padded = torch.zeros(len(self.pyramids), self.num_regions, *grid)
            for row, pyramid in zip(padded, self.pyramids, strict=True):
                row[: len(pyramid)] = pyramid.at(grid)
            self._padded[key] = padded.to(device=device, dtype=dtype)
        return self._padded[key]

    def at_tokens(self, num_tokens: int, device: Any = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The regions on the level with `num_tokens` cells, as `at` gives them."""
        return self.at(token_grid(num_tokens, *self.canvas), device, dtype)


def _box_side(start: float, stop: float, count: int, rule: str) -> torch.Tensor:
    """One axis of a box on `count` cells: the share of each cell, or {0, 1}; float64 `(count,)`, never all 0."""
    low, high = start * count, stop * count
    borders = torch.arange(count + 1, dtype=torch.float64)
    shares = (borders[1:].clamp(max=high) - borders[:-1].clamp(min=low)).clamp(min=0.0)
    # Rounded, so that of two equal shares the first is the largest on every machine.
    best = int(shares.mul(2**20).round().argmax()) if high - low > _EDGE_TOLERANCE else min(int(low), count - 1)
    if rule == "area":
        if shares.max() <= 0:
            shares[best] = _LEAST_SHARE
        return shares
    if rule == "cover":
        first, last = math.floor(low + _EDGE_TOLERANCE), math.ceil(high - _EDGE_TOLERANCE)
    elif rule == "round":
        first, last = math.floor(low + 0.5 + _EDGE_TOLERANCE), math.floor(high + 0.5 + _EDGE_TOLERANCE)
    else:
        first, last = math.ceil(low - 0.5 - _EDGE_TOLERANCE), math.ceil(high - 0.5 - _EDGE_TOLERANCE)
    side = torch.zeros(count, dtype=torch.float64)
    side[max(first, 0) : min(last, count)] = 1.0
    if not side.any():
        side[best] = 1.0
    return side


def _checked_soft_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask as float64 on the CPU."""
    values = mask.detach().cpu().double()
    if 0 in values.shape or not bool(((values >= 0) & (values <= 1)).all()):
        raise RegionError(f"`region` must be a mask (H, W) with values in [0, 1], got shape {tuple(mask.shape)}.")
    if not values.any():
        raise RegionError(f"`region` must not be empty, got a mask of zeros of shape {tuple(mask.shape)}.")
    return values


def _rasterize_mask(mask: torch.Tensor, rows: int, columns: int, rule: str) -> torch.Tensor:
    values = _checked_soft_mask(mask)
    height, width = values.shape
    down, across = _overlaps_of_cells(height, rows), _overlaps_of_cells(width, columns)
    shares = (down @ values @ across.T).clamp(0.0, 1.0)
    if rule == "area":
        cells = shares
    elif rule == "cover":
        touched = (down > _EDGE_TOLERANCE).double() @ (values > 0).double() @ (across > _EDGE_TOLERANCE).double().T
        cells = (touched > 0.5).double()
    elif rule == "round":
        cells = (shares >= 0.5 - _EDGE_TOLERANCE).double()
    else:
        # In whole numbers: pixel floor((i + 1/2) H / h).
        pixel_rows = torch.tensor([(2 * row + 1) * height // (2 * rows) for row in range(rows)])
        pixel_columns = torch.tensor([(2 * column + 1) * width // (2 * columns) for column in range(columns)])
        cells = (values[pixel_rows][:, pixel_columns] >= 0.5).double()
    if cells.max() < _LEAST_SHARE:
        best = int(shares.mul(2**40).round().argmax())
        cells.view(-1)[best] = _LEAST_SHARE if rule == "area" else 1.0
    return cells.float().to(mask.device)


def _overlaps_of_cells(pixels: int, cells: int) -> torch.Tensor:
    """Share of each cell that each pixel fills, float64 `(cells, pixels)`; each row sums to 1."""
    borders = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    edges = torch.arange(pixels + 1, dtype=torch.float64)
    upper = torch.minimum(borders[1:, None], edges[None, 1:])
    lower = torch.maximum(borders[:-1, None], edges[None, :-1])
    return (upper - lower).clamp(min=0.0) * (cells / pixels)


def _front_owners(regions: torch.Tensor, orders: Sequence[int], areas: Sequence[float]) -> torch.Tensor:
    """The index of the frontmost region in each cell, -1 where there is none; int64 `(h, w)` on the CPU."""
    if regions.ndim != 3 or not len(regions) == len(orders) == len(areas):
        raise RegionError(
            f"`regions` must have shape (N, h, w) with one order and one area each, got shape {tuple(regions.shape)}, "
            f"{len(orders)} orders and {len(areas)} areas."
        )
    present = (regions > 0).cpu()
    empty = [index for index in range(len(regions)) if not present[index].any()]
    if empty:
        raise RegionError(f"`regions` must not be empty, got nothing in regions {empty}.")
    owners = torch.full(tuple(regions.shape[1:]), -1, dtype=torch.int64)
    for index in reversed(front_order(orders, areas)):
        owners[present[index]] = index
    return owners


def _all_own_a_cell(owners: torch.Tensor, count: int) -> bool:
    return len(set(owners.unique().tolist()) - {-1}) == count


def _ownership(owners: torch.Tensor, count: int) -> torch.Tensor:
    """{0, 1} float `(N, h, w)` of a map of owners."""
    return (owners[None] == torch.arange(count)[:, None, None]).float()


def _one_cell_each(regions: torch.Tensor, owners: torch.Tensor) -> list[int] | None:
    """A cell (flat index) for every region, all different and each inside its region; None if there are too few.

    The assignment that takes fewest cells from their owners, and among those the one whose cells are covered most.
    """
    count = len(regions)
    shares = regions.detach().cpu().double().reshape(count, -1)
    flat_owners = owners.reshape(-1)
    foreign = (flat_owners[None] != torch.arange(count)[:, None]).double()
    cost = foreign * (2.0 * count) + (1.0 - shares.clamp(max=1.0))
    impossible = 100.0 * (count + 1) ** 2
    cost[shares <= 0] = impossible
    if cost.shape[1] < count:
        return None
    chosen = linear_sum_assignment(cost.numpy())[1]
    if any(cost[index, cell] >= impossible for index, cell in enumerate(chosen)):
        return None
    return [int(cell) for cell in chosen]
