"""Losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from objectcompose.attention_processors.losses import (
    box_masses,
    box_penalty_loss,
    box_reward_loss,
    enhance_loss,
    mask_penalty_loss,
    mask_reward_loss,
    mean_object_maps,
    pixel_loss,
    separate_loss,
    token_loss,
)
from objectcompose.errors import ObjectComposeError, RegionError


ONE = torch.ones(1, 1)  # one token, one object


def left_half(side=4):
    mask = torch.zeros(1, side, side)
    mask[..., : side // 2] = 1
    return mask


def column(values):
    """One map `(1, heads, 4, 1)` on a 2 x 2 grid from a list of heads."""
    return torch.tensor(values, dtype=torch.float32)[None, ..., None]


TOP = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])


class TestTokenLoss:
    def test_uniform_attention_and_half_a_mask(self):
        maps = {"a": torch.full((1, 2, 16, 1), 1 / 77)}
        torch.testing.assert_close(token_loss(maps, left_half(), ONE), torch.tensor(0.25))

    def test_all_inside_is_zero(self):
        assert token_loss({"a": column([[0.3, 0.1, 0.0, 0.0]])}, TOP, ONE) == 0

    def test_heads(self):
        """Masses 0.9 inside of 1.0 and 0.01 of 0.1: the mean of ratios is 0.5, the ratio of means 0.91 / 1.1."""
        maps = {"a": column([[0.9, 0.0, 0.1, 0.0], [0.01, 0.0, 0.09, 0.0]])}
        torch.testing.assert_close(token_loss(maps, TOP, ONE), torch.tensor(0.25))
        expected = torch.tensor((1 - 0.91 / 1.1) ** 2)
        torch.testing.assert_close(token_loss(maps, TOP, ONE, head_mode="map_mean"), expected)
        mean = {"a": maps["a"].mean(1)}
        torch.testing.assert_close(token_loss(mean, TOP, ONE, head_mode="map_mean"), expected)
        with pytest.raises(ObjectComposeError, match="mean over heads"):
            token_loss(mean, TOP, ONE)

    def test_an_empty_mask_costs_one_without_gradient(self):
        maps = column([[0.2, 0.1, 0.1, 0.1]]).requires_grad_()
        loss = token_loss({"a": maps}, torch.zeros(1, 2, 2), ONE)
        loss.backward()
        assert loss == 1 and maps.grad.eq(0).all()

    def test_tokens_objects_and_layers(self):
        """Object 0 has two tokens with shares 1 and 0.5, object 1 one with share 0: (0.125 + 1) / 2 per layer."""
        columns = [[0.2, 0.2, 0.0, 0.0], [0.2, 0.0, 0.2, 0.0], [0.1, 0.1, 0.0, 0.0], [0.5, 0.1, 0.0, 0.0]]
        maps = torch.tensor(columns).T[None, None]  # the fourth token is padding
        owners = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        masks = torch.cat([TOP, 1 - TOP])
        loss = token_loss({"a": maps, "b": maps}, masks, owners)
        torch.testing.assert_close(loss, torch.tensor(2 * (0.125 + 1) / 2))

    def test_rows_without_objects_count_as_zero(self):
        maps = torch.full((2, 1, 4, 1), 0.1)
        loss = token_loss({"a": maps}, TOP, torch.ones(2, 1, 1), present=torch.tensor([[1.0], [0.0]]))
        torch.testing.assert_close(loss, torch.tensor(0.25 / 2))

    def test_masks_per_resolution(self):
        maps = {"fine": torch.full((1, 1, 16, 1), 0.1), "coarse": torch.full((1, 1, 4, 1), 0.1)}
        loss = token_loss(maps, {16: left_half(), 4: TOP}, ONE)
        torch.testing.assert_close(loss, torch.tensor(0.5))

    def test_what_does_not_fit_is_refused(self):
        maps = {"a": torch.full((1, 1, 4, 1), 0.1)}
        with pytest.raises(ObjectComposeError, match="maps"):
            token_loss({}, TOP, ONE)
        with pytest.raises(ObjectComposeError, match="head_mode"):
            token_loss(maps, TOP, ONE, head_mode="mean")
        with pytest.raises(ObjectComposeError, match="owners"):
            token_loss(maps, TOP, torch.ones(2, 1))
        with pytest.raises(ObjectComposeError, match="present"):
            token_loss(maps, TOP, ONE, present=torch.ones(2))
        with pytest.raises(RegionError, match="masks"):
            token_loss(maps, TOP.expand(2, -1, -1), ONE)


class TestPixelLoss:
    def test_uniform_attention_and_half_a_mask(self):
        expected = -(math.log(1 / 77) + math.log(76 / 77)) / 2
        assert round(expected, 4) == 2.1784
        maps = {"a": torch.full((1, 2, 16, 1), 1 / 77)}
        torch.testing.assert_close(pixel_loss(maps, left_half(), ONE), torch.tensor(expected))

    def test_tokens_are_summed_layers_of_a_resolution_averaged_resolutions_summed(self):
        """Fine: tokens 0.1 + 0.2 and 0.3 + 0.2, mean of layers 0.4; coarse: 0.5."""
        both = torch.ones(2, 1)
        maps = {
            "fine 1": torch.tensor([0.1, 0.2]).expand(1, 3, 16, 2),
            "fine 2": torch.tensor([0.3, 0.2]).expand(1, 16, 2),
            "coarse": torch.tensor([0.25, 0.25]).expand(1, 3, 4, 2),
        }
        expected = -(math.log(0.4) + math.log(0.6)) / 2 - math.log(0.5)
        torch.testing.assert_close(pixel_loss(maps, {16: left_half(), 4: TOP}, both), torch.tensor(expected))

    def test_sum_over_layers(self):
        """The paper's form: every layer by itself, masses 0.2 and 0.4."""
        maps = {"a": torch.full((1, 3, 16, 1), 0.2), "b": torch.full((1, 16, 1), 0.4)}
        expected = -sum(math.log(mass) + math.log(1 - mass) for mass in (0.2, 0.4)) / 2
        torch.testing.assert_close(pixel_loss(maps, left_half(), ONE, pixel_sum="layers"), torch.tensor(expected))
        with pytest.raises(ObjectComposeError, match="pixel_sum"):
            pixel_loss(maps, left_half(), ONE, pixel_sum="all")

    def test_sums_above_one_by_rounding_are_taken(self):
        maps = {"a": torch.full((1, 1, 4, 1), 1.0000002)}
        assert pixel_loss(maps, torch.ones(1, 2, 2), ONE) == 0


class TestSeparate:
    def test_golden_values(self):
        maps = torch.zeros(1, 1, 4, 2)
        maps[0, 0, 1] = 0.25
        torch.testing.assert_close(separate_loss(maps), torch.tensor(0.125))
        maps[0, 0, 2] = 0.5
        torch.testing.assert_close(separate_loss(maps), torch.tensor(0.25))

    def test_disjoint_maps_are_zero(self):
        assert separate_loss(torch.tensor([[[[0.5, 0.0], [0.0, 0.5]]]])) == 0

    def test_three_objects(self):
        """Two overlap fully, the third is elsewhere: the pair counts, the product of all vanishes."""
        maps = torch.tensor([[[[0.4, 0.4, 0.0], [0.0, 0.0, 0.4]]]])
        torch.testing.assert_close(separate_loss(maps), torch.tensor(0.2))
        assert separate_loss(maps, reduce="joint") == 0

    def test_soft_overlap(self):
        """ab sums to 0.08, a + b - ab to 0.4 + 0.9 - 0.08."""
        maps = torch.tensor([[[[0.2, 0.4], [0.2, 0.0], [0.0, 0.5]]]])
        torch.testing.assert_close(separate_loss(maps, pixel="soft_iou"), torch.tensor(0.08 / 1.22))

    def test_mean_over_the_batch_largest_over_heads(self):
        maps = torch.zeros(2, 2, 4, 2)
        maps[0, 1, 3] = 0.5
        torch.testing.assert_close(separate_loss(maps), torch.tensor(0.125))

    def test_gradient_reaches_both_objects(self):
        maps = torch.full((1, 1, 4, 2), 0.2, requires_grad=True)
        separate_loss(maps).backward()
        assert (maps.grad.abs().sum((0, 1, 2)) > 0).all()

    def test_options_are_checked(self):
        with pytest.raises(ObjectComposeError, match="two objects"):
            separate_loss(torch.zeros(1, 1, 4, 1))
        with pytest.raises(ObjectComposeError, match="sum"):
            separate_loss(torch.zeros(1, 1, 4, 2), reduce="sum")


class TestEnhance:
    def test_constant_maps_stay_constant(self):
        maps = torch.tensor([0.2, 0.6]).expand(1, 2, 16, 2)
        torch.testing.assert_close(enhance_loss(maps, (4, 4)), torch.tensor(0.8))

    def test_an_impulse_is_smoothed(self):
        """1-D weights [0.2119, 0.5761, 0.2119], so the centre keeps 0.5761 squared."""
        maps = torch.zeros(1, 1, 256, 1)
        maps[0, 0, 8 * 16 + 8] = 1
        weights = [math.exp(-((x / 1.0) ** 2)) for x in (-1, 0, 1)]
        centre = (weights[1] / sum(weights)) ** 2
        assert round(centre, 4) == 0.3319
        torch.testing.assert_close(enhance_loss(maps, (16, 16)), torch.tensor(1 - centre))

    def test_gradient_reaches_only_the_weaker_object(self):
        maps = torch.tensor([0.2, 0.6]).expand(1, 2, 16, 2).clone().requires_grad_()
        enhance_loss(maps, (4, 4)).backward()
        assert maps.grad[..., 0].abs().sum() > 0 and maps.grad[..., 1].eq(0).all()

    def test_the_grid_is_checked(self):
        with pytest.raises(RegionError, match="grid"):
            enhance_loss(torch.zeros(1, 1, 16, 2), (4, 5))


def test_mean_object_maps():
    maps = {"a": torch.full((1, 2, 4, 3), 0.2), "b": torch.full((1, 2, 4, 3), 0.4)}
    maps["a"][..., 1] = 0.6
    owners = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    result = mean_object_maps(maps, owners)
    assert result.shape == (1, 2, 4, 2)
    torch.testing.assert_close(result[0, 0, 0], torch.tensor([0.4, 0.3]))
    with pytest.raises(ObjectComposeError, match="one shape"):
        mean_object_maps({"a": torch.zeros(1, 2, 4, 3), "b": torch.zeros(1, 2, 16, 3)}, owners)
    with pytest.raises(ObjectComposeError, match="owners"):
        mean_object_maps(maps, owners[:2])


class TestMIFO:
    def test_reward_of_learning(self):
        """Attention 0.5 inside and 0 outside is the aim; 0.5 everywhere misses by 0.25 on half of the cells."""
        assert mask_reward_loss({"a": 0.5 * TOP.reshape(1, 4, 1)}, TOP) == 0
        maps = {"a": torch.full((1, 2, 4, 1), 0.5), "b": torch.full((1, 4, 1), 0.5)}
        torch.testing.assert_close(mask_reward_loss(maps, TOP), torch.tensor(2 * 0.125))

    def test_penalty_of_learning(self):
        maps = torch.full((1, 4, 1), 0.5, requires_grad=True)
        loss = mask_penalty_loss({"a": maps}, TOP)
        loss.backward()
        torch.testing.assert_close(loss, torch.tensor(0.125))
        assert maps.grad[0, :2].eq(0).all() and maps.grad[0, 2:].gt(0).all()

    def test_instances_are_summed_and_padding_left_out(self):
        maps, masks = {"a": torch.full((1, 4, 2), 0.5)}, torch.cat([TOP, TOP])
        torch.testing.assert_close(mask_penalty_loss(maps, masks), torch.tensor(0.25))
        torch.testing.assert_close(mask_penalty_loss(maps, masks, torch.tensor([1.0, 0.0])), torch.tensor(0.125))
        with pytest.raises(RegionError, match="2 instances"):
            mask_penalty_loss(maps, TOP)

    def test_masses_are_sums_over_heads_and_cells(self):
        """Cells 0 and 1 are two boxes, 2 and 3 background; two heads."""
        mass = torch.tensor([[0.5, 0.1], [0.2, 0.7], [0.3, 0.0], [0.1, 0.2]]).expand(1, 2, 4, 2)
        boxes = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).view(2, 2, 2)
        inside, outside = box_masses(mass, boxes)
        torch.testing.assert_close(inside, torch.tensor([[1.0, 1.4]]))
        torch.testing.assert_close(outside, torch.tensor([[0.8, 0.4]]))
        with pytest.raises(RegionError, match="2 instances"):
            box_masses(mass, boxes[:1])
        assert [x.shape for x in box_masses(mass[..., :0], boxes[:0])] == [(1, 0), (1, 0)]

    def test_reward_and_penalty_of_synthesis(self):
        inside, outside = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        torch.testing.assert_close(box_reward_loss(inside, outside), torch.tensor([[1 / 16, 1.0]]))
        torch.testing.assert_close(box_reward_loss(inside, outside, 3.0)[0, 0], torch.tensor(0.25))
        torch.testing.assert_close(box_penalty_loss(outside), torch.tensor([[math.log(2), 0.0]]))


def test_losses_run_in_float32():
    half = torch.full((1, 2, 4, 2), 0.25, dtype=torch.bfloat16)
    owners, masks = torch.eye(2), torch.cat([TOP, 1 - TOP])
    results = [
        token_loss({"a": half}, masks, owners),
        pixel_loss({"a": half}, masks, owners),
        separate_loss(half),
        enhance_loss(half, (2, 2)),
        mask_reward_loss({"a": half}, masks),
        box_penalty_loss(half),
    ]
    assert all(result.dtype == torch.float32 for result in results)
