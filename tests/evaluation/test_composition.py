"""Evaluating composition: the fixed sets, figures by hand, poses from outlines, and the command on toybox."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from objectcompose.__main__ import main
from objectcompose.adapters.object_prompt_adapter import ObjectPromptAdapter
from objectcompose.errors import NonFiniteError, ObjectComposeError
from objectcompose.evaluation.composition import sets_digest
from objectcompose.evaluation.composition_metrics import (
    centre_spread,
    composition_metrics,
    flip_spread,
    pair_rows,
    rotation_spread,
    size_spread,
)
from objectcompose.evaluation.composition_scorer import CompositionScorer
from objectcompose.evaluation.touching_objects import divide_touching
from objectcompose.evaluation.toybox_object_sets import (
    SET_COUNTS,
    SET_KINDS,
    SETS_PER_COUNT,
    toybox_object_sets,
)
from objectcompose.evaluation.toybox_poses import estimate_pose
from objectcompose.files import write_png
from objectcompose.grounding.toybox_truth import scene_picture
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.toybox.categories import PRESETS, held_out_drawings, held_out_pairs
from objectcompose.toybox.identities import HELD_OUT_HUES
from objectcompose.toybox.judge import Detection
from objectcompose.toybox.scenes import boxes_of_masks, render_scenes, sample_scene
from objectcompose.toybox.weights import active_preset
from tests.pipelines.object_prompt_helpers import prompt_adapter
from tests.tiny import tiny_unet


CPU = PRESETS["cpu"]


# ---- the sets


def test_the_lists_are_what_they_were():
    digests = {
        (name, split): sets_digest(toybox_object_sets(PRESETS[name], split))[:8]
        for name in PRESETS
        for split in SETS_PER_COUNT
    }
    assert digests == {
        ("cpu", "dev"): "25b992f9",
        ("cpu", "test"): "9f0e8a0a",
        ("gpu", "dev"): "5f0ba341",
        ("gpu", "test"): "3ec82be3",
    }


@pytest.mark.parametrize("name", PRESETS)
def test_sets_are_of_their_kinds(name):
    preset = PRESETS[name]
    seen, held_out = set(), held_out_pairs(preset)
    low, high = HELD_OUT_HUES
    for split, per_count in SETS_PER_COUNT.items():
        sets = toybox_object_sets(preset, split)
        assert len(sets) == per_count * len(SET_KINDS) * len(SET_COUNTS)
        assert {(one.record.kind, len(one.identities)) for one in sets[:25]} == {
            (kind, count) for kind in SET_KINDS for count in SET_COUNTS
        }
        for one in sets:
            assert one.identities not in seen
            seen.add(one.identities)
            kind, names = one.record.kind, [identity.category for identity in one.identities]
            assert all(word in one.record.text for word in names)
            is_unseen = [
                low <= identity.hue <= high and identity.permutation == (0, 1, 2) for identity in one.identities
            ]
            assert all(is_unseen) if kind == "unseen" else not any(is_unseen)
            if kind == "look-alikes":
                assert len({(identity.category, identity.style) for identity in one.identities}) == 1
                assert (names[0], one.identities[0].style) not in held_out_drawings(preset)
                hues = [identity.hue for identity in one.identities]
                apart = [min(abs(a - b), 360 - abs(a - b)) for a, b in combinations(hues, 2)]
                assert min(apart) >= 300 / len(hues) - 1e-6
            else:
                assert len(set(names)) == len(names)
                has_pair = any(frozenset(pair) in held_out for pair in combinations(names, 2))
                assert has_pair == (kind == "unseen-pair")


def test_references_show_one_identity_in_other_poses():
    one = toybox_object_sets(CPU, "dev")[0]
    first, again, other = (np.asarray(one.reference(CPU, 0, pose)) for pose in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first[..., 3], other[..., 3])
    colours = [picture[picture[..., 3] > 250][:, :3].mean(0) for picture in (first, other)]
    assert np.abs(colours[0] - colours[1]).max() < 12


@pytest.mark.parametrize(
    "arguments", [("train",), ("dev", (1,)), ("dev", ()), ("dev", (2,), ("twins",)), ("dev", (2,), ("seen",), 0)]
)
def test_sets_that_cannot_be(arguments):
    with pytest.raises(ObjectComposeError):
        toybox_object_sets(CPU, *arguments)


# ---- figures by hand


def test_pairs_by_hand():
    dino = torch.tensor([[0.9, 0.8, 0.4], [0.85, 0.1, 0.3]])  # best sum: prompt 0 with 1, prompt 1 with 0
    clip = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    judge = torch.tensor([[0.7, 0.6, 0.0], [0.5, 0.9, 0.0]])
    first, second = pair_rows(dino, clip, judge, [[False, True, False], [False, False, False]], threshold=0.35)
    assert (first["segment"], second["segment"]) == (1, 0)
    assert [first["dino"], second["dino"]] == pytest.approx([0.8, 0.85])
    assert [first["clip"], second["clip"]] == pytest.approx([0.2, 0.4])
    assert [first["identity"], second["identity"]] == pytest.approx([0.6, 0.5])
    assert first["matching_accuracy"] == second["matching_accuracy"] == 0.0  # the judge finds both crossed
    assert (first["category"], second["category"]) == (1.0, 0.0)
    assert (first["copies"], second["copies"]) == (1, 0)  # segment 2 is like prompt 0, with 0.4
    assert [row["match_rate"] for row in pair_rows(dino, clip, threshold=0.82)] == [0.0, 1.0]


def test_prompts_without_a_segment_score_nothing():
    rows = pair_rows(torch.tensor([[0.2], [0.6]]), torch.tensor([[0.9], [0.8]]), torch.ones(2, 1), [[True], [True]])
    assert rows[0] == {
        "segment": None, "dino": 0.0, "clip": 0.0, "match_rate": 0.0, "copies": 0,
        "identity": 0.0, "matching_accuracy": 0.0, "category": 0.0,
    }  # fmt: skip
    assert rows[1]["segment"] == 0 and rows[1]["clip"] == pytest.approx(0.8)
    empty = pair_rows(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0), [[], []])
    assert [row["dino"] for row in empty] == [0.0, 0.0] and all(row["segment"] is None for row in empty)


def test_cosines_that_cannot_be():
    with pytest.raises(ObjectComposeError, match="same prompts"):
        pair_rows(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(NonFiniteError):
        pair_rows(torch.full((1, 1), math.nan), torch.zeros(1, 1))
    with pytest.raises(ObjectComposeError, match="at least one"):
        composition_metrics([])


def row(label, round_number, number, **values):
    common = {"set": label, "round": round_number, "object": number, "kind": "seen", "count": 2, "segment": 0}
    return {**common, "dino": 0.5, "clip": 0.4, "match_rate": 1.0, "copies": 0, **values}


def test_figures_by_hand():
    rows = [
        row("a", 0, 0, dino=0.8, x=0.2, y=0.5, size=0.1, rotation=10.0, flip=0, matching_accuracy=1.0),
        row("a", 1, 0, dino=0.4, x=0.6, y=0.5, size=0.4, rotation=-10.0, flip=1, matching_accuracy=0.0),
        row("a", 0, 1, copies=2),
        row("b", 0, 0, dino=0.0, clip=0.0, segment=None, kind="look-alikes", count=3, match_rate=0.0),
    ]
    metrics = composition_metrics(rows)
    assert metrics["dino_comp"] == pytest.approx(0.425) and metrics["dino_comp.n3"] == 0
    assert metrics["dino_comp.seen"] == pytest.approx(1.7 / 3) and metrics["dino_comp.look_alikes"] == 0
    assert metrics["match_rate"] == 75 and metrics["matching_accuracy"] == 50
    assert metrics["copies"] == pytest.approx(2 / 3)  # three pictures
    assert metrics["diversity_centre"] == pytest.approx(0.2) and metrics["diversity_size"] == pytest.approx(0.5)
    assert metrics["diversity_flip"] == 1.0 and metrics["diversity_rotation"] == pytest.approx(10.0, rel=0.01)
    assert "diversity_centre.n3" not in metrics and "identity" not in metrics


def test_spreads_by_hand():
    assert centre_spread([0.1, 0.1], [0.4, 0.4]) == 0 and centre_spread([0, 0.6], [0, 0.8]) == pytest.approx(0.5)
    assert size_spread([0.1, 0.1]) == 0 and size_spread([0.05, 0.2]) == pytest.approx(0.5)
    assert rotation_spread([170, -170]) == pytest.approx(rotation_spread([10, -10])) == pytest.approx(10, rel=0.01)
    assert flip_spread([0, 0, 0, 1]) == 0.5 and flip_spread([1, 1]) == 0


# ---- poses


def test_poses_of_true_outlines():
    """What is said is right; of what an outline does not tell little is said."""
    turned, mirrored, told = [], [], {}
    for category in CPU.categories:
        for number in range(8):
            spec = sample_scene(CPU, (2, 700 + number), [category])
            scenes = render_scenes(CPU, [spec])
            found = estimate_pose(CPU, spec.identities[0], scenes.visible[0, 0])
            told.setdefault(category, []).append(found.rotation is not None)
            if found.rotation is not None:
                turned.append(abs(found.rotation - spec.poses[0].rotation))
            if found.flip is not None:
                mirrored.append(found.flip == spec.poses[0].flip)
    assert np.median(turned) < 5 and max(turned) < 15
    assert len(mirrored) > 16 and all(mirrored)
    assert np.mean(told["car"]) == 1 and np.mean(told["teddy bear"]) > 0.7
    assert np.mean(told["pizza"]) < 0.5


def test_an_outline_of_something_else_tells_nothing():
    mask = torch.zeros(64, 64)
    mask[30:34] = 1
    spec = sample_scene(CPU, 0, ["car"])
    found = estimate_pose(CPU, spec.identities[0], mask)
    assert found.rotation is None and found.flip is None and found.fit < 0.75


# ---- touching objects


def detection(category, mask, score=0.8):
    return Detection(category, tuple(boxes_of_masks(mask).tolist()), score, mask)


def test_touching_look_alikes_are_divided_by_position():
    mask = torch.zeros(20, 30)
    mask[5:15, 2:12] = 1
    mask[6:16, 12:22] = 1  # touches the first
    other = torch.zeros(20, 30)
    other[0:4, 24:30] = 1
    found = divide_touching([detection("dog", mask), detection("cup", other)], ["dog", "dog"])
    assert [one.category for one in found] == ["dog", "dog", "cup"]
    pieces = sorted(found[:2], key=lambda one: one.box[0])
    assert torch.equal(pieces[0].mask + pieces[1].mask, mask)
    assert pieces[0].mask[5:15, 2:12].mean() > 0.95 and pieces[1].mask[6:16, 12:22].mean() > 0.95
    assert pieces[0].box[2] == pytest.approx(12 / 30, abs=0.04)


def test_objects_that_were_found_are_left_alone():
    masks = torch.zeros(3, 20, 30)
    for number in range(3):
        masks[number, 4:10, 10 * number : 10 * number + 8] = 1
    detections = [detection("dog", mask) for mask in masks]
    assert divide_touching(detections, ["dog", "dog", "cup"]) == detections
    assert divide_touching([], ["dog", "dog"]) == []
    speck = torch.zeros(20, 30)
    speck[3, 3] = 1
    assert divide_touching([detection("dog", speck)], ["dog", "dog"])[0].mask is speck


# ---- the judge's view


@pytest.fixture(scope="module")
def scorer():
    return CompositionScorer.of_toybox("cpu")


def test_true_scenes_score_high_and_swapped_ones_low(scorer, tmp_path):
    """A renderer that takes over every identity, against one that paints other identities of the categories."""
    preset = active_preset()
    sets = toybox_object_sets(preset, "dev", counts=(2, 3), kinds=("seen", "look-alikes"), per_count=2)
    rows = {"own": [], "swapped": []}
    for number, one in enumerate(sets):
        for label, identities in (
            ("own", one.identities),
            ("swapped", one.identities[::-1][:1] * len(one.identities)),
        ):
            spec = sample_scene(preset, (9, number), identities=list(identities))
            path = tmp_path / f"{label}-{number}.png"
            write_png(path, scene_picture(render_scenes(preset, [spec]).pixels[0]))
            labels = {"set": one.record.id, "round": 0, "kind": one.record.kind, "count": len(one.identities)}
            rows[label] += [
                {**labels, "object": place, **found} for place, found in enumerate(scorer.score(path, one))
            ]
    own, swapped = composition_metrics(rows["own"]), composition_metrics(rows["swapped"])
    assert own["dino_comp"] > 0.75 > swapped["dino_comp"] and own["clip_comp"] > swapped["clip_comp"]
    assert own["matching_accuracy.look_alikes"] > 80
    assert own["identity_floor"] < own["identity_ceiling"] - 0.3
    assert own["identity"] > own["identity_floor"] + 0.3 and own["matching_accuracy"] > 80
    assert own["matching_accuracy"] > swapped["matching_accuracy"] + 30


def test_a_picture_of_nothing_scores_nothing(scorer, tmp_path):
    one = toybox_object_sets(active_preset(), "dev")[0]
    write_png(tmp_path / "grey.png", scene_picture(torch.full((3, 64, 64), 0.5)))
    rows = scorer.score(tmp_path / "grey.png", one)
    assert len(rows) == len(one.identities)
    assert all(found["segment"] is None and found["dino"] == 0.0 for found in rows)


# ---- the command


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Untrained, of the toybox base."""
    torch.manual_seed(0)
    pipeline = load_checkpoint(None, "cpu", "object-prompt")
    folder = tmp_path_factory.mktemp("adapter")
    ObjectPromptAdapter.from_unet(pipeline.unet, "toybox-1", pipeline.image_encoder).save_pretrained(folder)
    return folder


def evaluate(out, *more):
    common = ["--out", str(out), "--device", "cpu", "--split", "dev", "--counts", "2", "--per-count", "1"]
    return main(["evaluate", "composition", *common, "--steps", "2", "--rounds", "2", *map(str, more)])


def test_the_command_paints_scores_and_goes_on(adapter, tmp_path):
    more = ("--adapter", adapter, "--kinds", "look-alikes")
    assert evaluate(tmp_path, *more) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"dino_comp", "clip_comp", "identity", "identity_floor", "dino_comp.n2"} <= report["metrics"].keys()
    assert report["num_rows"] == 2 * 2 and "guidance off" in report["protocol"]
    pictures = sorted((tmp_path / "pictures").glob("*.png"))
    times = [path.stat().st_mtime_ns for path in pictures]
    lines = (tmp_path / "rows.jsonl").read_text()
    pictures[0].unlink()
    assert evaluate(tmp_path, *more) == 0
    assert [path.stat().st_mtime_ns for path in pictures][1:] == times[1:]
    assert (tmp_path / "rows.jsonl").read_text() == lines
    assert evaluate(tmp_path, "--only", "score", "--kinds", "look-alikes") == 0
    assert evaluate(tmp_path, *more, "--image-scale", "0.5") == 2, "these were painted with another strength"


def test_what_the_command_refuses(adapter, tmp_path, capsys):
    prompt_adapter(tiny_unet()).save_pretrained(tmp_path / "other")
    for more, words in (
        ([], "--adapter"),
        (["--adapter", adapter, "--model", "a/b"], "--model"),
        (["--adapter", adapter, "--counts", "7"], "counts"),
        (["--adapter", adapter, "--image-scale", "-1"], "--image-scale"),
        (["--adapter", adapter, "--refinement-steps", "-1"], "--refinement-steps"),
        (["--adapter", adapter, "--max-prompts", "0"], "--max-prompts"),
        (["--adapter", adapter, "--lpips-weights", tmp_path / "none.pth"], "none.pth"),
        (["--adapter", tmp_path / "none"], "none"),
        (["--adapter", tmp_path / "other"], "adapter"),
        (["--only", "score"], "pictures"),
    ):
        assert evaluate(tmp_path / "out", *more) == 2
        assert words in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.slow
def test_guidance_is_another_run(adapter, tmp_path):
    for guidance in ("off", "masks", "fast"):
        assert evaluate(tmp_path / guidance, "--adapter", adapter, "--kinds", "seen", "--guidance", guidance) == 0
    names = [path.name for path in sorted((tmp_path / "off" / "pictures").glob("*.png"))]
    assert len(names) == 2
    manifests = {
        guidance: json.loads((tmp_path / guidance / "pictures" / "manifest.json").read_text())["settings"]["call"]
        for guidance in ("off", "masks", "fast")
    }
    assert len(set(manifests.values())) == 3


@pytest.mark.slow
def test_two_processes_score_what_one_does(adapter, tmp_path):
    more = ["--adapter", str(adapter), "--kinds", "seen", "look-alikes", "--batch-size", "1"]
    assert evaluate(tmp_path / "one", *more) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "objectcompose", "evaluate", "composition", "--out", str(tmp_path / "two")]
    command += ["--device", "cpu", "--split", "dev", "--counts", "2", "--per-count", "1", "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--rounds", "2", *more], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    logs = [path.stat().st_size for path in (tmp_path / "two" / "scores").rglob("process-*.jsonl")]
    assert len(logs) == 2 and all(logs)  # both scored something
    one, two = ((tmp_path / name / "rows.jsonl").read_text(encoding="utf-8") for name in ("one", "two"))
    assert one == two and len(one.splitlines()) > 0
    first, second = (json.loads((tmp_path / name / "report.json").read_text())["metrics"] for name in ("one", "two"))
    assert first == second
