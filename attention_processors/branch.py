"""Branch parts: attention to further keys and values (image tokens), beside the layer's own.

An adding branch adds its attention wherever its regions let it; a replacing branch takes the place of the text inside
its regions: `T * (1 - R) + R * (gamma * T + B)`. A region ties the tokens of one object to its cells.

Objects are attended in one call. Where regions are exclusive, that is one softmax over all objects' keys under a
boolean table; where they overlap, either the objects compete in one softmax (`overlap="joint"`), or each object has
its own softmax (objects folded into the batch) and the results are averaged by the regions' weights
(`overlap="folded"`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.mask import region_weights, rows_of_batch
from objectcompose.attention_processors.processor import AttentionCall, attend_visible, merge_heads, split_heads
from objectcompose.errors import LayerNotFoundError, ObjectComposeError, PartConflictError, RegionError


KeysValues = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _BranchGrid:
    """A branch's regions on one grid: `weights` (r, N, Q), `coverage` (r, Q, 1), and whether cells are shared."""

    weights: torch.Tensor
    coverage: torch.Tensor
    is_shared: bool


class Branch:
    """Attention to the keys and values of one method's objects.

    Args:
        keys_values: per layer name keys and values, each `(B, N * T, C)` or `(1, N * T, C)`, objects in order, T
            tokens each, already projected; C is the layer's inner width. B counts the chosen rows. Here and below,
            what has rows for both guidance halves, `[uncond, cond]`, serves a forward of the conditional half too.
        regions: where object n acts, as for `region_weights`, `(N, h, w)` or `(B, N, h, w)`, values in [0, 1]; None is
            everywhere.
        scale: strength: a number, a scalar tensor, or one value per object, `(N,)` or `(B, N)`, on the model's device.
        mode: "add", or "replace" (the text gives way inside the regions).
        gamma: share of the text that stays inside the regions of a replacing branch.
        num_objects: N, needed only where neither `regions`, `present` nor `scale` tell; it must agree with them.
        present: bool `(N,)` or `(B, N)`: False for padded slots, whose tokens nobody sees.
        overlap: what happens on cells of several regions (module text).
        rows: the batch rows it acts on; None is all.
        layers: which layers, a regex or a list; those of `keys_values` when None.

    Raises:
        ObjectComposeError: an unknown `mode` or `overlap`, or no keys and values.
    """

    kind = "branch"
    attention = "any"

    def __init__(
        self,
        keys_values: KeysValues,
        regions: Any = None,
        scale: float | torch.Tensor = 1.0,
        mode: Literal["add", "replace"] = "add",
        gamma: float | torch.Tensor = 0.0,
        *,
        num_objects: int | None = None,
        present: torch.Tensor | None = None,
        overlap: Literal["folded", "joint"] = "folded",
        rows: slice | None = None,
        layers: str | Sequence[str] | None = None,
    ):
        if mode not in ("add", "replace"):
            raise ObjectComposeError(f'`mode` must be "add" or "replace", got {mode!r}.')
        if overlap not in ("folded", "joint"):
            raise ObjectComposeError(f'`overlap` must be "folded" or "joint", got {overlap!r}.')
        if not keys_values:
            raise ObjectComposeError("`keys_values` must hold keys and values for at least one layer, got none.")
        self.keys_values = keys_values
        self.scale = scale
        self.mode = mode
        self.gamma = gamma
        self.num_objects = num_objects
        self.overlap = overlap
        self.rows = rows
        self.layers = list(keys_values) if layers is None else layers
        self._regions = regions
        self._present = present
        self._grids: dict[tuple[int, torch.device], _BranchGrid] = {}
        self._conflicts_checked: dict[int, list[Any]] = {}

    @property
    def regions(self) -> Any:
        """The regions; assign new ones to change them (what was built from the old ones is dropped)."""
        return self._regions

    @regions.setter
    def regions(self, regions: Any) -> None:
        self._regions = regions
        self._grids = {}
        self._conflicts_checked = {}

    def check_layers(self, names: Iterable[str]) -> None:
        """Refuse layers that the branch has no keys and values for (LayerNotFoundError)."""
        missing = [name for name in names if name not in self.keys_values]
        if missing:
            raise LayerNotFoundError(f"`keys_values` of a branch lacks the layers {missing} that `layers` chooses.")

    def prepare(self, num_tokens: int, device: torch.device | str) -> None:
        """Build what one grid needs, which a compiled pass cannot (`compiled.prepare_parts`)."""
        self._grid(num_tokens, torch.device(device))

    def coverage(self, num_tokens: int, device: torch.device | str) -> torch.Tensor | None:
        """How far the branch acts on each cell, `(B | 1, num_tokens, 1)` in [0, 1]; None is everywhere."""
        grid = self._grid(num_tokens, torch.device(device))
        return None if grid is None else grid.coverage

    def add_to(self, attended: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """`attended + scale * B`, shape `(batch, cells, C)`."""
        if isinstance(self.scale, (int, float)) and self.scale == 0:
            return attended
        own = attended if self.rows is None else attended[self.rows]
        added, coverage = self._attend(call)
        if coverage is not None:
            added = torch.where(coverage > 0, added * coverage, torch.zeros_like(added))
        return self._write_rows(attended, own + added)

    def replace_in(self, attended: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """`T * (1 - R) + R * (gamma * T + scale * B)`, shape `(batch, cells, C)`."""
        own = attended if self.rows is None else attended[self.rows]
        inside, coverage = self._attend(call)
        inside = self.gamma * own + inside
        if coverage is not None:  # where, not only a product: NaN of one side must not reach the other
            inside = torch.where(coverage > 0, own * (1 - coverage) + inside * coverage, own)
        return self._write_rows(attended, inside.to(attended.dtype))

    def refuse_overlap(self, replacing: Sequence[Any], batch_size: int, num_tokens: int, device: torch.device) -> None:
        """Refuse two replacing branches on one cell of a grid (PartConflictError); checked once per grid.

        Not while compiling, since it reads values: `compiled.prepare_parts` checks it before.
        """
        if torch.compiler.is_compiling():
            return
        grids = [branch.coverage(num_tokens, device) for branch in replacing]
        known = self._conflicts_checked.get(num_tokens)
        if known is not None and len(known) == len(grids) and all(a is b for a, b in zip(known, grids, strict=True)):
            return
        check_replacing_branches(replacing, num_tokens, batch_size, device)
        self._conflicts_checked[num_tokens] = grids

    def _write_rows(self, attended: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        if self.rows is None:
            return own
        attended = attended.clone()
        attended[self.rows] = own
        return attended

    def _grid(self, num_tokens: int, device: torch.device) -> _BranchGrid | None:
        if self._regions is None and self._present is None:
            return None
        if (num_tokens, device) not in self._grids:
            weights = self._weights(num_tokens, device)
            coverage = weights.sum(1).clamp(max=1)[:, :, None]
            # Without regions all objects compete in one softmax, as they do when nothing is padded.
            is_shared = self._regions is not None and bool(((weights > 0).sum(1) > 1).any())
            self._grids[num_tokens, device] = _BranchGrid(weights, coverage, is_shared)
        return self._grids[num_tokens, device]

    def _weights(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Regions times presence, `(r, N, cells)`."""
        if self._present is None:
            return region_weights(self._regions, num_tokens, device)
        present = self._present.to(device=device, dtype=torch.float32)
        present = (present if present.ndim == 2 else present[None])[:, :, None]  # (r, N, 1)
        if self._regions is None:
            return present.expand(-1, -1, num_tokens)
        weights = region_weights(self._regions, num_tokens, device)
        row_counts = {len(present), len(weights)} - {1}
        if present.shape[1] != weights.shape[1] or len(row_counts) > 1:
            raise RegionError(
                f"`present` is of {present.shape[1]} objects in {len(present)} rows,"
                f" `regions` of {weights.shape[1]} in {len(weights)}."
            )
        return weights * present

    def _layer_keys_values(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, int]:
        key, value = self.keys_values[call.name]
        count = len(rows_of_batch(self.rows, call.batch_size))
        key, value = _rows_for_half(key, count), _rows_for_half(value, count)
        inner = call.heads * call.query.shape[-1]
        if key.shape != value.shape or key.ndim != 3 or key.shape[-1] != inner or key.shape[0] not in (1, count):
            raise PartConflictError(
                f"`keys_values` of layer {call.name} must be two tensors of shape ({count} | 1, N * T, {inner}),"
                f" got {tuple(key.shape)} and {tuple(value.shape)}."
            )
        num_objects = self._object_count(call, count)
        if num_objects == 0 or key.shape[1] % num_objects:
            raise PartConflictError(
                f"`keys_values` of layer {call.name} has {key.shape[1]} tokens, not a multiple of {num_objects}"
                " objects."
            )
        key, value = key.to(call.query), value.to(call.query)
        if isinstance(self.scale, torch.Tensor) and self.scale.ndim > 0:  # linear, so it may act on the values
            scale = _rows_for_half(self.scale.to(value).reshape(-1, num_objects, 1, 1), count)
            value = (value.unflatten(1, (num_objects, -1)) * scale).flatten(1, 2)
        key, value = key.expand(count, -1, -1), value.expand(count, -1, -1)
        return split_heads(key, call.heads), split_heads(value, call.heads), num_objects

    def _object_count(self, call: AttentionCall, rows: int) -> int:
        """How many objects there are, by all that tells; `rows` is how many batch rows the branch acts on."""
        grid = self._grid(call.num_tokens, call.query.device)
        told: dict[str, tuple[int, ...]] = {}  # (rows, objects)
        if self.num_objects is not None:
            told["num_objects"] = (1, self.num_objects)
        if grid is not None:
            told["regions or present"] = tuple(grid.weights.shape[:2])
        if isinstance(self.scale, torch.Tensor) and self.scale.ndim > 0:
            told["scale"] = (1, *self.scale.shape)[-2:]
        fits = (1, rows, 2 * rows)
        if len({count for _, count in told.values()}) > 1 or any(row not in fits for row, _ in told.values()):
            raise PartConflictError(
                f"a branch's arguments must agree on the objects and be for 1 or {rows} batch rows, got"
                f" (rows, objects) {told}."
            )
        return next((count for _, count in told.values()), 1)

    def _attend(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The branch's attention `(rows, cells, C)`, scaled, and its coverage."""
        query = call.query if self.rows is None else call.query[self.rows]
        key, value, num_objects = self._layer_keys_values(call)
        grid = self._grid(call.num_tokens, query.device)
        if grid is None:
            attended = merge_heads(F.scaled_dot_product_attention(query, key, value))
        elif grid.is_shared and self.overlap == "folded":
            weights = _rows_for_half(grid.weights, len(query))
            attended = self._attend_folded(query, key, value, num_objects, weights)
        else:
            seen = (_rows_for_half(grid.weights, len(query)) > 0).transpose(1, 2)[:, None]  # (r, 1, cells, N)
            visible = seen.repeat_interleave(key.shape[2] // num_objects, dim=-1)
            attended = merge_heads(attend_visible(query, key, value, visible))
        if not (isinstance(self.scale, torch.Tensor) and self.scale.ndim > 0):
            attended = attended * self.scale
        coverage = None if grid is None else _rows_for_half(grid.coverage, len(query)).to(attended.dtype)
        return attended, coverage

    @staticmethod
    def _attend_folded(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_objects: int, weights: torch.Tensor
    ) -> torch.Tensor:
        """One softmax per object, averaged over the objects of a cell by their weights."""
        batch_size = query.shape[0]
        folded_query = query[:, None].expand(-1, num_objects, -1, -1, -1).flatten(0, 1)
        folded_key, folded_value = (
            x.unflatten(2, (num_objects, -1)).transpose(1, 2).flatten(0, 1) for x in (key, value)
        )  # (B * N, heads, T, d)
        per_object = merge_heads(F.scaled_dot_product_attention(folded_query, folded_key, folded_value))
        per_object = per_object.unflatten(0, (batch_size, num_objects))  # (B, N, cells, C)
        total = weights.sum(1, keepdim=True)
        share = torch.where(total > 0, weights / total.clamp(min=1e-12), torch.zeros_like(weights))
        return (per_object * share[..., None].to(per_object.dtype)).sum(1)


def _rows_for_half(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """The conditional half of `[uncond, cond]` where a forward has only that half's `count` rows; else all."""
    return tensor[count:] if tensor.shape[0] == 2 * count else tensor


def check_replacing_branches(
    branches: Sequence[Any], num_tokens: int, batch_size: int, device: torch.device | str = "cpu"
) -> None:
    """Refuse two replacing branches that act on one cell of the grid with `num_tokens` cells.

    Raises:
        PartConflictError: two of them do, in the same batch row, or regions do not fit the batch.
    """
    taken = torch.zeros(batch_size, num_tokens, dtype=torch.bool, device=device)
    for branch in branches:
        if branch.mode != "replace":
            continue
        own = torch.zeros_like(taken)
        coverage = branch.coverage(num_tokens, device)
        rows = len(rows_of_batch(branch.rows, batch_size))
        coverage = coverage if coverage is None else _rows_for_half(coverage, rows)
        if coverage is not None and len(coverage) not in (1, rows):
            raise PartConflictError(f"`regions` of a branch has {len(coverage)} batch rows, it acts on {rows}.")
        target = own if branch.rows is None else own[branch.rows]  # a view: writing it writes `own`
        target[:] = True if coverage is None else coverage[..., 0] > 0
        both = taken & own
        if both.any():
            raise PartConflictError(
                f'two branches with mode="replace" act on one cell ({int(both.any(0).sum())} of {num_tokens} cells);'
                " make their regions exclusive, or let one of them add."
            )
        taken |= own


def cached_projection(
    cache: dict[str, Any],
    tokens: torch.Tensor | Sequence[torch.Tensor],
    project: Callable[..., KeysValues],
    parameters: Iterable[torch.Tensor],
) -> KeysValues:
    """`project(*tokens)` for all layers, computed again only when the content of the tokens changed.

    Never stale: tokens are compared value by value with a copy of those that were projected, weights by identity,
    memory and version (only a write into `weight.data` is no new version). What inference mode or autocast made serves
    in it alone. Nothing is cached while gradients flow into the result, and nothing any longer than the memory of the
    weights lives: once they are moved to another device, as offloading does, replaced or gone, the cache is cleared.

    Args:
        cache: a dictionary that the caller keeps (and may clear); one per use.
        tokens: one tensor or several.
        project: gives `{layer: (key, value)}`.
        parameters: all weights that `project` uses.
    """
    tokens = (tokens,) if isinstance(tokens, torch.Tensor) else tuple(tokens)
    weights = tuple(parameters)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*tokens, *weights)):
        return project(*tokens)
    device = tokens[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    modes = (torch.is_inference_mode_enabled(), autocast)
    is_known = cache and cache["modes"] == modes and _same_weights(cache["weights"], weights)
    if is_known and _same_content(cache["tokens"], tokens):
        return cache["keys_values"]
    keys_values = project(*tokens)
    # Only now, since offloading moves weights to the device when they are used.
    known = [
        (weakref.ref(one), weakref.ref(one.untyped_storage(), lambda _: cache.clear()), *_version(one))
        for one in weights
    ]
    copies = tuple(x.detach().clone() for x in tokens)
    cache.update(tokens=copies, weights=known, keys_values=keys_values, modes=modes)
    return keys_values


def _version(weight: torch.Tensor) -> tuple[int, int]:
    """Where in its memory a weight lies, and how often that was written."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _same_weights(known: Sequence[tuple], weights: Sequence[torch.Tensor]) -> bool:
    return len(known) == len(weights) and all(
        one() is weight and memory() is weight.untyped_storage() and version == list(_version(weight))
        for (one, memory, *version), weight in zip(known, weights, strict=True)
    )


def _same_content(known: Sequence[torch.Tensor], current: Sequence[torch.Tensor]) -> bool:
    return len(known) == len(current) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(known, current, strict=True)
    )
