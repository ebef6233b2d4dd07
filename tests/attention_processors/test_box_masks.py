"""Masks of box control against additive masks over whole tables, in single tables and through a UNet."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.box_masks import (
    PromptSubjects,
    SubjectRegions,
    TokenVisibility,
    token_visibility,
)
from objectcompose.attention_processors.install import use_parts
from objectcompose.attention_processors.mask import GroupedVisibility, KeyMask, RegionKeyMask
from tests.attention_processors.box_reference import (
    NO_SUBJECT,
    ONE_BOX,
    ONE_SUBJECT,
    TWO_BOXES,
    TWO_SUBJECTS,
    box_members,
    box_pyramids,
    explicit_cross_mask,
    explicit_forward,
    explicit_self_mask,
)
from tests.attention_processors.helpers import unet_and_inputs


@pytest.mark.parametrize("mode", ["guide", "denoise"])
@pytest.mark.parametrize("padding", ["open", "like_end"])
@pytest.mark.parametrize(("boxes", "subjects"), [(TWO_BOXES, TWO_SUBJECTS), (ONE_BOX, ONE_SUBJECT), ((), NO_SUBJECT)])
def test_tokens_seen_are_those_of_the_explicit_mask(mode, padding, boxes, subjects):
    members = box_members(boxes, 8)
    expected = explicit_cross_mask(members, subjects, 11, mode, padding) == 0
    assert torch.equal(token_visibility(members, subjects, 11, mode, padding), expected)


def test_a_shared_token_is_open_in_all_boxes_of_its_subjects():
    members = box_members([(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0), (0.5, 0.0, 1.0, 0.5)], 4)
    subjects = PromptSubjects(((1, 2), (2,), (3,)), (1, 2, 3), end_index=5)
    visible = token_visibility(members, subjects, 7, "denoise")
    first, second, third = (row.nonzero()[0, 0] for row in members)
    assert visible[[first, second, third], 2].tolist() == [True, True, False]
    assert visible[[first, second, third], 1].tolist() == [True, False, False]
    assert visible[:, 0].all() and visible[:, 6].all()  # start token and padding


@pytest.mark.parametrize("side", [4, 8, 16, 32])
def test_boxes_on_the_grids_are_the_rounded_ones(side):
    regions = SubjectRegions(box_pyramids((32, 32), TWO_BOXES, ONE_BOX))
    members = regions.at_tokens(side * side).flatten(2) > 0
    assert torch.equal(members[0], box_members(TWO_BOXES, side))
    assert torch.equal(members[1, :1], box_members(ONE_BOX, side))
    assert not members[1, 1].any()


def test_gathered_keys_follow_the_explicit_rule():
    members = box_members(TWO_BOXES, 8)
    assert torch.equal(GroupedVisibility.from_regions(members).dense(), explicit_self_mask(members) == 0)


def test_refined_masks_replace_the_boxes_on_every_grid():
    regions = SubjectRegions(box_pyramids((16, 16), TWO_BOXES))
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 0, :3], masks[0, 1, 5:] = 1, 1
    regions.refine(masks)
    assert regions.is_refined and regions.version == 1
    assert torch.equal(regions.at_tokens(64), masks)
    assert torch.equal(regions.at_tokens(256), masks.repeat_interleave(2, -1).repeat_interleave(2, -2))


@pytest.mark.parametrize("mode", ["guide", "denoise"])
def test_kept_tables_equal_fresh_ones_after_a_change(mode):
    regions = SubjectRegions(box_pyramids((16, 16), TWO_BOXES, ONE_BOX))
    kept = TokenVisibility(regions, [TWO_SUBJECTS, ONE_SUBJECT], 11)
    mask = RegionKeyMask(regions)
    for _ in range(2):
        kept.mode = mode
        fresh = TokenVisibility(regions, [TWO_SUBJECTS, ONE_SUBJECT], 11)
        fresh.mode = mode
        assert torch.equal(kept.at_tokens(256), fresh.at_tokens(256))
        assert kept.at_tokens(256) is kept.at_tokens(256)
        for own, new in zip(mask.groups(4, 64), RegionKeyMask(regions).groups(4, 64), strict=True):
            assert torch.equal(own.dense(), new.dense())
        regions.refine((torch.rand(2, 2, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.6).float())
        mask.regions = regions


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("mode", ["guide", "denoise"])
def test_a_masked_unet_predicts_what_whole_tables_give(kind, mode):
    unet, inputs = unet_and_inputs(kind, batch_size=4)
    boxes, subjects = (TWO_BOXES, ONE_BOX), (TWO_SUBJECTS, ONE_SUBJECT)
    regions = SubjectRegions(box_pyramids((16, 16), *boxes))
    tables = TokenVisibility(regions, subjects, inputs["encoder_hidden_states"].shape[1])
    tables.mode = mode
    with torch.no_grad():
        expected, _ = explicit_forward(unet, inputs, boxes, subjects, mode)
        plain = unet(**inputs).sample
        with use_parts(unet, [KeyMask(tables, rows=slice(-2, None)), RegionKeyMask(regions)]):
            found = unet(**inputs).sample
    assert torch.allclose(found, expected, atol=1e-5)
    changed = (plain - expected).abs().amax((1, 2, 3))
    assert changed[[0, 2, 3]].min() > 1e-3
    assert changed[1] < 1e-5  # without text masks a single box closes nothing: it sees itself and the background
