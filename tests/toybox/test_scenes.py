"""Scenes are what their descriptions say: exact masks, boxes, order and captions, equal from equal seeds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from objectcompose.toybox.categories import CATEGORIES, PRESETS, STYLES, held_out_drawings, held_out_pairs
from objectcompose.toybox.identities import HELD_OUT_HUES, PICTURES, Identity, load_atlas, sample_identity
from objectcompose.toybox.scenes import (
    MAX_OBJECTS,
    Pose,
    SceneSpec,
    boxes_of_masks,
    list_objects,
    render_references,
    render_scenes,
    sample_scene,
)


CPU, GPU = PRESETS["cpu"], PRESETS["gpu"]
PRESET_LIST = [CPU, GPU]


def crowded(seed: int) -> SceneSpec:
    """Five objects, so that some lie in front of others."""
    return sample_scene(GPU, seed, categories=["dog", "cup", "car", "pizza", "apple"])


@pytest.mark.parametrize("preset", PRESET_LIST, ids=lambda preset: preset.name)
def test_equal_seeds_give_equal_scenes(preset):
    first, second = (render_scenes(preset, [sample_scene(preset, (9, n)) for n in range(4)]) for _ in range(2))
    assert first.specs == second.specs and first.captions == second.captions
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.visible, second.visible)
    assert sample_scene(preset, (9, 0)) != sample_scene(preset, (9, 1))
    assert first.pixels.shape == (4, 3, preset.image_size, preset.image_size)
    assert first.pixels.min() >= 0 and first.pixels.max() <= 1


def test_batch_equals_single_scenes():
    specs = [sample_scene(CPU, seed) for seed in range(7)]
    batch = render_scenes(CPU, specs)
    for row, spec in enumerate(specs):
        single = render_scenes(CPU, [spec])
        count = len(spec.identities)
        torch.testing.assert_close(batch.pixels[row], single.pixels[0], atol=1e-6, rtol=0)
        assert torch.equal(batch.visible[row, :count], single.visible[0])
        assert torch.equal(batch.boxes[row, :count], single.boxes[0])
        assert not batch.visible[row, count:].any() and not batch.boxes[row, count:].any()


def test_masks_and_boxes_are_exact():
    batch = render_scenes(GPU, [crowded(seed) for seed in range(6)])
    side = GPU.image_size
    assert set(batch.visible.unique().tolist()) == {0.0, 1.0} == set(batch.amodal.unique().tolist())
    assert (batch.visible <= batch.amodal).all()
    assert batch.visible.sum(1).max() == 1  # no pixel belongs to two objects
    assert torch.equal(batch.visible.amax(1), batch.amodal.amax(1))  # and none that an outline covers to nobody
    assert (batch.visible < batch.amodal).any()  # some object is really hidden in part
    for mask, box in zip(batch.visible.flatten(0, 1), batch.boxes.flatten(0, 1), strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
        torch.testing.assert_close(box, torch.tensor([float(edge) for edge in expected]) / side)


def test_last_object_is_in_front():
    scene = crowded(0)
    middle = tuple(dataclasses.replace(pose, x=0.5, y=0.5) for pose in scene.poses)
    batch = render_scenes(GPU, [dataclasses.replace(scene, poses=middle)])
    assert torch.equal(batch.visible[0, -1], batch.amodal[0, -1])
    assert batch.visible[0, 0].sum() < batch.amodal[0, 0].sum()
    front = render_scenes(
        GPU, [dataclasses.replace(scene, identities=scene.identities[-1:], poses=middle[-1:])]
    )  # the front one alone looks the same where it is opaque
    inside = torch.nn.functional.max_pool2d(1 - batch.visible[:, -1:], 3, 1, 1)[0, 0] == 0
    torch.testing.assert_close(batch.pixels[0][:, inside], front.pixels[0][:, inside], atol=0.15, rtol=0)


def test_boxes_of_empty_and_full_masks():
    masks = torch.stack([torch.zeros(5, 7), torch.ones(5, 7)])
    assert boxes_of_masks(masks).tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("preset", PRESET_LIST, ids=lambda preset: preset.name)
def test_held_out_pairs_never_train(preset):
    pairs = held_out_pairs(preset)
    assert pairs == held_out_pairs(preset) and pairs
    if preset is GPU:
        assert len(pairs) == 24
    for seed in range(1000):
        names = {identity.category for identity in sample_scene(preset, (0, seed)).identities}
        assert 1 <= len(names) <= MAX_OBJECTS
        assert not any(pair <= names for pair in pairs)
    asked = sorted(next(iter(pairs)))
    assert {one.category for one in sample_scene(preset, 0, categories=asked).identities} == set(asked)


def test_unseen_identities_are_apart():
    import numpy as np

    rng = np.random.default_rng(0)
    low, high = HELD_OUT_HUES
    drawings = held_out_drawings(GPU)
    assert len(drawings) == 16 == len({category for category, _ in drawings})
    for number in range(600):
        category = CATEGORIES[number % len(CATEGORIES)]
        seen = sample_identity(GPU, category, rng)
        assert not low < seen.hue < high and (category, seen.style) not in drawings
        unseen = sample_identity(GPU, category, rng, unseen=True)
        assert low <= unseen.hue <= high
        if category in {name for name, _ in drawings}:
            assert (category, unseen.style) in drawings
    assert not held_out_drawings(CPU)


def test_references_show_the_identity_in_another_pose():
    identity = Identity("dog", "fluent", hue=90.0)
    first, second, again = render_references(CPU, [identity] * 3, [1, 2, 1])
    assert first.shape == (4, 64, 64) and torch.equal(first, again)
    overlap = torch.minimum(first[3], second[3]).sum() / torch.maximum(first[3], second[3]).sum()
    assert overlap < 0.95
    colours = [(one[:3] * one[3:]).sum((1, 2)) / one[3].sum() for one in (first, second)]
    torch.testing.assert_close(*colours, atol=0.04, rtol=0)  # the same thing: only moved
    other = render_references(CPU, [dataclasses.replace(identity, hue=210.0)], [1])[0]
    assert torch.equal(other[3], first[3]) and (other[:3] - first[:3]).abs().max() > 0.2


def test_captions_list_what_is_there():
    for seed in range(200):
        spec = sample_scene(GPU, seed)
        assert spec.caption.startswith("a photo of ")
        said = spec.caption
        for identity in spec.identities:
            assert f" {identity.category}" in said
            assert identity.style not in said
    captions = [sample_scene(GPU, seed).caption for seed in range(600)]
    with_background = sum(" on " in caption or "background" in caption for caption in captions) / len(captions)
    assert 0.25 < with_background < 0.42
    assert list_objects(["dog"]) == "a dog" and list_objects(["dog", "cup", "apple"]) == "a dog, a cup and an apple"


def test_given_identities_appear():
    identities = [Identity("cup", "noto", hue=30.0), Identity("cup", "noto", hue=200.0)]
    spec = sample_scene(GPU, 3, identities=identities)
    assert set(spec.identities) == set(identities) and spec.poses[0] != spec.poses[1]
    assert all(isinstance(pose, Pose) for pose in spec.poses)


def test_all_pictures_are_there():
    files = sorted(PICTURES.glob("*/*.png"))
    assert len(files) == 189 == len(CATEGORIES) * len(STYLES)
    alpha = load_atlas(CATEGORIES, STYLES, 32)[:, :, 3]
    covered = alpha.mean((-1, -2))
    assert covered.min() > 0.08 and covered.max() < 1.0  # each has an outline
    licences = (PICTURES / "LICENSES.md").read_text(encoding="utf-8")
    assert all(word in licences for word in ("fluent", "noto", "twemoji", "MIT", "Apache", "CC-BY 4.0"))
