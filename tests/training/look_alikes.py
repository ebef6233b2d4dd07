"""A toybox picture of two look-alikes, for learning from it and for finding them in it."""

from __future__ import annotations

from dataclasses import replace

import torch
from PIL import Image

from objectcompose.grounding.toybox_truth import scene_picture
from objectcompose.toybox.identities import Identity
from objectcompose.toybox.scenes import Pose, SceneSpec, render_scenes, sample_scene
from objectcompose.toybox.weights import active_preset


def two_bears() -> tuple[Image.Image, dict[str, torch.Tensor]]:
    """An umbrella between two recolourings of one teddy bear, 64 x 64 pixels, and their exact masks, bool."""
    preset, bear = active_preset(), Identity("teddy bear", "fluent")
    identities = (bear, Identity("umbrella", "fluent"), replace(bear, hue=120.0))
    poses = tuple(Pose(x, y, 0.4) for x, y in ((0.8, 0.65), (0.5, 0.25), (0.2, 0.7)))
    background = sample_scene(preset, 0).background
    batch = render_scenes(preset, [SceneSpec(identities, poses, background, "two teddy bears and an umbrella")])
    right, umbrella, left = batch.visible[0] > 0
    return scene_picture(batch.pixels[0]), {"left": left, "umbrella": umbrella, "right": right}


def mask_overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Intersection over union of two masks, bool."""
    return int((first & second).sum()) / int((first | second).sum())
