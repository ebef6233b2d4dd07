"""LocRef's fusion against the paper's formula, object by object with loops and whole softmax tables."""

from __future__ import annotations

import math

import pytest
import torch

from objectcompose.attention_processors.branch import check_replacing_branches
from objectcompose.attention_processors.install import attention_layers, match_layers, use_parts
from objectcompose.attention_processors.reference_fusion import FusionSettings, fusion_parts
from objectcompose.attention_processors.regions import RegionPyramid, RegionPyramidBatch, grids_of
from objectcompose.errors import PartConflictError
from tests.attention_processors.helpers import predict, random_keys_values, unet_and_inputs


TOKENS = 3  # of one picture
LATENTS = (12, 20)
DEFAULTS = FusionSettings()
BOXES = {
    "apart": [((0.0, 0.0, 0.4, 0.5), 0), ((0.55, 0.3, 0.9, 1.0), 0)],
    "smaller in front": [((0.1, 0.1, 0.9, 0.9), 0), ((0.3, 0.3, 0.7, 0.7), 0)],
    "order decides": [((0.0, 0.0, 0.8, 0.8), 2), ((0.2, 0.2, 1.0, 1.0), 1), ((0.5, 0.0, 1.0, 0.6), 3)],
    "everywhere": [((0.0, 0.0, 1.0, 1.0), 0)],
    "nothing": [],
}


def owners_of(boxes, grid):
    """Index of the box in front in each cell, -1 without one: all cells that a box touches, by loops."""
    height, width = grid
    owners = torch.full(grid, -1)
    for row in range(height):
        for column in range(width):
            found = []
            for index, ((x0, y0, x1, y1), order) in enumerate(boxes):
                rows = range(math.floor(y0 * height + 1e-9), math.ceil(y1 * height - 1e-9))
                columns = range(math.floor(x0 * width + 1e-9), math.ceil(x1 * width - 1e-9))
                if row in rows and column in columns:
                    found.append((-order, (x1 - x0) * (y1 - y0), index))
            if found:
                owners[row, column] = min(found)[2]
    return owners


def attend(attn, query, key, value):
    """Softmax tables and all, one batch row: `(Q, C)`, `(K, C)`, `(K, C)`."""
    split = [x.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for x in (query, key, value)]
    table = (split[0] @ split[1].transpose(1, 2) / split[0].shape[-1] ** 0.5).softmax(-1)
    return (table @ split[2]).transpose(0, 1).flatten(1)


def naive_layer(attn, states, text, composite, references, boxes, grid, settings):
    """`HS = T * BM + (gamma * T + s_ci * CI + s_ri * sum_i M_i * Attn(Q, r_i)) * FM`, one batch row."""
    query = attn.to_q(states)
    fused = attend(attn, query, attn.to_k(text), attn.to_v(text))
    owners = owners_of(boxes, grid).flatten()
    is_inside = (owners >= 0)[:, None]
    inside = settings.gamma * fused
    if composite is not None:
        inside = inside + settings.ci_scale * attend(attn, query, *composite)
    for index in range(len(boxes)):
        own = [x[index * TOKENS : (index + 1) * TOKENS] for x in references]
        inside = inside + settings.ri_scale * (owners == index)[:, None] * attend(attn, query, *own)
    fused = torch.where(is_inside, inside, fused)
    return attn.to_out[0](fused)


def check_against_naive(scenes, settings=DEFAULTS, with_composite=True, tolerance=1e-5):
    """All cross-attention layers on all grids of non-square latents; one scene per batch row."""
    unet, inputs = unet_and_inputs("sd2", len(scenes), LATENTS)
    layers = match_layers(unet, "", kind="cross")
    regions = [
        RegionPyramid([box for box, _ in scene], LATENTS, "cover", [order for _, order in scene], exclusive=True)
        for scene in scenes
    ]
    slots = max(len(scene) for scene in scenes)
    keys_values = {"references": random_keys_values(unet, layers, len(scenes), slots * TOKENS, seed=1)}
    if with_composite:
        keys_values["composite"] = random_keys_values(unet, layers, len(scenes), TOKENS, seed=2)
    parts = fusion_parts(keys_values, RegionPyramidBatch(regions), settings)
    modules = attention_layers(unet)
    for name in layers:
        attn = modules[name]
        for grid in grids_of(*LATENTS, 3):
            states = torch.randn(len(scenes), grid[0] * grid[1], attn.to_q.in_features)
            text = inputs["encoder_hidden_states"]
            with torch.no_grad(), use_parts(unet, parts):
                found = attn(states, encoder_hidden_states=text)
            for row, scene in enumerate(scenes):
                composite = [x[row] for x in keys_values["composite"][name]] if with_composite else None
                references = [x[row] for x in keys_values["references"][name]]
                with torch.no_grad():
                    wanted = naive_layer(attn, states[row], text[row], composite, references, scene, grid, settings)
                torch.testing.assert_close(found[row], wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", [name for name in BOXES if name != "nothing"])
def test_equals_the_formula_object_by_object(name):
    check_against_naive([BOXES[name]])


def test_equals_the_formula_in_batches_of_different_layouts():
    check_against_naive([BOXES["apart"], BOXES["order decides"], BOXES["nothing"], BOXES["everywhere"]])


@pytest.mark.parametrize(
    "settings",
    [FusionSettings(gamma=1.0, ci_scale=0.3, ri_scale=0.7), FusionSettings(gamma=0.5), FusionSettings(0.0, 0.0)],
)
@pytest.mark.parametrize("with_composite", [True, False])
def test_strengths_and_gamma(settings, with_composite):
    check_against_naive([BOXES["order decides"], BOXES["nothing"]], settings, with_composite)


def test_without_boxes_a_row_is_the_bases_bit_for_bit():
    unet, inputs = unet_and_inputs("sd1", 2, (16, 16))
    layers = match_layers(unet, "", kind="cross")
    keys_values = {
        "references": random_keys_values(unet, layers, 2, TOKENS, seed=1),
        "composite": random_keys_values(unet, layers, 2, TOKENS, seed=2),
    }
    regions = [RegionPyramid([], (16, 16)), RegionPyramid([(0.2, 0.2, 0.8, 0.8)], (16, 16), "cover")]
    parts = fusion_parts(keys_values, RegionPyramidBatch(regions), FusionSettings())
    with torch.no_grad():
        plain = predict(unet, inputs)
        with use_parts(unet, parts):
            fused = predict(unet, inputs)
    assert torch.equal(fused[0], plain[0]) and not torch.allclose(fused[1], plain[1], atol=1e-3)


def fused_layer(keys_values, regions, states, text, unet, name, settings=DEFAULTS, **options):
    parts = fusion_parts(keys_values, regions, settings, **options)
    with torch.no_grad(), use_parts(unet, parts):
        return attention_layers(unet)[name](states, encoder_hidden_states=text)


@pytest.fixture
def layer():
    """One layer at a grid of 12 x 20 with two overlapping boxes: keys, values, regions and inputs of one row."""
    unet, inputs = unet_and_inputs("sd1", 1, LATENTS)
    name = match_layers(unet, r"down_blocks\.0", kind="cross")[0]
    boxes, orders = zip(*BOXES["order decides"][:2], strict=True)
    regions = RegionPyramidBatch([RegionPyramid(boxes, LATENTS, "cover", orders, exclusive=True)])
    keys_values = {
        "references": random_keys_values(unet, [name], 1, 2 * TOKENS, seed=1),
        "composite": random_keys_values(unet, [name], 1, TOKENS, seed=2),
    }
    states = torch.randn(1, LATENTS[0] * LATENTS[1], attention_layers(unet)[name].to_q.in_features)
    return {
        "unet": unet, "name": name, "regions": regions, "keys_values": keys_values,
        "states": states, "text": inputs["encoder_hidden_states"],
    }  # fmt: skip


def test_a_reference_reaches_its_own_cells_only(layer):
    before = fused_layer(**layer)
    key, value = layer["keys_values"]["references"][layer["name"]]
    changed = torch.cat([value[:, :TOKENS], torch.randn_like(value[:, TOKENS:])], dim=1)
    layer["keys_values"]["references"] = {layer["name"]: (key, changed)}
    moved = (fused_layer(**layer) != before).any(-1)[0].reshape(LATENTS)
    assert torch.equal(moved, owners_of(BOXES["order decides"][:2], LATENTS) == 1)


def test_scale_of_one_reference(layer):
    scales = torch.tensor([[1.0, 0.25]])
    found = fused_layer(**layer, scales=scales)
    key, value = layer["keys_values"]["references"][layer["name"]]
    scaled = torch.cat([value[:, :TOKENS], 0.25 * value[:, TOKENS:]], dim=1)
    layer["keys_values"]["references"] = {layer["name"]: (key, scaled)}
    torch.testing.assert_close(found, fused_layer(**layer), atol=1e-6, rtol=0)


def test_without_region_mask_all_references_reach_all_regions(layer):
    """The ablation: one softmax over all references, wherever there is any region."""
    settings = FusionSettings(region_mask=False)
    found = fused_layer(**layer, settings=settings)[0]
    attn, name = attention_layers(layer["unet"])[layer["name"]], layer["name"]
    with torch.no_grad():
        query = attn.to_q(layer["states"][0])
        text = attend(attn, query, attn.to_k(layer["text"][0]), attn.to_v(layer["text"][0]))
        both = sum(attend(attn, query, *(x[0] for x in kv[name])) for kv in layer["keys_values"].values())
        inside = (owners_of(BOXES["order decides"][:2], LATENTS).flatten() >= 0)[:, None]
        wanted = attn.to_out[0](torch.where(inside, both, text))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_padded_slots_of_coordinates_are_never_seen(layer):
    """One composite token per object: a row with fewer objects equals that row alone."""
    one = RegionPyramid([(0.0, 0.0, 0.8, 0.8)], LATENTS, "cover", exclusive=True)
    two = layer["regions"].pyramids[0]
    unet, name = layer["unet"], layer["name"]
    keys_values = {
        "references": random_keys_values(unet, [name], 2, 2 * TOKENS, seed=3),
        "composite": random_keys_values(unet, [name], 2, 2, seed=4),
    }
    text, states = layer["text"].repeat(2, 1, 1), layer["states"].repeat(2, 1, 1)
    batch = {"unet": unet, "name": name, "composite_per_object": True}
    together = fused_layer(keys_values, RegionPyramidBatch([one, two]), states, text, **batch)
    counts = {"references": TOKENS, "composite": 1}
    alone = {kind: {name: tuple(x[:1, : counts[kind]] for x in layers[name])} for kind, layers in keys_values.items()}
    found = fused_layer(alone, RegionPyramidBatch([one]), states[:1], text[:1], **batch)
    torch.testing.assert_close(together[:1], found, atol=1e-6, rtol=0)


def test_more_regions_than_cells_share_the_coarse_grid():
    """Three boxes on a grid of one cell: the cell is theirs in equal parts, each with a softmax of its own."""
    boxes = [(0.0, 0.0, 0.3, 0.3), (0.4, 0.4, 0.6, 0.6), (0.7, 0.7, 1.0, 1.0)]
    unet, inputs = unet_and_inputs("sd1", 1, (4, 4))
    name = match_layers(unet, "mid_block", kind="cross")[0]
    attn = attention_layers(unet)[name]
    keys_values = {
        "references": random_keys_values(unet, [name], 1, 3 * TOKENS, seed=1),
        "composite": random_keys_values(unet, [name], 1, TOKENS, seed=2),
    }
    states, text = torch.randn(1, 1, attn.to_q.in_features), inputs["encoder_hidden_states"]
    regions = RegionPyramidBatch([RegionPyramid(boxes, (4, 4), "cover", exclusive=True)])
    found = fused_layer(keys_values, regions, states, text, unet, name)
    with torch.no_grad():
        query = attn.to_q(states[0])
        key, value = (x[0] for x in keys_values["references"][name])
        each = [
            attend(attn, query, key[n * TOKENS : (n + 1) * TOKENS], value[n * TOKENS : (n + 1) * TOKENS])
            for n in range(3)
        ]
        composite = attend(attn, query, *(x[0] for x in keys_values["composite"][name]))
        wanted = attn.to_out[0](composite + sum(each) / 3)
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=0)


def test_both_halves_also_serve_the_conditional_half_alone(layer):
    """Keys, values and regions for `[uncond, cond]`; guidance of other methods runs the second half only."""
    unet, name = layer["unet"], layer["name"]
    keys_values = {
        "references": random_keys_values(unet, [name], 2, 2 * TOKENS, seed=3),
        "composite": random_keys_values(unet, [name], 2, TOKENS, seed=4),
    }
    regions = RegionPyramidBatch(layer["regions"].pyramids * 2)
    states, text = torch.randn(2, *layer["states"].shape[1:]), layer["text"].repeat(2, 1, 1)
    scales = torch.tensor([[1.0, 1.0], [0.5, 2.0]])
    whole = fused_layer(keys_values, regions, states, text, unet, name, scales=scales)
    half = fused_layer(keys_values, regions, states[1:], text[1:], unet, name, scales=scales)
    torch.testing.assert_close(whole[1:], half, atol=1e-6, rtol=0)


def test_another_replacing_branch_on_the_same_cells_is_refused(layer):
    parts = [fusion_parts(layer["keys_values"], layer["regions"], FusionSettings())[0] for _ in range(2)]
    with pytest.raises(PartConflictError, match="replace"):
        check_replacing_branches(parts, LATENTS[0] * LATENTS[1], batch_size=1)
    with torch.no_grad(), use_parts(layer["unet"], parts), pytest.raises(PartConflictError, match="replace"):
        attention_layers(layer["unet"])[layer["name"]](layer["states"], encoder_hidden_states=layer["text"])
