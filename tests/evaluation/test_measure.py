"""The measuring tools, on calls whose cost is known."""

import time

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import flop_registry

from benchmarks.measure import (
    flops,
    measuring_inputs,
    measuring_unet,
    paired_ratio,
    peak_memory,
    prepare_plain_forward,
    ratio_of_pairs,
)


MIB = 2**20


def allocate(mebibytes):
    """For `peak_memory`: a call that touches this much memory."""
    return lambda: np.ones(mebibytes * MIB, dtype=np.uint8).sum()


def fail():
    """For `peak_memory`: what does not work."""
    raise OSError("no such thing")


def test_ratio_of_pairs_alternates_and_is_the_known_one():
    order = []

    def side(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    measured = paired_ratio(side("a", 0.04), side("b", 0.02), pairs=7, warmup=2)
    assert "".join(order) == "abab" + "abbaabbaabbaab"
    assert measured.ratio == pytest.approx(2.0, rel=0.2)
    assert len(measured.rows()) == 7 and measured.rows()[0]["seconds_a"] == measured.seconds_a[0]


def test_unsteady_ratio_is_invalid():
    steady = ratio_of_pairs([2.0] * 7, [1.0] * 7)
    assert (steady.ratio, steady.iqr, steady.valid) == (2.0, 0.0, True)
    unsteady = ratio_of_pairs([1, 2, 3, 4, 5, 6, 7], [1.0] * 7)
    assert (unsteady.ratio, unsteady.iqr, unsteady.valid) == (4.0, 3.0, False)


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio(int, int, pairs=3)


def test_flops_of_products():
    first, second = torch.ones(3, 5), torch.ones(5, 7)
    assert flops(lambda: first @ second) == 2 * 3 * 5 * 7


@pytest.mark.skipif(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry,
    reason="this torch counts no attention on CPUs (benchmarks need a newer one)",
)
def test_flops_of_attention():
    query = torch.ones(1, 2, 11, 8)
    attention = flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    assert attention == 2 * (2 * 2 * 11 * 11 * 8)


def test_peak_memory_of_a_known_allocation():
    if torch.cuda.is_available():
        pytest.skip("on CUDA only device memory is counted")
    memory = peak_memory("tests.evaluation.test_measure:allocate", mebibytes=200)
    assert memory.device == "cpu"
    assert 195 * MIB < memory.extra_bytes < 215 * MIB < memory.loaded_bytes


def test_failed_measurement_says_why():
    with pytest.raises(RuntimeError, match="no such thing"):
        peak_memory("tests.evaluation.test_measure:fail")


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_measuring_unet_has_the_layers_of_stable_diffusion(kind):
    unet = measuring_unet(kind)
    assert len(unet.attn_processors) == 32
    assert sum(parameter.numel() for parameter in unet.parameters()) < 30e6
    inputs = measuring_inputs(unet, batch_size=1, side=16, num_tokens=5)
    with torch.no_grad():
        assert unet(**inputs).sample.shape == (1, 4, 16, 16)
    heads = [unet.get_submodule(name.removesuffix(".processor")).heads for name in unet.attn_processors]
    assert set(heads) == ({8} if kind == "sd1" else {5, 10, 20})


def test_measuring_unet_leaves_the_generator_alone():
    before = torch.get_rng_state()
    measuring_unet("sd1")
    assert torch.equal(before, torch.get_rng_state())
    assert prepare_plain_forward(side=8, batch_size=1)().shape == (1, 4, 8, 8)


@pytest.mark.parametrize("options", [{"kind": "sd9"}, {"width": 41}])
def test_unknown_unets_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        measuring_unet(**options)
