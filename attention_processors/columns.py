"""Columns of a softmax over few keys, without keeping the table that they are taken from.

Autograd's own way through matrix product, logsumexp and gather holds five tables of all queries and keys at its peak;
this one holds one, and keeps none between forward and backward, where it is computed again. At 64 x 64 cells, 77
tokens and 8 heads a table has 10 MB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def softmax_columns(
    query: torch.Tensor,
    key: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
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


def _table(query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    logits = (query * scale) @ key.transpose(-1, -2)
    return logits if bias is None else logits.add_(bias)


class _SoftmaxColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        indices: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
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
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):  # which may be on around the backward pass alone
            return _SoftmaxColumns._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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
