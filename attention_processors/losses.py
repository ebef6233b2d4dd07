"""Losses on attention maps: pure functions of maps and masks, for training and for guidance alike. All run in float32.

- `token_loss`, `pixel_loss`: TokenCompose (arXiv 2312.03626), equations 4 to 6. Defaults follow the authors' code,
  which made the published numbers: the token ratio per head before the mean over heads, and the pixel loss over
  supervised objects only, once per resolution. `head_mode="map_mean"` is the form of the paper.
- `separate_loss`, `enhance_loss`: Separate-and-Enhance (arXiv 2312.06712). Both are minimised. For three and more
  objects the overlap is the worst pair's, since a product over all objects vanishes although two overlap fully;
  `reduce="joint"` is the written formula.
- `mask_reward_loss`, `mask_penalty_loss`: MIFO (arXiv 2511.00542), learning, equations 1 and 2.
- `box_masses`, `box_reward_loss`, `box_penalty_loss`: MIFO, synthesis, equations 6 to 10.

Maps come from `TokenMapProbe`: `(B, heads, HW, T)`, or `(B, HW, T)` as a mean over heads. Masks are given as for
`region_weights`: per resolution, `(N, h, w)` or `(B, N, h, w)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from itertools import combinations
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.mask import region_weights
from objectcompose.errors import ObjectComposeError, RegionError


_TINY = 1e-12
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _without_autocast(loss: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Keep `torch.autocast` from running a loss in half precision; the first argument is a tensor or maps."""

    @wraps(loss)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first: Any = (*args, *kwargs.values())[0]
        tensor = first if isinstance(first, torch.Tensor) else next(iter(first.values()), None)
        with torch.autocast("cpu" if tensor is None else tensor.device.type, enabled=False):
            return loss(*args, **kwargs)

    return run


@_without_autocast
def token_loss(
    maps: Mapping[str, torch.Tensor],
    masks: Any,
    owners: torch.Tensor,
    present: torch.Tensor | None = None,
    head_mode: Literal["ratio_mean", "map_mean"] = "ratio_mean",
) -> torch.Tensor:
    """Squared share of the objects' attention that falls outside of them (TokenCompose, L_token).

    Per layer: mean over objects of the mean over their tokens of `(1 - share inside)^2`; summed over layers, mean
    over the batch.

    Args:
        maps: layer name to `(B, heads, HW, T)` probabilities; `(B, HW, T)` too with `head_mode="map_mean"`.
        masks: the objects on every layer's grid, values in {0, 1}.
        owners: `(T, N)` or `(B, T, N)`, 1 where token T belongs to object N; a padded token belongs to none.
        present: `(N,)` or `(B, N)`, 0 for padded objects; None: those that own a token.
        head_mode: ratio per head, then mean ("ratio_mean"), or ratio of the mean map ("map_mean").

    Returns:
        Scalar in [0, number of layers]; 0 when all attention lies inside.

    Raises:
        ObjectComposeError: no maps, an unknown `head_mode`, or head-mean maps with "ratio_mean".
    """
    if head_mode not in ("ratio_mean", "map_mean"):
        raise ObjectComposeError(f'`head_mode` must be "ratio_mean" or "map_mean", got {head_mode!r}.')
    total = _zero_like_maps(maps)
    for layer, layer_maps in maps.items():
        columns = layer_maps.float()
        if columns.ndim == 3:
            if head_mode == "ratio_mean":
                raise ObjectComposeError(f'`maps` of {layer} is a mean over heads; "ratio_mean" needs every head.')
            columns = columns[:, None]
        if head_mode == "map_mean":
            columns = columns.mean(1, keepdim=True)
        owner, weight = _owners_and_weights(owners, present, columns)
        mask = _object_masks(masks, columns.shape[2], owner.shape[0], owner.shape[2], owner.device)
        # Per token and object, since two phrases may share a token: (B, heads, T, N).
        inside = torch.einsum("bhqt,bnq->bhtn", columns, mask) / columns.sum(2).clamp_min(_TINY)[..., None]
        per_token = (1 - inside.mean(1)) ** 2  # (B, T, N)
        per_object = (per_token * owner).sum(1) / owner.sum(1).clamp_min(1)
        total = total + _mean_over_objects(per_object, weight)
    return total


@_without_autocast
def pixel_loss(
    maps: Mapping[str, torch.Tensor],
    masks: Any,
    owners: torch.Tensor,
    present: torch.Tensor | None = None,
    pixel_sum: Literal["resolutions", "layers"] = "resolutions",
) -> torch.Tensor:
    """Binary cross-entropy between the objects' maps and their masks (TokenCompose, L_pixel).

    Maps are averaged over heads, an object's tokens are summed; mean over pixels and objects, mean over the batch.

    Args:
        maps, masks, owners, present: as for `token_loss`.
        pixel_sum: "resolutions" averages the layers of each resolution first and sums over resolutions (the authors'
            code), "layers" sums over layers (the paper's equation 7).

    Returns:
        Scalar from 0.

    Raises:
        ObjectComposeError: no maps, or an unknown `pixel_sum`.
    """
    if pixel_sum not in ("resolutions", "layers"):
        raise ObjectComposeError(f'`pixel_sum` must be "resolutions" or "layers", got {pixel_sum!r}.')
    groups: dict[int | str, list[torch.Tensor]] = {}
    for layer, layer_maps in maps.items():
        columns = layer_maps.float()
        columns = columns.mean(1) if columns.ndim == 4 else columns  # (B, HW, T)
        groups.setdefault(columns.shape[1] if pixel_sum == "resolutions" else layer, []).append(columns)
    total = _zero_like_maps(maps)
    for layers in groups.values():
        columns = torch.stack(layers).mean(0)
        owner, weight = _owners_and_weights(owners, present, columns)
        mask = _object_masks(masks, columns.shape[1], owner.shape[0], owner.shape[2], owner.device)
        # Sums of probabilities exceed 1 by rounding, which the cross-entropy refuses.
        object_map = torch.einsum("bqt,btn->bnq", columns, owner).clamp(0, 1)
        per_object = F.binary_cross_entropy(object_map, mask.expand_as(object_map), reduction="none").mean(-1)
        total = total + _mean_over_objects(per_object, weight)
    return total


@_without_autocast
def mean_object_maps(maps: Mapping[str, torch.Tensor], owners: torch.Tensor) -> torch.Tensor:
    """Maps of objects: mean over layers of one resolution, and over an object's tokens; heads stay.

    Args:
        maps: layer name to `(B, heads, HW, T)` or `(B, HW, T)`, all of one resolution and number of heads.
        owners: `(T, N)` or `(B, T, N)`, 1 where token T belongs to object N.

    Returns:
        float32 `(B, heads | 1, HW, N)`.

    Raises:
        ObjectComposeError: no maps, maps of several resolutions, or `owners` that do not fit them.
    """
    _zero_like_maps(maps)
    columns = [x.float() if x.ndim == 4 else x.float()[:, None] for x in maps.values()]
    if len({x.shape for x in columns}) > 1:
        raise ObjectComposeError(
            f"`maps` must share one shape to be averaged, got {sorted({tuple(x.shape) for x in columns})}."
        )
    mean = torch.stack(columns).mean(0)
    owner, _ = _owners_and_weights(owners, None, mean)
    return torch.einsum("bhqt,btn->bhqn", mean, owner / owner.sum(1, keepdim=True).clamp_min(1))


def separate_loss(
    object_maps: torch.Tensor,
    reduce: Literal["pairwise", "joint"] = "pairwise",
    pixel: Literal["max", "soft_iou"] = "max",
) -> torch.Tensor:
    """Overlap of the objects' maps (Separate-and-Enhance, L_Sep), to be minimised.

    For two objects the largest `a * b / (a + b)` over heads and cells. Mean over the batch.

    Args:
        object_maps: `(B, heads, HW, K)` from K >= 2 objects, values in [0, 1]; see `mean_object_maps`.
        reduce: for K > 2 the worst pair, or product over sum of all objects.
        pixel: the largest cell, or a soft overlap over all cells, `sum(ab) / sum(a + b - ab)` (denser gradient).

    Returns:
        Scalar in [0, 0.25] for two tokens of one softmax; 0 for disjoint maps.

    Raises:
        ObjectComposeError: fewer than two objects, or an unknown option.
    """
    if object_maps.shape[-1] < 2:
        raise ObjectComposeError(f"`object_maps` must hold at least two objects, got {object_maps.shape[-1]}.")
    if reduce not in ("pairwise", "joint") or pixel not in ("max", "soft_iou"):
        raise ObjectComposeError(f"`reduce` or `pixel` is unknown: {reduce!r}, {pixel!r}.")
    maps = object_maps.float().unbind(-1)
    groups = [maps] if reduce == "joint" else list(combinations(maps, 2))
    overlaps = []
    for group in groups:
        members = torch.stack(group, -1)
        product, total = members.prod(-1), members.sum(-1)  # (B, heads, HW)
        if pixel == "max":
            overlaps.append((product / (total + 1e-8)).flatten(1).amax(1))
        else:
            overlaps.append((product.flatten(1).sum(1)) / ((total - product).flatten(1).sum(1) + 1e-8))
    return torch.stack(overlaps).amax(0).mean()


@_without_autocast
def enhance_loss(object_maps: torch.Tensor, grid: tuple[int, int], sigma: float = 0.5) -> torch.Tensor:
    """How weak the weakest object is (Separate-and-Enhance, L_En): `1 - min over objects of max over heads and cells`.

    Maps are smoothed with 3 x 3 weights `exp(-(x / (2 * sigma))^2)` (the form the paper's numbers were made with; its
    standard deviation is `sigma * sqrt(2)`) and reflected borders. Mean over the batch.

    Args:
        object_maps: `(B, heads, HW, K)`, values in [0, 1].
        grid: `(h, w)` with `h * w = HW`, each at least 2.
        sigma: width of the smoothing in cells.

    Returns:
        Scalar in [0, 1].

    Raises:
        RegionError: `grid` does not fit the maps.
    """
    batch_size, heads, num_tokens, count = object_maps.shape
    if grid[0] * grid[1] != num_tokens or min(grid) < 2:
        raise RegionError(f"`grid` must have {num_tokens} cells and sides of at least 2, got {tuple(grid)}.")
    maps = object_maps.float().permute(0, 1, 3, 2).reshape(-1, 1, *grid)
    offsets = torch.arange(-1.0, 2.0, device=maps.device)
    weights = torch.exp(-((offsets / (2 * sigma)) ** 2))
    weights = weights / weights.sum()
    kernel = (weights[:, None] * weights[None, :])[None, None]
    smooth = F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="reflect"), kernel)
    strongest = smooth.reshape(batch_size, heads, count, num_tokens).amax((1, 3))  # (B, K)
    return (1 - strongest.amin(1)).mean()


def mask_reward_loss(
    maps: Mapping[str, torch.Tensor], masks: Any, target: float = 0.5, present: torch.Tensor | None = None
) -> torch.Tensor:
    """Distance of each instance's map from `target` times its mask (MIFO, equation 1).

    Mean over cells, summed over layers and instances, mean over the batch.

    Args:
        maps: layer name to `(B, heads, HW, N)` or `(B, HW, N)`, column n = the placeholder of instance n.
        masks: the instances on every layer's grid, values in [0, 1].
        target: the attention asked for inside, in [0, 1].
        present: `(N,)` or `(B, N)`, 0 for padded instances; None: all are there.
    """
    return _sum_over_instances(maps, masks, present, lambda columns, mask: (target * mask - columns) ** 2)


def mask_penalty_loss(
    maps: Mapping[str, torch.Tensor], masks: Any, present: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared attention of each instance outside its mask (MIFO, equation 2); reduced as `mask_reward_loss`.

    Attending to nothing is a minimum too: watch the attention inside.
    """
    return _sum_over_instances(maps, masks, present, lambda columns, mask: ((1 - mask) * columns) ** 2)


def box_masses(mass: torch.Tensor, regions: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on each subject's keys from its own box and from the background, summed over heads and cells.

    Args:
        mass: `(B, heads, HW, S)`, per cell the attention on the keys of subject s: its box's cells (self-attention,
            from `RegionMassProbe(head_mean=False)`) or its tokens (cross-attention, columns of `TokenMapProbe`
            summed).
        regions: the boxes on this grid, `(S, h, w)` or `(B, S, h, w)`, a cell belongs where the value is above 0.

    Returns:
        inside and outside, float32 `(B, S)` each; outside counts cells of no box at all.

    Raises:
        RegionError: the boxes do not fit the mass.
    """
    members = _object_masks(regions, mass.shape[2], mass.shape[0], mass.shape[3], mass.device) > 0  # (B, S, HW)
    background = ~members.any(1)  # (B, HW)
    per_cell = mass.float().sum(1)  # (B, HW, S)
    inside = (per_cell * members.transpose(1, 2)).sum(1)
    outside = (per_cell * background[:, :, None]).sum(1)
    return inside, outside


def box_reward_loss(
    inside: torch.Tensor, outside: torch.Tensor, background_factor: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """In-box reward `(1 - F / (F + background_factor * G))^2` (MIFO, equations 6 to 9).

    Args:
        inside: F, attention mass in the box, `(B, S)`, from 0; first average over layers.
        outside: G, mass in the background, same shape.
        background_factor: 1, or the number of subjects, also `(B, 1)`, for Bounded Attention's form.

    Returns:
        float32 `(B, S)` in [0, 1]; 1 with zero gradient where there is no mass at all.
    """
    inside, outside = inside.float(), outside.float()
    return (1 - inside / (inside + background_factor * outside).clamp_min(_TINY)) ** 2


def box_penalty_loss(outside: torch.Tensor) -> torch.Tensor:
    """Out-of-box penalty `log(1 + G)` (MIFO, equation 10), float32 `(B, S)`; `outside` as in `box_reward_loss`."""
    return torch.log1p(outside.float())


def _zero_like_maps(maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if not maps:
        raise ObjectComposeError("`maps` must hold the maps of at least one layer, got none.")
    return torch.zeros((), device=next(iter(maps.values())).device)


def _owners_and_weights(
    owners: torch.Tensor, present: torch.Tensor | None, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, T, N)` ownership and `(B, N)` weights of the objects."""
    batch_size, num_tokens = columns.shape[0], columns.shape[-1]
    owner = owners.to(columns.device, torch.float32)
    owner = owner.expand(batch_size, -1, -1) if owner.ndim == 2 else owner
    if owner.shape[:2] != (batch_size, num_tokens):
        raise ObjectComposeError(
            f"`owners` must have shape ({num_tokens}, N) or ({batch_size}, {num_tokens}, N),"
            f" got {tuple(owners.shape)}."
        )
    if present is None:
        return owner, (owner.sum(1) > 0).float()
    if tuple(present.shape) not in ((owner.shape[2],), (batch_size, owner.shape[2])):
        raise ObjectComposeError(
            f"`present` must have shape ({owner.shape[2]},) or ({batch_size}, {owner.shape[2]}),"
            f" got {tuple(present.shape)}."
        )
    return owner, present.to(columns.device, torch.float32).expand(batch_size, -1)


def _object_masks(masks: Any, num_tokens: int, batch_size: int, count: int, device: torch.device) -> torch.Tensor:
    """The masks on one grid, `(B, N, HW)`."""
    mask = region_weights(masks, num_tokens, device)
    if mask.shape[0] not in (1, batch_size) or mask.shape[1] != count:
        raise RegionError(
            f"`masks` must be of {count} instances in 1 or {batch_size} rows, got {mask.shape[1]} in {mask.shape[0]}."
        )
    return mask.expand(batch_size, -1, -1)


def _mean_over_objects(per_object: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over a row's objects, then over all rows; a row without objects counts as 0."""
    return ((per_object * weight).sum(1) / weight.sum(1).clamp_min(1)).mean()


def _sum_over_instances(
    maps: Mapping[str, torch.Tensor], masks: Any, present: torch.Tensor | None, distance: Any
) -> torch.Tensor:
    total = _zero_like_maps(maps)
    for layer_maps in maps.values():
        columns = layer_maps.float()
        columns = columns.mean(1) if columns.ndim == 4 else columns  # (B, HW, N)
        mask = _object_masks(masks, columns.shape[1], columns.shape[0], columns.shape[2], columns.device)
        per_instance = distance(columns, mask.transpose(1, 2)).mean(1)  # (B, N)
        if present is not None:
            per_instance = per_instance * present.to(per_instance)
        total = total + per_instance.sum(1).mean()
    return total
