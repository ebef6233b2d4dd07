"""The schedules and the loss of box control against the paper's numbers and against sums over whole tables."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.box_loss import (
    box_control_loss,
    descent_step_size,
    mean_box_masses,
    penalty_weight,
    scaled_steps,
    schedule_position,
    subject_token_mass,
)
from objectcompose.errors import ObjectComposeError


def test_the_penalty_decays_linearly_then_by_a_cosine():
    expected = [0.4, 0.25, 0.1, 0.0985, 0.094, 0.0868, 0.0775, 0.0666]
    expected += [0.055, 0.0434, 0.0325, 0.0232, 0.016, 0.0115, 0.01]
    weights = [penalty_weight(step + 1) for step in range(15)]
    assert torch.allclose(torch.tensor(weights), torch.tensor(expected), atol=1e-4)
    assert penalty_weight(16) == penalty_weight(40) == 0.01
    assert penalty_weight(1, linear_steps=1) == pytest.approx(0.1)


def test_the_step_size_falls_linearly():
    sizes = [descent_step_size(step, 15) for step in range(15)]
    assert torch.allclose(torch.tensor(sizes), 8 - 0.4 * torch.arange(15.0))


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(50, (15, 5)), (20, (6, 2)), (10, (3, 1)), (1, (1, 1)), (2, (1, 1))]
)
def test_other_runs_keep_the_ratios(num_steps, expected):
    assert (scaled_steps(15, num_steps), scaled_steps(5, num_steps)) == expected


def test_positions_of_a_shorter_run_cover_the_same_schedule():
    assert [schedule_position(step, 15) for step in range(15)] == list(range(1, 16))
    assert [schedule_position(step, 6) for step in range(6)] == [1, 3.5, 6, 8.5, 11, 13.5]


def test_the_loss_is_the_sum_of_the_papers_terms():
    inside, outside = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    masses = {"cross": (inside, outside), "self": (outside, inside)}
    present = torch.tensor([[True, True]])
    loss = box_control_loss(masses, {"cross": 1.5, "self": 0.5}, 0.1, present)
    reward = 1.5 * (0.25**2 + 0.5**2) + 0.5 * (0.75**2 + 0.5**2)
    log = torch.log(torch.tensor([2.0, 2.0, 4.0, 2.0]))
    penalty = 1.5 * 0.1 * (log[0] + log[1]) + 0.5 * 0.1 * (log[2] + log[3])
    assert loss.reward.item() == pytest.approx(reward)
    assert loss.total.item() == pytest.approx(reward + penalty.item())


def test_padded_subjects_do_not_count():
    inside, outside = torch.rand(2, 3), torch.rand(2, 3)
    present = torch.tensor([[True, True, False], [True, True, True]])
    masses = {"cross": (inside, outside)}
    padded = box_control_loss(masses, {"cross": 1.5}, 0.2, present)
    short = box_control_loss({"cross": (inside[:1, :2], outside[:1, :2])}, {"cross": 1.5}, 0.2, present[:1, :2])
    assert torch.equal(padded.total[:1], short.total)


def test_bounded_attentions_reward_weighs_the_background_by_the_number_of_subjects():
    masses = {"self": (torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0]]))}
    present = torch.tensor([[True, True]])
    loss = box_control_loss(masses, {"self": 1.0}, 0.0, present, torch.tensor([[2.0]]))
    assert loss.total.item() == pytest.approx(2 * (1 - 1 / 3) ** 2)


def test_masses_are_averaged_over_layers_before_the_ratio():
    boxes = {4: torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), 16: torch.zeros(1, 4, 4)}
    boxes[16][0, :2, :2] = 1
    masses = {"coarse": torch.rand(1, 3, 4, 1), "fine": torch.rand(1, 2, 16, 1)}
    inside, outside = mean_box_masses(masses, boxes)
    expected = 0.0, 0.0
    for mass, side in ((masses["coarse"], 2), (masses["fine"], 4)):
        grid = mass.sum(1).reshape(side, side)
        in_box = grid[: side // 2, : side // 2].sum()
        expected = expected[0] + in_box / 2, expected[1] + (grid.sum() - in_box) / 2
    assert inside.item() == pytest.approx(expected[0].item())
    assert outside.item() == pytest.approx(expected[1].item())


def test_tokens_are_summed_per_subject():
    maps = {"layer": torch.rand(1, 2, 5, 3)}
    owners = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    mass = subject_token_mass(maps, owners)["layer"]
    assert torch.allclose(mass[..., 0], maps["layer"][..., 0] + maps["layer"][..., 2])
    assert torch.allclose(mass[..., 1], maps["layer"][..., 1] + maps["layer"][..., 2])


def test_nothing_to_measure_is_refused():
    with pytest.raises(ObjectComposeError, match="at least one layer"):
        mean_box_masses({}, {})
    with pytest.raises(ObjectComposeError, match='"cross" or "self"'):
        box_control_loss({}, {}, 0.1, torch.ones(1, 1))


def test_token_masses_are_float32_under_autocast():
    maps = {"a": torch.rand(2, 3, 16, 4), "b": torch.rand(2, 3, 4, 4)}
    owners = torch.randint(2, (2, 4, 2)).float()
    expected = subject_token_mass(maps, owners)
    with torch.autocast("cpu", torch.bfloat16):
        found = subject_token_mass(maps, owners)
    for name, mass in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], mass)
