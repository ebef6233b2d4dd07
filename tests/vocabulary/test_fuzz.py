"""Whatever comes in, out comes a result that keeps its promises, or an `ObjectComposeError`; nothing else.

The same properties run with 200 cases each in the fast tier and with 10,000 in the slow one.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from objectcompose.attention_processors.regions import (
    RASTER_RULES,
    RegionPyramid,
    exclusive_regions,
    grids_of,
    shared_ownership,
)
from objectcompose.errors import ObjectComposeError
from objectcompose.layout import Layout, SceneObject, as_scene_objects, load_layout, save_layout
from objectcompose.pipelines.token_utils import find_phrases, prompt_token_ids
from tests.tiny import tiny_tokenizer


FAST, SLOW = 200, 10_000
# Thousands of small files, each written to the disk's end: in memory where that is possible.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

numbers = st.one_of(
    st.floats(0, 1, allow_subnormal=True), st.floats(), st.integers(), st.sampled_from([0, 1, 0.5, True, "0", None])
)
text = st.text(st.characters(), max_size=20)
words = st.sampled_from(
    "dog dogs cat car carton corgi teddy bear glass wine <v> <v>_1 13 3 a and , 's é 🐶 <|endoftext|> \x1c DOG".split(
        " "
    )
)
prompts = st.lists(words | text, max_size=12).map(" ".join) | st.lists(words, max_size=90).map(" ".join)
phrases = st.lists(words | text, min_size=0, max_size=3).map(" ".join)
good_sides = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda pair: pair[0] < pair[1])
good_boxes = st.tuples(good_sides, good_sides).map(lambda s: (s[0][0], s[1][0], s[0][1], s[1][1]))
boxes = st.one_of(good_boxes, st.lists(numbers, max_size=5), st.tuples(*[numbers] * 4), text, st.none())
mask_values = st.sampled_from([0, 1, 1.0, 0.0, 255, 2, -1, 0.5, float("nan"), True, None, "1"])
# One number holds all pixels: much cheaper to draw than a list of lists.
rows_of_zeros_and_ones = st.builds(
    lambda height, width, bits: [
        [bits >> (row * width + column) & 1 for column in range(width)] for row in range(height)
    ],
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**25 - 1),
)
masks = st.one_of(
    rows_of_zeros_and_ones,
    rows_of_zeros_and_ones.map(lambda rows: np.array(rows, dtype=np.uint8) * 255),
    rows_of_zeros_and_ones.map(torch.tensor),
    st.lists(st.lists(mask_values, max_size=4), max_size=4),
    st.integers(),
    text,
    st.none(),
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
object_dicts = st.fixed_dictionaries(
    {},
    optional={
        "phrase": phrases | json_values,
        "mask": masks,
        "box": boxes,
        "token": words | json_values,
        "scale": numbers | st.floats(0, 4),
        "order": st.integers() | numbers,
        "image": text | json_values,
        "bbox": boxes,
    },
)
layout_json = st.fixed_dictionaries(
    {},
    optional={
        "schema_version": st.sampled_from([1, 1, 1, 2, "1", None]),
        "prompt": prompts | json_values,
        "objects": st.lists(object_dicts | json_values, max_size=3) | json_values,
        "extra": json_values,
    },
)


def both_tiers(*strategies):
    """Run a property with `FAST` cases, and again, marked slow, with `SLOW`."""

    def decorate(property_of):
        def run(cases):
            checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
            config = settings(
                max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=checks
            )
            config(given(*strategies)(property_of))()

        def test(cases):
            run(cases)

        test.__doc__ = property_of.__doc__
        cases = [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="slow", marks=pytest.mark.slow)]
        return pytest.mark.parametrize("cases", cases)(test)

    return decorate


@both_tiers(object_dicts | json_values, st.integers(1, 2))
def test_objects(data, batch_size):
    """A dict becomes the same valid object for each prompt, or a typed error."""
    try:
        rows = as_scene_objects([data], batch_size)
    except ObjectComposeError as error:
        assert str(error)
        return
    assert len(rows) == batch_size
    for obj in (obj for row in rows for obj in row):
        assert obj.box is None or (0 <= obj.box[0] < obj.box[2] <= 1 and 0 <= obj.box[1] < obj.box[3] <= 1)
        assert obj.mask is None or (obj.mask.any() and set(obj.mask.unique().tolist()) <= {0.0, 1.0})
        assert as_scene_objects([obj], 1) == [[obj]]


@both_tiers(layout_json | json_values)
def test_layout_files(data):
    """A JSON file loads into a layout that is written and read back equal, or a typed error."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        path = Path(folder) / "scene.json"
        try:
            path.write_text(json.dumps(data))
        except TypeError:  # arrays as masks have no JSON
            return
        try:
            layout = load_layout(path)
        except ObjectComposeError as error:
            assert str(error)
            return
        save_layout(layout, path)
        assert load_layout(path) == layout


@both_tiers(st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789.eE-ntrufalsxobjectpm\\ ', max_size=60))
def test_layout_bytes(content):
    """Any bytes at all as a layout file end in a typed error (or a layout)."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        path = Path(folder) / "scene.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            assert isinstance(load_layout(path), Layout)
        except ObjectComposeError as error:
            assert str(error)


@both_tiers(phrases, rows_of_zeros_and_ones, good_boxes, st.floats(0, 9), st.integers(-5, 5))
def test_round_trip(phrase, mask, box, scale, order):
    """What is a valid layout comes back from disk exactly."""
    try:
        layout = Layout(phrase, (SceneObject(phrase, mask=mask, box=box, scale=scale, order=order),))
    except ObjectComposeError:
        return
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        save_layout(layout, Path(folder) / "scene.json")
        assert load_layout(Path(folder) / "scene.json") == layout


TOKENIZER = tiny_tokenizer()
TOKENIZER.add_tokens(["<v>", "<v>_1"])


@both_tiers(prompts, st.lists(phrases, max_size=3))
def test_prompts(prompt, wanted):
    """Phrases get distinct places inside the prompt, or a typed error."""
    try:
        found = find_phrases(TOKENIZER, prompt, wanted)
    except ObjectComposeError as error:
        assert str(error)
        return
    taken = [position for positions in found for position in positions]
    length = len(prompt_token_ids(TOKENIZER, prompt))
    assert len(found) == len(wanted) and all(found) and len(taken) == len(set(taken))
    assert length <= 77 and all(0 < position < length - 1 for position in taken)


regions_to_place = st.lists(good_boxes | boxes | rows_of_zeros_and_ones.map(lambda rows: torch.tensor(rows).float()))


@both_tiers(
    regions_to_place,
    st.tuples(st.integers(0, 17), st.integers(1, 17)),
    st.sampled_from(RASTER_RULES),
    st.lists(st.integers(-2, 2), min_size=8, max_size=8),
    st.booleans(),
)
def test_regions(regions, canvas, rule, orders, exclusive):
    """Every level holds every region, and ownership adds up; or a typed error."""
    regions = regions[:8]
    try:
        pyramid = RegionPyramid(regions, canvas, rule, orders[: len(regions)], exclusive)
    except ObjectComposeError as error:
        assert str(error)
        return
    for grid in grids_of(*canvas, 4):
        cells = pyramid.at(grid)
        assert cells.shape == (len(regions), *grid) and cells.flatten(1).any(1).all()
        assert bool(((cells >= 0) & (cells <= 1)).all())
        shares = shared_ownership(cells, pyramid.orders, pyramid.areas)
        owned = shares.sum(0)
        reached = (cells > 0).any(0).float() if len(regions) else torch.zeros(grid)
        torch.testing.assert_close(owned, reached)
        assert shares.flatten(1).any(1).all() and not (shares * (cells == 0)).any()
        try:
            alone = exclusive_regions(cells, pyramid.orders, pyramid.areas)
        except ObjectComposeError:
            continue
        assert bool(((alone > 0).sum(0) <= 1).all()) and alone.flatten(1).any(1).all()
