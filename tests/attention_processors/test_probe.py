"""Probes: values and gradients are those of whole softmax tables."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.install import attention_layers, use_parts
from objectcompose.attention_processors.mask import KeyMask, RegionKeyMask, region_weights
from objectcompose.attention_processors.probe import RegionMassProbe, TokenMapProbe
from objectcompose.errors import ObjectComposeError, PromptTooLongError, RegionError
from tests.attention_processors.helpers import (
    KINDS,
    OneOf,
    explicit_probabilities,
    half_regions,
    predict,
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
    probes = [TokenMapProbe([2, 3]), RegionMassProbe(half_regions())]
    for one, other in zip(measure(unet, inputs, probes), expected, strict=True):
        is_close(one, other)
    assert len(probes[0].maps) == sum(name.endswith("attn2") for name in attention_layers(unet))


@torch.no_grad()
def test_a_batch_equals_its_single_rows():
    unet, inputs = unet_and_inputs("sd1", batch_size=3)
    probe = TokenMapProbe([1, 5])
    with use_parts(unet, [probe]):
        predict(unet, inputs)
        together = dict(probe.maps)
        for row in range(3):
            one = {name: value[row : row + 1] if name != "timestep" else value for name, value in inputs.items()}
            predict(unet, one)
            for name, maps in probe.maps.items():
                is_close(maps[0], together[name][row])


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


def test_half_precision_maps_are_float32_and_finite():
    unet, inputs = unet_and_inputs("sd1")
    unet.to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in inputs.items()}
    probes = [TokenMapProbe([1]), RegionMassProbe(half_regions())]
    with torch.no_grad(), use_parts(unet, probes):
        predict(unet, inputs)
    for values in (*probes[0].maps.values(), *probes[1].mass.values()):
        assert values.dtype == torch.float32 and torch.isfinite(values).all()


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
    ],
)
def test_what_does_not_fit_is_refused(probe, error, message):
    unet, inputs = unet_and_inputs("sd1")
    with pytest.raises(error, match=message), torch.no_grad(), use_parts(unet, [probe]):
        predict(unet, inputs)
