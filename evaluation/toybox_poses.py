"""The pose of an object from its outline: what of a drawing's rotation and mirroring a mask tells.

The judge names pixels and tells identities apart; it knows nothing of poses. So the outline that it finds is compared
with the drawing's own outline in all poses of a coarse table, both brought to one centre and one area. Round outlines
tell no rotation and symmetric ones no mirroring: then nothing is said rather than something guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from objectcompose.toybox.categories import Preset
from objectcompose.toybox.identities import Identity
from objectcompose.toybox.scenes import Pose, render_objects


#: Rotations of the table, degrees; scenes have up to 60.
ROTATIONS = tuple(range(-60, 61, 10))
#: An outline is the drawing's from this intersection over union on.
LEAST_FIT = 0.75
#: By so much the best pose must beat those that are turned by more than `FAR_ROTATION`, or the mirrored ones.
LEAST_LEAD, FAR_ROTATION = 0.05, 35
_SIDE = 48
_REACH = 1.6  # half a frame, in roots of the outline's area


@dataclass(frozen=True)
class PoseEstimate:
    """What an outline tells.

    Attributes:
        rotation: degrees, one of `ROTATIONS`; None where the outline does not tell.
        flip: whether it is mirrored; None where the outline does not tell.
        fit: intersection over union with the best pose, in [0, 1].
    """

    rotation: float | None
    flip: bool | None
    fit: float


def estimate_pose(preset: Preset, identity: Identity, mask: torch.Tensor) -> PoseEstimate:
    """The pose of a drawing from its outline.

    Args:
        preset: the world.
        identity: whose drawing it is.
        mask: (H, W), {0, 1}, not empty.
    """
    table, poses = _pose_table(preset, identity.category, identity.style)
    framed = _framed(mask[None].float())
    both, either = (framed * table).flatten(1).sum(1), torch.maximum(framed, table).flatten(1).sum(1)
    fits = both / either.clamp(min=1e-6)
    best = int(fits.argmax())
    fit, (rotation, flip) = float(fits[best]), poses[best]
    if fit < LEAST_FIT:
        return PoseEstimate(None, None, fit)
    far = max(float(fits[n]) for n, pose in enumerate(poses) if abs(pose[0] - rotation) > FAR_ROTATION)
    mirrored = max(float(fits[n]) for n, pose in enumerate(poses) if pose[1] != flip)
    return PoseEstimate(
        float(rotation) if fit - far >= LEAST_LEAD else None,
        flip if fit - mirrored >= LEAST_LEAD else None,
        fit,
    )


@lru_cache(maxsize=256)
def _pose_table(preset: Preset, category: str, style: str) -> tuple[torch.Tensor, list[tuple[int, bool]]]:
    poses = [(rotation, flip) for flip in (False, True) for rotation in ROTATIONS]
    drawn = [Pose(diameter=0.72, rotation=float(rotation), flip=flip) for rotation, flip in poses]
    alpha = render_objects(preset, [Identity(category, style)] * len(poses), drawn, 64)[:, 3]
    return _framed((alpha > 0.5).float()), poses


def _framed(masks: torch.Tensor) -> torch.Tensor:
    """Masks (N, H, W) brought to one centre and one area: (N, 48, 48)."""
    height, width = masks.shape[-2:]
    rows = (torch.arange(height) + 0.5).view(1, -1, 1)
    columns = (torch.arange(width) + 0.5).view(1, 1, -1)
    area = masks.flatten(1).sum(1).clamp(min=1)
    y, x = (masks * rows).flatten(1).sum(1) / area, (masks * columns).flatten(1).sum(1) / area
    reach = _REACH * area.sqrt()
    theta = torch.zeros(len(masks), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = 2 * reach / width, 2 * x / width - 1
    theta[:, 1, 1], theta[:, 1, 2] = 2 * reach / height, 2 * y / height - 1
    grid = F.affine_grid(theta, [len(masks), 1, _SIDE, _SIDE], align_corners=False)
    return (F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] > 0.5).float()
