"""`RegionPyramid` in every part of the core, on real UNets at latents that are neither square nor even.

Latents of 13 x 7 cells give the levels 13 x 7, 7 x 4 and 4 x 2: each side is halved rounding up, and no number of
cells has a whole square root.
"""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.install import attention_layers, match_layers, use_parts
from objectcompose.attention_processors.losses import box_masses, box_reward_loss, token_loss
from objectcompose.attention_processors.mask import KeyMask, RegionKeyMask
from objectcompose.attention_processors.probe import RegionMassProbe, TokenMapProbe
from objectcompose.attention_processors.regions import RegionPyramid, RegionPyramidBatch
from objectcompose.errors import RegionError
from objectcompose.layout import SceneObject
from tests.attention_processors.helpers import (
    KINDS,
    explicit_probabilities,
    predict,
    random_keys_values,
    unet_and_inputs,
)


CANVAS = (13, 7)
OBJECTS = (
    SceneObject("a dog", box=(0.0, 0.1, 0.55, 0.8)),
    SceneObject("a cup", box=(0.4, 0.5, 0.9, 1.0), order=1),
)
TOKENS = (2, 5)  # one token for each object
FIRST_CROSS = r"down_blocks\.\d\.attentions\.0\.transformer_blocks\.0\.attn2$"


def pyramid(rule="round", **options):
    return RegionPyramid.from_objects(OBJECTS, CANVAS, rule=rule, **options)


def odd_unet_and_inputs(kind, batch_size=2):
    return unet_and_inputs(kind, batch_size, CANVAS)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


class TokensOfOwnObject:
    """A table for `KeyMask`: an object's token is seen from its own cells only, other tokens from everywhere."""

    def __init__(self, regions, num_keys):
        self.regions, self.num_keys = regions, num_keys

    def at_tokens(self, num_tokens, device=None):
        table = torch.ones(num_tokens, self.num_keys, dtype=torch.bool, device=device)
        table[:, list(TOKENS)] = self.regions.at_tokens(num_tokens, device).flatten(1).T > 0
        return table


class BoxRuleTable:
    """The rule of `RegionKeyMask` as a whole table, cell by cell."""

    def __init__(self, regions):
        self.regions = regions

    def at_tokens(self, num_tokens, device=None):
        members = self.regions.at_tokens(num_tokens, device).flatten(1) > 0
        background = ~members.any(0)
        own = (members.T.float() @ members.float()) > 0
        return own | background[None] | background[:, None]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_region_mass_equals_the_whole_table(kind):
    unet, inputs = odd_unet_and_inputs(kind)
    regions = pyramid(rule="area")
    with explicit_probabilities(unet) as tables:
        predict(unet, inputs)
    probe = RegionMassProbe(regions, head_mean=False)
    with use_parts(unet, [probe]):
        predict(unet, inputs)
    assert probe.mass.keys() == {name for name in tables if name.endswith("attn1")}
    seen = set()
    for name, mass in probe.mass.items():
        num_tokens = mass.shape[2]
        seen.add(num_tokens)
        close(mass, tables[name] @ regions.at_tokens(num_tokens).flatten(1).T)
    assert seen == ({28} if kind == "sdxl" else {91, 28, 8})


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_gathered_regions_equal_the_whole_table(kind):
    unet, inputs = odd_unet_and_inputs(kind)
    outputs = []
    for mask in (RegionKeyMask(pyramid()), KeyMask(BoxRuleTable(pyramid()), layers=r"attn1$")):
        with use_parts(unet, [mask]):
            outputs.append(predict(unet, inputs))
    close(outputs[0], outputs[1])
    assert (outputs[0] - predict(unet, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tokens_are_seen_from_their_own_cells_only(kind):
    unet, inputs = odd_unet_and_inputs(kind)
    regions, probe = pyramid(), TokenMapProbe(TOKENS, rows=slice(1, None))
    mask = KeyMask(TokensOfOwnObject(regions, 11), rows=slice(1, None))
    with use_parts(unet, [mask, probe]):
        predict(unet, inputs)
    for maps in probe.maps.values():
        inside = regions.at_tokens(maps.shape[1]).flatten(1).T > 0
        assert maps[0][inside].gt(0).all() and maps[0][~inside].eq(0).all()
    loss = token_loss(probe.maps, regions, torch.eye(2), head_mode="map_mean")
    close(loss, torch.zeros(()))  # all attention of the objects' tokens lies inside


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_branch_acts_on_the_cells_of_its_regions_only(kind, mode):
    unet, inputs = odd_unet_and_inputs(kind)
    regions, layer = pyramid(), match_layers(unet, FIRST_CROSS)[0]
    branch = Branch(random_keys_values(unet, [layer], 1, 6), regions, mode=mode)
    outputs = []
    handle = unet.get_submodule(layer).register_forward_hook(lambda *call: outputs.append(call[-1]))
    predict(unet, inputs)
    with use_parts(unet, [branch]):
        predict(unet, inputs)
    handle.remove()
    changed = (outputs[0] - outputs[1]).abs().amax(-1) > 0  # (B, cells)
    inside = regions.at_tokens(changed.shape[1]).flatten(1).any(0)
    assert torch.equal(changed, inside.expand_as(changed)) and not inside.all()


@torch.no_grad()
def test_more_objects_than_cells_share_the_coarse_grid():
    """Ten strips, each with cells of its own on 13 x 7; the middle of the UNet has 8 cells."""
    unet, inputs = odd_unet_and_inputs("sd1")
    boxes = [(0.0, index / 10, 1.0, (index + 1) / 10) for index in range(10)]
    regions = RegionPyramid(boxes, CANVAS, rule="cover", exclusive=True)
    assert ((regions.at(CANVAS) > 0).sum(0) == 1).all()
    assert ((regions.at((4, 2)) > 0).sum(0) > 1).any() and regions.at((4, 2)).flatten(1).any(1).all()
    cross = match_layers(unet, r"attn2$")
    keys_values = random_keys_values(unet, cross, 1, 20)
    middle = match_layers(unet, r"mid_block.*attn2$")
    outputs = []
    for last in (0.0, 1.0):  # also the object that owns least reaches the middle
        scale = torch.ones(10)
        scale[-1] = last
        with use_parts(unet, [Branch(keys_values, regions, scale, layers=middle)]):
            outputs.append(predict(unet, inputs))
    assert torch.isfinite(outputs[0]).all() and not torch.equal(outputs[0], outputs[1])


def parts_of_a_method(unet, regions, num_pictures):
    """A mask, a branch and a probe of each kind on the conditional half, as a guided method installs them."""
    half = slice(num_pictures, None)
    keys_values = random_keys_values(unet, match_layers(unet, r"attn2$"), num_pictures, 6)
    return [
        RegionKeyMask(regions, rows=half),
        Branch(keys_values, regions, mode="replace", gamma=0.2, rows=half),
        TokenMapProbe(TOKENS, rows=half, head_mean=False),
        RegionMassProbe(regions, rows=half, head_mean=False),
    ]


def rows_of_inputs(inputs, rows):
    chosen = {name: inputs[name][rows] for name in ("sample", "encoder_hidden_states")}
    added = {name: values[rows] for name, values in inputs.get("added_cond_kwargs", {}).items()}
    return {**inputs, **chosen, **({"added_cond_kwargs": added} if added else {})}


@pytest.mark.parametrize("kind", KINDS)
def test_full_pass_of_a_batch_with_all_parts(kind):
    """Two pictures and their unconditional halves: each equals the picture alone, and gradients reach the latents."""
    unet, inputs = odd_unet_and_inputs(kind, batch_size=4)
    plain = predict(unet, inputs).detach()
    inputs["sample"].requires_grad_()
    second = RegionPyramid([(0.3, 0.0, 1.0, 0.4)], CANVAS, rule="round")
    regions = RegionPyramidBatch([pyramid(), second])
    parts = parts_of_a_method(unet, regions, 2)
    with use_parts(unet, parts):
        output = predict(unet, inputs)
        rewards = [
            box_reward_loss(*box_masses(mass, regions))[regions.valid].sum() for mass in parts[-1].mass.values()
        ]
        rewards.append(token_loss(parts[2].maps, regions, torch.eye(2)))
        (gradient,) = torch.autograd.grad(sum(rewards), inputs["sample"])
    assert output.shape == (4, 4, *CANVAS)
    close(output[:2], plain[:2])  # the unconditional half
    assert (output[2:] - plain[2:]).abs().amax((1, 2, 3)).gt(1e-3).all()
    assert gradient[:2].eq(0).all() and gradient[2:].abs().amax((1, 2, 3)).gt(0).all()
    assert torch.isfinite(gradient).all()
    assert torch.equal(predict(unet, inputs), plain)
    keys_values = parts[1].keys_values
    with torch.no_grad():
        for row in range(2):
            single = parts_of_a_method(unet, regions.pyramids[row], 1)
            count = len(regions.pyramids[row])
            single[1].keys_values = {  # three tokens for each object; the padded one is left out
                name: tuple(x[row : row + 1, : 3 * count] for x in pair) for name, pair in keys_values.items()
            }
            with use_parts(unet, single):
                close(predict(unet, rows_of_inputs(inputs, [row, row + 2]))[1], output[row + 2])


@torch.no_grad()
def test_a_picture_without_objects_is_left_alone():
    unet, inputs = odd_unet_and_inputs("sd2")
    plain = predict(unet, inputs)
    nothing = RegionPyramid([], CANVAS)
    some = RegionPyramidBatch([nothing, pyramid()])
    cross = match_layers(unet, r"attn2$")
    probe = RegionMassProbe(nothing)
    with use_parts(unet, [RegionKeyMask(nothing), probe]):
        close(predict(unet, inputs), plain)
    assert all(mass.shape[-1] == 0 for mass in probe.mass.values())
    with use_parts(unet, [RegionKeyMask(some), Branch(random_keys_values(unet, cross, 1, 6), some)]):
        output = predict(unet, inputs)
    close(output[0], plain[0])
    assert not torch.allclose(output[1], plain[1])


def test_a_pyramid_of_another_canvas_is_refused():
    unet, inputs = odd_unet_and_inputs("sd1")
    regions = RegionPyramid.from_objects(OBJECTS, (7, 12))
    before = {name: module.processor for name, module in attention_layers(unet).items()}
    for part in (RegionKeyMask(regions), RegionMassProbe(regions)):
        with pytest.raises(RegionError, match=r"canvas \(7, 12\), got 91"), torch.no_grad(), use_parts(unet, [part]):
            predict(unet, inputs)
    assert all(module.processor is before[name] for name, module in attention_layers(unet).items())
