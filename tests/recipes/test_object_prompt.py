"""The ObjectPrompt recipe: its figures by hand, its cost figures, and the whole of it at its smallest size."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from benchmarks import object_prompt_cost
from benchmarks.recipes import object_prompt
from benchmarks.recipes.object_prompt_metrics import GUIDANCE_ARMS, STREAM_ARMS, metrics_of_rows
from benchmarks.recipes.object_prompt_sheet import save_scatter
from objectcompose.evaluation.composition_metrics import WORLD_SPREADS
from objectcompose.pipelines.token_refinement import REFINEMENT_STEPS, refinement_indices


def outcome(case, arm, label, identity, *, place=0, number=0, kind="seen", count=2, **values):
    """One object of one picture, its floor at 0.2."""
    return {
        "case": case, "arm": arm, "set": label, "round": number, "object": place, "kind": kind, "count": count,
        "segment": 0, "dino": identity / 2, "clip": 0.5, "identity": identity, "identity_floor": 0.2,
        "matching_accuracy": float(identity > 0.5), "category": 1.0, "copies": 0, "overlap": 0.0, **values,
    }  # fmt: skip


def varied(arm, label, identity, spread):
    """Two pictures of a set whose object moves by so many of the world's own spreads."""
    away = spread * WORLD_SPREADS["centre"]
    return [
        outcome("streams", arm, label, identity, number=number, x=0.5 + sign * away, y=0.5)
        for number, sign in enumerate((-1, 1))
    ]


def test_streams_by_hand():
    """Fine keeps 0.6, mixed 0.54, coarse 0.1; coarse varies by 1.0, mixed by 0.8, fine by 0.2 of the world."""
    rows = []
    for shift, label in ((0.0, "a"), (0.01, "b"), (-0.01, "c")):
        rows += varied("fine", label, 0.8 + shift, 0.2) + varied("coarse", label, 0.3 + shift / 2, 1.0 + shift)
        rows += varied("mixed", label, 0.74 + shift, 0.8)
    metrics = metrics_of_rows(rows)
    assert metrics["identity.fine"] == pytest.approx(0.6) and metrics["identity.fine.lo"] < 0.6
    assert metrics["identity.mixed_seen"] == pytest.approx(0.54) and "identity.mixed_unseen" not in metrics
    assert metrics["diversity.coarse"] == pytest.approx(1.0) and metrics["diversity.fine"] == pytest.approx(0.2)
    assert metrics["diversity_centre.mixed"] == pytest.approx(0.8 * WORLD_SPREADS["centre"])
    assert metrics["identity_diff.coarse_fine"] == pytest.approx(-0.5)
    assert metrics["trade_off.identity"] is True and metrics["trade_off.diversity"] is True
    assert metrics["kept.identity"] == pytest.approx(0.9) and metrics["kept.diversity"] == pytest.approx(0.75)


def test_no_trade_off_is_said_and_nothing_is_kept_of_it():
    rows = []
    for number, label in enumerate("abcd"):
        rows += varied("fine", label, 0.8, 0.5 + 0.2 * (number % 2)) + varied(
            "coarse", label, 0.8, 0.7 - 0.2 * (number % 2)
        )
        rows += varied("mixed", label, 0.8, 0.6)
    metrics = metrics_of_rows(rows)
    assert metrics["trade_off.diversity"] is False and metrics["trade_off.identity"] is False
    assert "kept.diversity" not in metrics


def test_guidance_by_hand():
    rows = []
    for arm, gain in (("unguided", 0.0), ("guided", 0.1)):
        rows += [
            outcome("guidance", arm, "a", 0.5 + gain, overlap=0.3), outcome("guidance", arm, "b", 0.7 + gain, count=5),
            outcome("guidance", arm, "c", 0.7 + gain, count=4, kind="unseen"),
            outcome("guidance", arm, "e", 0.4 + 3 * gain, count=5, kind="look-alikes"),
            outcome("guidance", arm, "f", 0.4 + 3 * gain, count=5, kind="look-alikes"),
            outcome("guidance", arm, "g", 0.3, kind="occluded"), outcome("guidance", arm, "h", 0.5, kind="occluded"),
        ]  # fmt: skip
    metrics = metrics_of_rows(rows)
    assert metrics["identity.unguided"] == pytest.approx(1.3 / 3), "look-alikes and occluded ones stand apart"
    assert metrics["identity.guided_n5"] == pytest.approx(0.6) and metrics["identity.guided_n2"] == pytest.approx(0.4)
    assert metrics["identity.unguided_unseen"] == pytest.approx(0.5)
    assert metrics["identity.unguided_occluded"] == pytest.approx(0.2)
    assert metrics["identity.unguided_overlapping"] == pytest.approx(0.3)
    assert metrics["dinocomp.unguided"] == pytest.approx(1.9 / 6)
    assert metrics["matching_accuracy.distinct"] == pytest.approx(200 / 3)
    assert metrics["matching_accuracy.distinct5"] == 100 and metrics["matching_accuracy.lookalike5"] == 0
    assert metrics["matching_accuracy.lookalike5_guided"] == 100
    assert metrics["identity_diff.guided_unguided.lo"] == pytest.approx(0.1)
    assert metrics["identity_diff.guided_unguided_n2to4"] == pytest.approx(0.1)
    assert metrics["identity_diff.guided_unguided_lookalike"] == pytest.approx(0.3)
    assert metrics["identity_diff.guided_unguided_occluded"] == 0


def test_seconds_leave_segmentation_out():
    times = [
        {"case": "seconds", "arm": "masks", "pair": pair, "seconds_a": 3.0, "seconds_b": 1.0, "seconds_segment": 0.5}
        for pair in range(7)
    ]
    metrics = metrics_of_rows(times)
    assert metrics["seconds_ratio.masks"] == 2.5 and metrics["seconds_ratio.masks_segmentation"] == 0.5
    assert metrics["seconds_ratio.masks.valid"] is True


def test_all_arms_have_the_same_budget(tmp_path):
    for size in object_prompt.SIZES.values():
        arms = object_prompt.build_arms(size, tmp_path)
        assert tuple(arms) == STREAM_ARMS and {arm.options["streams"] for arm in arms.values()} == {*STREAM_ARMS}
        assert len({arm.candidates for arm in map(_hashable, arms.values())}) == 1
        others = [{**arm.options, "streams": ""} for arm in arms.values()]
        assert all(one == others[0] for one in others)
    assert set(object_prompt.GUIDANCE_OF_ARM) == {*GUIDANCE_ARMS}
    with pytest.raises(SystemExit, match="no-arm"):
        object_prompt.Recipe("smoke", tmp_path, ["no-arm"])


def _hashable(arm):
    return type(arm)(arm.name, arm.train, {}, tuple(tuple(sorted(one.items())) for one in arm.candidates))


def test_the_scatter_plot_shows_each_arm(tmp_path):
    few = {"diversity.mixed": 0.8, "identity.mixed": 0.3, "identity.mixed.lo": 0.2, "identity.mixed.hi": 0.35}
    more = {**few, "diversity.coarse": 1.0, "identity.coarse": 0.1}
    pictures = [Image.open(save_scatter(one, tmp_path / f"{len(one)}.png")) for one in (few, more)]
    assert pictures[0].size == pictures[1].size and pictures[0].tobytes() != pictures[1].tobytes()


# ---- cost


def test_cost_is_a_sum_of_parts():
    """A guided call of 3 + 3 steps, one update in the second step of the second run, segmentation between the runs."""
    plain = object_prompt_cost.plain_parts([1.5, 2.5, 3.5, 3.7])
    assert plain == pytest.approx({"plain_step": 1.0, "plain_once": 0.7})
    ends = [1.6, 2.7, 3.8, 6.0, 8.4, 9.6, 9.9]  # prepare 0.5, step 1.1; segment 0.6, match 0.4, step 1.2, update 1.2
    parts = object_prompt_cost.guided_parts(ends, 0.6)
    assert parts == pytest.approx(
        {"first_step": 1.1, "prepare": 0.5, "second_step": 1.2, "update": 1.2, "match": 0.4, "decode": 0.3,
         "segmentation": 0.6}
    )  # fmt: skip
    rows = [{"case": "time", "pair": pair, **plain, **parts} for pair in range(7)]
    peaks = zip(object_prompt_cost.MEMORY_CASES, (100, 500, 200), strict=True)
    rows += [{"case": "memory", "side": side, "device": "cpu", "extra_bytes": peak} for side, peak in peaks]
    rows += [{"case": "memory_full", "objects": count, "extra_bytes": peak} for count, peak in ((0, 100), (8, 109))]
    metrics = object_prompt_cost.metrics_of_rows(rows)
    assert metrics["time_ratio.unguided_n4"] == pytest.approx((0.8 + 20 * 1.1) / 20.7)
    assert metrics["time_ratio.guided_exact_n4"] == pytest.approx((0.8 + 22 + 0.4 + 24 + 7 * 1.2) / 20.7)
    assert metrics["time_ratio.guided_fast_n4"] == pytest.approx((0.8 + 11 + 0.4 + 24 + 7 * 1.2) / 20.7)
    assert metrics["time_ratio.segmentation_n4"] == pytest.approx(0.6 / 20.7)
    assert metrics["memory_ratio.unguided_n8"] == pytest.approx(1.09)
    assert metrics["memory_ratio.guided"] == 5 and metrics["memory_ratio.guided_checkpointed"] == 2
    assert metrics["time_ratio.guided_exact_n4.valid"] is True


def test_the_timed_update_lies_in_the_second_step():
    """On which the sums rely."""
    scheduler = object_prompt_cost.measuring_scheduler()
    scheduler.set_timesteps(object_prompt_cost.TIMED_STEPS)
    assert refinement_indices(scheduler.timesteps, object_prompt_cost.TIMED_UPDATES) == [1]
    scheduler.set_timesteps(object_prompt_cost.STEPS)
    assert len(refinement_indices(scheduler.timesteps, REFINEMENT_STEPS)) == object_prompt_cost.UPDATES


# ---- the whole of it


@pytest.mark.slow
def test_smoke_the_committed_adapter_keeps_identities(tmp_path):
    """Painted objects are liker to their pictures than to others of their category, and than what text alone gives."""
    assert object_prompt.main(["--preset", "smoke", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    metrics = report["metrics"]
    assert metrics["identity.unguided.lo"] > 0 and metrics["identity.guided.lo"] > 0
    assert metrics["identity_diff.unguided_text.lo"] > 0
    assert all(f"{name}.{arm}" in metrics for arm in STREAM_ARMS for name in ("identity", "diversity"))
    assert all(f"{name}.{arm}_n3" in metrics for arm in GUIDANCE_ARMS for name in ("dinocomp", "clipcomp", "identity"))
    assert (tmp_path / "sheet.png").is_file() and (tmp_path / "scatter.png").is_file()
