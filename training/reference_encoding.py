"""What a sample with references becomes before the adapter sees it: vectors, boxes, latent moments, text states.

All pictures go through the frozen encoders once. A sample has K variants; each follows from the sample, the variant's
number and the seed alone, and is encoded by itself, so it may be kept on disk. Vectors, regions and composite image
are made by the functions that sampling uses.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from objectcompose.errors import ObjectComposeError
from objectcompose.grounding.loading import fingerprint
from objectcompose.layout import SceneObject
from objectcompose.pipelines.reference_images import clip_statistics
from objectcompose.pipelines.reference_layout import reference_regions
from objectcompose.pipelines.reference_scenes import ReferenceScene, SceneVectors, encode_scenes
from objectcompose.training.caption_encoding import encode_caption
from objectcompose.training.reference_augmentation import ReferenceAugmentation
from objectcompose.training.reference_samples import ReferenceDataset, ReferenceSample
from objectcompose.training.tensor_cache import cached_tensors


@dataclass(frozen=True)
class EncodedReferences:
    """A variant of a sample, ready for a step.

    Attributes:
        moments: (2 * C, h, w), mean and log-variance of the latent, unscaled.
        text: (L, D), the text encoder's last hidden state.
        boxes: (N, 4), of the references, xyxy fractions.
        references: (N, D'), the image encoder's vectors.
        composite: (S, D''), the adapter's `composite`; None where it reads none.
    """

    moments: torch.Tensor
    text: torch.Tensor
    boxes: torch.Tensor
    references: torch.Tensor
    composite: torch.Tensor | None


class ReferenceEncoder:
    """Encodes variants of the samples of a data set, with what was encoded before kept on disk.

    Args:
        dataset: pictures with boxes and references.
        pipeline: a `LocRefPipeline` with its encoders, all frozen, and its adapter.
        augmentation: of references and boxes.
        variants: K, variants of each sample, at least 1.
        drop_object: probability that a variant lacks one of its references, with its box; only where it has others.
        seed: of all variants.
        cache: folder for encoded variants; None computes each anew.

    Raises:
        ObjectComposeError: a number is out of range.
    """

    def __init__(
        self,
        dataset: ReferenceDataset,
        pipeline: Any,
        augmentation: ReferenceAugmentation,
        variants: int = 4,
        drop_object: float = 0.1,
        seed: int = 0,
        cache: Path | None = None,
    ) -> None:
        if variants < 1:
            raise ObjectComposeError(f"`variants` must be at least 1, got {variants}.")
        if not 0 <= drop_object <= 1:
            raise ObjectComposeError(f"`drop_object` must lie in [0, 1], got {drop_object}.")
        self.dataset, self.pipeline, self.augmentation = dataset, pipeline, augmentation
        self.variants, self.drop_object, self.seed, self.cache = variants, drop_object, seed, cache
        self._settings = "" if cache is None else self._cache_settings()

    def _cache_settings(self) -> str:
        """All that encoded variants follow from beside the sample; looks at the encoders' weights once."""
        pipeline, config = self.pipeline, self.pipeline.adapter.config
        encoders = (pipeline.image_encoder, pipeline.vae, pipeline.text_encoder)
        statistics = [row.tolist() for row in clip_statistics(pipeline.feature_extractor)]
        settings = [dataclasses.astuple(self.augmentation), self.drop_object, self.seed, statistics]
        return json.dumps(
            [*settings, config.feature, config.composite, *(fingerprint(one, one.config) for one in encoders)]
        )

    def __getitem__(self, place: tuple[int, int]) -> EncodedReferences:
        """Variant `place[1]` of sample `place[0]`, encoded, on the CPU."""
        if self.cache is None:
            return self.encode(*place)
        key = f"{self._settings} {self.dataset.key(place[0])} {place}"
        names = [field.name for field in dataclasses.fields(EncodedReferences) if field.name != "composite"]
        tensors = cached_tensors(self.cache, key, names, lambda: _tensors_of(self.encode(*place)))
        composite = tensors.pop("composite", None)
        return EncodedReferences(**tensors, composite=composite)

    def draw_sample(self, index: int, variant: int) -> ReferenceSample:
        """A variant before it is encoded: references and boxes varied, perhaps one of them dropped."""
        rng = np.random.default_rng((self.seed, index, variant))
        sample = self.dataset.sample(index, rng)
        objects = []
        for item in sample.objects:
            assert item.box is not None
            image = self.augmentation.vary_picture(item.image, rng)
            objects.append(dataclasses.replace(item, image=image, box=self.augmentation.vary_box(item.box, rng)))
        is_dropped, number = rng.random() < self.drop_object, int(rng.integers(len(objects)))
        if is_dropped and len(objects) > 1:
            del objects[number]
        return dataclasses.replace(sample, objects=tuple(objects))

    @torch.no_grad()
    def encode(self, index: int, variant: int) -> EncodedReferences:
        """Encode one variant, whatever the cache holds.

        Raises:
            RegionError: the latents' grid cannot give each reference a cell of its own.
        """
        pipeline, sample = self.pipeline, self.draw_sample(index, variant)
        device = pipeline.unet.device
        pixels = sample.pixels[None].to(device, pipeline.vae.dtype)
        moments = pipeline.vae.encode(pixels).latent_dist.parameters[0].float().cpu()
        text = encode_caption(pipeline.tokenizer, pipeline.text_encoder, sample.caption)
        scene = ReferenceScene(
            list(sample.objects), reference_regions(sample.objects, (moments.shape[-2], moments.shape[-1]))
        )
        vectors = encode_scenes(
            [scene],
            (sample.pixels.shape[-2], sample.pixels.shape[-1]),
            pipeline.image_encoder,
            pipeline.feature_extractor,
            pipeline.adapter,
            device,
        )
        composite = None if vectors.composite is None else vectors.composite[0].float().cpu()
        boxes = torch.tensor([item.box for item in sample.objects])
        return EncodedReferences(moments, text, boxes, vectors.references[0].float().cpu(), composite)


def _tensors_of(encoded: EncodedReferences) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(encoded).items() if value is not None}


def stack_references(
    samples: Sequence[EncodedReferences], device: torch.device | str
) -> tuple[list[ReferenceScene], SceneVectors]:
    """Scenes and vectors of a batch as `scene_parts` reads them, padded to the row with most references.

    Args:
        samples: B encoded samples with latents of one size.
        device: of the vectors.
    """
    scenes = []
    for sample in samples:
        objects = [SceneObject(box=box) for box in sample.boxes.tolist()]
        scenes.append(
            ReferenceScene(objects, reference_regions(objects, (sample.moments.shape[-2], sample.moments.shape[-1])))
        )
    pad = torch.nn.utils.rnn.pad_sequence
    references = pad([sample.references for sample in samples], batch_first=True).to(device)
    composites = [sample.composite for sample in samples if sample.composite is not None]
    return scenes, SceneVectors(references, pad(composites, batch_first=True).to(device) if composites else None)
