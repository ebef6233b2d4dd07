"""Scenes: one to five objects on a background, with caption, exact masks and boxes, deterministic from a seed.

A scene is first a small description (`SceneSpec`, drawn from a seed with numpy) and then pixels (`render_scenes`, one
vectorised composition for a whole batch). Objects are listed back to front: the last one is in front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from objectcompose.toybox.backgrounds import Background, render_backgrounds, sample_background
from objectcompose.toybox.categories import Preset, held_out_pairs
from objectcompose.toybox.identities import Identity, render_identities, sample_identity


#: Share of training scenes with 1, 2, 3, 4 and 5 objects: few large scenes, as in real captions.
COUNT_SHARES = (0.42, 0.42, 0.10, 0.04, 0.02)
MAX_OBJECTS = 5
_DIAMETERS = (0.72, 0.54, 0.46, 0.40, 0.36)  # of the canvas, for 1 to 5 objects


@dataclass(frozen=True)
class Pose:
    """How an identity lies on the canvas.

    Attributes:
        x, y: centre, fractions of the canvas.
        diameter: side of the drawing's square, fraction of the canvas.
        rotation: degrees, in [-60, 60].
        shear: horizontal shear, in [-0.15, 0.15].
        flip: mirrored left to right.
    """

    x: float = 0.5
    y: float = 0.5
    diameter: float = 0.72
    rotation: float = 0.0
    shear: float = 0.0
    flip: bool = False


@dataclass(frozen=True)
class SceneSpec:
    """Everything that determines a scene; objects back to front."""

    identities: tuple[Identity, ...]
    poses: tuple[Pose, ...]
    background: Background
    caption: str


@dataclass
class SceneBatch:
    """Rendered scenes.

    Attributes:
        pixels: (B, 3, S, S), in [0, 1].
        captions: one per scene.
        specs: the descriptions.
        visible: (B, N, S, S), {0, 1}: what can be seen of each object; absent objects are all zero.
        amodal: (B, N, S, S), {0, 1}: each object's whole outline.
        boxes: (B, N, 4): xyxy fractions around the visible part; zeros for absent objects.
    """

    pixels: torch.Tensor
    captions: list[str]
    specs: list[SceneSpec]
    visible: torch.Tensor
    amodal: torch.Tensor
    boxes: torch.Tensor


def with_article(name: str) -> str:
    """The name with its indefinite article: "an umbrella"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def list_objects(names: list[str] | tuple[str, ...]) -> str:
    """The names as a caption lists them: "a dog, a cup and an apple"."""
    words = [with_article(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def sample_pose(rng: np.random.Generator, diameter: float) -> Pose:
    """A pose at the centre of the canvas."""
    return Pose(
        0.5,
        0.5,
        diameter * float(rng.uniform(0.85, 1.1)),
        float(rng.uniform(-60, 60)) if rng.random() < 0.5 else float(rng.uniform(-10, 10)),
        float(rng.uniform(-0.15, 0.15)),
        bool(rng.random() < 0.5),
    )


def _place(poses: list[Pose], rng: np.random.Generator) -> list[Pose]:
    """Move poses to places that overlap little: each takes one of several random places, far from the others."""
    placed: list[Pose] = []
    for pose in poses:
        margin = min(0.45 * pose.diameter, 0.5)
        places = rng.uniform(margin, 1 - margin, (24, 2))
        if placed:
            others = np.array([[other.x, other.y] for other in placed])
            reach = np.array([(other.diameter + pose.diameter) / 2 for other in placed])
            room = (np.linalg.norm(places[:, None] - others, axis=-1) / reach).min(1)
            # The first place with enough room keeps layouts varied; failing that, the roomiest one.
            x, y = places[np.argmax(room > 0.8)] if (room > 0.8).any() else places[np.argmax(room)]
        else:
            x, y = places[0]
        placed.append(Pose(float(x), float(y), pose.diameter, pose.rotation, pose.shear, pose.flip))
    return placed


def sample_scene(
    preset: Preset,
    seed: int | tuple[int, ...],
    categories: list[str] | None = None,
    identities: list[Identity] | None = None,
    unseen: bool = False,
) -> SceneSpec:
    """Draw the description of a scene.

    Args:
        preset: the world.
        seed: integer or tuple of integers; equal seeds give equal scenes.
        categories: what the scene contains, 1 to 5 names; by default drawn, avoiding the held-out pairs.
        identities: the very identities to show (overrides `categories`), in new poses.
        unseen: draw identities that training never shows.
    """
    rng = np.random.default_rng(seed)
    if identities is not None:
        categories = [identity.category for identity in identities]
    elif categories is None:
        categories = _sample_categories(preset, rng)
    if identities is None:
        identities = [sample_identity(preset, category, rng, unseen) for category in categories]
    diameter = _DIAMETERS[len(categories) - 1]
    poses = _place([sample_pose(rng, diameter) for _ in categories], rng)
    background = sample_background(rng)
    caption = f"a photo of {list_objects(categories)}"
    if rng.random() < 1 / 3:
        caption = f"{caption} {background.words}"
    front = rng.permutation(len(categories))  # who is in front has nothing to do with the caption's order
    return SceneSpec(tuple(identities[i] for i in front), tuple(poses[i] for i in front), background, caption)


def _sample_categories(preset: Preset, rng: np.random.Generator) -> list[str]:
    held_out = held_out_pairs(preset)
    count = int(rng.choice(MAX_OBJECTS, p=COUNT_SHARES)) + 1
    while True:
        names = [str(name) for name in rng.choice(preset.categories, size=count, replace=False)]
        if not any(frozenset((a, b)) in held_out for i, a in enumerate(names) for b in names[i + 1 :]):
            return names


def pose_grids(poses: list[Pose], side: int) -> torch.Tensor:
    """Sampling grids (N, side, side, 2) that take a drawing's square to its pose on the canvas."""
    thetas = np.zeros((len(poses), 2, 3), dtype=np.float32)
    for n, pose in enumerate(poses):
        angle = math.radians(pose.rotation)
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        shear = np.array([[1.0, pose.shear], [0.0, 1.0]])
        mirror = np.diag([-1.0 if pose.flip else 1.0, 1.0])
        inverse = np.linalg.inv(pose.diameter * rotation @ shear @ mirror)
        thetas[n, :, :2] = inverse
        thetas[n, :, 2] = -inverse @ np.array([2 * pose.x - 1, 2 * pose.y - 1])
    return F.affine_grid(torch.from_numpy(thetas), [len(poses), 1, side, side], align_corners=False)


def render_objects(preset: Preset, identities: list[Identity], poses: list[Pose], side: int) -> torch.Tensor:
    """Objects alone on the canvas: (N, 4, side, side), RGB multiplied by alpha, and alpha."""
    texture = render_identities(preset, identities, max(side // 2, 16))  # about one texel a pixel: no aliasing
    texture = torch.cat([texture[:, :3] * texture[:, 3:], texture[:, 3:]], dim=1)
    return F.grid_sample(texture, pose_grids(poses, side), mode="bilinear", align_corners=False)


def boxes_of_masks(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes (..., 4), xyxy fractions, around masks (..., H, W); zeros where a mask is empty."""
    height, width = masks.shape[-2:]
    columns, rows = masks.amax(-2) > 0, masks.amax(-1) > 0
    x1, y1 = columns.float().argmax(-1) / width, rows.float().argmax(-1) / height
    x2 = 1 - columns.flip(-1).float().argmax(-1) / width
    y2 = 1 - rows.flip(-1).float().argmax(-1) / height
    return torch.stack([x1, y1, x2, y2], dim=-1) * columns.any(-1, keepdim=True)


def render_scenes(preset: Preset, specs: list[SceneSpec], side: int | None = None) -> SceneBatch:
    """Compose a batch of scenes.

    Args:
        preset: the world that the specs were drawn in.
        specs: B descriptions.
        side: S, pixels; by default the preset's.
    """
    side = side or preset.image_size
    identities = [identity for spec in specs for identity in spec.identities]
    poses = [pose for spec in specs for pose in spec.poses]
    layers = render_objects(preset, identities, poses, side)
    count = max(len(spec.identities) for spec in specs)
    padded = layers.new_zeros(len(specs), count, 4, side, side)
    owner = [(b, n) for b, spec in enumerate(specs) for n in range(len(spec.identities))]
    padded[tuple(torch.tensor(owner).T)] = layers
    pixels = render_backgrounds([spec.background for spec in specs], side)
    amodal = (padded[:, :, 3] > 0.5).float()
    visible, covered = torch.zeros_like(amodal), torch.zeros_like(amodal[:, 0])
    for n in range(count):
        pixels = padded[:, n, :3] + (1 - padded[:, n, 3:]) * pixels
    for n in reversed(range(count)):
        visible[:, n] = amodal[:, n] * (1 - covered)
        covered = torch.maximum(covered, amodal[:, n])
    captions = [spec.caption for spec in specs]
    return SceneBatch(pixels.clamp(0, 1), captions, specs, visible, amodal, boxes_of_masks(visible))


def render_references(
    preset: Preset, identities: list[Identity], seeds: list[int], side: int | None = None
) -> torch.Tensor:
    """Reference pictures of identities, each in a pose of its own: (N, 4, side, side), straight RGB and alpha."""
    side = side or preset.image_size
    poses = [sample_pose(np.random.default_rng((seed, 7)), 0.72) for seed in seeds]
    layers = render_objects(preset, identities, poses, side)
    return torch.cat([layers[:, :3] / layers[:, 3:].clamp_min(1e-4), layers[:, 3:]], dim=1).clamp(0, 1)
