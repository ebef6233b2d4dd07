"""What evaluating composition adds to plain identity: occluded references, overlaps, spreads, LPIPS, maps of keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import CheckpointError, ObjectComposeError
from objectcompose.evaluation.composition_lpips import load_lpips, lpips_rows
from objectcompose.evaluation.composition_maps import paint_with_key_maps
from objectcompose.evaluation.composition_metrics import (
    WORLD_SPREADS,
    composition_metrics,
    overlap_of_boxes,
    spread_rows,
)
from objectcompose.evaluation.generation import Picture
from objectcompose.evaluation.toybox_object_sets import HIDDEN_SHARE, toybox_object_sets
from objectcompose.files import write_png
from objectcompose.toybox.categories import PRESETS
from objectcompose.toybox.identities import sample_identity
from objectcompose.toybox.scenes import render_scenes, sample_scene
from tests.pipelines.object_prompt_helpers import PROMPT, prompt_pipeline, two_objects


CPU = PRESETS["cpu"]


def row(label, round_number, number=0, **values):
    common = {"set": label, "round": round_number, "object": number, "kind": "seen", "count": 2, "segment": 0}
    return {**common, "dino": 0.5, "clip": 0.4, "match_rate": 1.0, "copies": 0, **values}


# ---- occluded references


@pytest.mark.parametrize("name", PRESETS)
def test_occluded_references_miss_a_third(name):
    preset, hidden = PRESETS[name], []
    for one in toybox_object_sets(preset, "dev", (2, 3), ("occluded",)):
        for number in range(len(one.identities)):
            seen, whole = (
                np.asarray(one.reference(preset, number, is_whole=is_whole)).astype(float) / 255
                for is_whole in (False, True)
            )
            assert np.array_equal(seen[..., :3], whole[..., :3]) and (seen[..., 3] <= whole[..., 3]).all()
            hidden.append(1 - seen[..., 3].sum() / whole[..., 3].sum())
    assert 0.2 < min(hidden) < max(hidden) < 0.45 and np.mean(hidden) == pytest.approx(HIDDEN_SHARE, abs=0.05)


def test_other_references_are_whole():
    one = toybox_object_sets(CPU, "dev", (2,), ("seen",))[0]
    assert np.array_equal(*(np.asarray(one.reference(CPU, 0, is_whole=is_whole)) for is_whole in (False, True)))


# ---- overlaps and gains


def test_overlap_of_boxes_by_hand():
    boxes = [(0.0, 0.0, 0.5, 0.5), None, (0.25, 0.0, 0.5, 0.5), (0.8, 0.8, 1.0, 1.0)]
    assert overlap_of_boxes(boxes) == [pytest.approx(0.5), None, pytest.approx(1.0), 0.0]
    assert overlap_of_boxes([(0, 0, 1, 1)]) == [0.0]
    assert overlap_of_boxes([(0, 0, 1, 1), (0, 0, 1, 1)]) == [1.0, 1.0], "equal boxes are not one box"


def test_gain_and_overlap_by_hand():
    rows = [
        row("a", 0, 0, identity=0.9, identity_floor=0.3, overlap=0.5),
        row("a", 0, 1, identity=0.7, identity_floor=0.5, overlap=0.0),
        row("b", 0, 0, identity=0.0, identity_floor=0.4, overlap=None),
    ]
    metrics = composition_metrics(rows)
    assert metrics["identity_gain"] == pytest.approx((0.6 + 0.2 - 0.4) / 3)
    assert metrics["identity_gain.overlapping"] == pytest.approx(0.6)
    assert metrics["identity_gain.apart"] == pytest.approx(0.2)
    assert "identity_gain.apart" not in composition_metrics(rows[1:]), "nothing overlaps there"


# ---- diversity


def test_diversity_is_the_mean_of_known_spreads_in_units_of_the_world():
    centre, size = WORLD_SPREADS["centre"], WORLD_SPREADS["size"]
    rows = [
        row("a", 0, x=0.5 - centre, y=0.5, size=0.1 * 4**-size),
        row("a", 1, x=0.5 + centre, y=0.5, size=0.1 * 4**size),
    ]
    (found,) = spread_rows(rows)
    assert found["centre"] == pytest.approx(centre) and found["size"] == pytest.approx(size)
    assert found["diversity"] == pytest.approx(1.0) and "flip" not in found
    assert composition_metrics(rows)["diversity"] == pytest.approx(1.0)
    still = [{**one, "flip": 0} for one in rows]
    assert spread_rows(still)[0]["diversity"] == pytest.approx(2 / 3)
    assert spread_rows(rows[:1]) == []


def test_the_worlds_own_scenes_have_a_diversity_of_one():
    """From true outlines, boxes and poses of eight scenes of each set."""
    rows = []
    for number in range(24):
        rng = np.random.default_rng((5, number))
        count = 2 + number % 3
        names = rng.choice(CPU.categories, count, replace=False)
        identities = [sample_identity(CPU, str(name), rng) for name in names]
        specs = [sample_scene(CPU, (5, number, place), identities=identities) for place in range(8)]
        scenes = render_scenes(CPU, specs)
        for round_number, spec in enumerate(specs):
            for place, identity in enumerate(identities):
                own = spec.identities.index(identity)
                if not scenes.visible[round_number, own].any():
                    continue
                x1, y1, x2, y2 = scenes.boxes[round_number, own].tolist()
                share, pose = float(scenes.visible[round_number, own].mean()), spec.poses[own]
                seen = {"x": (x1 + x2) / 2, "y": (y1 + y2) / 2, "size": share}
                rows.append(row(str(number), round_number, place, rotation=pose.rotation, flip=int(pose.flip), **seen))
    metrics = composition_metrics(rows)
    assert metrics["diversity"] == pytest.approx(1.0, abs=0.08)
    for name, spread in WORLD_SPREADS.items():
        assert metrics[f"diversity_{name}"] == pytest.approx(spread, rel=0.15), name


# ---- LPIPS


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """AlexNet with random weights, as torchvision saves it."""
    pytest.importorskip("torchmetrics")
    models = pytest.importorskip("torchvision.models")
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.manual_seed(0)
    weights = models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{name}": weight for name, weight in weights.items()}, path)  # without the classifier
    return path


def test_lpips_knows_equal_pictures_and_grows_with_change(alexnet):
    distance = load_lpips(alexnet, "cpu")
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    near = 0.9 * picture + 0.1 * other
    pairs = ((picture, picture), (picture, near), (picture, other), (other, picture))
    same, close, far, back = (float(distance.between(*pair)) for pair in pairs)
    assert same == 0 and 0 < close < far and far == pytest.approx(back)


def test_lpips_is_of_the_weights_that_are_given(alexnet):
    """Each layer's unit-length features, their squared differences weighted by the learned head, computed by hand."""
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    models = pytest.importorskip("torchvision.models")
    layers = models.alexnet(weights=None).features
    weights = torch.load(alexnet, weights_only=True)
    layers.load_state_dict({name.removeprefix("features."): weight for name, weight in weights.items()})
    heads = lpips._LPIPS(net="alex", pnet_rand=True).lins
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand(2, 3, 256, 256, generator=generator)  # of LPIPS's own side: nothing is resized
    shift, scale = (torch.tensor(one).view(1, 3, 1, 1) for one in ([-0.03, -0.088, -0.188], [0.458, 0.448, 0.45]))
    states, expected, places = (pictures * 2 - 1 - shift) / scale, 0.0, iter(heads)
    with torch.no_grad():
        for layer in layers[:12]:
            states = layer(states)
            if isinstance(layer, torch.nn.ReLU):
                units = states / (1e-8 + states.square().sum(1, keepdim=True)).sqrt()
                expected += float(next(places)((units[:1] - units[1:]).square()).mean())
    found = load_lpips(alexnet, "cpu").between(pictures[:1], pictures[1:])
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_lpips_rows_are_pairs_of_one_set(alexnet, tmp_path):
    sets = {one.record.id: one for one in toybox_object_sets(CPU, "dev", (2,), ("seen",), 2)}
    pictures = []
    for place, one in enumerate(sets.values()):
        for number in range(3):
            path = tmp_path / f"{place}-{number}.png"
            write_png(path, Image.new("RGB", (64, 64), (60 * number, 90 * place, 10)))
            pictures.append(Picture(one.record, number, path))
    rows = lpips_rows(load_lpips(alexnet, "cpu"), sets, pictures)
    assert [found["pair"] for found in rows] == [[0, 1], [0, 2], [1, 2]] * 2
    assert all(found["lpips"] > 0 and found["count"] == 2 for found in rows)
    metrics = composition_metrics([row("a", 0), *rows])
    assert metrics["diversity_lpips"] == pytest.approx(np.mean([found["lpips"] for found in rows]))
    assert metrics["diversity_lpips.n2"] == metrics["diversity_lpips"] and metrics["dino_comp"] == 0.5
    with pytest.raises(ObjectComposeError, match="at least one"):
        composition_metrics(rows)


def test_lpips_weights_that_cannot_be(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        load_lpips(tmp_path / "none.pth", "cpu")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"broken\.pth"):
        load_lpips(tmp_path / "broken.pth", "cpu")
    pytest.importorskip("torchmetrics")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"AlexNet: its 1 tensors"):
        load_lpips(tmp_path / "other.pth", "cpu")


# ---- maps of keys


def test_maps_of_keys_are_shares_of_the_objects():
    pipeline = prompt_pipeline()
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    image, maps = paint_with_key_maps(pipeline, PROMPT, two_objects(), **arguments)
    assert maps.shape == (2, 16, 16) and maps.min() >= 0
    torch.testing.assert_close(maps.sum(0), torch.ones(16, 16))
    assert float(maps[0].std()) > 1e-3, "cells differ"
    again = pipeline(PROMPT, objects=two_objects(), num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(np.asarray(image), np.asarray(again.images[0])), "measuring changes nothing"
    twice = [two_objects()[0], {**two_objects()[0], "phrase": "cup"}]
    _, equal = paint_with_key_maps(pipeline, PROMPT, twice, **arguments)
    torch.testing.assert_close(equal, torch.full((2, 16, 16), 0.5))


def test_maps_of_keys_are_the_branchs_softmax():
    """Beside the branch's own attention with the objects' indicators as values."""
    pipeline, seen = prompt_pipeline(), {}
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    module = dict(pipeline.unet.named_modules())[layer]
    module.to_q.register_forward_hook(lambda _, __, query: seen.update(query=query[1:]))
    adapter_layers = pipeline.adapter.projections.layer_widths
    pipeline.adapter.projections.layer_widths = {layer: adapter_layers[layer]}
    _, maps = paint_with_key_maps(pipeline, PROMPT, two_objects(), num_inference_steps=1)
    branch = pipeline._caches["keys"]["keys_values"][layer]
    heads = module.heads
    query, key = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (seen["query"], branch))
    indicators = torch.eye(2).repeat_interleave(3, 0).expand(1, heads, -1, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, indicators).mean(1)[0]  # (HW, 2)
    side = int(len(expected) ** 0.5)
    small = torch.nn.functional.interpolate(
        expected.T.reshape(1, 2, side, side), (16, 16), mode="bilinear", align_corners=False
    )[0]
    torch.testing.assert_close(maps, small.detach(), atol=1e-5, rtol=0)


def test_maps_need_a_strength():
    objects = [{**one, "scale": 0.0} for one in two_objects()]
    with pytest.raises(ObjectComposeError, match="`scale` above 0"):
        paint_with_key_maps(prompt_pipeline(), PROMPT, objects)
