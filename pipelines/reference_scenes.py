"""From objects with pictures and boxes to the attention parts of LocRef-Diffusion.

Plain functions on a scene's references, so that training builds what sampling builds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from objectcompose.adapters.locref_adapter import box_features
from objectcompose.attention_processors.branch import KeysValues
from objectcompose.attention_processors.guided_keys_values import GuidedKeysValues
from objectcompose.attention_processors.reference_fusion import FusionSettings, fusion_parts
from objectcompose.attention_processors.regions import RegionPyramid, RegionPyramidBatch
from objectcompose.layout import SceneObject, require_object_fields
from objectcompose.pipelines.reference_images import (
    clip_statistics,
    encode_references,
    encoder_side,
    normalize_pixels,
    reference_pixels,
    resize_pixels,
)
from objectcompose.pipelines.reference_layout import composite_image, reference_regions


#: Objects that a prompt may have.
MAX_LOCREF_OBJECTS = 20


@dataclass(frozen=True, eq=False)
class ReferenceScene:
    """The references of one picture.

    Attributes:
        references: its objects whose picture is shown (`has_reference`), with their boxes.
        regions: the exclusive regions of these.
    """

    references: list[SceneObject]
    regions: RegionPyramid


@dataclass(frozen=True, eq=False)
class SceneVectors:
    """What `LocRefAdapter` reads of B scenes.

    Attributes:
        references: `(B, N, D)`, zeros where a scene has fewer than N references.
        composite: the adapter's argument of that name, `(B, 1, D)` or `(B, N, 64)`, or None.
    """

    references: torch.Tensor
    composite: torch.Tensor | None


def check_locref_objects(objects: Sequence[SceneObject], method: str) -> None:
    """Check the objects of one prompt.

    Raises:
        MissingFieldError: a reference without a box, or an object with neither `image` nor `phrase`.
    """
    require_object_fields(objects, [("image", "phrase", "token")], method)
    require_object_fields(objects, ["box"], method, where="image")


def locref_fields(item: SceneObject) -> tuple[str, ...]:
    """The fields that the method uses of an object: without a picture, the object is left to the prompt."""
    return ("phrase",) if item.image is None else ("phrase", "image", "box", "scale", "order")


def has_reference(item: SceneObject) -> bool:
    """Whether an object is shown by its picture: it has one, and its `scale` does not switch it off."""
    return item.image is not None and item.scale != 0


def reference_scene(objects: Sequence[SceneObject], latent_size: tuple[int, int]) -> ReferenceScene:
    """Those of a picture's objects that are shown by a reference; the others take part in nothing.

    Args:
        objects: objects that passed `check_locref_objects`.
        latent_size: height and width of the latents.

    Raises:
        RegionError: the latents' grid cannot give each reference a cell of its own.
    """
    references = [item for item in objects if has_reference(item)]
    return ReferenceScene(references, reference_regions(references, latent_size))


def encode_scenes(
    scenes: Sequence[ReferenceScene],
    canvas: tuple[int, int],
    image_encoder: Any,
    feature_extractor: Any,
    adapter: Any,
    device: torch.device | str,
) -> SceneVectors:
    """All pictures of B scenes as vectors, in one pass of the image encoder.

    Args:
        scenes: B scenes, at least one of them with a reference.
        canvas: height and width of the pictures to be made, in pixels.
        image_encoder: a `CLIPVisionModelWithProjection`.
        feature_extractor: of the encoder, or None; see `clip_statistics`.
        adapter: the `LocRefAdapter` that is going to read them.
        device: where the encoder runs.
    """
    config = adapter.config
    mean, std = clip_statistics(feature_extractor)
    side = encoder_side(image_encoder)
    pictures = [reference_pixels(item.image, side, mean) for scene in scenes for item in scene.references]
    if config.composite == "image":
        composites = (composite_image(scene.references, canvas, mean) for scene in scenes)
        pictures += [resize_pixels(composite, (side, side)) for composite in composites]
    pixels = normalize_pixels(torch.stack(pictures), mean, std).to(device)
    vectors = getattr(encode_references(image_encoder, pixels), config.feature).to(adapter.dtype)

    counts = [len(scene.references) for scene in scenes]
    references = _padded_rows(vectors[: sum(counts)].split(counts))
    composite = None
    if config.composite == "image":
        composite = vectors[sum(counts) :, None]
    elif config.composite == "coordinates":
        boxes = [torch.tensor([item.box for item in scene.references]).reshape(-1, 4) for scene in scenes]
        composite = _padded_rows([box_features(row).to(vectors) for row in boxes])
    return SceneVectors(references, composite)


def _padded_rows(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows `(n_i, C)` as `(B, max n_i, C)`, zeros where there is nothing."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def scene_parts(
    adapter: Any,
    scenes: Sequence[ReferenceScene],
    vectors: SceneVectors,
    settings: FusionSettings,
    repeats: int = 1,
    with_nulls: bool = False,
) -> list[Any]:
    """The attention parts of a batch. The adapter runs once; what it gives serves every step.

    Args:
        adapter: a `LocRefAdapter`.
        scenes: B scenes.
        vectors: what `encode_scenes` returned.
        settings: strengths and switches.
        repeats: pictures per scene, side by side (n).
        with_nulls: the UNet's batch is `[uncond, cond]`, and the first half sees null pictures in the same regions;
            otherwise the parts act on the last B * n rows, whichever halves there are.
    """
    references, composite = vectors.references, vectors.composite
    if with_nulls:  # one row of zeros, seen by all unconditional rows
        references = _zero_row_first(references)
        composite = None if composite is None else _zero_row_first(composite)
    keys_values = adapter(references, composite)

    own = [row for row in range(len(scenes)) for _ in range(repeats)]  # scene of each picture
    rows = torch.tensor(own, device=references.device)
    counts = {"references": references.shape[1], "composite": 1}
    if adapter.config.composite == "coordinates":
        counts["composite"] = references.shape[1]
    keys_values = {
        kind: _guided_rows(layers, rows, counts[kind])
        if with_nulls
        else {layer: (key[rows], value[rows]) for layer, (key, value) in layers.items()}
        for kind, layers in keys_values.items()
    }
    of_rows = [scenes[row] for row in own] * (2 if with_nulls else 1)
    return list(
        fusion_parts(
            keys_values,
            RegionPyramidBatch([scene.regions for scene in of_rows]),
            settings,
            _reference_scales(of_rows, references),
            composite_per_object=adapter.config.composite == "coordinates",
            rows=None if with_nulls else slice(-len(own), None),
        )
    )


def _guided_rows(keys_values: KeysValues, rows: torch.Tensor, num_objects: int) -> GuidedKeysValues:
    """Keys and values of `[uncond, cond]` rows.

    Args:
        keys_values: per layer keys and values `(1 + B, N * T, C)`; the first row is that of null pictures.
        rows: the scene of each picture, `(n,)`, numbers in [0, B).
        num_objects: N.
    """
    nulls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    shown: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer, (key, value) in keys_values.items():
        num_tokens = key.shape[1] // num_objects
        # copies, since a view would keep all of what it looks into
        nulls[layer] = (key[:1, :num_tokens].clone(), value[:1, :num_tokens].clone())
        shown[layer] = (key[rows + 1], value[rows + 1])
    return GuidedKeysValues(nulls, shown)


def _zero_row_first(vectors: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(vectors[:1]), vectors])


def _reference_scales(scenes: Sequence[ReferenceScene], like: torch.Tensor) -> torch.Tensor | None:
    """Strength of each reference `(rows, N)`; None where all are 1."""
    if all(item.scale == 1 for scene in scenes for item in scene.references):
        return None
    return _padded_rows([torch.tensor([item.scale for item in scene.references]).to(like) for scene in scenes])


def composite_pictures(
    scenes: Sequence[ReferenceScene], canvas: tuple[int, int], feature_extractor: Any, repeats: int = 1
) -> list[Any]:
    """The composite images of B scenes as PIL images, each `repeats` times."""
    mean, _ = clip_statistics(feature_extractor)
    pixels = torch.stack([composite_image(scene.references, canvas, mean) for scene in scenes])
    pictures = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))
    return [picture for picture in pictures for _ in range(repeats)]
