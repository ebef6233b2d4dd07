"""The cost of LocRef: its figures by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.locref_cost import COUNTED, ENCODER_SHARE, TIMED, metrics_of_rows, row_of_objects
from benchmarks.measure import flops, measuring_encoder, measuring_inputs, measuring_unet
from objectcompose.pipelines.reference_layout import reference_regions


def test_figures_by_hand():
    rows = [
        {"case": "time", "round": number, "objects": count, "seconds": (2 + number) * (1 + 0.01 * count)}
        for number in range(7)
        for count in TIMED
    ]
    rows += [
        {"case": "flops", "objects": count, "flops": 1000 + (20 + 5 * count if count else 0)} for count in COUNTED
    ]
    rows += [
        {"case": "memory", "objects": 8, "device": "cpu", "extra_bytes": 106, "loaded_bytes": 300},
        {"case": "memory", "objects": 0, "device": "cpu", "extra_bytes": 100, "loaded_bytes": 200},
    ]
    metrics = metrics_of_rows(rows)
    assert metrics["time_ratio.n4"] == pytest.approx(1.04) and metrics["time_ratio.n20"] == pytest.approx(1.2)
    assert metrics["time_growth"] == pytest.approx(0.01) and metrics["time_growth.start"] == pytest.approx(1.0)
    assert metrics["time_ratio.n4.valid"] and metrics["time_ratio.n4.iqr"] == pytest.approx(0, abs=1e-9)
    assert metrics["flops_ratio.n20"] == pytest.approx(1.12) and metrics["flops_growth"] == pytest.approx(0.005)
    assert metrics["flops_growth.start"] == pytest.approx(1.02)
    assert metrics["memory_ratio.n8"] == pytest.approx(1.06) and metrics["memory_loaded_ratio.n8"] == 1.5


def test_what_is_measured_is_what_the_protocol_says():
    for count in TIMED[1:]:
        regions = reference_regions(row_of_objects(count), (64, 64)).at((64, 64))
        assert regions.shape[0] == count and (regions.sum((1, 2)) > 0).all()


@pytest.mark.slow
def test_the_encoder_has_the_share_of_the_real_one():
    unet, encoder = measuring_unet(), measuring_encoder()
    with torch.no_grad():
        picture = flops(lambda: encoder(torch.zeros(1, 3, 224, 224)))
        forward = flops(lambda: unet(**measuring_inputs(unet, batch_size=1)))
    assert picture / forward == pytest.approx(ENCODER_SHARE, rel=0.05)
