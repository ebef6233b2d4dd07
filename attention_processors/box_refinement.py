"""Masks for box control from what the picture has become (MIFO, section 3.3, after Bounded Attention).

Cells that attend alike belong together: the averaged self-attention of a small grid is clustered, each cluster goes to
the subject whose cross-attention covers it best, or to the background. Pure functions and a small running mean.

Clustering is a k-means of our own: a few hundred vectors, seeded, with k-means++ starts, so that the same maps give
the same masks on every machine that rounds alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from objectcompose.errors import ObjectComposeError, RegionError


@dataclass(frozen=True)
class RefinementOptions:
    """How masks are found.

    Attributes:
        clusters_per_subject: the number of clusters is this times the number of subjects.
        token_threshold, token_sharpness: soft masks are `sigmoid(sharpness * (map / max - threshold))`.
        cluster_threshold: a cluster with a smaller score belongs to the background.
        restarts: of k-means; the best counts.
        max_iterations, tolerance: k-means ends when its centres move less than the tolerance on average.
        seed: of k-means.
    """

    clusters_per_subject: int = 3
    token_threshold: float = 0.2
    token_sharpness: float = 10.0
    cluster_threshold: float = 0.2
    restarts: int = 10
    max_iterations: int = 100
    tolerance: float = 1e-4
    seed: int = 123

    def __post_init__(self) -> None:
        for name in ("clusters_per_subject", "restarts", "max_iterations"):
            if getattr(self, name) < 1:
                raise ObjectComposeError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Clusters:
    """A clustering of n vectors.

    Attributes:
        labels: `(n,)`, int64 in [0, K).
        centres: `(K, d)`.
        inertia: sum of squared distances to the own centre.
    """

    labels: torch.Tensor
    centres: torch.Tensor
    inertia: float


def cluster_vectors(
    vectors: torch.Tensor, num_clusters: int, options: RefinementOptions, warm_start: torch.Tensor | None = None
) -> Clusters:
    """K-means with Euclidean distances.

    A cluster that runs empty moves to the vector that is farthest from its own centre.

    Args:
        vectors: `(n, d)`, n at least `num_clusters`.
        num_clusters: K.
        options: restarts, iterations, tolerance and seed.
        warm_start: `(K, d)`, centres to go on from, in one run; None: the best of several runs from k-means++ starts.

    Raises:
        RegionError: fewer vectors than clusters.
    """
    if len(vectors) < num_clusters:
        raise RegionError(f"`vectors` must be at least {num_clusters}, one per cluster, got {len(vectors)}.")
    vectors = vectors.detach().cpu().double()
    if warm_start is not None:
        return _lloyd(vectors, warm_start.cpu().double(), options)
    generator = torch.Generator().manual_seed(options.seed)
    runs = [
        _lloyd(vectors, _spread_centres(vectors, num_clusters, generator), options) for _ in range(options.restarts)
    ]
    return min(runs, key=lambda run: run.inertia)


def _spread_centres(vectors: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each further centre is a vector drawn with the squared distance to the nearest centre as weight."""
    chosen = [int(torch.randint(len(vectors), (), generator=generator))]
    nearest = (vectors - vectors[chosen[0]]).square().sum(1)
    while len(chosen) < num_clusters:
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)  # all vectors are centres already
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (vectors - vectors[chosen[-1]]).square().sum(1))
    return vectors[chosen].clone()


def _lloyd(vectors: torch.Tensor, centres: torch.Tensor, options: RefinementOptions) -> Clusters:
    for _ in range(options.max_iterations):
        distances = torch.cdist(vectors, centres, compute_mode="donot_use_mm_for_euclid_dist")
        labels = _fill_empty(distances, distances.argmin(1))
        one_hot = torch.nn.functional.one_hot(labels, len(centres)).to(vectors)  # (n, K)
        moved = one_hot.T @ vectors / one_hot.sum(0)[:, None]
        shift = (moved - centres).norm(dim=1).mean()
        centres = moved
        if shift < options.tolerance:
            break
    distances = torch.cdist(vectors, centres, compute_mode="donot_use_mm_for_euclid_dist")
    labels = _fill_empty(distances, distances.argmin(1))
    inertia = float(distances.gather(1, labels[:, None]).square().sum())
    return Clusters(labels, centres, inertia)


def _fill_empty(distances: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Give each empty cluster the vector that is farthest from its own centre, of those that are not alone."""
    labels = labels.clone()
    own = distances.gather(1, labels[:, None])[:, 0]
    for cluster in range(distances.shape[1]):
        if (labels == cluster).any():
            continue
        sizes = torch.bincount(labels, minlength=distances.shape[1])
        farthest = int(own.masked_fill(sizes[labels] == 1, -1.0).argmax())
        labels[farthest], own[farthest] = cluster, 0.0
    return labels


def cell_features(cell_map: torch.Tensor) -> torch.Tensor:
    """What cells are clustered by: rows of the self-attention, each key's column divided by its largest entry.

    Args:
        cell_map: `(n, n)`, from each cell to each cell.

    Returns:
        `(n, n)`, values in [0, 1).
    """
    return cell_map / (cell_map.amax(0, keepdim=True) + 1e-5)


def soft_subject_masks(token_maps: torch.Tensor, active: torch.Tensor, options: RefinementOptions) -> torch.Tensor:
    """Where each subject's token is looked from, within its present region.

    Args:
        token_maps: `(S, n)`, attention of each cell to the subject's leading token.
        active: `(S, n)`, {0, 1}, the regions so far.
        options: threshold and sharpness.

    Returns:
        `(S, n)`, values in [0, 1].
    """
    relative = token_maps / token_maps.amax(1, keepdim=True).clamp_min(1e-12)
    sharp = torch.sigmoid(options.token_sharpness * (relative - options.token_threshold))
    low, high = sharp.amin(1, keepdim=True), sharp.amax(1, keepdim=True)
    return (sharp - low) / (high - low).clamp_min(1e-12) * active


def label_clusters(labels: torch.Tensor, soft_masks: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which subject each cell belongs to, by its cluster.

    A subject's score for a cluster is the soft mask that lies in it, over the smaller of the cluster's size and all of
    the soft mask.

    Args:
        labels: `(n,)`, cluster of each cell.
        soft_masks: `(S, n)`, values in [0, 1].
        threshold: clusters whose best score is below belong to the background.

    Returns:
        bool `(S, n)`; no cell is in two.
    """
    one_hot = torch.nn.functional.one_hot(labels).to(soft_masks)  # (n, K)
    inside = soft_masks @ one_hot  # (S, K)
    smaller = torch.minimum(soft_masks.sum(1, keepdim=True), one_hot.sum(0, keepdim=True))
    scores = torch.where(smaller > 0, inside / smaller.clamp_min(1e-12), torch.zeros_like(inside))
    best, owner = scores.max(0)
    owner = torch.where(best >= threshold, owner, torch.full_like(owner, -1))
    return owner[labels][None] == torch.arange(len(soft_masks))[:, None]


def restore_empty_masks(masks: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Give subjects without a cell their box, and take that from the others; `(S, n)` bool each.

    Where boxes of such subjects overlap, or cover all that another one has, the later one keeps the cells it was
    given, and who would be left without a cell gets the whole box back, so that no subject is ever without.
    """
    masks = masks.clone()
    for subject in (~masks.any(1)).nonzero()[:, 0].tolist():
        masks &= ~boxes[subject]
        masks[subject] = boxes[subject]
    for subject in (~masks.any(1)).nonzero()[:, 0].tolist():
        masks[subject] = boxes[subject]
    return masks


class MaskRefiner:
    """Running means of the maps of one picture, and the masks that follow from them.

    Args:
        boxes: bool `(S, n)` on the maps' grid.
        options: see there.

    Raises:
        RegionError: the grid has fewer cells than clusters are wanted.
    """

    def __init__(self, boxes: torch.Tensor, options: RefinementOptions) -> None:
        self.boxes = boxes.cpu()
        self.options = options
        self.num_clusters = options.clusters_per_subject * len(boxes)
        if boxes.shape[1] < self.num_clusters:
            raise RegionError(
                f"`objects` must be at most {boxes.shape[1] // options.clusters_per_subject} for their masks to be"
                f" told apart on {boxes.shape[1]} cells, got {len(boxes)}."
            )
        self._cell_mean: torch.Tensor | None = None
        self._token_mean: torch.Tensor | None = None
        self._count = 0
        self._centres: torch.Tensor | None = None

    def add(self, cell_maps: Mapping[str, torch.Tensor], token_maps: Mapping[str, torch.Tensor]) -> None:
        """Add one step's maps.

        Args:
            cell_maps: layer name to `(n, n)`.
            token_maps: layer name to `(n, S)`.
        """
        cells = torch.stack([*cell_maps.values()]).mean(0).detach()
        tokens = torch.stack([*token_maps.values()]).mean(0).detach()
        self._count += 1
        if self._cell_mean is None or self._token_mean is None:
            self._cell_mean, self._token_mean = cells, tokens
        else:
            self._cell_mean = self._cell_mean + (cells - self._cell_mean) / self._count
            self._token_mean = self._token_mean + (tokens - self._token_mean) / self._count

    def masks(self, active: torch.Tensor) -> torch.Tensor:
        """Masks from the maps so far.

        Args:
            active: `(S, n)`, {0, 1}, the regions in force.

        Returns:
            bool `(S, n)`, none empty. Without any maps yet: the regions in force.
        """
        if self._cell_mean is None or self._token_mean is None:
            return active.cpu() > 0
        clusters = cluster_vectors(
            cell_features(self._cell_mean), self.num_clusters, self.options, warm_start=self._centres
        )
        self._centres = clusters.centres
        soft = soft_subject_masks(self._token_mean.cpu().T.double(), active.cpu().double(), self.options)
        return restore_empty_masks(label_clusters(clusters.labels, soft, self.options.cluster_threshold), self.boxes)
