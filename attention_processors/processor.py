"""The one attention processor of the package, made of parts.

What a layer computes without parts is what diffusers' `AttnProcessor2_0` computes (fused attention; group and spatial
norm, residual connection, output rescaling, 4-D input and prepared attention masks included). Masks say what a query
sees, branches add or replace attention to further keys, probes write down what they measure:

    out = T * (1 - R) + R * (gamma * T + B_replace) + sum(scale * B_add)

with T the attention to the text (or to the layer's own cells) under all masks, R the cells of a replacing branch.

Parts are plain objects told apart by `part.kind`, never by class, because a flattened Hub file holds a second copy of
every class. Processors hold no weights: diffusers drops weights of processors on reload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.mask import GroupedVisibility, intersect_row_groups, rows_of_batch


def split_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """`(B, L, C)` to `(B, heads, L, C / heads)`."""
    return states.unflatten(-1, (heads, states.shape[-1] // heads)).transpose(1, 2)


def merge_heads(states: torch.Tensor) -> torch.Tensor:
    """`(B, heads, L, d)` to `(B, L, heads * d)`."""
    return states.transpose(1, 2).flatten(2)


def attend_visible(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
) -> torch.Tensor:
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

    name: str
    is_cross: bool
    query: torch.Tensor
    key: torch.Tensor
    bias: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    groups: list[GroupedVisibility | None] | None = None

    @property
    def batch_size(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_tokens(self) -> int:
        """Cells of the layer's grid."""
        return self.query.shape[2]

    def select(self, rows: slice | None) -> AttentionCall:
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

    def attend(self, value: torch.Tensor) -> torch.Tensor:
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

    def logits(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled logits in float32, `(B, heads, Q, K)`, hidden keys at -inf, and which queries see any key (None:
        all).

        For cross-attention, whose keys are few, and for self-attention on small grids. A query that sees nothing keeps
        finite logits; use the second value.
        """
        logits = self.query.float() @ self.key.float().transpose(-1, -2) * self.query.shape[-1] ** -0.5
        bias, sees_any = self.logit_bias()
        return logits if bias is None else logits + bias, sees_any

    def logit_bias(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What is added to the scaled logits, float32, -inf for hidden keys (None: nothing), and which queries see any
        key (None: all). For a query that sees nothing no key is hidden."""
        bias = None if self.bias is None else self.bias.float()
        visible = self.visible if self.groups is None else self.dense_groups(self.groups)
        if visible is None:
            return bias, None
        sees_any = visible.any(-1, keepdim=True)
        hidden = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible & sees_any, float("-inf"))
        return hidden if bias is None else bias + hidden, sees_any

    def dense_groups(self, groups: list[GroupedVisibility | None]) -> torch.Tensor:
        """The groups as one table `(B, 1, Q, K)`."""
        everything = torch.ones(self.num_tokens, self.key.shape[2], dtype=torch.bool, device=self.query.device)
        rows = [everything if group is None else group.dense(self.query.device) for group in groups]
        return torch.stack(rows)[:, None]

    def _attend_groups(self, value: torch.Tensor) -> torch.Tensor:
        assert self.groups is not None
        groups = self.groups
        rows_by_group: list[list[int]] = []
        for row, group in enumerate(groups):
            known = next((rows for rows in rows_by_group if groups[rows[0]] is group), None)
            if known is None:
                rows_by_group.append([row])
            else:
                known.append(row)
        if len(rows_by_group) == 1:
            return self._attend_rows(value, groups[0], None)
        by_row: dict[int, torch.Tensor] = {}
        for rows in rows_by_group:
            attended = self._attend_rows(value, groups[rows[0]], rows)
            by_row.update(zip(rows, attended.split(1), strict=True))
        return torch.cat([by_row[row] for row in range(self.batch_size)])

    def _attend_rows(
        self, value: torch.Tensor, group: GroupedVisibility | None, rows: list[int] | None
    ) -> torch.Tensor:
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


def _pick_rows(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
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

    def __init__(self, attn: Any):
        self._attn = attn
        self.to_out = (_same_states, _same_states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


def _same_states(states: torch.Tensor) -> torch.Tensor:
    return states


class ComposedAttnProcessor:
    """Attention of one layer with its parts.

    Args:
        name: the layer's name, under which probes store.
        parts: masks, branches and probes of this layer; with none the layer computes what `AttnProcessor2_0` does.
        original: a processor that is kept and called for the layer's own attention (IP-Adapter's); None computes it
            here.
    """

    def __init__(self, name: str = "", parts: Sequence[Any] = (), original: Any = None):
        self.name = name
        self.composed_parts = tuple(parts)
        self.original = original
        self._masks = tuple(part for part in self.composed_parts if part.kind == "mask")
        self._branches = tuple(part for part in self.composed_parts if part.kind == "branch")
        self._probes = tuple(part for part in self.composed_parts if part.kind == "probe")

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> torch.Tensor:
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
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any, attention_mask: torch.Tensor | None
    ) -> tuple[AttentionCall, torch.Tensor]:
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

    def _text_states(self, encoder_hidden_states: Any) -> torch.Tensor:
        if isinstance(encoder_hidden_states, tuple):  # (text, image embeddings): diffusers' form with an IP-Adapter
            return encoder_hidden_states[0]
        if self.original is not None:  # the older form, image tokens appended to the text
            return encoder_hidden_states[:, : encoder_hidden_states.shape[1] - self.original.num_tokens[0]]
        return encoder_hidden_states

    def _apply_masks(self, call: AttentionCall) -> None:
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
        attn: Any,
        call: AttentionCall,
        value: torch.Tensor,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any,
        attention_mask: torch.Tensor | None,
        temb: torch.Tensor | None,
        ip_adapter_masks: Any,
    ) -> torch.Tensor:
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

    def _add_branches(self, attended: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        replacing = [branch for branch in self._branches if branch.mode == "replace"]
        if len(replacing) > 1:
            replacing[0].refuse_overlap(replacing, call.batch_size, call.num_tokens, call.query.device)
        for branch in replacing:
            attended = branch.replace_in(attended, call)
        for branch in self._branches:
            if branch.mode == "add":
                attended = branch.add_to(attended, call)
        return attended
