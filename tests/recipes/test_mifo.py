"""The MIFO recipe: its figures by hand, its parts, and the whole of it at its smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.mifo import metrics_of_rows as mifo_cost_metrics
from benchmarks.recipes import mifo
from benchmarks.recipes.mifo_metrics import metrics_of_rows
from benchmarks.recipes.mifo_parts import ATTENTION_LOSSES, CONTROLS, LEARNING_ARMS, chosen_scenes, parts_of
from objectcompose.attention_processors.box_control import BoxControlOptions
from objectcompose.pipelines.mifo_control import box_control_options
from objectcompose.training.mifo_losses import MIFOLossOptions


def picture(case, arm, scene, own, other=0.1, kind="alike", leakage=0.2, prompt=0):
    table = [[own, other], [other, own]]
    return {
        "case": case, "arm": arm, "scene": scene, "kind": kind, "prompt": f"{scene}-{prompt}", "round": 0,
        "sim_c": 0.5, "dino": table, "identity": table, "background": [0.0, 0.1], "leakage": leakage,
        "placed": [True, False],
    }  # fmt: skip


def attention(arm, scene, inside, noise="200-0"):
    return {"case": "attention", "arm": arm, "scene": scene, "kind": "alike", "noise": noise, "instance": 0,
            "inside": inside}  # fmt: skip


def test_figures_are_named_by_arm_and_kind_and_paired():
    rows = [
        *(picture("learning", "reward", scene, own) for scene, own in (("a", 0.4), ("b", 0.6))),
        *(picture("learning", "reward_penalty", scene, own) for scene, own in (("b", 0.9), ("a", 0.7))),
        picture("learning", "reward", "c", 0.5, kind="unlike"),
        picture("learning", "reward_penalty", "c", 0.4, kind="unlike"),
    ]
    metrics = metrics_of_rows(rows)
    assert metrics["sim_d.reward.alike"] == pytest.approx(0.5) and metrics["sim_d.reward.unlike"] == pytest.approx(0.5)
    assert metrics["sim_d_diff.reward_penalty_reward.alike"] == pytest.approx(0.3)
    assert metrics["sim_d_diff.reward_penalty_reward.alike.lo"] == pytest.approx(0.3)
    assert "sim_d_diff.reward_penalty_reward.unlike" not in metrics  # one scene, one prompt: nothing to draw
    assert metrics["placed.reward"] == pytest.approx(50) and metrics["cs.reward.alike"] == pytest.approx(
        0.5 * 0.5 * 0.9
    )
    assert not any("stage2" in name or "synthesis" in name for name in metrics)


def test_leakage_is_compared_where_both_show_something():
    outside = {"a": (0.1, 0.5), "b": (None, 0.9), "c": (0.3, 0.5)}
    rows = [
        picture("synthesis", arm, scene, 0.5, leakage=pair[number])
        for scene, pair in outside.items()
        for number, arm in enumerate(("full", "no_control"))
    ]
    metrics = metrics_of_rows(rows)
    assert metrics["synthesis.leakage_diff.full_no_control"] == pytest.approx(-30)
    assert metrics["synthesis.leakage.full"] == pytest.approx(20)
    shown = [metrics[f"synthesis.shown.{arm}"] for arm in ("full", "no_control")]
    assert shown == pytest.approx([200 / 3, 100]) and metrics["synthesis.shown_diff.full_no_control"] < 0


def test_attention_in_the_masks_is_paired_by_noise():
    rows = [attention("none", scene, value) for scene, value in (("a", 0.2), ("b", 0.3))]
    rows += [attention("reward_penalty", scene, value) for scene, value in (("b", 0.5), ("a", 0.3))]
    metrics = metrics_of_rows(rows)
    assert metrics["map_inside.none"] == pytest.approx(25)
    assert metrics["map_inside_diff.reward_penalty_none"] == pytest.approx(15)
    assert metrics["map_inside_diff.reward_penalty_none.lo"] == pytest.approx(10)


def test_arms_are_what_they_are_called():
    named = {f"{name}{end}" for name in ATTENTION_LOSSES for end in ("", "_stage2", "_prior")}
    assert set(LEARNING_ARMS) == named - {"separate_stage2", "separate_prior"}
    for options in ATTENTION_LOSSES.values():
        MIFOLossOptions(**options)
    options = {name: box_control_options(call.get("box_control")) for name, call in CONTROLS.items()}
    assert options["full"] == BoxControlOptions()
    assert options["in_box"].penalty == "none" and options["no_decay"].penalty == "constant"
    assert not options["no_refinement"].refine
    assert (options["self_only"].kinds, options["cross_only"].kinds) == (("self",), ("cross",))


def test_every_preset_has_its_scenes_and_parts():
    for name, size in mifo.SIZES.items():
        scenes = chosen_scenes(size)
        assert [scene.kind for scene in scenes] == ["alike"] * size.alike + ["unlike"] * size.unlike
        assert all("<" not in word for scene in scenes for word in scene.words)
        recipe = mifo.Recipe(name, Path("nowhere"), jobs=1)
        first, second, third = parts_of(size, recipe.out, recipe.arms, recipe.controls, 0)
        assert len(first + second) == len(scenes) * len(size.arms)
        assert len(third) == len(scenes) * (len(size.controls) - 1)  # "full" is painted by a learning arm
        assert len({part.folder for part in first + second + third}) == len(first + second + third)


def test_chosen_arms_bring_what_they_need():
    recipe = mifo.Recipe("cpu", Path("nowhere"), ["no_control", "none_stage2", "penalty_prior"])
    assert recipe.arms == [
        "none", "none_stage2", "penalty", "penalty_prior", "reward_penalty", "reward_penalty_stage2",
    ]  # fmt: skip
    assert recipe.controls == ["no_control"]
    with pytest.raises(SystemExit, match="magic"):
        mifo.Recipe("cpu", Path("nowhere"), ["magic"])
    with pytest.raises(SystemExit, match="jobs"):
        mifo.Recipe("cpu", Path("nowhere"), jobs=0)


def test_cost_figures_by_hand():
    """50 steps and 75 iterations; the naive way's from its pieces."""
    counts = {"plain": (10, 100), "ours": (10, 150), "naive": (1, 100), "naive_step": (1, 40)}
    rows = [
        {"case": "flops", "side": side, "steps": steps, "flops": number} for side, (steps, number) in counts.items()
    ]
    for pair in range(7):
        rows += [
            {"case": "time", "side": "ours", "steps": 10, "pair": pair, "seconds_a": 2.0, "seconds_b": 1.0},
            {"case": "time", "side": "naive", "steps": 1, "pair": pair, "seconds_a": 3.0, "seconds_b": 1.0},
        ]
    held = {"nothing": 1, "plain": 5, "ours": 6, "stage1": 1 + 2**30, "stage2_lora": 1 + 2**31}
    rows += [{"case": "full", "side": side, "loaded_bytes": size, "extra_bytes": 0} for side, size in held.items()]
    for repeat in range(3):  # on a CPU without what was loaded; the median
        rows += [
            {"case": "memory", "side": side, "device": "cpu", "loaded_bytes": 50, "extra_bytes": size + 100 * repeat}
            for side, size in (("plain", 100), ("ours", 300), ("naive", 900))
        ]
    metrics = mifo_cost_metrics(rows)
    assert metrics["full_memory_ratio.ours"] == pytest.approx(5 / 4)
    assert metrics["learning_peak_gib.stage1"] == 1 and metrics["learning_peak_gib.stage2_lora"] == 2
    assert metrics["memory_ratio.ours"] == pytest.approx(2) and metrics["memory_ratio.naive"] == pytest.approx(5)
    assert metrics["flops_ratio.ours"] == pytest.approx(1.5)
    assert metrics["flops_ratio.naive"] == pytest.approx((50 * 40 + 75 * 60) / 500)
    assert metrics["time_ratio.ours"] == pytest.approx(2) and metrics["time_ratio.naive"] == pytest.approx(200 / 5)
    on_gpu = mifo_cost_metrics([{**row, "device": "cuda"} for row in rows])
    assert on_gpu["gpu.memory_ratio.ours"] == pytest.approx(450 / 250) and all(
        key.startswith("gpu.") for key in on_gpu
    )


@pytest.mark.slow
def test_smoke_instances_stay_in_their_boxes_and_maps_in_their_masks(tmp_path):
    assert mifo.main(["--preset", "smoke", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
    assert metrics["synthesis.leakage_diff.full_no_control.hi"] < 0
    assert metrics["map_inside_diff.reward_penalty_none.lo"] > 0
    assert (tmp_path / "sheet.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("rows.json")}
    assert mifo.main(["--preset", "smoke", "--out", str(tmp_path)]) == 0  # nothing is done twice
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("rows.json")} and len(before) == 4
