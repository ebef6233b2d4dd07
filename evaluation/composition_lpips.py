"""LPIPS between the pictures of one object set (arXiv:1801.03924): how differently the same prompts are painted.

The distance on which the paper measures diversity. torchmetrics brings the learned heads; the AlexNet beneath them is
torchvision's, whose weights have to be given: nothing is downloaded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F

from objectcompose.errors import CheckpointError, MissingPackageError
from objectcompose.evaluation.composition_metrics import Row
from objectcompose.evaluation.detectors import picture_tensor
from objectcompose.evaluation.generation import Picture
from objectcompose.evaluation.results import hash_weights
from objectcompose.evaluation.toybox_object_sets import ObjectSet
from objectcompose.grounding.loading import load_checkpoint_file
from objectcompose.layout_fields import check_picture


#: Pictures are brought to this side, at which LPIPS is usually reported.
LPIPS_SIDE = 256
_PAIRS_AT_ONCE = 16


@dataclass(frozen=True)
class PictureDistance:
    """A distance of pictures.

    Attributes:
        identity: changes with its weights.
        between: two batches (B, 3, H, W) in [0, 1] to distances (B,), float32 on the CPU.
    """

    identity: str
    between: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def load_lpips(weights: Path, device: str | torch.device) -> PictureDistance:
    """LPIPS on AlexNet.

    Args:
        weights: of torchvision's AlexNet, such as `alexnet-owt-7be5be79.pth`.
        device: where it runs.

    Raises:
        CheckpointError: the weights are missing, corrupt or of another network.
        MissingPackageError: torchmetrics or torchvision is not installed.
    """
    state = load_checkpoint_file(weights, weights.name)
    try:
        from torchmetrics.functional.image.lpips import _LPIPS  # the public class would download an AlexNet

        network = _LPIPS(net="alex", pnet_rand=True)
    except ImportError as error:
        raise MissingPackageError(
            f'`--lpips-weights` needs torchmetrics and torchvision: pip install "objectcompose[eval]" torchvision'
            f" ({error})."
        ) from error
    # `slice1.0.weight` there is `features.0.weight` in torchvision
    own = {f"features.{name.partition('.')[2]}": weight for name, weight in network.net.named_parameters()}
    if any(name not in state or state[name].shape != weight.shape for name, weight in own.items()):
        raise CheckpointError(
            f"`--lpips-weights` {weights} must be of torchvision's AlexNet: its {len(state)} tensors are not."
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(state[name])
    network.to(device)

    @torch.no_grad()
    def between(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return network(_fitted(first).to(device), _fitted(second).to(device), normalize=True).flatten().float().cpu()

    return PictureDistance(f"lpips-alex:{hash_weights(weights)[:32]} {LPIPS_SIDE}", between)


def _fitted(pictures: torch.Tensor) -> torch.Tensor:
    size = (LPIPS_SIDE, LPIPS_SIDE)
    return F.interpolate(pictures, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def lpips_rows(distance: PictureDistance, sets: Mapping[str, ObjectSet], pictures: Sequence[Picture]) -> list[Row]:
    """One row per unordered pair of a set's pictures, for `composition_metrics`.

    Args:
        distance: of `load_lpips`.
        sets: by id.
        pictures: files that are there; sets with a single one have no row.

    Raises:
        ImageInputError: a picture cannot be read.
    """
    of_set: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        of_set[picture.record.id].append(picture)
    rows: list[Row] = []
    for label, own in sorted(of_set.items()):
        pixels = picture_tensor([check_picture(one.path, str(one.path)).convert("RGB") for one in own])
        pairs = list(combinations(range(len(own)), 2))
        found: list[float] = []
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            first, second = (pixels[list(side)] for side in zip(*pairs[start : start + _PAIRS_AT_ONCE], strict=True))
            found += distance.between(first, second).tolist()
        labels = {"set": label, "kind": own[0].record.kind, "count": len(sets[label].identities)}
        rows += [
            {**labels, "pair": [own[a].round, own[b].round], "lpips": value}
            for (a, b), value in zip(pairs, found, strict=True)
        ]
    return rows
