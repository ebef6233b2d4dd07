"""Without parts the processor is diffusers' own, in every corner of the attention module."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SpatialNorm

from objectcompose.attention_processors.install import attention_layers, use_parts
from objectcompose.attention_processors.mask import GroupedVisibility, KeyMask, RegionKeyMask
from objectcompose.attention_processors.processor import AttentionCall, ComposedAttnProcessor, attend_visible
from objectcompose.errors import PartConflictError, RegionError
from tests.attention_processors.helpers import KINDS, TensorSizes, half_regions, predict, unet_and_inputs


CASES = {
    "cross": ({"cross_attention_dim": 10}, False),
    "self": ({}, False),
    "group norm, residual, rescaled": (
        {"norm_num_groups": 3, "residual_connection": True, "rescale_output_factor": 2.0},
        True,
    ),
    "4-D without norm": ({"bias": True, "out_bias": False}, True),
    "text layer norm": ({"cross_attention_dim": 10, "cross_attention_norm": "layer_norm"}, False),
    "text group norm": (
        {"cross_attention_dim": 10, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 5},
        False,
    ),
    "query and key norm": ({"qk_norm": "layer_norm"}, False),
    "spatial norm": ({"spatial_norm_dim": 7, "residual_connection": True}, True),
}  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_attn_processor_bit_for_bit(case, masked):
    options, is_image = CASES[case]
    width = 64 if "spatial_norm_dim" in options else 12  # the spatial norm has 32 groups
    attn = Attention(query_dim=width, heads=3, dim_head=5, **options).eval()
    states = torch.randn(2, width, 4, 5) if is_image else torch.randn(2, 20, width)
    text = torch.randn(2, 9, 10) if "cross_attention_dim" in options else None
    temb = torch.randn(2, 7, 4, 5) if "spatial_norm_dim" in options else None
    assert temb is None or isinstance(attn.spatial_norm, SpatialNorm)
    num_keys = 20 if text is None else 9
    bias = torch.randn(2, 1, num_keys) if masked else None
    arguments = {"encoder_hidden_states": text, "attention_mask": bias, "temb": temb}
    expected = AttnProcessor2_0()(attn, states, **arguments)
    assert torch.equal(ComposedAttnProcessor()(attn, states, **arguments), expected)


def explicit(call, value, visible):
    logits = call.query @ call.key.transpose(-1, -2) / call.query.shape[-1] ** 0.5
    if call.bias is not None:
        logits = logits + call.bias
    probabilities = logits.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0)
    return probabilities @ value


def random_call(num_cells=16, num_keys=16, batch_size=2):
    return AttentionCall(
        "layer", False, torch.randn(batch_size, 3, num_cells, 5), torch.randn(batch_size, 3, num_keys, 5)
    )


def box_rule(members):
    """The rule of self-attention masks, cell by cell."""
    own = (members.T.float() @ members.float()) > 0
    background = ~members.any(0)
    return own | background[None] | background[:, None]


@pytest.mark.parametrize("with_bias", [False, True])
def test_gathered_groups_equal_the_whole_table(with_bias):
    call, value = random_call(), torch.randn(2, 3, 16, 5)
    members = torch.rand(3, 16) > 0.6  # regions that overlap
    call.groups = [GroupedVisibility.from_regions(members), None]
    call.bias = torch.randn(2, 3, 1, 16) if with_bias else None
    visible = torch.stack([box_rule(members), torch.ones(16, 16, dtype=torch.bool)])[:, None]
    torch.testing.assert_close(call.attend(value), explicit(call, value, visible), atol=1e-6, rtol=0)


def test_two_gathered_masks_combine_by_and():
    first, second = torch.rand(2, 16) > 0.5, torch.rand(2, 16) > 0.5
    both = GroupedVisibility.from_regions(first).intersect(GroupedVisibility.from_regions(second))
    assert torch.equal(both.dense(), box_rule(first) & box_rule(second))


def test_no_visible_key_gives_zero_with_finite_gradients():
    query, key, value = (torch.randn(1, 2, 4, 3, requires_grad=True) for _ in range(3))
    visible = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    visible[..., 2, :] = False
    out = attend_visible(query, key, value, visible)
    assert out[..., 2, :].eq(0).all() and out[..., 1, :].ne(0).all()
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))
    assert query.grad[..., 2, :].eq(0).all()


def test_a_gathered_group_without_keys_gives_zero():
    labels = torch.arange(16) % 2
    visible = torch.stack([torch.zeros(16), torch.ones(16)]).bool()
    call, value = random_call(batch_size=1), torch.randn(1, 3, 16, 5)
    call.groups = [GroupedVisibility(labels, visible)]
    out = call.attend(value)
    assert out[:, :, ::2].eq(0).all() and out[:, :, 1::2].ne(0).all()


def test_a_table_joins_a_bias_and_blind_queries_get_zero():
    call, value = random_call(num_keys=9), torch.randn(2, 3, 9, 5)
    call.bias = torch.randn(2, 3, 1, 9)
    call.visible = torch.rand(1, 1, 16, 9) > 0.6
    call.visible[..., 3, :] = False
    out = call.attend(value)
    torch.testing.assert_close(out, explicit(call, value, call.visible), atol=1e-6, rtol=0)
    assert out[:, :, 3].eq(0).all() and torch.isfinite(out).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cells_that_see_no_token_get_zero_in_a_unet(kind):
    """What reaches the output projection: zero in the first cell, as without the mask in cells that see all."""
    unet, inputs = unet_and_inputs(kind)
    name = next(name for name in attention_layers(unet) if name.endswith("attn2"))
    attended = []
    unet.get_submodule(name).to_out[0].register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    predict(unet, inputs)
    table = torch.ones(attended[0].shape[1], 11, dtype=torch.bool)
    table[0] = False
    with use_parts(unet, [KeyMask(table, layers=[name])]):
        assert torch.isfinite(predict(unet, inputs)).all()
    assert attended[1][:, 0].eq(0).all() and attended[0][:, 0].ne(0).any()
    torch.testing.assert_close(attended[1][:, 1:], attended[0][:, 1:], atol=1e-6, rtol=1e-5)


def test_region_masks_at_64_by_64_make_no_table():
    """Forward and backward of one layer; a table of float32 is a map of 64 MiB, of booleans a quarter of it."""
    attn, made = Attention(query_dim=40, heads=1, dim_head=40), []
    states = torch.randn(1, 64 * 64, 40, requires_grad=True)
    visible = torch.rand(64 * 64, 64 * 64) > 0.5
    for mask in (RegionKeyMask(half_regions(3)), KeyMask(visible, layers="attn1")):
        with TensorSizes() as sizes:
            masked_output(attn, states, None, [mask]).square().mean().backward()
        made.append(sizes.largest)
    assert made[0] < 0.05 * 4 * (64 * 64) ** 2 and made[1] >= (64 * 64) ** 2


def masked_output(attn, states, text, masks):
    return ComposedAttnProcessor("layer", masks)(attn, states, encoder_hidden_states=text)


def test_key_masks_combine_by_and_and_hold_for_their_rows():
    attn = Attention(query_dim=12, cross_attention_dim=10, heads=3, dim_head=5).eval()
    states, text = torch.randn(2, 20, 12), torch.randn(2, 9, 10)
    first, second = torch.rand(20, 9) > 0.4, torch.rand(9) > 0.4
    both = masked_output(attn, states, text, [KeyMask(first), KeyMask({20: second})])
    together = masked_output(attn, states, text, [KeyMask(first & second)])
    assert torch.equal(both, together)
    half = masked_output(attn, states, text, [KeyMask(first & second, rows=slice(1, None))])
    plain = masked_output(attn, states, text, [])
    torch.testing.assert_close(half[0], plain[0])
    torch.testing.assert_close(half[1], together[1])
    assert not torch.allclose(half[1], plain[1])


def test_a_table_joins_gathered_groups():
    attn = Attention(query_dim=12, heads=3, dim_head=5).eval()
    states = torch.randn(2, 16, 12)
    regions = (torch.rand(2, 4, 4) > 0.5).float()
    table = torch.rand(16, 16) > 0.3
    both = masked_output(attn, states, None, [RegionKeyMask(regions), KeyMask(table)])
    rule = box_rule(regions.flatten(1) > 0)
    torch.testing.assert_close(both, masked_output(attn, states, None, [KeyMask(rule & table)]), atol=1e-6, rtol=0)


def test_region_masks_per_row_and_after_new_regions():
    attn = Attention(query_dim=12, heads=3, dim_head=5).eval()
    states = torch.randn(3, 16, 12)
    regions = (torch.rand(2, 2, 4, 4) > 0.5).float()
    mask = RegionKeyMask(regions, rows=slice(1, None))
    tables = torch.stack([torch.ones(16, 16).bool(), *(box_rule(x.flatten(1) > 0) for x in regions)])
    out = masked_output(attn, states, None, [mask])
    torch.testing.assert_close(out, masked_output(attn, states, None, [KeyMask(tables)]), atol=1e-6, rtol=0)
    mask.regions = torch.ones(1, 4, 4)
    torch.testing.assert_close(masked_output(attn, states, None, [mask]), masked_output(attn, states, None, []))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (KeyMask(torch.ones(8).bool()), r"broadcast to \(2, 16, 16\)"),
        (KeyMask({4: torch.ones(16).bool()}), "no table"),
        (RegionKeyMask(torch.ones(1, 3, 4)), "3 x 4"),
        (RegionKeyMask(torch.ones(16)), "shape"),
        (RegionKeyMask({9: torch.ones(1, 3, 3)}), "no grid of 16"),
        (RegionKeyMask(torch.ones(3, 1, 4, 4)), "3 batch rows"),
        (KeyMask(torch.ones(16).bool(), rows=slice(2, None)), "some of the 2 batch rows"),
        (RegionKeyMask(torch.ones(1, 4, 4), rows=slice(2, None)), "some of the 2 batch rows"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    attn = Attention(query_dim=12, heads=3, dim_head=5).eval()
    with pytest.raises((RegionError, PartConflictError), match=message):
        masked_output(attn, torch.randn(2, 16, 12), None, [mask])
