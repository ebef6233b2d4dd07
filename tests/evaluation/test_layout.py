"""`objectcompose evaluate layout`: precision against COCO's own code, cosines and moves by hand, the command."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from objectcompose.__main__ import main
from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.errors import CheckpointError
from objectcompose.evaluation.crop_similarity import GREY, CropEncoder, crop_of_box, toybox_encoders
from objectcompose.evaluation.layout_metrics import (
    average_precisions,
    layout_metrics,
    match_boxes,
    matches_of_row,
    matches_of_rows,
    mean_precisions,
    precision_differences,
    shift_metrics,
)
from objectcompose.evaluation.row_log import RowLog
from objectcompose.evaluation.toybox_layouts import toybox_layouts
from objectcompose.toybox.categories import PRESETS
from objectcompose.toybox.weights import toybox_path


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


# ---- average precision


def random_pictures(seed, count=12):
    """Pictures of three categories with several boxes, some found well, some badly, some not; ties among scores."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        corners = rng.uniform(0, 0.6, (rng.integers(0, 6), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.1, 0.4, corners.shape)], axis=1)
        categories = [str(name) for name in rng.choice(["cat", "dog", "cup"], len(boxes))]
        found = []
        for name, box in zip(categories, boxes, strict=True):
            for _ in range(rng.integers(0, 4)):
                moved = box + rng.normal(0, 0.02, 4)
                found.append({"category": name, "score": float(rng.integers(1, 9)) / 10, "box": moved.tolist()})
        rows.append({"categories": categories, "boxes": boxes.tolist(), "found": found})
    return rows


def coco_precisions(rows):
    """AP50 and AP by pycocotools, with the detections that our own counts: those of the picture's categories."""
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    names = ["cat", "dog", "cup"]

    def corner_and_sides(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    wanted, found = [], []
    for number, row in enumerate(rows):
        for name, box in zip(row["categories"], row["boxes"], strict=True):
            sides = corner_and_sides(box)
            facts = {"id": len(wanted) + 1, "image_id": number, "category_id": names.index(name), "iscrowd": 0}
            wanted.append({**facts, "bbox": sides, "area": sides[2] * sides[3]})
        for one in row["found"]:
            facts = {"image_id": number, "category_id": names.index(one["category"])}
            found.append({**facts, "bbox": corner_and_sides(one["box"]), "score": one["score"]})
    truth = coco.COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = {
            "info": {},
            "images": [{"id": number} for number in range(len(rows))],
            "annotations": wanted,
            "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
        }
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 2]  # thresholds, recalls, categories; all areas, 100 detections
    return precision[0].mean(), precision.mean()


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_cocos(seed):
    rows = random_pictures(seed)
    ours = mean_precisions([matches_of_row(row["categories"], row["boxes"], row["found"]) for row in rows])
    assert tuple(ours[0]) == pytest.approx(coco_precisions(rows), abs=1e-9)
    assert 0.2 < ours[0, 1] < ours[0, 0] < 1


def test_average_precision_by_hand():
    found_one = match_boxes([(0.9, LEFT)], [LEFT, RIGHT])
    assert average_precisions([found_one])[0, 0] == pytest.approx(51 / 101)  # precision 1 up to recall 0.5
    wrong_first = match_boxes([(0.9, (0.0, 0.0, 0.1, 0.1)), (0.8, LEFT)], [LEFT])
    assert average_precisions([wrong_first])[0, 0] == pytest.approx(0.5)
    twice = match_boxes([(0.9, LEFT), (0.8, LEFT)], [LEFT])  # the second one finds nothing free
    assert twice.is_hit[0].tolist() == [True, False] and average_precisions([twice])[0, 0] == pytest.approx(1.0)
    wide = match_boxes([(0.9, (0.0, 0.0, 0.7, 1.0))], [LEFT])  # overlap 5 / 7
    assert wide.is_hit[:, 0].tolist() == [True] * 5 + [False] * 5
    assert average_precisions([match_boxes([], [LEFT])]).tolist() == [[0.0] * 10]
    assert np.isnan(average_precisions([match_boxes([(0.9, LEFT)], [])])).all()


def test_a_picture_that_counts_twice_is_as_two():
    pictures, rng = random_pictures(7, 5), np.random.default_rng(0)
    for one in (one for row in pictures for one in row["found"]):
        one["score"] += rng.uniform(0, 0.01)  # no ties: among them the order decides
    rows = [matches_of_row(row["categories"], row["boxes"], row["found"]) for row in pictures]
    counts = np.array([[1, 1, 1, 1, 1], [2, 0, 1, 0, 2]], dtype=float)
    once, drawn = mean_precisions(rows, counts)
    assert once == pytest.approx(mean_precisions(rows)[0])
    repeated = [row for row, count in zip(rows, counts[1], strict=True) for _ in range(int(count))]
    assert drawn == pytest.approx(mean_precisions(repeated)[0])


def row(layout, kind, similar, found=(LEFT, RIGHT), number=0, truth=True, outside=(0.3, 0.1)):
    """Two objects; `similar` is the table of cosines of the painted picture, `outside` those beside the own boxes."""
    seen = [{"category": name, "score": 0.9, "box": box} for name, box in zip(("dog", "cup"), found, strict=False)]
    best = {"found": [{"category": "dog", "score": 1.0, "box": LEFT}, {"category": "cup", "score": 1.0, "box": RIGHT}]}
    return {
        "layout": layout, "round": number, "kind": kind, "categories": ["dog", "cup"], "boxes": [LEFT, RIGHT],
        "found": seen, "cosines": {"dino": similar}, "outside": {"dino": list(outside)},
        "truth": {**best, "cosines": {"dino": [[0.9, 0.1], [0.2, 0.8]]}, "outside": {"dino": [0.0, 0.1]}}
        if truth
        else None,
        "rivals": {"found": [], "cosines": {"dino": [[0.4, 0.0], [0.0, 0.2]]}} if truth else None,
    }  # fmt: skip


def test_metrics_by_hand():
    rows = [
        row("a", "seen", [[0.8, 0.3], [0.1, 0.6]]),
        row("a", "seen", [[0.6, 0.3], [0.1, 0.4]], number=1),
        row("b", "unseen", [[0.2, 0.0], [0.4, 0.0]], found=(RIGHT, LEFT), outside=(0.9, 0.7)),
    ]
    metrics = layout_metrics(rows)
    expected = {
        "ap50": 100 * 67 / 101,  # two of three dogs and cups, all with one score: precision 2 / 3 comes later
        "dino.similarity": 100 * 2.6 / 6, "dino.leakage": 100 * 1.2 / 6, "dino.ceiling": 85.0, "dino.floor": 30.0,
        "dino.true_leakage": 15.0, "dino.leakage_outside": 40.0, "dino.true_leakage_outside": 5.0,
        "seen.dino.leakage_outside": 20.0, "unseen.dino.leakage_outside": 80.0,
        "ceiling.ap50": 100.0, "ceiling.ap": 100.0,
        "seen.ap50": 100.0, "seen.dino.similarity": 60.0, "seen.dino.leakage": 20.0,
        "unseen.ap50": 0.0, "unseen.dino.similarity": 10.0, "unseen.dino.leakage": 20.0,
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6), name
    assert metrics["ap50.lo"] <= metrics["ap50"] <= metrics["ap50.hi"]
    assert metrics["seen.dino.way"] == pytest.approx(100 * (60 - 30) / (85 - 30))
    assert metrics["dino.way.lo"] < metrics["dino.way"] < metrics["dino.way.hi"]
    assert "unseen.ap50.lo" not in metrics  # one layout has no interval
    assert metrics["dino.leakage_outside.lo"] < metrics["dino.leakage_outside"] < metrics["dino.leakage_outside.hi"]
    bare = layout_metrics([row("a", "", [[0.8, 0.3], [0.1, 0.6]], truth=False)])
    assert set(bare) == {"ap50", "ap", "dino.similarity", "dino.leakage", "dino.leakage_outside"}
    alone = {**row("a", "", [[0.8]], truth=False, outside=(0.4,)), "categories": ["dog"], "boxes": [LEFT]}
    single = layout_metrics([alone])  # one object leaks into no other box, but it may leak
    assert "dino.leakage" not in single and single["dino.leakage_outside"] == pytest.approx(40)
    del alone["outside"]  # measured before there was such a figure
    assert set(layout_metrics([alone])) == {"ap50", "ap", "dino.similarity"}


def test_differences_by_hand():
    good, bad = (
        [row("a", "", [[1.0]]), row("b", "", [[1.0]])],
        [row("a", "", [[1.0]], found=()), row("b", "", [[1.0]])],
    )
    layouts = ["a", "b"]
    same = precision_differences("x_y", matches_of_rows(good), matches_of_rows(good), layouts)
    assert set(same.values()) == {0.0} and set(same) == {
        f"{key}_diff.x_y{bound}" for key in ("ap50", "ap") for bound in ("", ".lo", ".hi")
    }
    found = precision_differences("x_y", matches_of_rows(good), matches_of_rows(bad), layouts)
    assert found["ap50_diff.x_y"] == pytest.approx(100 * (1 - 51 / 101))
    assert found["ap50_diff.x_y.lo"] == 0 and found["ap50_diff.x_y.hi"] == 100  # draws of one layout alone


def test_shift_by_hand():
    def side(layout, box, found):
        seen = [{"category": "dog", "score": 0.9 - number / 10, "box": one} for number, one in enumerate(found)]
        return {"layout": layout, "round": 0, "categories": ["dog"], "boxes": [box],
                "found": [*seen, {"category": "cup", "score": 1.0, "box": LEFT}]}  # fmt: skip

    middle = (0.25, 0.0, 0.75, 1.0)
    left = [side("a", LEFT, [LEFT, RIGHT]), side("b", LEFT, [middle]), side("c", LEFT, [])]
    right = [side("c", RIGHT, [RIGHT]), side("b", RIGHT, [RIGHT]), side("a", RIGHT, [RIGHT])]
    found = shift_metrics("shift.full", left, right)
    assert found["shift.full"] == pytest.approx(50)  # all the way, half of it, and nothing found to have moved
    assert found["shift.full.lo"] == 0 and found["shift.full.hi"] == 100


# ---- what is outside


def test_what_lies_outside_is_seen_there():
    """Beside greying out and embedding one by one."""
    encoder = CropEncoder("mean", "", 8, GREY, lambda pixels: pixels.mean((2, 3)))
    picture = Image.new("RGB", (16, 16), "red")
    picture.paste("blue", (8, 0, 16, 16))
    references = [Image.new("RGB", (4, 4), name) for name in ("blue", "green")]
    inside, outside = encoder.inside_and_outside(picture, [LEFT, RIGHT], references)
    torch.testing.assert_close(
        inside, encoder.cosines([crop_of_box(picture, box) for box in (LEFT, RIGHT)], references)
    )
    for number, box in enumerate((LEFT, RIGHT)):
        rest = picture.copy()
        rest.paste((128, 128, 128), (0, 0, 8, 16) if box == LEFT else (8, 0, 16, 16))
        [[alone]] = encoder.cosines([rest], references[number : number + 1])
        assert outside[number] == pytest.approx(float(alone), abs=1e-6)
    assert outside.shape == (2,) and picture.getpixel((0, 0)) == (255, 0, 0)


def test_a_second_copy_is_leakage_even_of_one_object():
    reference = toybox_layouts(PRESETS["cpu"], "dev", 1)[0].objects[0].image
    shown = reference.crop(reference.getbbox()).resize((28, 28))
    once = Image.new("RGB", (64, 64), (170, 200, 160))
    once.paste(shown, (2, 18), shown)
    twice = once.copy()
    twice.paste(shown, (34, 18), shown)
    for encoder in toybox_encoders("cpu"):
        (inside, before), (still, after) = (
            encoder.inside_and_outside(one, [(0.0, 0.25, 0.5, 0.75)], [reference]) for one in (once, twice)
        )
        assert float(inside) == pytest.approx(float(still), abs=1e-5) and float(inside) > 0.7, encoder.name
        assert float(after) > float(before) + 0.2, encoder.name


# ---- the command


def arguments(out, *more):
    return ["evaluate", "layout", "--out", str(out), "--split", "dev", "--steps", "1", *more]


def run(out, *more):
    return main(arguments(out, *more))


def report(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_true_scenes_reach_their_ceiling(tmp_path, capsys):
    few = ("--max-prompts", "4")
    assert run(tmp_path, *few, "--only", "generate") == 0
    for case in toybox_layouts(PRESETS["cpu"], "dev", 4):
        case.truth.save(tmp_path / "pictures" / f"{case.record.id}_0.png")
    assert run(tmp_path, *few, "--only", "score") == 0
    metrics = report(tmp_path)["metrics"]
    for name in ("ap", "ap50"):
        assert metrics[name] == metrics[f"ceiling.{name}"] > 50
    for encoder in ("identity", "clip_i", "dino"):
        assert metrics[f"{encoder}.similarity"] == pytest.approx(metrics[f"{encoder}.ceiling"])
        assert metrics[f"{encoder}.ceiling"] > metrics[f"{encoder}.floor"]
        assert metrics[f"{encoder}.leakage_outside"] == pytest.approx(metrics[f"{encoder}.true_leakage_outside"])
        assert metrics[f"{encoder}.leakage_outside"] < metrics[f"{encoder}.ceiling"]
    [log] = (tmp_path / "measures").rglob("*.jsonl")
    before = log.read_text(encoding="utf-8")
    assert run(tmp_path, *few, "--only", "score") == 0  # nothing is looked at twice
    assert log.read_text(encoding="utf-8") == before and report(tmp_path)["metrics"] == metrics
    log.write_text(before[:-20], encoding="utf-8")  # torn by a kill
    assert run(tmp_path, *few, "--only", "score") == 0
    assert report(tmp_path)["metrics"] == metrics
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert layout_metrics(rows) == metrics
    # rows of a version that measured less are left alone, and measured anew
    measured = sorted(report(tmp_path)["measured_with"].items())
    before_outside = log.parent.with_name(f"judge-{sha256(repr(measured).encode()).hexdigest()[:16]}")
    assert before_outside.name != log.parent.name
    log.parent.rename(before_outside)
    with RowLog(before_outside) as old:
        for key, one in list(old.rows.items()):
            old.add(key, {name: value for name, value in one.items() if name != "outside"})
    assert run(tmp_path, *few, "--only", "score") == 0
    assert report(tmp_path)["metrics"] == metrics and log.is_file()
    assert run(tmp_path, "--max-prompts", "3", "--only", "score") == 2
    assert "other layouts" in capsys.readouterr().err


@pytest.mark.slow
def test_adapter_paints_its_layouts(tmp_path, capsys):
    unet = UNet2DConditionModel.from_pretrained(toybox_path("base"), subfolder="unet")
    from transformers import CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection.from_pretrained(toybox_path("image_encoder"))
    LocRefAdapter.from_unet(unet, "toybox-1", encoder).save_pretrained(tmp_path / "adapter")
    few = ("--max-prompts", "3", "--rounds", "2")
    assert run(tmp_path / "plain", *few) == 0
    assert run(tmp_path / "locref", *few, "--adapter", str(tmp_path / "adapter")) == 0
    plain, ours = report(tmp_path / "plain"), report(tmp_path / "locref")
    assert plain["num_rows"] == ours["num_rows"] == 6
    assert plain["metrics"]["ceiling.ap"] == ours["metrics"]["ceiling.ap"]
    assert plain["metrics"]["dino.similarity"] != ours["metrics"]["dino.similarity"]
    assert "the prompt alone" in plain["protocol"] and "LocRef" in ours["protocol"]
    config = json.loads((tmp_path / "adapter/config.json").read_text(encoding="utf-8"))
    config["base_fingerprint"] = "0" * len(config["base_fingerprint"])
    (tmp_path / "adapter/config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run(tmp_path / "other", *few, "--adapter", str(tmp_path / "adapter")) == 2
    assert "made for" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    few = ("--max-prompts", "3", "--batch-size", "1")
    assert run(tmp_path / "one", *few) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "objectcompose", *arguments(tmp_path / "two", *few)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    logs = [path.stat().st_size for path in (tmp_path / "two" / "measures").rglob("process-*.jsonl")]
    assert len(logs) == 2 and all(logs)  # both measured something
    one, two = ((tmp_path / name / "rows.jsonl").read_text(encoding="utf-8") for name in ("one", "two"))
    assert one == two and len(one.splitlines()) == 3
    assert report(tmp_path / "one")["metrics"] == report(tmp_path / "two")["metrics"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-prompts", "0"], "--max-prompts"),
        (["--model", "somewhere"], "--layouts"),
        (["--layouts", "nowhere"], "got none"),
        (["--max-prompts", "1", "--only", "score"], "missing"),
        (["--max-prompts", "1", "--detector-model", "x"], "detector_model"),
        (["--objects", "21"], "`objects`"),
        (["--layouts", "nowhere", "--objects", "2"], "--objects"),
        (["--box-jitter", "0.5"], "--box-jitter"),
        (["--gamma", "1"], "`--gamma` needs `--adapter`"),
        (["--no-region-mask"], "`--no-region-mask` needs `--adapter`"),
        (["--adapter", "a", "--ip-adapter", "b"], "must not both be given"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(tmp_path, capsys, more, message):
    assert run(tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def test_adapter_that_is_not_there(tmp_path):
    import argparse

    from objectcompose.evaluation.layout import add_arguments
    from objectcompose.evaluation.layout import main as layout_main

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    wanted = ["--out", str(tmp_path), "--max-prompts", "1", "--only", "generate", "--adapter", str(tmp_path / "none")]
    with pytest.raises(CheckpointError):
        layout_main(parser.parse_args(wanted))
