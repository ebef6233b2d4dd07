"""Bad pictures and phrases are typed errors, and come before any model runs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from objectcompose.errors import ImageInputError, LayoutError, ObjectComposeError, ObjectNotFoundError
from objectcompose.grounding.clipseg import ClipSegDetector
from objectcompose.grounding.grounder import Grounder, load_grounder
from objectcompose.grounding.inputs import check_ground_phrases, check_ground_picture
from tests.grounding import helpers


class Unreached(ClipSegDetector):
    """The real detector, which fails the test when it is asked anything."""

    def detect(self, pictures, phrases):
        raise AssertionError("the model ran before its input was checked")


@pytest.fixture(scope="module")
def unreached() -> Grounder:
    return Grounder(Unreached(*helpers.clipseg()))


def text_file(folder):
    path = folder / "notes.png"
    path.write_text("no picture")
    return path


def cut_file(folder):
    path = folder / "cut.png"
    helpers.picture().save(path)
    path.write_bytes(path.read_bytes()[:300])
    return path


BAD_PICTURES = {
    "text": text_file,
    "cut off": cut_file,
    "missing": lambda folder: folder / "missing.png",
    "number": lambda folder: 7,
    "array": lambda folder: np.zeros((32, 32, 3), np.uint8),
    "1x1": lambda folder: Image.new("RGB", (1, 1)),
    "low": lambda folder: Image.new("RGB", (64, 15)),
    "strip": lambda folder: Image.new("RGB", (400, 16)),
    "16 bits": lambda folder: Image.fromarray(np.full((32, 32), 40_000, np.uint16)),
    "32 bits": lambda folder: Image.new("I", (32, 32)),
    "float": lambda folder: Image.new("F", (32, 32)),
    "invisible": lambda folder: Image.new("RGBA", (32, 32), (200, 0, 0, 0)),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures(name, unreached, tmp_path):
    with pytest.raises(ImageInputError, match=r"`images\[0\]`"):
        unreached.ground(BAD_PICTURES[name](tmp_path), ["a dog"])


def test_16_bits_on_disk(unreached, tmp_path):
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ImageInputError, match="I;16"):
        unreached.ground(tmp_path / "deep.png", ["a dog"])


def test_transparency_is_shown_on_white():
    shown = helpers.picture()
    half = shown.convert("RGBA")
    half.paste((0, 0, 0, 0), (0, 0, 24, 48))
    flat = np.asarray(check_ground_picture(half))
    assert (flat[:, :24] == 255).all() and (flat[:, 24:] == np.asarray(shown)[:, 24:]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_of_8_bits_become_rgb(mode):
    checked = check_ground_picture(helpers.picture().convert(mode))
    assert checked.mode == "RGB" and checked.size == (48, 48)


BAD_PHRASES = ["a dog", [], [""], ["  "], [None], [3], ["a dog", "a dog"], ["a dog", " A  dog "], ["\ud800"], {"a": 1}]


@pytest.mark.parametrize("phrases", BAD_PHRASES, ids=ascii)
def test_bad_phrases(phrases, unreached):
    with pytest.raises(LayoutError, match="`phrases"):
        unreached.ground(helpers.picture(), phrases)


def test_phrases_are_kept_as_given():
    assert check_ground_phrases(["A Dog", "cup"]) == ("A Dog", "cup")


def test_lists_must_fit(unreached):
    for images, phrases in (([helpers.picture()], []), (helpers.picture(), [["a dog"]])):
        with pytest.raises(LayoutError, match="same length"):
            unreached.ground_batch(images, phrases)
    with pytest.raises(LayoutError, match="on_missing"):
        unreached.ground(helpers.picture(), ["a dog"], on_missing="ignore")
    assert unreached.ground_batch([], []) == []


class NeverAsked:
    """A segmenter that fails the test when it is asked for masks."""

    name = "never"

    def identity(self):
        return self.name

    def masks_in_boxes(self, pictures, boxes):
        raise AssertionError("masks were made although a phrase has no hit")


def test_phrase_without_hit_comes_before_segmentation():
    grounder = Grounder(ClipSegDetector(*helpers.clipseg(), threshold=1.0), NeverAsked())
    pictures = [helpers.picture(seed) for seed in range(2)]
    with pytest.raises(ObjectNotFoundError, match=r"images\[0\].*'a dog', 'a cup'.*on_missing") as raised:
        grounder.ground_batch(pictures, [["a dog", "a cup"], ["a bird"]])
    assert isinstance(raised.value, ObjectComposeError)
    assert Grounder(grounder.detector).ground_batch(pictures, [["a dog"]] * 2, on_missing="skip") == [[], []]


def test_grounder_needs_its_parts(unreached):
    with pytest.raises(ObjectComposeError, match="both be None"):
        Grounder()
    with pytest.raises(ObjectComposeError, match="batch_size"):
        Grounder(unreached.detector, batch_size=0)
    with pytest.raises(ObjectComposeError, match="`segment` needs a segmenter"):
        unreached.segment(helpers.picture())
    with pytest.raises(ObjectComposeError, match="clipseg.*'yolo'"):
        load_grounder("yolo")
    with pytest.raises(ObjectComposeError, match="'thresold'"):
        load_grounder("clipseg", detector_options={"thresold": 0.2})
    with pytest.raises(ObjectComposeError, match="threshold.*1.5"):
        load_grounder("clipseg", detector_options={"threshold": 1.5})
    with pytest.raises(ObjectComposeError, match="`segmenter` must be named"):
        load_grounder("clipseg", segmenter_model="somewhere")
    with pytest.raises(ObjectComposeError, match="`device` 'gpu'"):
        load_grounder("clipseg", device="gpu")
