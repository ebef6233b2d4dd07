"""A UNet with parts traces as one graph."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.install import match_layers, use_parts
from objectcompose.attention_processors.mask import KeyMask, RegionKeyMask
from objectcompose.attention_processors.probe import RegionMassProbe, TokenMapProbe
from tests.attention_processors.helpers import KINDS, half_regions, predict, random_keys_values, unet_and_inputs


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_graph_breaks_and_no_recompilation(kind):
    torch._dynamo.reset()
    unet, inputs = unet_and_inputs(kind)
    cross = match_layers(unet, r"attn2$")
    scale = torch.tensor(0.5)
    parts = [
        KeyMask(torch.arange(11) != 4),
        RegionKeyMask(half_regions(), layers=r"mid_block.*attn1$"),
        Branch(random_keys_values(unet, cross, 2, 4), half_regions(), scale),
        TokenMapProbe([1, 2]),
        RegionMassProbe(half_regions()),
    ]
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    with use_parts(unet, parts):
        expected = predict(unet, inputs)  # also builds what depends on the regions' values
        maps = dict(parts[3].maps)
        compiled = torch.compile(unet, backend=count, fullgraph=True)
        torch.testing.assert_close(predict(compiled, inputs), expected, atol=1e-5, rtol=1e-5)
        for name, values in parts[3].maps.items():
            torch.testing.assert_close(values, maps[name], atol=1e-6, rtol=1e-5)
        scale.fill_(0.9)
        changed = predict(compiled, inputs)
    assert len(graphs) == 1
    assert not torch.allclose(changed, expected)
    torch._dynamo.reset()
