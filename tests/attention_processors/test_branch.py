"""Branches: the algebra of adding and replacing, objects in one call, conflicts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from objectcompose.attention_processors.branch import Branch, check_replacing_branches
from objectcompose.attention_processors.install import attention_layers, match_layers, use_parts
from objectcompose.attention_processors.mask import KeyMask, RegionKeyMask
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.attention_processors.processor import ComposedAttnProcessor
from objectcompose.errors import ObjectComposeError, PartConflictError, RegionError
from tests.attention_processors.helpers import KINDS, OneOf, half_regions, predict, random_keys_values, unet_and_inputs


HEADS, WIDTH, CELLS = 3, 15, 16


@pytest.fixture
def layer():
    return Attention(query_dim=12, cross_attention_dim=10, heads=HEADS, dim_head=5).eval()


@pytest.fixture
def states():
    return torch.randn(2, CELLS, 12), torch.randn(2, 9, 10)


def keys_values(num_tokens, rows=2):
    return {"layer": (torch.randn(rows, num_tokens, WIDTH), torch.randn(rows, num_tokens, WIDTH))}


def compose(layer, states, parts):
    return ComposedAttnProcessor("layer", parts)(layer, states[0], encoder_hidden_states=states[1])


def split(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def plain_attention(layer, states, pair=None):
    """Attention before the output projection, to the text or to one object's keys and values."""
    key, value = pair if pair is not None else (layer.to_k(states[1]), layer.to_v(states[1]))
    logits = split(layer.to_q(states[0])) @ split(key).transpose(-1, -2) / 5**0.5
    return (logits.softmax(-1) @ split(value)).transpose(1, 2).flatten(2)


def objects(branch_keys_values, num_objects):
    key, value = branch_keys_values["layer"]
    return list(zip(key.chunk(num_objects, 1), value.chunk(num_objects, 1), strict=True))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def cells(*chosen):
    """One region `(1, 4, 4)` of the given cells."""
    region = torch.zeros(CELLS)
    region[list(chosen)] = 1
    return region.view(1, 4, 4)


def test_adding_everywhere(layer, states):
    pairs = keys_values(6)
    expected = layer.to_out[0](plain_attention(layer, states) + 0.7 * plain_attention(layer, states, pairs["layer"]))
    close(compose(layer, states, [Branch(pairs, scale=0.7)]), expected)
    close(compose(layer, states, [Branch(pairs, scale=torch.tensor(0.7))]), expected)


def test_one_object_per_region_in_one_call(layer, states):
    pairs, regions = keys_values(6), torch.cat([cells(0, 1, 2), cells(5, 6)])
    text = plain_attention(layer, states)
    added = sum(
        region.view(1, CELLS, 1) * strength * plain_attention(layer, states, pair)
        for region, pair, strength in zip(regions, objects(pairs, 2), (0.5, 2.0), strict=True)
    )
    close(compose(layer, states, [Branch(pairs, regions, torch.tensor([0.5, 2.0]))]), layer.to_out[0](text + added))


def test_cells_without_a_visible_key_get_exactly_nothing(layer, states):
    branch = Branch(keys_values(6), torch.cat([cells(0, 1), cells(5)]))
    plain, out = compose(layer, states, []), compose(layer, states, [branch])
    outside = [cell for cell in range(CELLS) if cell not in (0, 1, 5)]
    assert torch.equal(out[:, outside], plain[:, outside])
    assert not torch.allclose(out[:, [0, 1, 5]], plain[:, [0, 1, 5]])
    nothing = Branch(keys_values(6), torch.zeros(2, 4, 4))
    assert torch.equal(compose(layer, states, [nothing]), plain)


def test_changing_one_object_changes_only_its_region(layer, states):
    pairs, regions = keys_values(6), torch.cat([cells(0, 1), cells(5)])
    first = compose(layer, states, [Branch(pairs, regions)])
    key, value = (x.clone() for x in pairs["layer"])
    value[:, 3:] += 1
    second = compose(layer, states, [Branch({"layer": (key, value)}, regions)])
    changed = (first - second).abs().amax((0, 2)) > 1e-6
    assert changed.nonzero()[:, 0].tolist() == [5]


def test_replacing_and_adding_stack_by_the_formula(layer, states):
    replaced, added, second = keys_values(6), keys_values(4), keys_values(3)
    region = torch.rand(1, 4, 4) * (torch.rand(1, 4, 4) > 0.4)  # soft edges, and cells outside
    other = (region == 0).float() * cells(*range(8))
    share, other_share = region.view(1, CELLS, 1), other.view(1, CELLS, 1)
    text = plain_attention(layer, states)
    expected = text * (1 - share) + share * (0.3 * text + 1.5 * plain_attention(layer, states, replaced["layer"]))
    expected = torch.where(other_share > 0, plain_attention(layer, states, second["layer"]), expected)
    expected = expected + 0.7 * plain_attention(layer, states, added["layer"])
    parts = [
        Branch(added, scale=0.7),
        Branch(replaced, region, 1.5, mode="replace", gamma=0.3),
        Branch(second, other, mode="replace"),
    ]
    close(compose(layer, states, parts), layer.to_out[0](expected))
    close(compose(layer, states, parts[::-1]), layer.to_out[0](expected))


def test_masks_act_on_the_text_of_a_layer_with_branches(layer, states):
    pairs, table = keys_values(6), torch.rand(CELLS, 9) > 0.5
    logits = split(layer.to_q(states[0])) @ split(layer.to_k(states[1])).transpose(-1, -2) / 5**0.5
    text = logits.masked_fill(~table, float("-inf")).softmax(-1).nan_to_num(0) @ split(layer.to_v(states[1]))
    expected = text.transpose(1, 2).flatten(2) + plain_attention(layer, states, pairs["layer"])
    close(compose(layer, states, [KeyMask(table), Branch(pairs)]), layer.to_out[0](expected))


def test_overlapping_regions_share_or_compete(layer, states):
    pairs, regions = keys_values(6), torch.cat([cells(0, 1), cells(1, 2)])
    text = plain_attention(layer, states)
    one, two = (plain_attention(layer, states, pair) for pair in objects(pairs, 2))
    folded = compose(layer, states, [Branch(pairs, regions)])
    close(folded[:, 1], layer.to_out[0](text + (one + two) / 2)[:, 1])
    close(folded[:, 0], layer.to_out[0](text + one)[:, 0])
    joint = compose(layer, states, [Branch(pairs, regions, overlap="joint")])
    close(joint[:, 1], layer.to_out[0](text + plain_attention(layer, states, pairs["layer"]))[:, 1])
    close(joint[:, 2], layer.to_out[0](text + two)[:, 2])


def test_folded_equals_one_call_for_exclusive_regions(layer, states):
    pairs, regions = keys_values(6), torch.cat([cells(0, 1, 9), cells(2)])
    branch = Branch(pairs, regions)
    grid = branch._grid(CELLS, torch.device("cpu"))
    query, (key, value) = split(layer.to_q(states[0])), (split(x) for x in pairs["layer"])
    folded = Branch._attend_folded(query, key, value, 2, grid.weights) * grid.coverage
    close(compose(layer, states, [branch]), layer.to_out[0](plain_attention(layer, states) + folded))


def test_objects_are_attended_in_one_call(layer, states, monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    compose(layer, states, [Branch(keys_values(8), torch.cat([cells(n) for n in range(4)]))])
    assert len(calls) == 2  # text, and all four objects
    compose(layer, states, [Branch(keys_values(8), torch.cat([cells(n, n + 1) for n in range(4)]))])
    assert len(calls) == 4


def test_padded_objects_are_invisible(layer, states):
    pairs = keys_values(6)
    first_only = {"layer": tuple(x[:, :3] for x in pairs["layer"])}
    present = torch.tensor([[True, False], [False, False]])
    out = compose(layer, states, [Branch(pairs, present=present)])
    close(out[0], compose(layer, states, [Branch(first_only)])[0])
    close(out[1], compose(layer, states, [])[1])
    everyone = torch.tensor([True, True])
    close(compose(layer, states, [Branch(pairs, present=everyone)]), compose(layer, states, [Branch(pairs)]))
    region = torch.cat([cells(0, 1), cells(2)])
    close(
        compose(layer, states, [Branch(pairs, region, present=torch.tensor([True, False]))]),
        compose(layer, states, [Branch(first_only, cells(0, 1))]),
    )


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_rows_choose_the_guidance_half(layer, states, mode):
    pairs = keys_values(6, rows=1)
    out = compose(layer, states, [Branch(pairs, cells(0, 3), mode=mode, rows=slice(1, None))])
    both = compose(layer, states, [Branch(pairs, cells(0, 3), mode=mode)])
    close(out[0], compose(layer, states, [])[0])
    close(out[1], both[1])


def test_values_of_one_side_never_leak_as_nan(layer, states):
    key, value = keys_values(6)["layer"]
    branch = Branch({"layer": (key, torch.full_like(value, float("nan")))}, cells(3), mode="replace")
    out = compose(layer, states, [branch])
    assert torch.isnan(out[:, 3]).all() and torch.isfinite(out[:, [0, 1, 2, 4]]).all()


def test_two_replacing_branches_on_one_cell_conflict(layer, states):
    first, second = (Branch(keys_values(3), cells(*where), mode="replace") for where in ((0, 1), (1, 2)))
    with pytest.raises(PartConflictError, match="1 of 16 cells"):
        compose(layer, states, [first, second])
    second.regions = cells(2, 3)
    processor = ComposedAttnProcessor("layer", [first, second])
    processor(layer, states[0], encoder_hidden_states=states[1])
    second.regions = cells(0)  # found again although this grid was checked before
    with pytest.raises(PartConflictError):
        processor(layer, states[0], encoder_hidden_states=states[1])
    second.mode = "add"
    processor(layer, states[0], encoder_hidden_states=states[1])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_conflict_in_a_unet_leaves_no_trace(kind):
    unet, inputs = unet_and_inputs(kind)
    before = {name: module.processor for name, module in attention_layers(unet).items()}
    pairs = random_keys_values(unet, match_layers(unet, r"attn2$"), 2, 3)
    thirds = half_regions(3)
    first, second = (Branch(pairs, OneOf(thirds, [which]), mode="replace") for which in (0, 1))
    with use_parts(unet, [first, second]):
        predict(unet, inputs)
    second.regions = thirds
    with pytest.raises(PartConflictError, match='mode="replace"'), use_parts(unet, [first, second]):
        predict(unet, inputs)
    assert all(module.processor is before[name] for name, module in attention_layers(unet).items())


def test_replacing_everywhere_conflicts_unless_the_rows_differ():
    first, second = (Branch(keys_values(3), mode="replace", rows=rows) for rows in (slice(0, 1), slice(1, 2)))
    check_replacing_branches([first, second], CELLS, 2)
    second.rows = None
    with pytest.raises(PartConflictError, match="16 of 16 cells"):
        check_replacing_branches([first, second], CELLS, 2)
    second.regions = torch.zeros(3, 1, 4, 4)
    with pytest.raises(PartConflictError, match="3 batch rows"):
        check_replacing_branches([first, second], CELLS, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "swap"}, ObjectComposeError, "mode"),
        ({"overlap": "sum"}, ObjectComposeError, "overlap"),
        ({"keys_values": {}}, ObjectComposeError, "keys_values"),
        ({"keys_values": keys_values(6, rows=3)}, PartConflictError, r"\(2 \| 1"),
        ({"keys_values": keys_values(5), "num_objects": 2}, PartConflictError, "multiple of 2"),
        ({"regions": torch.ones(2, 3, 3)}, RegionError, "3 x 3"),
        ({"regions": torch.ones(2, 4, 4), "present": torch.ones(3).bool()}, RegionError, "3 objects"),
        ({"regions": torch.ones(3, 2, 4, 4), "present": torch.ones(2, 2).bool()}, RegionError, "in 3"),
        ({"regions": torch.ones(3, 2, 4, 4)}, PartConflictError, "1 or 2 batch rows"),
        ({"scale": torch.ones(3, 2)}, PartConflictError, "1 or 2 batch rows"),
        ({"regions": torch.ones(2, 4, 4), "scale": torch.ones(3)}, PartConflictError, "agree on the objects"),
        ({"regions": torch.ones(2, 4, 4), "num_objects": 3}, PartConflictError, "agree on the objects"),
        ({"rows": slice(2, None)}, PartConflictError, "some of the 2 batch rows"),
    ],
)
def test_what_does_not_fit_is_refused(layer, states, arguments, error, message):
    with pytest.raises(error, match=message):
        compose(layer, states, [Branch(**{"keys_values": keys_values(6), **arguments})])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_parts_of_two_methods_stack_in_a_unet(kind):
    """The result of all parts differs from any subset's, and does not depend on the order of the methods."""
    unet, inputs = unet_and_inputs(kind)
    cross = match_layers(unet, r"attn2$")
    stripes = half_regions(3)
    first = [Branch(random_keys_values(unet, cross, 2, 4), OneOf(stripes, [0, 1]), mode="replace")]
    second = [
        RegionKeyMask(OneOf(stripes, [1, 2])),
        KeyMask(torch.arange(11) != 4),
        Branch(random_keys_values(unet, cross, 1, 5, seed=9), scale=0.5, rows=slice(1, None)),
        TokenMapProbe([4, 5]),
    ]
    outputs = []
    for parts in ([], first, second, first + second, second + first):
        with use_parts(unet, parts):
            outputs.append(predict(unet, inputs))
    close(outputs[3], outputs[4])
    assert torch.isfinite(outputs[3]).all()
    for other in outputs[:3]:
        assert (outputs[3] - other).abs().max() > 1e-3
    assert all(maps[..., 0].eq(0).all() for maps in second[-1].maps.values())


def test_gradients_reach_keys_values_and_scale(layer, states):
    pairs = keys_values(6)
    tensors = [*pairs["layer"], torch.ones(2)]
    for tensor in tensors:
        tensor.requires_grad_()
    regions = torch.cat([cells(0, 1), cells(2)])
    compose(layer, states, [Branch(pairs, regions, tensors[2])]).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in tensors)
