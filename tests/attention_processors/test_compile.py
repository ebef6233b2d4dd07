"""A UNet with parts traces as one graph."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.compiled import is_compiled, prepare_parts
from objectcompose.attention_processors.install import match_layers, use_parts
from objectcompose.attention_processors.mask import KeyMask, RegionKeyMask
from objectcompose.attention_processors.probe import RegionMassProbe, TokenMapProbe
from objectcompose.errors import PartConflictError
from tests.attention_processors.helpers import KINDS, half_regions, predict, random_keys_values, unet_and_inputs


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_graph_breaks_and_no_recompilation(kind):
    torch._dynamo.reset()
    unet, inputs = unet_and_inputs(kind)
    cross = match_layers(unet, r"attn2$")
    scale = torch.tensor(0.5)
    regions = half_regions()

    def make_parts():
        return [
            KeyMask(torch.arange(11) != 4),
            RegionKeyMask(regions, layers=r"mid_block.*attn1$"),
            Branch(random_keys_values(unet, cross, 2, 4), regions, scale),
            TokenMapProbe([1, 2]),
            RegionMassProbe(regions),
        ]

    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    eager_parts, parts = make_parts(), make_parts()
    with use_parts(unet, eager_parts):
        expected = predict(unet, inputs)
    compiled = torch.compile(unet, backend=count, fullgraph=True)
    with use_parts(compiled, parts):  # nothing has been built from the regions yet
        prepare_parts(compiled, inputs["sample"])
        torch.testing.assert_close(predict(compiled, inputs), expected, atol=1e-5, rtol=1e-5)
        for name, values in parts[3].maps.items():
            torch.testing.assert_close(values, eager_parts[3].maps[name], atol=1e-6, rtol=1e-5)
        for probe in parts[3:]:
            probe.clear()  # as every step does: whether a map is there already is part of what is compiled
        scale.fill_(0.9)
        changed = predict(compiled, inputs)
    assert len(graphs) == 1
    assert not torch.allclose(changed, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("part", ["model", "block"])
def test_conflicts_are_found_before_a_compiled_pass(part):
    unet, inputs = unet_and_inputs("sd1")
    cross = match_layers(unet, r"attn2$")
    branches = [Branch(random_keys_values(unet, cross, 2, 4), half_regions(), mode="replace") for _ in range(2)]
    with use_parts(unet, branches):
        assert not is_compiled(unet)
        if part == "model":
            unet = torch.compile(unet, backend="eager")
        else:
            unet.mid_block.compile(backend="eager")
        assert is_compiled(unet)
        with pytest.raises(PartConflictError, match="one cell"):
            prepare_parts(unet, inputs["sample"])
