"""From a picture to who is where: segments, crops, embeddings, assignment, and the cells a match opens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.processor import AttentionCall
from objectcompose.errors import CheckpointError, NonFiniteError, ObjectComposeError, RegionError
from objectcompose.grounding.detection import Detection
from objectcompose.grounding.grounder import Grounder
from objectcompose.pipelines.object_matching import (
    check_segmenter,
    dino_side,
    dino_statistics,
    embed_crops,
    find_segments,
    keep_segments,
    mask_bounds,
    match_objects,
    match_segments,
    segment_pixels,
)
from objectcompose.pipelines.object_regions import SlotRegions, dilated_masks, slot_masks
from objectcompose.pipelines.reference_images import reference_pixels
from tests.tiny import tiny_dino


COLOUR = torch.tensor([0.2, 0.4, 0.6])


def box_mask(top, bottom, left, right, size=(20, 20)):
    mask = torch.zeros(size)
    mask[top:bottom, left:right] = 1
    return mask


class ColourSegmenter:
    """Segments by exact colour: each colour but black is one segment. Needs no text."""

    def segment(self, picture):
        pixels = np.array(picture)
        colours = np.unique(pixels.reshape(-1, 3), axis=0)
        return [(pixels == colour).all(-1) for colour in colours if colour.any()]


# ---- assignment


def test_assignment_maximises_the_sum_not_each_row():
    similarity = torch.tensor([[0.9, 0.8], [0.85, 0.1]])
    found = match_objects(similarity, 0.35)
    assert [segment for segment, _ in found] == [1, 0]
    assert [score for _, score in found] == pytest.approx([0.8, 0.85])


def test_fewer_segments_than_prompts():
    found = match_objects(torch.tensor([[0.5], [0.9], [0.4]]), 0.35)
    assert [segment for segment, _ in found] == [None, 0, None]
    assert found[0][1] is None and found[1][1] == pytest.approx(0.9)


def test_more_segments_than_prompts():
    found = match_objects(torch.tensor([[0.1, 0.2, 0.7, 0.3]]), 0.35)
    assert found == [(2, pytest.approx(0.7))]


def test_no_segments_at_all():
    assert match_objects(torch.zeros(2, 0), 0.35) == [(None, None)] * 2


@pytest.mark.parametrize(("threshold", "matched"), [(0.35, True), (0.36, False), (-1.0, True)])
def test_weak_pairs_are_refused_and_reported(threshold, matched):
    ((segment, score),) = match_objects(torch.tensor([[0.35]], dtype=torch.float64), threshold)
    assert (segment == 0) == matched and score == 0.35


def test_a_refused_pair_does_not_free_its_segment():
    """Hungarian first, threshold afterwards: the pairs are those of the best sum."""
    found = match_objects(torch.tensor([[0.9, 0.0], [0.8, 0.3]]), 0.35)
    assert [segment for segment, _ in found] == [0, None] and found[1][1] == pytest.approx(0.3)


def test_similarities_must_be_numbers():
    with pytest.raises(NonFiniteError, match="similarity"):
        match_objects(torch.tensor([[float("nan")]]), 0.3)


def test_match_segments_on_hand_made_features():
    masks = torch.stack([box_mask(0, 5, 0, 5), box_mask(10, 15, 0, 5), box_mask(10, 15, 10, 15)])
    prompts = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0]]), dim=-1)
    segments = F.normalize(torch.tensor([[0.0, 0, 1], [0.1, 1, 0], [1, 0, 0.2]]), dim=-1)
    first, second = match_segments(masks, segments, prompts, 0.35)
    assert torch.equal(first.mask, masks[2]) and torch.equal(second.mask, masks[1])
    assert first.similarity == pytest.approx(1 / 1.04**0.5)


# ---- segments


def test_specks_walls_duplicates_and_parts_are_dropped():
    masks = torch.stack(
        [
            box_mask(0, 10, 0, 10),  # 0: an object
            box_mask(0, 1, 12, 14),  # 1: 2 of 400 pixels, a speck
            box_mask(0, 20, 0, 19),  # 2: 95 % of the picture, a wall
            box_mask(0, 10, 0, 9),  # 3: nearly the first one
            box_mask(2, 6, 2, 6),  # 4: a part of the first one
            box_mask(12, 18, 12, 18),  # 5: another object
        ]
    )
    assert keep_segments(masks, [0.8, 0.9, 0.9, 0.7, 0.9, 0.95]) == [5, 0]
    assert keep_segments(masks, [0.8, 0.9, 0.9, 0.9, 0.1, 0.95]) == [5, 3]
    assert keep_segments(masks, [0.8, 0.9, 0.9, 0.7, 0.9, 0.95], drop_parts=False) == [5, 4, 0]
    assert keep_segments(torch.zeros(0, 20, 20), []) == []


def picture_of(*masks_and_colours, size=(20, 20)):
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    for mask, colour in masks_and_colours:
        pixels[mask.bool().numpy()] = colour
    return Image.fromarray(pixels)


def test_any_object_with_segment_will_do():
    first, second = box_mask(0, 8, 0, 8), box_mask(10, 18, 4, 16)
    picture = picture_of((first, (255, 0, 0)), (second, (0, 255, 0)))
    found = find_segments(ColourSegmenter(), picture, None)
    assert {tuple(mask_bounds(mask)) for mask in found} == {(0, 8, 0, 8), (10, 18, 4, 16)}
    assert found.dtype == torch.float32 and set(found.unique().tolist()) == {0.0, 1.0}


class PhraseDetector:
    """Finds "left" and "right", with masks; nothing without phrases."""

    name = "halves"

    def identity(self):
        return "halves"

    def detect(self, pictures, phrases):
        left = box_mask(0, 20, 0, 10)
        halves = {"left": ((0.0, 0.0, 0.5, 1.0), left), "right": ((0.5, 0.0, 1.0, 1.0), 1 - left)}
        return [[Detection(word, *halves[word], 0.9) for word in row if word in halves] for row in phrases]


def test_a_grounder_is_asked_by_phrases_where_all_objects_have_one():
    grounder, picture = Grounder(PhraseDetector()), picture_of()
    check_segmenter(grounder, has_phrases=True)
    found = find_segments(grounder, picture, ["right", "dragon", "right"])
    assert [mask_bounds(mask) for mask in found] == [(0, 20, 10, 20)]
    with pytest.raises(ObjectComposeError, match="a `phrase` of every object"):
        check_segmenter(grounder, has_phrases=False)


@pytest.mark.parametrize("segmenter", [None, object(), SimpleNamespace(segment=3)])
def test_what_is_no_segmenter_is_refused(segmenter):
    with pytest.raises(ObjectComposeError, match="`segmenter`"):
        check_segmenter(segmenter, has_phrases=True)


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (None, ObjectComposeError, "list of masks"),
        ("masks", ObjectComposeError, "list of masks"),
        ([Detection("a", (0, 0, 1, 1), None, 0.5)], ObjectComposeError, "result 0 without one"),
        ([torch.ones(3, 3)], RegionError, r"size \(20, 20\), got shape \(3, 3\)"),
        ([torch.full((20, 20), float("nan"))], NonFiniteError, "NaN"),
    ],
)
def test_what_a_segmenter_returns_is_checked(returned, error, words):
    with pytest.raises(error, match=words):
        find_segments(SimpleNamespace(segment=lambda picture: returned), picture_of(), None)


def test_a_picture_without_segments():
    assert find_segments(ColourSegmenter(), picture_of(), None).shape == (0, 20, 20)


# ---- crops and embeddings


def test_a_segment_is_prepared_as_a_cut_out_is():
    """The mask as an alpha channel, through the preparation of prompts."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (20, 30, 3), generator=generator, dtype=torch.uint8)
    mask = box_mask(3, 15, 5, 25, (20, 30)) * (torch.rand(20, 30, generator=generator) > 0.3)
    mask[3, 5] = mask[14, 24] = 1
    image = Image.fromarray(torch.cat([levels, (mask * 255).byte()[..., None]], -1).numpy())
    found = segment_pixels(levels.permute(2, 0, 1).float() / 255, mask, 28, COLOUR)
    torch.testing.assert_close(found, reference_pixels(image, 28, COLOUR, margin=0.1))


def test_only_pixels_of_the_segment_matter():
    picture, mask = torch.rand(3, 20, 20, requires_grad=True), box_mask(5, 15, 5, 12)
    segment_pixels(picture, mask, 28, COLOUR).square().sum().backward()
    assert ((picture.grad.abs().sum(0) > 0) == mask.bool()).all()


def test_an_empty_mask_has_no_crop():
    with pytest.raises(RegionError, match="empty"):
        segment_pixels(torch.rand(3, 8, 8), torch.zeros(8, 8), 28, COLOUR)


def test_embeddings_are_the_class_token_of_length_one():
    dino = tiny_dino().requires_grad_(False)
    crops = torch.rand(3, 3, 28, 28)
    features = embed_crops(dino, crops, dino_statistics(), "cpu")
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    token = dino((crops - mean[:, None, None]) / std[:, None, None]).last_hidden_state[:, 0]
    torch.testing.assert_close(features, F.normalize(token, dim=-1))


def test_side_of_what_dino_reads():
    dino = tiny_dino()
    assert dino_side(dino) == 28
    assert dino_side(dino, SimpleNamespace(crop_size={"height": 42, "width": 42})) == 42
    with pytest.raises(CheckpointError, match="do not divide 30"):
        dino_side(dino, SimpleNamespace(crop_size={"height": 30, "width": 30}))
    with pytest.raises(CheckpointError, match="`dino` is needed"):
        dino_side(None)


# ---- regions


def test_unmatched_objects_and_backgrounds_share_what_nobody_claims():
    first = box_mask(0, 10, 0, 10)
    masks = slot_masks([first, None], num_others=1)
    assert torch.equal(masks[0], first) and torch.equal(masks[1], 1 - first) and torch.equal(masks[2], 1 - first)
    assert slot_masks([None, None], 1) == [None, None, None]


def test_cells_by_coverage_on_every_level():
    mask = box_mask(0, 8, 0, 5, (16, 16))  # on 4 x 4 cells of 4 pixels: columns covered by 4/4 and 1/4
    hard = SlotRegions([[mask]], (8, 8), [[False]])
    assert torch.equal(hard.at_tokens(16)[0, 0], box_mask(0, 2, 0, 1, (4, 4)))
    soft = SlotRegions([[mask, 1 - mask]], (8, 8), [[False, True]]).at_tokens(16)[0]
    assert torch.equal(soft[0], box_mask(0, 2, 0, 2, (4, 4)))
    assert torch.equal(soft[1], 1 - box_mask(0, 2, 0, 1, (4, 4))), "the border belongs to both"
    assert soft.sum(0).min() == 1


@pytest.mark.parametrize("edge", [5, 6, 7])  # of four pixels of the second column the left one covers 1, 2 or 3
def test_borders_between_segments_stay_hard_beside_free_slots(edge):
    left, right = box_mask(0, 8, 0, edge, (16, 16)), box_mask(0, 8, edge, 16, (16, 16))
    free = 1 - left - right
    alone = SlotRegions([[left, right]], (8, 8), [[False, False]]).at_tokens(16)[0]
    beside = SlotRegions([[left, right, free]], (8, 8), [[False, False, True]]).at_tokens(16)[0]
    assert torch.equal(beside[:2], alone) and torch.equal(beside[2], 1 - box_mask(0, 2, 0, 4, (4, 4)))


def test_small_objects_keep_a_cell_and_empty_slots_have_none():
    speck = box_mask(3, 4, 3, 4, (16, 16))
    regions = SlotRegions(
        [[speck, torch.zeros(16, 16), None], [None]], (8, 8), [[False, False, True], [True]], halves=2
    )
    cells = regions.at_tokens(4)
    assert cells.shape == (4, 3, 2, 2) and torch.equal(cells[:2], cells[2:])
    assert torch.equal(cells[0, 0], torch.tensor([[1.0, 0], [0, 0]]))
    assert cells[0, 1].sum() == 0 and cells[0, 2].sum() == 4
    assert cells[1, 0].sum() == 4 and cells[1, 1:].sum() == 0


def test_sides_that_are_not_square_and_odd():
    mask = box_mask(0, 20, 0, 14, (20, 28))
    regions = SlotRegions([[mask]], (5, 7), [[False]])
    assert regions.at_tokens(35).shape == (1, 1, 5, 7) and regions.at_tokens(12).shape == (1, 1, 3, 4)
    assert torch.equal(regions.at_tokens(12)[0, 0], box_mask(0, 3, 0, 2, (3, 4)))


def test_dilation_is_by_cells_of_the_canvas():
    mask = box_mask(8, 10, 8, 12, (32, 32))
    ((grown, everywhere, empty),) = dilated_masks([[mask, None, torch.zeros(32, 32)]], (16, 16), 4)
    assert mask_bounds(grown) == (0, 9, 0, 10) and everywhere is None and not empty.any()


def test_a_slot_acts_in_its_cells_only():
    """Changing one object's tokens changes nothing outside its cells, and every cell sees its own object alone."""
    left = box_mask(0, 16, 0, 8, (16, 16))
    regions = SlotRegions([[left, 1 - left]], (4, 4), [[False, False]])
    query = torch.randn(1, 2, 16, 3)
    key, value = torch.randn(1, 10, 6), torch.randn(1, 10, 6)

    def branch_output(key, value):
        call = AttentionCall("layer", True, query, key)
        branch = Branch({"layer": (key, value)}, regions, overlap="joint")
        return branch.add_to(torch.zeros(1, 16, 6), call).reshape(4, 4, 6)

    before = branch_output(key, value)
    value_moved, key_moved = value.clone(), key.clone()
    value_moved[:, 5:] += 1
    key_moved[:, 5:] *= -1
    for moved in (branch_output(key, value_moved), branch_output(key_moved, value)):
        assert torch.equal(moved[:, :2], before[:, :2]) and not torch.allclose(moved[:, 2:], before[:, 2:])
    alone = Branch({"layer": (key[:, :5], value[:, :5])}, num_objects=1)
    own = alone.add_to(torch.zeros(1, 16, 6), AttentionCall("layer", True, query, key)).reshape(4, 4, 6)
    torch.testing.assert_close(before[:, :2], own[:, :2])
