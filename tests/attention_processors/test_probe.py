"""Probes: values and gradients are those of whole softmax tables."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.install import attention_layers, match_layers, use_parts
from objectcompose.attention_processors.mask import KeyMask, RegionKeyMask, region_weights
from objectcompose.attention_processors.probe import RegionMassProbe, TokenMapProbe
from objectcompose.attention_processors.processor import ComposedAttnProcessor
from objectcompose.errors import ObjectComposeError, PartConflictError, PromptTooLongError, RegionError
from tests.attention_processors.helpers import (
    KINDS,
    OneOf,
    TensorSizes,
    explicit_probabilities,
    half_regions,
    predict,
    random_keys_values,
    unet_and_inputs,
)


def is_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def weigh(results):
    """A scalar that depends on every entry of every result, differently."""
    total = 0
    for index, name in enumerate(sorted(results)):
        values = results[name]
        weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(index))
        total = total + (weights * values**2).sum()
    return total


def gradients(unet, inputs, scalar):
    """Gradients with respect to the latents, the text and a key projection."""
    weights = attention_layers(unet)["mid_block.attentions.0.transformer_blocks.0.attn2"].to_k.weight
    return torch.autograd.grad(scalar, [inputs["sample"], inputs["encoder_hidden_states"], weights])


def with_gradients(inputs):
    return {
        **inputs,
        "sample": inputs["sample"].clone().requires_grad_(),
        "encoder_hidden_states": inputs["encoder_hidden_states"].clone().requires_grad_(),
    }


def measure(unet, inputs, probes):
    with use_parts(unet, probes):
        predict(unet, inputs)
        return gradients(unet, inputs, sum(weigh(getattr(p, "maps", None) or p.mass) for p in probes))


@pytest.mark.parametrize("rows", [None, slice(1, None)], ids=["both halves", "second half"])
@pytest.mark.parametrize("head_mean", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_explicit_softmax(kind, head_mean, rows):
    unet, inputs = unet_and_inputs(kind)
    inputs = with_gradients(inputs)
    tokens, regions = [2, 3, 7], half_regions(3)
    with explicit_probabilities(unet) as tables:
        predict(unet, inputs)
    maps, mass = {}, {}
    for name, table in tables.items():
        table = table if rows is None else table[rows]
        if name.endswith("attn2"):
            maps[name] = table[..., tokens].mean(1) if head_mean else table[..., tokens]
        else:
            share = table @ region_weights(regions, table.shape[-1])[:, None].transpose(-1, -2)
            mass[name] = share.mean(1, keepdim=True) if head_mean else share
    expected = gradients(unet, inputs, weigh(maps) + weigh(mass))
    token_probe = TokenMapProbe(tokens, head_mean=head_mean, rows=rows)
    mass_probe = RegionMassProbe(regions, head_mean=head_mean, rows=rows)
    found = measure(unet, inputs, [token_probe, mass_probe])
    assert token_probe.maps.keys() == maps.keys() and mass_probe.mass.keys() == mass.keys()
    for name in maps:
        is_close(token_probe.maps[name], maps[name])
    for name in mass:
        is_close(mass_probe.mass[name], mass[name])
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-4
        is_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind):
    unet, inputs = unet_and_inputs(kind)
    inputs = with_gradients(inputs)
    expected = measure(unet, inputs, [TokenMapProbe([2, 3]), RegionMassProbe(half_regions())])
    unet.enable_gradient_checkpointing()
    unet.train()
    calls = dict.fromkeys(attention_layers(unet), 0)

    def count(name):
        calls[name] += 1

    for name, module in attention_layers(unet).items():
        module.register_forward_hook(lambda *_, name=name: count(name))
    probes = [TokenMapProbe([2, 3]), RegionMassProbe(half_regions())]
    for one, other in zip(measure(unet, inputs, probes), expected, strict=True):
        is_close(one, other)
    assert set(calls.values()) == {2}  # forward, and again for the backward pass
    assert len(probes[0].maps) == sum(name.endswith("attn2") for name in attention_layers(unet))


@torch.no_grad()
def test_a_batch_equals_its_single_rows():
    unet, inputs = unet_and_inputs("sd1", batch_size=3)
    probe, mass_probe = TokenMapProbe([1, 5]), RegionMassProbe(half_regions())
    with use_parts(unet, [probe, mass_probe]):
        predict(unet, inputs)
        together = {**probe.maps, **mass_probe.mass}
        for row in range(3):
            one = {name: value[row : row + 1] if name != "timestep" else value for name, value in inputs.items()}
            predict(unet, one)
            for name, values in {**probe.maps, **mass_probe.mass}.items():
                is_close(values[0], together[name][row])


def bytes_of_a_layer(parts, explicit=False):
    """Bytes made by forward and backward of one layer of SD 1's finest grid, in float32 maps of one head."""
    torch.manual_seed(0)
    attn = Attention(query_dim=40, heads=1, dim_head=40)
    states = torch.randn(1, 64 * 64, 40, requires_grad=True)
    with TensorSizes() as sizes:
        scalar = ComposedAttnProcessor("layer", parts)(attn, states).square().mean()
        for part in parts:
            scalar = scalar + part.mass["layer"].square().mean()
        if explicit:
            scalar = scalar + (attn.to_q(states) @ attn.to_k(states).mT).softmax(-1).square().mean()
        scalar.backward()
    one_map = 4 * (64 * 64) ** 2
    return sizes.largest / one_map, sizes.peak / one_map


def test_region_mass_at_64_by_64_needs_a_twentieth_of_a_map():
    _, plain = bytes_of_a_layer([])
    largest, peak = bytes_of_a_layer([RegionMassProbe(half_regions(4))])
    assert largest < 0.05 and 0 < peak - plain < 0.05
    largest, peak = bytes_of_a_layer([], explicit=True)
    assert largest >= 1 and peak - plain > 1


def test_a_value_of_another_width_than_the_keys_would_materialise_a_map():
    """Why indicators are padded to the head's width."""
    query, sizes = torch.randn(1, 1, 1024, 40), []
    for width in (40, 4):
        with TensorSizes() as made:
            F.scaled_dot_product_attention(query, query, torch.randn(1, 1, 1024, width))
        sizes.append(made.largest)
    assert sizes[0] < 0.05 * 4 * 1024**2 and sizes[1] >= 4 * 1024**2


@pytest.mark.parametrize("head_mean", [True, False])
def test_the_mask_of_padded_text_is_in_force(head_mean):
    """`encoder_attention_mask` is a bias in the layer: masked tokens get nothing, the others share all."""
    unet, inputs = unet_and_inputs("sd2")
    inputs["encoder_attention_mask"] = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])
    probe = TokenMapProbe(range(11), head_mean=head_mean)
    with torch.no_grad(), use_parts(unet, [probe]):
        predict(unet, inputs)
        for maps in probe.maps.values():
            assert maps[1, ..., 6:].eq(0).all() and maps[1, ..., :6].gt(0).all() and maps[0].gt(0).all()
            is_close(maps.sum(-1), torch.ones_like(maps[..., 0]))


@torch.no_grad()
def test_token_lists_per_row_are_padded_with_zeros():
    unet, inputs = unet_and_inputs("sd1")
    probe, all_tokens = TokenMapProbe([[4, 2], [6]]), TokenMapProbe(list(range(11)))
    with use_parts(unet, [probe, all_tokens]):
        predict(unet, inputs)
    for name, maps in probe.maps.items():
        whole = all_tokens.maps[name]
        is_close(whole.sum(-1), torch.ones_like(whole.sum(-1)))
        is_close(maps[0], whole[0][:, [4, 2]])
        is_close(maps[1, :, 0], whole[1][:, 6])
        assert maps[1, :, 1].eq(0).all()


@torch.no_grad()
def test_more_regions_than_the_head_is_wide():
    unet, inputs = unet_and_inputs("sd1")
    probe = RegionMassProbe(half_regions(4), layers=r"down_blocks.0.*attn1$")
    wide = RegionMassProbe(OneOf(half_regions(4), [0, 1, 2, 3] * 5), layers=r"down_blocks.0.*attn1$")
    with use_parts(unet, [probe, wide]):
        predict(unet, inputs)
    for name, mass in wide.mass.items():
        assert mass.shape[-1] == 20
        is_close(mass, probe.mass[name].repeat(1, 1, 1, 5))
        is_close(probe.mass[name].sum(-1), torch.ones_like(mass[..., 0]))


@torch.no_grad()
def test_masks_are_in_force_and_blind_cells_have_zeros():
    unet, inputs = unet_and_inputs("sd1")
    layers = r"down_blocks.0.*attn2$"
    table = torch.ones(256, 11, dtype=torch.bool)
    table[:, 3] = False
    table[5] = False
    token_probe = TokenMapProbe([3, 4, 5], layers=layers)
    mass_probe = RegionMassProbe(half_regions(2), layers=r"down_blocks.0.*attn1$")
    box_mask = RegionKeyMask(half_regions(2), layers=r"down_blocks.0.*attn1$")
    with use_parts(unet, [KeyMask(table, layers=layers), box_mask, token_probe, mass_probe]):
        predict(unet, inputs)
    for maps in token_probe.maps.values():
        assert maps[..., 0].eq(0).all() and maps[:, 5].eq(0).all() and maps[:, 6, 1:].gt(0).all()
    for mass in mass_probe.mass.values():  # both halves are regions, so each sees only itself
        own = region_weights(half_regions(2), 256)[:, None].transpose(-1, -2)
        is_close(mass, own.expand_as(mass))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precision_is_finite_and_close_and_maps_are_float32(kind, dtype):
    unet, inputs = unet_and_inputs(kind)
    table = torch.ones(11, dtype=torch.bool)
    table[3] = False
    keys_values = random_keys_values(unet, match_layers(unet, r"attn2$"), 2, 6)
    results = []
    for precision in (torch.float32, dtype):
        unet.to(precision)
        probes = [TokenMapProbe([1, 3]), RegionMassProbe(half_regions())]
        others = [
            KeyMask(table),
            RegionKeyMask(half_regions(3)),
            Branch(keys_values, half_regions(), mode="replace", gamma=0.3),
            Branch(keys_values, OneOf(half_regions(3), [0, 1]), scale=torch.tensor([0.5, 0.2])),
        ]
        with use_parts(unet, probes + others):
            output = predict(unet, in_precision(inputs, precision))
        values = {**probes[0].maps, **probes[1].mass}
        assert output.dtype == precision and all(x.dtype == torch.float32 for x in values.values())
        results.append({"output": output.float(), **values})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, atol=0.1, rtol=0.1)


def in_precision(inputs, dtype):
    added = {name: values.to(dtype) for name, values in inputs.get("added_cond_kwargs", {}).items()}
    cast = {name: inputs[name].to(dtype) for name in ("sample", "encoder_hidden_states")}
    return {**inputs, **cast, **({"added_cond_kwargs": added} if added else {})}


def test_results_are_assigned_and_can_be_cleared():
    unet, inputs = unet_and_inputs("sd1")
    probe = TokenMapProbe([1])
    with torch.no_grad(), use_parts(unet, [probe]):
        predict(unet, inputs)
        first = dict(probe.maps)
        predict(unet, inputs)
    assert probe.maps.keys() == first.keys()
    probe.clear()
    assert probe.maps == {}


@pytest.mark.parametrize("indices", [[], [[]], [-1], [[1], [-2]]])
def test_positions_are_checked(indices):
    with pytest.raises(ObjectComposeError, match="token_indices"):
        TokenMapProbe(indices)


@pytest.mark.parametrize(
    ("probe", "error", "message"),
    [
        (TokenMapProbe([11]), PromptTooLongError, "position 11"),
        (TokenMapProbe([[1], [2], [3]]), ObjectComposeError, "3 rows"),
        (RegionMassProbe(torch.ones(1, 3, 3)), RegionError, "3 x 3"),
        (RegionMassProbe({256: torch.ones(5, 1, 16, 16)}), RegionError, "5 batch rows"),
        (TokenMapProbe([1], rows=slice(2, None)), PartConflictError, "some of the 2 batch rows"),
        (RegionMassProbe(half_regions(), rows=slice(2, None)), PartConflictError, "some of the 2 batch rows"),
    ],
)
def test_what_does_not_fit_is_refused(probe, error, message):
    unet, inputs = unet_and_inputs("sd1")
    with pytest.raises(error, match=message), torch.no_grad(), use_parts(unet, [probe]):
        predict(unet, inputs)
