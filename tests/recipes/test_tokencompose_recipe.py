"""The TokenCompose recipe: its figures by hand, and the whole of it at its smallest size."""

from __future__ import annotations

import json

import pytest

from benchmarks.recipes import tokencompose
from benchmarks.recipes.common import Arm, choose_candidate, command_line, train_once
from benchmarks.recipes.tokencompose_metrics import metrics_of_rows
from objectcompose.training.common import read_log


def picture(arm, prompt, found, named=("dog", "car", "clock"), case="test"):
    return {
        "case": case, "arm": arm, "prompt": prompt, "round": 0, "kind": "", "named": list(named),
        "found": list(found),
    }  # fmt: skip


def map_rows(arm, ious):
    return [
        {"case": "map", "arm": arm, "sample": number, "phrase": "dog", "t": 200, "iou": iou, "inside": iou / 2}
        for number, iou in enumerate(ious)
    ]


def test_figures_of_rows_and_their_differences():
    rows = [
        picture("ldm", "a", ["dog", "car"]), picture("ldm", "b", ["dog", "car", "clock"]),
        picture("tokencompose", "b", ["dog", "car", "clock"]), picture("tokencompose", "a", ["dog", "car", "clock"]),
        picture("ldm", "p", ["dog"], ["dog"], "single"), picture("tokencompose", "p", [], ["dog"], "single"),
        picture("ldm", "q", ["dog"], ["dog"], "single"), picture("tokencompose", "q", ["dog"], ["dog"], "single"),
        *map_rows("ldm", [0.2, 0.4]), *map_rows("tokencompose", [0.5, 0.7]),
        {"case": "fd", "arm": "ldm", "value": 2.0, "left_out": [1.0, 3.0]},
        {"case": "fd", "arm": "tokencompose", "value": 3.0, "left_out": [1.5, 4.5]},
    ]  # fmt: skip
    metrics = metrics_of_rows(rows)
    assert metrics["mg3.ldm"] == 50 and metrics["mg3.tokencompose"] == 100 and metrics["mg2.ldm"] == 100
    assert metrics["mg3_diff.tokencompose_ldm"] == 50 and metrics["mg3_diff.tokencompose_ldm.lo"] == 0
    assert metrics["single_object.tokencompose"] == 50 and metrics["single_object_diff.tokencompose_ldm"] == -50
    assert metrics["map_iou.ldm"] == pytest.approx(0.3)
    assert metrics["map_iou_diff.tokencompose_ldm.lo"] == pytest.approx(0.3)
    # jackknife of two blocks: the variance is (2 - 1) times that of the values without each block
    assert metrics["fd_judge.ldm.hi"] == pytest.approx(2 + 1.959964)
    ratio = {name: metrics[f"fd_judge_ratio.tokencompose_ldm{name}"] for name in ("", ".lo", ".hi")}
    assert ratio == {name: pytest.approx(1.5) for name in ratio}, "both distances move together"
    assert not any("base" in name for name in metrics)


def test_arms_of_different_prompts_are_not_compared():
    rows = [picture("ldm", "a", []), picture("ldm", "b", []), picture("tokencompose", "a", []),
            picture("tokencompose", "c", []), *map_rows("ldm", [1, 1]), *map_rows("tokencompose", [1, 1])]  # fmt: skip
    with pytest.raises(AssertionError, match="other rows"):
        metrics_of_rows(rows)


def test_the_best_trial_is_chosen_once(tmp_path):
    trained = []

    def train(arguments):
        out = arguments[arguments.index("--output_dir") + 1]
        trained.append(arguments)
        (tmp_path / out / "weights").mkdir(parents=True)
        return 0

    arm = Arm("x", train, {"names": ["a b", "c"]}, ({"rate": 1}, {"rate": 2}, {"rate": 3}))
    scores = iter([0.1, 0.5, 0.2])
    assert choose_candidate(arm, 7, tmp_path, lambda weights: next(scores)) == {"rate": 2}
    assert choose_candidate(arm, 7, tmp_path, lambda weights: next(scores)) == {"rate": 2}  # read, not tried again
    assert len(trained) == 3 and trained[0][:5] == ["--names", "a b", "c", "--rate", "1"]
    assert json.loads((tmp_path / "choice.json").read_text())["trials"][2] == {"options": {"rate": 3}, "score": 0.2}


def test_ablations_keep_the_tuned_choice_and_what_they_leave_out(tmp_path):
    recipe = tokencompose.Recipe("cpu", tmp_path)
    chosen = {"learning_rate": 1e-4, "token_weight": 0.005, "pixel_weight": 0.00025}
    (tmp_path / "tokencompose").mkdir()
    (tmp_path / "tokencompose" / "choice.json").write_text(json.dumps({"chosen": chosen}))
    weights = {name: recipe.arm_options(name) for name in ("mid_only", "token_only", "pixel_only", "largest_weights")}
    assert weights["mid_only"] == chosen and "pixel_weight" not in weights["token_only"]
    assert "token_weight" not in weights["pixel_only"] and weights["largest_weights"] == {}
    assert recipe.arms["token_only"].options["pixel_weight"] == 0


def test_weights_of_other_options_are_not_taken_for_these(tmp_path):
    def train(arguments):
        (tmp_path / "x" / "weights").mkdir(parents=True)
        return 0

    arm = Arm("x", train, {"rate": 1}, ({},))
    assert train_once(arm, {}, 5, tmp_path / "x") == train_once(arm, {}, 5, tmp_path / "x")
    with pytest.raises(SystemExit, match="other options or steps"):
        train_once(arm, {}, 6, tmp_path / "x")


def test_all_arms_have_the_same_budget():
    for size in tokencompose.SIZES.values():
        named = tokencompose.build_arms(size)
        arms = named.values()
        tuned = [len(named[name].candidates) for name in ("ldm", "tokencompose", "sepen")]
        assert set(tuned) == {3 if size.trial_steps else 1}
        assert {arm.options["train_batch_size"] for arm in arms} == {size.batch_size}
        assert {arm.options.get("toybox_scenes", size.scenes) for arm in arms} == {size.scenes}
    assert command_line({"a": 1, "b": ("x", "y z")}) == ["--a", "1", "--b", "x", "y z"]


@pytest.mark.slow
def test_smoke_losses_fall_and_maps_move_into_the_masks(tmp_path):
    assert tokencompose.main(["--preset", "smoke", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
    for other in ("ldm", "base"):
        assert metrics[f"map_iou_diff.tokencompose_{other}.lo"] > 0
        assert metrics[f"map_inside_diff.tokencompose_{other}.lo"] > 0
    for arm, names in (("tokencompose", ("loss", "token")), ("sepen", ("loss", "enhance"))):
        lines = read_log(tmp_path / arm / "log.jsonl")
        for name in names:
            first, last = (sum(line[name] for line in part) / 15 for part in (lines[:15], lines[-15:]))
            assert last < first, (arm, name)
    assert metrics["trained_share.sepen"] < 0.05
    assert (tmp_path / "sheet.png").is_file()
