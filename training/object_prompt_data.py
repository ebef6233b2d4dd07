"""What ObjectPrompt's adapter is trained on: scenes with captions, and pictures of the objects in them.

Object pictures come from grounded captions (the object cut out of the very picture that is to be painted: nothing else
is known of it) or from toybox (the same identity in another pose). Each has a few fixed views, augmented by a draw of
their own, so that what the image encoder says of them can be kept (`ObjectFeatures`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance

from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.grounding.loading import fingerprint
from objectcompose.pipelines.object_matching import mask_bounds
from objectcompose.pipelines.object_prompts import PROMPT_MARGIN
from objectcompose.pipelines.reference_images import (
    clip_statistics,
    encode_references,
    encoder_side,
    normalize_pixels,
    reference_pixels,
)
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.identities import Identity
from objectcompose.toybox.scenes import render_references, sample_scene
from objectcompose.training.common import progress_bar
from objectcompose.training.grounded_captions import CaptionDataset, CaptionSample, ToyboxCaptions
from objectcompose.training.tensor_cache import cached_tensors
from objectcompose.training.toybox_data import SPLIT_SEEDS


#: Objects count from this share of the picture up to that one, and up to this ratio of their sides.
LEAST_OBJECT, LARGEST_OBJECT, LONGEST_OBJECT = 0.02, 0.7, 1 / 0.3
#: Of two objects one of which lies in the other by more than this share, the smaller is left out.
CONTAINED_SHARE = 0.8
#: Objects of one picture that are prompts, the largest ones.
MAX_TRAINED_OBJECTS = 5
#: Augmentation: chance of a mirror image, degrees of rotation, size in the frame, change of colours, chance and share
#: of an erased rectangle.
FLIP_CHANCE, MAX_ROTATION, SIZES_IN_FRAME, MAX_JITTER = 0.5, 15.0, (0.8, 1.1), 0.1
ERASE_CHANCE, ERASED_SIDES = 0.3, (0.1, 0.35)


class ObjectScenes(Protocol):
    """Scenes by number: a grounded caption, and pictures of the objects in it."""

    @property
    def captions(self) -> CaptionDataset:
        """The scenes' grounded captions, by the same numbers."""
        ...

    def count(self, index: int) -> int:
        """How many objects the scene has pictures of; may be 0."""
        ...

    def picture(self, index: int, number: int, view: int) -> Image.Image:
        """One object before augmentation, RGBA with its outline as alpha; `view` may show another pose."""
        ...

    def scene_without_objects(self, index: int) -> Image.Image:
        """The scene as a background prompt: RGBA, transparent where the objects are."""
        ...

    def key(self, index: int) -> str:
        """Hex digest of all that the pictures of a scene follow from."""
        ...


def usable_objects(masks: torch.Tensor) -> list[int]:
    """Which masks are objects that a picture can be cut from: neither specks nor walls, nor parts of others.

    Args:
        masks: (N, H, W) in [0, 1].

    Returns:
        Numbers of at most `MAX_TRAINED_OBJECTS` masks, ascending.
    """
    masks = (masks > 0.5).float()
    areas = masks.flatten(1).mean(1)
    kept: list[int] = []
    for number in sorted(range(len(masks)), key=lambda one: (-float(areas[one]), one)):
        if len(kept) == MAX_TRAINED_OBJECTS or not LEAST_OBJECT <= areas[number] <= LARGEST_OBJECT:
            continue
        top, bottom, left, right = mask_bounds(masks[number])
        sides = (bottom - top) / (right - left)
        if max(sides, 1 / sides) > LONGEST_OBJECT:
            continue
        if all((masks[number] * masks[other]).mean() <= CONTAINED_SHARE * areas[number] for other in kept):
            kept.append(number)
    return sorted(kept)


class ChosenCaptions:
    """Some samples of a data set, numbered anew.

    Args:
        captions: the data set.
        numbers: of the samples in it, in their new order.
    """

    def __init__(self, captions: CaptionDataset, numbers: Sequence[int]) -> None:
        self.captions, self.numbers = captions, list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> CaptionSample:
        """See `CaptionDataset`."""
        return self.captions[self.numbers[index]]

    def key(self, index: int) -> str:
        """See `CaptionDataset`."""
        return self.captions.key(self.numbers[index])

    def digest(self) -> str:
        """See `CaptionDataset`."""
        return self.captions.digest()


def captions_with_objects(captions: CaptionDataset, is_shown: bool = True) -> ChosenCaptions:
    """The samples with an object that a picture can be cut from; all are read once to know.

    Args:
        captions: the data set.
        is_shown: whether this process shows how far it is.

    Raises:
        LayoutError: there is none.
        ImageInputError, RegionError: a file cannot be read.
    """
    kept: list[int] = []
    bar = progress_bar(len(captions), description="looking for objects", is_shown=is_shown)
    bar.unit = "picture"
    with bar, ThreadPoolExecutor() as pool:  # pictures are decoded outside of Python's lock
        found = pool.map(lambda index: usable_objects(captions[index].masks), range(len(captions)))
        for number, objects in enumerate(found):
            bar.update()
            kept += [number] * bool(objects)
    if not kept:
        raise LayoutError(f"`data` must show an object that can be cut out, got none in {len(captions)} pictures.")
    return ChosenCaptions(captions, kept)


def cut_out(pixels: torch.Tensor, mask: torch.Tensor) -> Image.Image:
    """RGBA picture of pixels (3, H, W) in [-1, 1] with a mask (H, W) in [0, 1] as its alpha channel."""
    rgba = torch.cat([pixels.add(1).div(2), mask[None].to(pixels)]).clamp(0, 1)
    return Image.fromarray((rgba * 255).round().byte().permute(1, 2, 0).numpy(), "RGBA")


class CutOutScenes:
    """Object pictures cut out of the scene itself.

    Args:
        captions: grounded captions.
    """

    def __init__(self, captions: CaptionDataset) -> None:
        self.captions = captions
        self._sample = lru_cache(maxsize=8)(self._usable_sample)

    def _usable_sample(self, index: int) -> tuple[CaptionSample, list[int]]:
        sample = self.captions[index]
        return sample, usable_objects(sample.masks)

    def count(self, index: int) -> int:
        """See `ObjectScenes`."""
        return len(self._sample(index)[1])

    def picture(self, index: int, number: int, view: int) -> Image.Image:
        """See `ObjectScenes`; all views show the one pose that is known."""
        sample, usable = self._sample(index)
        return cut_out(sample.pixels, (sample.masks[usable[number]] > 0.5).float())

    def scene_without_objects(self, index: int) -> Image.Image:
        """See `ObjectScenes`."""
        sample, usable = self._sample(index)
        covered = (sample.masks[usable] > 0.5).any(0).float()
        return cut_out(sample.pixels, 1 - covered)

    def key(self, index: int) -> str:
        """See `ObjectScenes`."""
        return self.captions.key(index)


class ToyboxScenes:
    """Scenes of the toybox; an object's views show its identity in poses other than the scene's.

    Args:
        preset: the world.
        count: number of scenes.
        cache: folder for the rendered scenes.
        split: of `SPLIT_SEEDS`.
    """

    def __init__(self, preset: Preset, count: int, cache: Path, split: str = "train") -> None:
        self.preset, self.split = preset, split
        self.captions: ToyboxCaptions = ToyboxCaptions(preset, count, cache, split)
        self._objects = lru_cache(maxsize=64)(self._visible_objects)

    def _visible_objects(self, index: int) -> list[tuple[int, Identity]]:
        """Place in the scene and identity of each object that is seen well enough to be learned."""
        spec = sample_scene(self.preset, (SPLIT_SEEDS[self.split], index))
        owner = self.captions.pool.owner[index]
        shares = [float((owner == place + 1).float().mean()) for place in range(len(spec.identities))]
        return [
            (place, identity)
            for place, (identity, share) in enumerate(zip(spec.identities, shares, strict=True))
            if share >= LEAST_OBJECT
        ]

    def count(self, index: int) -> int:
        """See `ObjectScenes`."""
        return len(self._objects(index))

    def picture(self, index: int, number: int, view: int) -> Image.Image:
        """See `ObjectScenes`; each view has a pose of its own."""
        place, identity = self._objects(index)[number]
        seed = np.random.SeedSequence([SPLIT_SEEDS[self.split], index, place, view]).generate_state(1)
        rendered = render_references(self.preset, [identity], [int(seed[0])])[0]
        return cut_out(rendered[:3] * 2 - 1, rendered[3])

    def scene_without_objects(self, index: int) -> Image.Image:
        """See `ObjectScenes`."""
        pixels = self.captions.pool.images(torch.tensor([index]))[0] * 2 - 1
        return cut_out(pixels, (self.captions.pool.owner[index] == 0).float())

    def key(self, index: int) -> str:
        """See `ObjectScenes`; the scene's number decides who its objects are, and their poses."""
        return hashlib.sha256(
            json.dumps([self.preset.name, self.split, index, self.captions.key(index)]).encode()
        ).hexdigest()


# ---- augmentation


def augment_picture(image: Image.Image, generator: torch.Generator) -> tuple[Image.Image, float]:
    """An object as another photograph might show it.

    Args:
        image: RGBA.
        generator: on the CPU; all of this is drawn from it.

    Returns:
        The picture, and the margin that frames it for the image encoder, a share of its longer side.
    """
    flip, erase, *draws = torch.rand(12, generator=generator).tolist()
    spread = [2 * one - 1 for one in draws]
    if flip < FLIP_CHANCE:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(MAX_ROTATION * spread[0], Image.Resampling.BICUBIC, expand=True)
    alpha = image.getchannel("A")
    coloured = image.convert("RGB")
    changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for change, amount in zip(changes, spread[1:4], strict=True):
        coloured = change(coloured).enhance(1 + MAX_JITTER * amount)
    coloured.putalpha(_erased(alpha, draws[4:8]) if erase < ERASE_CHANCE else alpha)
    low, high = SIZES_IN_FRAME
    size = low + (high - low) * draws[8]
    return coloured, ((1 + 2 * PROMPT_MARGIN) / size - 1) / 2


def _erased(alpha: Image.Image, draws: Sequence[float]) -> Image.Image:
    """The outline without a rectangle, as if something stood before the object; never without all of it."""
    bounds = alpha.getbbox()
    if bounds is None:
        return alpha
    left, top, right, bottom = bounds
    low, high = ERASED_SIDES
    width = (low + (high - low) * draws[0]) * (right - left)
    height = (low + (high - low) * draws[1]) * (bottom - top)
    x, y = left + draws[2] * (right - left - width), top + draws[3] * (bottom - top - height)
    erased = alpha.copy()
    erased.paste(0, (round(x), round(y), round(x + width), round(y + height)))
    return erased if erased.getbbox() is not None else alpha


# ---- features


class ObjectFeatures:
    """What the image encoder says of object pictures, with what it said before kept on disk.

    A view is encoded by itself and follows from scene, object and view alone, so the cache changes nothing.

    Args:
        scenes: whose objects.
        image_encoder: frozen.
        feature_extractor: for mean and standard deviation; None: CLIP's.
        views: fixed augmentations of each object, at least 1.
        cache: folder of features; None computes each anew.

    Raises:
        ObjectComposeError: `views` is below 1.
    """

    def __init__(
        self,
        scenes: ObjectScenes,
        image_encoder: Any,
        feature_extractor: Any,
        views: int = 4,
        cache: Path | None = None,
    ) -> None:
        if views < 1:
            raise ObjectComposeError(f"`views` must be at least 1, got {views}.")
        self.scenes, self.image_encoder, self.views, self.cache = scenes, image_encoder, views, cache
        self.mean, self.std = clip_statistics(feature_extractor)
        weights = "" if cache is None else fingerprint(image_encoder, image_encoder.config)
        self._settings = json.dumps([weights, self.mean.tolist(), self.std.tolist(), encoder_side(image_encoder)])

    def of_object(self, index: int, number: int, view: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Global vector (D,) and patch grid (L, G) of one view of an object, float32 on the CPU.

        Raises:
            LayoutError: the scene has no such object or view.
        """
        if not (0 <= number < self.scenes.count(index) and 0 <= view < self.views):
            raise LayoutError(f"scene {index} has no object {number} with a view {view}.")
        return self._kept(
            index, f"object {number} view {view}", lambda key: self._view_pixels(index, number, view, key)
        )

    def of_background(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the scene without its objects, squashed whole as at inference."""
        side = encoder_side(self.image_encoder)
        scene = self.scenes.scene_without_objects
        return self._kept(
            index, "background", lambda _: reference_pixels(scene(index), side, self.mean, shape="stretch")
        )

    def _view_pixels(self, index: int, number: int, view: int, key: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(key[:15], 16))
        image, margin = augment_picture(self.scenes.picture(index, number, view), generator)
        return reference_pixels(image, encoder_side(self.image_encoder), self.mean, margin)

    def _kept(self, index: int, what: str, make_pixels: Any) -> tuple[torch.Tensor, torch.Tensor]:
        of_picture = hashlib.sha256(f"{self.scenes.key(index)} {what}".encode()).hexdigest()
        if self.cache is None:
            return self._encode(make_pixels(of_picture))

        def encode() -> dict[str, torch.Tensor]:
            embeds, grid = self._encode(make_pixels(of_picture))
            return {"embeds": embeds, "grid": grid}

        tensors = cached_tensors(self.cache / "objects", self._settings + of_picture, ("embeds", "grid"), encode)
        return tensors["embeds"], tensors["grid"]

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = next(self.image_encoder.parameters()).device
        ready = normalize_pixels(pixels[None], self.mean, self.std).to(device)
        with torch.autocast(device.type, enabled=False):  # what is kept must not depend on who asked for it
            features = encode_references(self.image_encoder, ready)
        return features.embeds[0].float().cpu().contiguous(), features.grid[0].float().cpu().contiguous()
