"""Results on disk: found again by content, never trusted when damaged."""

from __future__ import annotations

import pytest
import torch

from objectcompose.errors import ObjectComposeError
from objectcompose.grounding.cache import CACHE_VARIABLE, GroundingCache, default_cache_folder
from objectcompose.grounding.clipseg import ClipSegDetector
from objectcompose.grounding.detection import Detection
from objectcompose.grounding.grounder import Grounder
from objectcompose.grounding.sam import SamSegmenter
from tests.grounding import helpers


PHRASES = ["a dog", "a cup"]


class Counting(ClipSegDetector):
    """The real detector; counts the pictures that it has seen."""

    seen = 0

    def detect(self, pictures, phrases):
        self.seen += len(pictures)
        return super().detect(pictures, phrases)


def counting_grounder(folder, **settings) -> Grounder:
    return Grounder(Counting(*helpers.clipseg(), **{"threshold": 0.45, **settings}), cache=GroundingCache(folder))


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        (a.phrase, a.box, a.score) == (b.phrase, b.box, b.score)
        and ((a.mask is None and b.mask is None) or torch.equal(a.mask, b.mask))
        for a, b in zip(first, second, strict=True)
    )


def test_second_time_from_disk(tmp_path):
    grounder = counting_grounder(tmp_path)
    pictures = [helpers.picture(seed, 48 + seed, 40) for seed in range(3)]
    first = grounder.ground_batch(pictures, [PHRASES] * 3, "skip")
    again = counting_grounder(tmp_path)
    second = again.ground_batch(pictures[::-1], [PHRASES] * 3, "skip")[::-1]
    assert grounder.detector.seen == 3 and again.detector.seen == 0
    assert all(map(same, first, second)) and any(first)
    assert first[0][0].mask.dtype == second[0][0].mask.dtype and second[2][0].mask.shape == (40, 50)


def test_key_holds_all_that_matters(tmp_path):
    base = counting_grounder(tmp_path)
    picture = helpers.picture()
    base.ground(picture, PHRASES, "skip")
    other = picture.copy()
    other.putpixel((47, 47), tuple(255 - value for value in other.getpixel((47, 47))))
    base.ground(other, PHRASES, "skip")
    base.ground(picture, PHRASES[:1], "skip")
    base.ground(picture.resize((24, 96)), PHRASES, "skip")
    assert base.detector.seen == 4
    assert base.ground(picture, PHRASES, "skip") and base.detector.seen == 4

    nudged = counting_grounder(tmp_path)
    with torch.no_grad():
        nudged.detector.model.decoder.film_add.bias[0] += 1e-3
    stricter = counting_grounder(tmp_path, threshold=0.46)
    refined = Grounder(Counting(*helpers.clipseg(), threshold=0.45), SamSegmenter(*helpers.sam()), base.cache)
    for changed in (nudged, stricter, refined):
        changed.ground(picture, PHRASES, "skip")
        assert changed.detector.seen == 1, changed.identity()
    assert len({one.identity() for one in (base, nudged, stricter, refined)}) == 4


def test_a_setting_that_changes_later_is_another_key(tmp_path):
    base = counting_grounder(tmp_path)
    ask, before = (helpers.picture(), PHRASES, "skip"), base.identity()
    found = base.ground(*ask)
    base.detector.threshold = 0.999
    assert base.identity() != before and not base.ground(*ask) and base.detector.seen == 2
    base.detector.threshold = 0.45
    assert base.identity() == before and len(base.ground(*ask)) == len(found) > 0 and base.detector.seen == 2


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def change_score(content: bytes) -> bytes:
    place = content.index(b'score\\": 0.') + len(b'score\\": 0.')
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [cut, flip_last_byte, change_score, lambda content: b"", lambda content: b"x" * 99])
def test_damaged_files_are_made_anew(damage, tmp_path):
    grounder = counting_grounder(tmp_path)
    expected = grounder.ground(helpers.picture(), PHRASES, "skip")
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    assert grounder.cache.load(file.stem) is None
    assert same(grounder.ground(helpers.picture(), PHRASES, "skip"), expected) and grounder.detector.seen == 2
    assert same(grounder.cache.load(file.stem), expected)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [file.name]


def test_all_kinds_of_detections(tmp_path):
    cache = GroundingCache(tmp_path)
    mask = (torch.arange(77).reshape(7, 11) % 3 == 0).float()
    for key, found in {
        "none": [],
        "boxes": [Detection("a dog", (0.1, 0.2, 0.3, 1 / 3), None, 0.7)],
        "mixed": [Detection("é", (0, 0, 1, 1), mask, 1.0), Detection(None, (0, 0, 0.5, 1), None, 0)],
        "masks": [Detection(None, (0, 0, 1, 1), mask, 0.1), Detection(None, (0, 0, 1, 1), 1 - mask, 0.2)],
    }.items():
        cache.store(key, found)
        assert same(cache.load(key), found), key
    assert cache.load("unknown") is None


def test_parts_are_kept_too(tmp_path):
    def grounder(points):
        segmenter = SamSegmenter(*helpers.sam(), points_per_side=points, min_quality=-10.0, min_stability=0.0)
        return Grounder(segmenter=segmenter, cache=GroundingCache(tmp_path))

    first = grounder(3).segment(helpers.picture())
    second = grounder(3)
    second.segmenter.segment = None  # whoever asks the model now fails
    assert first and same(second.segment(helpers.picture()), first)
    grounder(2).segment(helpers.picture())
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_phrase_without_hit_is_an_error_from_disk_too(tmp_path):
    grounder = counting_grounder(tmp_path, threshold=1.0)
    assert grounder.ground(helpers.picture(), PHRASES, "skip") == []
    with pytest.raises(ObjectComposeError, match="nothing was found"):
        grounder.ground(helpers.picture(), PHRASES)
    assert grounder.detector.seen == 1


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ObjectComposeError, match="`cache` must be a folder"):
        GroundingCache(tmp_path / "file").store("key", [])


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert default_cache_folder() == tmp_path / "grounding" == GroundingCache().folder
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "xdg" / "objectcompose" / "grounding"
