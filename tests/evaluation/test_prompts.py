"""Prompt lists and their readers: counts and wording of the protocols, lists that never change, broken files."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache

import pytest

from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.evaluation.category_names import ADE20K_CATEGORIES, COCO_CATEGORIES
from objectcompose.evaluation.multigen import multigen_list
from objectcompose.evaluation.prompt_lists import multigen_prompts, pair_prompts, spatial_prompts, stable_sample
from objectcompose.evaluation.prompts import (
    PromptRecord,
    check_records,
    prompts_digest,
    read_multigen,
    read_prompt_lines,
)
from objectcompose.evaluation.toybox_prompts import split_of_categories, toybox_pairs, toybox_prompts
from objectcompose.toybox.categories import PRESETS, held_out_pairs


# what was measured on a list holds only for as long as the list stays what it was
DIGESTS = {
    "multigen": "3d0f88acf664f6db",
    "spatial": "f9f2e358a4384354",
    "pairs": "ce8433eef25c375a",
    "cpu dev": "2d61ad07c5d0f35a",
    "cpu test": "7b663c358ee3c247",
    "cpu pairs": "bc6fb584e1a1da54",
    "gpu dev": "b79d3fa1a82f919c",
    "gpu test": "664fbf62c1fece35",
    "gpu pairs": "cfc888bb2fe741b7",
}


@lru_cache(maxsize=1)
def all_lists():
    lists = {"multigen": multigen_prompts(), "spatial": spatial_prompts(), "pairs": pair_prompts()}
    for name, preset in PRESETS.items():
        lists |= {f"{name} {split}": toybox_prompts(preset, split) for split in ("dev", "test")}
        lists[f"{name} pairs"] = toybox_pairs(preset)
    return lists


def test_lists_stay_what_they_were():
    assert {name: prompts_digest(records)[:16] for name, records in all_lists().items()} == DIGESTS


def test_every_list_can_be_painted():
    for records in all_lists().values():
        check_records(records)
        assert all(name in record.text for record in records for name in record.categories)


def test_multigen_words_and_counts():
    records = multigen_prompts()
    first = records[0]
    a, b, c, d, e = first.categories
    assert first.text == f"a photo of a {a}, a {b}, a {c}, a {d}, and a {e}." and first.id == "0"
    assert len(records) == 1000 and all(len(set(record.categories)) == 5 for record in records)
    counts = Counter(name for record in records for name in record.categories)
    assert set(counts) == set(COCO_CATEGORIES)
    assert 40 <= min(counts.values()) and max(counts.values()) <= 90  # 62.5 expected, standard deviation 7.7
    assert multigen_prompts(seed=1)[0] != first
    assert (len(COCO_CATEGORIES), len(ADE20K_CATEGORIES)) == (80, 100) == (80, len(set(ADE20K_CATEGORIES)))
    assert multigen_prompts(["dog", "cup"], 1, 2)[0].text in (
        "a photo of a dog and a cup.",
        "a photo of a cup and a dog.",
    )


def test_spatial_prompts_are_all_ordered_pairs_in_four_relations():
    records = spatial_prompts()
    assert len(records) == 25_280 == len({record.text for record in records})
    assert set(Counter(record.kind for record in records).values()) == {6320}
    assert "an apple to the left of a dog" in {record.text for record in records}


def test_the_276_pairs():
    records = pair_prompts()
    assert Counter(record.kind for record in records) == {
        "animal-animal": 66,
        "animal-object": 144,
        "object-object": 66,
    }
    texts = {record.text for record in records}
    assert len(texts) == 276 and {"a cat and a dog", "an elephant with a crown"} <= texts
    coloured = next(record.text for record in records if record.categories == ("cat", "car")).split()
    assert coloured[:3] == ["a", "cat", "and"] and coloured[-1] == "car" and len(coloured) == 6


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_toybox_splits_share_no_combination(preset):
    dev, test = (toybox_prompts(preset, split) for split in ("dev", "test"))
    sets = [{frozenset(record.categories) for record in records} for records in (dev, test)]
    assert not sets[0] & sets[1]
    held_out = held_out_pairs(preset)
    assert not any(pair <= names for names in sets[0] for pair in held_out)
    for records in (dev, test):
        assert len({record.text for record in records}) == len(records)
        assert [len(record.categories) for record in records[:4]] == [2, 3, 4, 5]
        assert set(Counter(record.kind for record in records).values()) == {len(records) // 4}
    assert split_of_categories(preset, dev[0].categories[::-1]) == "dev"


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_toybox_pairs_hold_every_pair_that_training_never_shows(preset):
    records = toybox_pairs(preset)
    held_out = [record for record in records if record.kind == "held-out"]
    assert Counter(frozenset(record.categories) for record in held_out) == dict.fromkeys(held_out_pairs(preset), 2)
    seen = {frozenset(record.categories) for record in records if record.kind == "seen"}
    dev = {frozenset(record.categories) for record in toybox_prompts(preset, "dev")}
    assert seen and not seen & held_out_pairs(preset) and not seen & dev


def official_entry(number, *names):
    entry = {"unique_id": number, "num_objects": len(names), "text": f"a photo of {', '.join(names)}."}
    return entry | {f"obj_{place}_attributes": [name] for place, name in enumerate(names, start=1)}


def test_official_json(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([official_entry(0, "dog", "cup", "car"), official_entry(7, "cup", "cup")]))
    first, second = read_multigen(path)
    assert (first.id, first.text, first.categories) == ("0", "a photo of dog, cup, car.", ("dog", "cup", "car"))
    assert (second.id, second.categories) == ("7", ("cup",))
    assert multigen_list(str(path), has_model=True) == [first, second]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[\n{},\n]", "line 3"),
        ("{}", "list of at least one"),
        ("[]", "list of at least one"),
        (json.dumps([official_entry(0, "dog", "cup"), {"unique_id": 1}]), "entry 1.*num_objects"),
        (json.dumps([{**official_entry(0, "dog"), "num_objects": 2}]), "entry 0.*obj_2_attributes"),
        (json.dumps([{**official_entry(0, "dog"), "obj_1_attributes": []}]), "entry 0"),
        (json.dumps([official_entry(3, "dog"), official_entry(3, "cup")]), "'3' twice"),
        (json.dumps([{**official_entry(0, "dog"), "text": " "}]), "entry 0.*text"),
    ],
)
def test_broken_json_is_named(tmp_path, content, message):
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(LayoutError, match=message):
        read_multigen(path)


def test_compbench_lines(tmp_path):
    path = tmp_path / "color_val.txt"
    path.write_text(
        "a green bench and a blue bowl\n\na red car\tseen\na green bench and a blue bowl\r\n", encoding="utf-8"
    )
    records = read_prompt_lines(path)
    assert [(one.id, one.text, one.kind) for one in records] == [
        ("0", "a green bench and a blue bowl", ""),
        ("1", "a red car", "seen"),
        ("2", "a green bench and a blue bowl", ""),
    ]
    path.write_text("\n \n")
    with pytest.raises(LayoutError, match="at least one line"):
        read_prompt_lines(path)
    with pytest.raises(LayoutError, match="cannot be read"):
        read_prompt_lines(tmp_path / "none.txt")


def test_bad_records_and_lists():
    for arguments, message in (
        (("a/b", "a dog"), "id"),
        (("", "a dog"), "id"),
        (("1", ""), "text"),
        (("1", "a dog", ("dog", "dog")), "differ"),
    ):
        with pytest.raises(LayoutError, match=message):
            PromptRecord(*arguments)
    with pytest.raises(LayoutError, match="at least one prompt"):
        check_records([])
    with pytest.raises(LayoutError, match="twice"):
        check_records([PromptRecord("a", "a dog"), PromptRecord("A", "a cup")])
    with pytest.raises(ObjectComposeError, match="at least 9"):
        stable_sample(["dog"], 9)
    with pytest.raises(ObjectComposeError, match="`split`"):
        toybox_prompts(PRESETS["cpu"], "train")
    with pytest.raises(LayoutError, match="--prompts"):
        multigen_list("no-such-list", has_model=True)
    with pytest.raises(ObjectComposeError, match="got none"):
        multigen_list(None, has_model=True)
