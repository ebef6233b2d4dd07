"""Clustering and labelling of cells, on maps whose answer is known, and against loops."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.box_refinement import (
    MaskRefiner,
    RefinementOptions,
    cell_features,
    cluster_vectors,
    label_clusters,
    restore_empty_masks,
    soft_subject_masks,
)
from objectcompose.errors import ObjectComposeError, RegionError


OPTIONS = RefinementOptions()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def three_clouds(size=20):
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    noise = 0.2 * torch.randn(3, size, 2, generator=seeded())
    return (centres[:, None] + noise).flatten(0, 1)


def test_clouds_are_found():
    found = cluster_vectors(three_clouds(), 3, OPTIONS)
    labels = found.labels.reshape(3, -1)
    assert (labels == labels[:, :1]).all() and len(labels[:, 0].unique()) == 3
    members = torch.stack([three_clouds()[found.labels == label].mean(0) for label in range(3)])
    assert torch.allclose(found.centres.float(), members, atol=1e-5)
    distances = (three_clouds() - found.centres[found.labels].float()).square().sum()
    assert found.inertia == pytest.approx(distances.item(), rel=1e-5)


def test_the_same_seed_gives_the_same_clusters_and_leaves_the_global_one_alone():
    vectors = torch.rand(60, 7, generator=seeded(3))
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first, second = cluster_vectors(vectors, 9, OPTIONS), cluster_vectors(vectors, 9, OPTIONS)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.labels, second.labels) and torch.equal(first.centres, second.centres)


def test_more_restarts_are_never_worse():
    vectors = torch.rand(80, 5, generator=seeded(4))
    one, ten = (cluster_vectors(vectors, 8, RefinementOptions(restarts=count)).inertia for count in (1, 10))
    assert ten <= one


def test_no_cluster_stays_empty():
    vectors = torch.cat([torch.zeros(10, 3), torch.ones(1, 3)])  # two different vectors, four clusters
    found = cluster_vectors(vectors, 4, OPTIONS)
    assert torch.bincount(found.labels, minlength=4).min() >= 1
    assert torch.isfinite(found.centres).all() and found.inertia == 0


def test_an_empty_cluster_takes_the_farthest_vector():
    vectors = torch.tensor([[0.0], [0.1], [0.2], [10.0]])
    far_away = torch.tensor([[0.1], [1e6]])
    found = cluster_vectors(vectors, 2, RefinementOptions(max_iterations=1), warm_start=far_away)
    assert found.labels.tolist() == [0, 0, 0, 1]


def test_a_warm_start_at_the_solution_stays_there():
    vectors = three_clouds()
    cold = cluster_vectors(vectors, 3, OPTIONS)
    warm = cluster_vectors(vectors, 3, RefinementOptions(seed=99), warm_start=cold.centres)
    assert torch.equal(cold.labels, warm.labels)


def test_too_few_vectors_are_refused():
    with pytest.raises(RegionError, match="at least 4"):
        cluster_vectors(torch.rand(3, 2), 4, OPTIONS)
    with pytest.raises(RegionError, match="at most 1 "):
        MaskRefiner(torch.ones(2, 4).bool(), OPTIONS)


@pytest.mark.parametrize("name", ["clusters_per_subject", "restarts", "max_iterations"])
def test_options_without_work_are_refused(name):
    with pytest.raises(ObjectComposeError, match=name):
        RefinementOptions(**{name: 0})


def test_features_are_columns_over_their_maximum():
    cell_map = torch.rand(5, 5, generator=seeded())
    features = cell_features(cell_map)
    for column in range(5):
        expected = cell_map[:, column] / (cell_map[:, column].max() + 1e-5)
        assert torch.allclose(features[:, column], expected)


def test_soft_masks_follow_the_formula():
    maps, active = torch.rand(2, 6, generator=seeded()), torch.tensor([[1.0] * 6, [0.0] * 3 + [1.0] * 3])
    found = soft_subject_masks(maps, active, OPTIONS)
    for subject in range(2):
        sharp = 1 / (1 + torch.exp(-10 * (maps[subject] / maps[subject].max() - 0.2)))
        expected = (sharp - sharp.min()) / (sharp.max() - sharp.min()) * active[subject]
        assert torch.allclose(found[subject], expected, atol=1e-5)
    assert torch.equal(soft_subject_masks(torch.zeros(1, 4), torch.ones(1, 4), OPTIONS), torch.zeros(1, 4))


@pytest.mark.parametrize("seed", range(5))
def test_clusters_go_to_the_subject_that_covers_them_best(seed):
    labels = torch.randint(4, (30,), generator=seeded(seed))
    soft = torch.rand(3, 30, generator=seeded(seed + 50)) ** 4
    found = label_clusters(labels, soft, 0.2)
    for cell in range(30):
        cluster = labels == labels[cell]
        scores = [float(row[cluster].sum() / min(row.sum(), cluster.sum())) for row in soft]
        best = max(range(3), key=lambda subject: scores[subject])
        assert found[:, cell].tolist() == [subject == best and scores[best] >= 0.2 for subject in range(3)]


def test_a_subject_without_any_soft_mask_gets_no_cluster():
    found = label_clusters(torch.tensor([0, 0, 1]), torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), 0.2)
    assert found.tolist() == [[False] * 3, [True, True, False]]


def test_empty_masks_take_their_box_from_the_others():
    masks = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    boxes = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    assert restore_empty_masks(masks, boxes).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    all_empty = restore_empty_masks(torch.zeros(2, 4).bool(), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool())
    assert all_empty.any(1).all()
    nested = restore_empty_masks(torch.zeros(2, 4).bool(), torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1]]).bool())
    assert nested.any(1).all()


def block_maps(owner, strength=8.0):
    """Self- and cross-attention in which cells of one owner (-1: background) look at each other."""
    same = (owner[:, None] == owner[None]).float()
    noise = torch.rand(len(owner), len(owner), generator=seeded(7))
    cells = (strength * same + noise).softmax(-1)
    tokens = torch.stack([(owner == subject).float() for subject in range(2)], 1) * 0.8 + 0.02
    return cells, tokens


def test_blocks_of_attention_become_the_masks():
    owner = torch.full((8, 8), -1)
    owner[1:4, 0:3], owner[4:7, 5:8] = 0, 1
    boxes = torch.zeros(2, 8, 8)
    boxes[0, 0:5, 0:4], boxes[1, 3:8, 4:8] = 1, 1
    cells, tokens = block_maps(owner.flatten())
    refiner = MaskRefiner(boxes.flatten(1).bool(), OPTIONS)
    refiner.add({"layer": cells}, {"layer": tokens})
    masks = refiner.masks(boxes.flatten(1))
    for subject in range(2):
        assert torch.equal(masks[subject], owner.flatten() == subject)
    assert torch.equal(refiner.masks(masks), masks)  # a rebuild from the same maps


def test_maps_are_averaged_over_layers_and_steps():
    boxes = torch.ones(1, 6).bool()
    refiner = MaskRefiner(boxes, RefinementOptions(clusters_per_subject=2))
    steps = [
        {name: torch.rand(6, 6, generator=seeded(seed)) for seed, name in enumerate("ab", start)}
        for start in (0, 5, 9)
    ]
    for step in steps:
        refiner.add(step, {name: cells[:, :1] for name, cells in step.items()})
    mean = torch.stack([cells for step in steps for cells in step.values()]).mean(0)
    assert torch.allclose(refiner._cell_mean, mean, atol=1e-6)
    assert torch.allclose(refiner._token_mean, mean[:, :1], atol=1e-6)


def test_without_maps_the_regions_stay():
    boxes = torch.tensor([[1, 1, 0, 0, 0, 0]]).bool()
    assert torch.equal(MaskRefiner(boxes, OPTIONS).masks(boxes.float()), boxes)
