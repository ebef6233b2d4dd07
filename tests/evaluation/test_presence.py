"""Detectors, what is kept of them, and the figures: against the model's own logits and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import CheckpointError, ImageInputError, ObjectComposeError
from objectcompose.evaluation.detectors import (
    JudgePresence,
    PhrasePresence,
    Sighting,
    load_presence,
    look_at_pictures,
)
from objectcompose.evaluation.generation import list_pictures
from objectcompose.evaluation.multigen import multigen_metrics
from objectcompose.evaluation.pairs import pair_metrics
from objectcompose.evaluation.presence import presence_rows
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.evaluation.row_log import RowLog, read_rows
from objectcompose.evaluation.visor import visor_metrics
from objectcompose.grounding.grounding_dino import GroundingDinoDetector
from objectcompose.grounding.owlv2 import Owlv2Detector, OwlViTDetector
from objectcompose.toybox.categories import PRESETS
from objectcompose.toybox.judge import Judge, build_identity_encoder, build_segmenter
from tests.grounding import helpers


@torch.no_grad()
def logits_of(model, processor, picture, names):
    """(boxes, names), as the library's own example asks."""
    queries = [[f"a photo of a {name}" for name in names]]
    inputs = processor(text=queries, images=picture, return_tensors="pt")
    text = processor.tokenizer(queries[0], padding="max_length", max_length=16, return_tensors="pt")
    return model(pixel_values=inputs.pixel_values, **text).logits[0]


@pytest.mark.parametrize(
    ("build", "kind"), [(helpers.owlv2, Owlv2Detector), (helpers.owlvit, OwlViTDetector)], ids=["owlv2", "owlvit"]
)
def test_queries_of_a_prompt_compete(build, kind):
    model, processor = build()
    detector = PhrasePresence(kind(model, processor, 0.01))
    picture, names = helpers.picture(3), ["dog", "cup", "wine glass"]
    logits = logits_of(model, processor, picture, names)
    best, labels = logits.max(-1)
    scores = best.sigmoid().tolist()
    expected = [(names[label], score) for label, score in zip(labels, scores, strict=True) if score > 0.01]
    [seen] = detector.look([picture], [names])
    assert [one.category for one in seen] == [name for name, _ in expected]
    assert [one.score for one in seen] == pytest.approx([score for _, score in expected], abs=1e-5)
    winners = {name: sum(one.category == name for one in seen) for name in names}
    assert sum(count > 0 for count in winners.values()) > 1
    for name in names:  # without rivals a query has more boxes
        [alone] = detector.look([picture], [[name]])
        assert len(alone) > winners[name]


def test_pictures_of_all_sizes_and_prompts_of_all_lengths_share_a_call():
    detector = PhrasePresence(Owlv2Detector(*helpers.owlv2(), 0.01))
    pictures = [helpers.picture(0), helpers.picture(1, 64, 48), helpers.picture(2)]
    names = [["dog", "cup"], ["dog", "cup"], ["cup", "wine glass", "teddy bear"]]
    together = detector.look(pictures, names)
    for found, picture, asked in zip(together, pictures, names, strict=True):
        [alone] = detector.look([picture], [asked])
        assert [one.category for one in found] == [one.category for one in alone]
        assert [one.score for one in found] == pytest.approx([one.score for one in alone], abs=1e-5)


def test_grounding_dino_is_asked_for_bare_nouns():
    model, processor = helpers.grounding_dino()
    detector = PhrasePresence(GroundingDinoDetector(model, processor, 0.01, 0.01))
    pictures, names = [helpers.picture(3), helpers.picture(1, 64, 48)], [["dog", "wine glass"], ["cup"]]
    found = detector.find(pictures, names)
    for seen, picture, asked in zip(found, pictures, names, strict=True):
        [expected] = detector.detector.detect([picture], [asked])
        assert [(one.category, one.box) for one in seen] == [(one.phrase, pytest.approx(one.box)) for one in expected]
        assert {one.category for one in seen} == {*asked}
    with pytest.raises(ObjectComposeError, match="scores from 0.01 on, got 0.25"):
        PhrasePresence(GroundingDinoDetector(model, processor, 0.01))


def test_loading_by_name(tmp_path):
    for part in helpers.owlvit():
        part.save_pretrained(tmp_path)
    found = load_presence("owlvit", tmp_path, device="cpu")
    assert found.identity() == PhrasePresence(OwlViTDetector(*helpers.owlvit(), 0.01)).identity()
    with pytest.raises(CheckpointError, match="owlv2"):
        load_presence("owlv2", tmp_path, device="cpu")
    with pytest.raises(ObjectComposeError, match="`detector` must be one of judge, .*, grounding-dino, got 'yolo'"):
        load_presence("yolo", device="cpu")
    with pytest.raises(ObjectComposeError, match="detector_model"):
        load_presence("judge", tmp_path, device="cpu")
    with pytest.raises(ObjectComposeError, match="scores from 0.01 on"):
        PhrasePresence(OwlViTDetector(*helpers.owlvit(), 0.1))


def test_the_judge_knows_its_own_categories():
    preset = PRESETS["cpu"]
    judge = JudgePresence(Judge(preset, build_segmenter(preset), build_identity_encoder(preset)))
    judge.check_categories(["dog", "wine glass"])
    with pytest.raises(ObjectComposeError, match="got elephant, lion"):
        judge.check_categories(["lion", "dog", "elephant"])


class ColourDetector:
    """Sees "red", "green" and "blue" as sure as a picture's mean is high in them; counts what it looks at."""

    def __init__(self, name="colours"):
        self.name = name
        self.looked = 0

    def identity(self):
        return f"{self.name} 1"

    def check_categories(self, categories):
        if "purple" in categories:
            raise ObjectComposeError("`prompts` must not name purple.")

    def look(self, pictures, categories):
        self.looked += len(pictures)
        means = [np.asarray(picture).mean((0, 1)) / 255 for picture in pictures]
        names = ("red", "green", "blue")
        return [[Sighting(name, float(mean[place])) for place, name in enumerate(names)] for mean in means]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    records = [PromptRecord(str(number), "colours", ("red", "blue")) for number in range(3)]
    found = list_pictures(records, 2, folder)
    for number, picture in enumerate(found):
        Image.new("RGB", (20, 20), (51 * number, 0, 255)).save(picture.path)
    return found


def test_what_was_seen_is_kept(pictures, tmp_path):
    detector = ColourDetector()
    first = look_at_pictures(detector, pictures, tmp_path / "seen", 4)
    assert [[one.score for one in row] for row in first] == [[51 * number / 255, 0.0, 1.0] for number in range(6)]
    assert look_at_pictures(detector, pictures, tmp_path / "seen", 5) == first and detector.looked == 6
    [log] = (tmp_path / "seen").rglob("*.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:30])  # as a kill leaves it
    assert look_at_pictures(detector, pictures, tmp_path / "seen", 5) == first and detector.looked == 8
    assert look_at_pictures(detector, pictures, tmp_path / "seen", 5) == first and detector.looked == 8


def test_other_pictures_questions_and_detectors_are_looked_at_again(pictures, tmp_path):
    detector = ColourDetector()
    look_at_pictures(detector, pictures, tmp_path / "seen", 4)
    Image.new("RGB", (20, 20), (255, 255, 0)).save(pictures[2].path)
    changed = look_at_pictures(detector, pictures, tmp_path / "seen", 4)
    assert detector.looked == 7 and [one.score for one in changed[2]] == [1.0, 1.0, 0.0]
    records = [PromptRecord(str(number), "colours", ("green",)) for number in range(3)]
    others = list_pictures(records, 2, pictures[0].path.parent)
    look_at_pictures(detector, others, tmp_path / "seen", 4)
    assert detector.looked == 13
    second = ColourDetector("others")
    look_at_pictures(second, pictures, tmp_path / "seen", 4)
    assert second.looked == 6 and len(list((tmp_path / "seen").iterdir())) == 2


def test_pictures_that_cannot_be_looked_at(pictures, tmp_path):
    pictures[1].path.write_bytes(b"no picture")
    with pytest.raises(ImageInputError, match=r"1_0\.png"):
        look_at_pictures(ColourDetector(), pictures, tmp_path / "seen")
    pictures[1].path.unlink()
    with pytest.raises(ImageInputError, match="1 of 6 are missing"):
        look_at_pictures(ColourDetector(), pictures, tmp_path / "seen")
    bare = list_pictures([PromptRecord("bare", "a dog")], 1, tmp_path)
    with pytest.raises(ObjectComposeError, match="prompt bare has none"):
        look_at_pictures(ColourDetector(), bare, tmp_path / "seen")
    purple = list_pictures([PromptRecord("0", "a", ("purple",))], 1, tmp_path)
    with pytest.raises(ObjectComposeError, match="purple"):
        look_at_pictures(ColourDetector(), purple, tmp_path / "seen")


def test_row_log_reads_all_processes(tmp_path):
    for process in range(2):
        with RowLog(tmp_path, process) as log:
            log.add(f"key {process}", {"value": process})
    (tmp_path / "process-2.jsonl").write_text(
        '{"key": "torn", "val\n[]\n{"value": 3}\n' + json.dumps({"key": "c", "v": 1})
    )
    with RowLog(tmp_path, 2) as log:
        assert set(log.rows) == {"key 0", "key 1", "c"}
        log.add("d", {"v": 2})
    assert read_rows(tmp_path) == {"key 0": {"value": 0}, "key 1": {"value": 1}, "c": {"v": 1}, "d": {"v": 2}}


def test_a_category_is_found_above_the_threshold_only(pictures):
    def found(*sightings, threshold=0.1):
        return presence_rows(pictures[:1], [[Sighting(*one) for one in sightings]], threshold)[0]["found"]

    assert found(("red", 0.1), ("blue", 0.1 + 1e-9)) == ["blue"]
    assert found(("blue", 0.9), ("blue", 0.8), ("red", 0.2), ("green", 1.0)) == ["red", "blue"]
    assert found(("blue", 0.2), ("red", 0.05), threshold=0.2) == []
    [row] = presence_rows(pictures[3:4], [[]])
    assert row == {"prompt": "0", "round": 1, "kind": "", "named": ["red", "blue"], "found": []}


def rows_of(*rows):
    """Rows from (prompt, round, number named, number found, kind)."""
    return [
        {"prompt": p, "round": r, "kind": k, "named": list("abcde"[:n]), "found": list("abcde"[:f])}
        for p, r, n, f, k in rows
    ]


def test_multigen_by_hand():
    rows = rows_of(("0", 0, 5, 5, ""), ("0", 1, 5, 2, ""), ("1", 0, 3, 3, ""), ("1", 1, 3, 1, ""))
    metrics = multigen_metrics(rows)
    # of 4 pictures 3 show two of theirs: 100 % in round 0, 50 % in round 1; population deviation 25, not 35.4
    assert (metrics["mg2"], metrics["mg2.std"]) == (75.0, 25.0)
    assert (metrics["mg3"], metrics["mg3.std"]) == (50.0, 50.0)
    # only prompt 0 names four and five
    assert (metrics["mg4"], metrics["mg4.std"], metrics["mg5"]) == (50.0, 50.0, 50.0)
    assert metrics["mg2.lo"] == 50.0 and metrics["mg2.hi"] == 100.0  # two prompts: 50 % and 100 % of their pictures
    assert "mg4.lo" not in metrics  # one prompt has no interval
    assert set(multigen_metrics(rows_of(("0", 0, 2, 1, ""), ("1", 0, 2, 2, "")))) == {
        "mg2",
        "mg2.lo",
        "mg2.hi",
    }  # and a single round has no deviation


def test_object_accuracy_by_hand():
    rows = rows_of(("0", 0, 2, 2, "above"), ("0", 1, 2, 1, "above"), ("1", 0, 2, 2, "below"), ("1", 1, 2, 0, "below"))
    assert visor_metrics(rows) == {"object_accuracy": 50.0}  # one pair of objects: nothing to resample
    rows[3]["named"], rows[3]["found"] = ["c", "d"], []
    metrics = visor_metrics(rows)
    assert metrics["object_accuracy"] == 50.0 and metrics["object_accuracy.lo"] == 0.0


def test_pairs_by_hand():
    rows = rows_of(
        ("0", 0, 2, 2, "seen"), ("1", 0, 2, 1, "seen"), ("2", 0, 2, 0, "held-out"), ("3", 0, 2, 0, "held-out")
    )
    metrics = pair_metrics(rows)
    assert {name: metrics[name] for name in ("both", "both.seen", "both.held_out")} == {
        "both": 25.0,
        "both.seen": 50.0,
        "both.held_out": 0.0,
    }
    assert metrics["both.lo"] == 0.0 and metrics["both.hi"] == 75.0
