"""Columns of a softmax against the whole table."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.columns import softmax_columns
from objectcompose.attention_processors.install import use_parts
from objectcompose.attention_processors.probe import TokenMapProbe
from tests.tiny import tiny_unet


INDICES = torch.tensor([[0, 3, 3], [6, 1, 0]])  # a position may come twice


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 5, 4, generator=generator, dtype=dtype).requires_grad_()
    key = torch.randn(2, 3, 7, 4, generator=generator, dtype=dtype).requires_grad_()
    return query, key


def hiding_bias():
    bias = torch.zeros(2, 1, 5, 7, dtype=torch.float64)
    bias[0, :, 2, 3:] = float("-inf")
    bias[1, :, :, 1] = 0.5
    return bias


def whole_table(query, key, indices, scale, bias):
    logits = scale * query @ key.transpose(-1, -2)
    table = (logits if bias is None else logits + bias).softmax(-1)
    return table.gather(-1, indices[:, None, None, :].expand(*table.shape[:-1], -1))


@pytest.mark.parametrize("bias", [None, hiding_bias()])
def test_values_and_gradients_are_those_of_the_whole_table(bias):
    ours, explicit = inputs(), inputs()
    columns = softmax_columns(*ours, INDICES, 0.7, bias)
    expected = whole_table(*explicit, INDICES, 0.7, bias)
    torch.testing.assert_close(columns, expected)
    weights = torch.randn(columns.shape, generator=torch.Generator().manual_seed(1), dtype=columns.dtype)
    (columns * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, theirs in zip(ours, explicit, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    torch.autograd.gradcheck(lambda query, key: softmax_columns(query, key, INDICES, 0.7, bias), inputs())


def test_large_logits_do_not_overflow():
    query, key = (200 * part.detach().float() for part in inputs())
    columns = softmax_columns(query, key, INDICES, 1.0)
    torch.testing.assert_close(columns, whole_table(query, key, INDICES, 1.0, None))
    assert columns.isfinite().all()


def test_one_list_for_all_rows_and_only_one_gradient():
    query, key = inputs()
    key.requires_grad_(False)
    columns = softmax_columns(query, key, INDICES[:1], 0.7)
    torch.testing.assert_close(columns, whole_table(query, key, INDICES[:1].expand(2, -1), 0.7, None))
    columns.sum().backward()
    assert query.grad.abs().sum() > 0 and key.grad is None


def test_nothing_as_large_as_the_table_is_kept():
    query, key = inputs(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        softmax_columns(query, key, INDICES, 0.7)
    assert kept and (2, 3, 5, 7) not in {tuple(shape) for shape in kept}


def test_held_maps_survive_the_second_run_of_a_checkpointed_block():
    """A backward pass through checkpointed blocks measures again; what is held stays the first run's."""
    unet = tiny_unet().train()
    unet.enable_gradient_checkpointing()
    probe = TokenMapProbe([1, 2], head_mean=False)
    inputs = torch.randn(1, 4, 16, 16), 5, torch.randn(1, 7, unet.config.cross_attention_dim)
    for is_held in (True, False):
        with use_parts(unet, [probe]):
            loss = unet(*inputs).sample.square().mean() + sum(maps.sum() for maps in probe.maps.values())
            if is_held:
                probe.hold()
            first = {name: id(maps) for name, maps in probe.maps.items()}
            loss.backward()
        assert ({name: id(maps) for name, maps in probe.maps.items()} == first) is is_held
        probe.clear()


def test_gradients_under_autocast_are_those_in_float32():
    weights = torch.randn(2, 3, 5, 3, generator=torch.Generator().manual_seed(1))
    plain, cast = inputs(torch.float32), inputs(torch.float32)
    (softmax_columns(*plain, INDICES, 0.7) * weights).sum().backward()
    loss = (softmax_columns(*cast, INDICES, 0.7) * weights).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    for one, other in zip(plain, cast, strict=True):
        assert torch.equal(one.grad, other.grad)
