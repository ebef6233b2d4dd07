"""The loss of LocRef-Diffusion (arXiv:2411.15252): denoising, heavier inside the boxes, with parts left out at random.

    loss = mean( W * (noise - prediction)^2 ),  W = W_f inside the union of the boxes, W_b outside

on the latents' grid, W_f = 2.3 and W_b = 0.3 in the paper. With a share a of cells inside boxes the mean weight is
0.3 + 2.0 * a. What is left out (a caption, all pictures, both, the composite image) follows IP-Adapter: a vector of
zeros stands for a dropped picture, and the regions stay, so that null pictures are trained for guidance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from objectcompose.attention_processors.install import use_parts
from objectcompose.attention_processors.reference_fusion import FusionSettings
from objectcompose.errors import ObjectComposeError
from objectcompose.pipelines.reference_scenes import ReferenceScene, SceneVectors, scene_parts
from objectcompose.training.caption_encoding import encode_caption
from objectcompose.training.denoising import check_prediction_type, denoising_task
from objectcompose.training.loop import Draw, check_loss_weights
from objectcompose.training.reference_encoding import ReferenceEncoder, stack_references


@dataclass(frozen=True)
class LocRefLossOptions:
    """Weights and rates.

    Attributes:
        foreground_weight: W_f.
        background_weight: W_b.
        drop_text: probability of an empty caption alone.
        drop_images: probability that all pictures, composite and references, are null, alone.
        drop_both: probability of both.
        drop_composite: probability that the composite image alone is null.

    Raises:
        ObjectComposeError: a weight is negative or not finite, or both are 0; a rate lies outside [0, 1], or they sum
            to more than 1.
    """

    foreground_weight: float = 2.3
    background_weight: float = 0.3
    drop_text: float = 0.05
    drop_images: float = 0.05
    drop_both: float = 0.05
    drop_composite: float = 0.05

    def __post_init__(self) -> None:
        check_loss_weights(foreground_weight=self.foreground_weight, background_weight=self.background_weight)
        rates = {name: value for name, value in vars(self).items() if name.startswith("drop_")}
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise ObjectComposeError(f"`{name}` must lie in [0, 1], got {rate}.")
        if sum(rates.values()) > 1:
            raise ObjectComposeError(f"{', '.join(f'`{name}`' for name in rates)} must sum to at most 1, got {rates}.")


@dataclass(frozen=True)
class Dropped:
    """What a sample is trained without."""

    text: bool = False
    references: bool = False
    composite: bool = False


def draw_dropped(options: LocRefLossOptions, generator: torch.Generator) -> Dropped:
    """Which parts a sample lacks: at most one of the four kinds, each at its rate."""
    draw = float(torch.rand((), generator=generator, dtype=torch.float64))
    kinds = (
        (options.drop_text, Dropped(text=True)),
        (options.drop_images, Dropped(references=True, composite=True)),
        (options.drop_both, Dropped(text=True, references=True, composite=True)),
        (options.drop_composite, Dropped(composite=True)),
    )
    for rate, kind in kinds:
        if draw < rate:
            return kind
        draw -= rate
    return Dropped()


def foreground_of(scenes: Sequence[ReferenceScene]) -> torch.Tensor:
    """Union of the regions of B scenes on the latents' grid: (B, 1, h, w), {0, 1}."""
    unions = [(scene.regions.at(scene.regions.canvas) > 0).any(0, keepdim=True) for scene in scenes]
    return torch.stack(unions).float()


def cell_weights(foreground: torch.Tensor, foreground_weight: float, background_weight: float) -> torch.Tensor:
    """W: the weight of each cell, of the shape of `foreground` ({0, 1})."""
    return foreground_weight * foreground + background_weight * (1 - foreground)


def weighted_loss(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over all elements of the weighted squared difference; the weights stand outside the square.

    Args:
        prediction, target: (B, C, h, w).
        weights: (B, 1, h, w).
    """
    return (weights * (prediction - target).square()).mean()


class LocRefLosses:
    """Losses of a batch of draws, as `run_loop` wants them.

    Args:
        pipeline: a `LocRefPipeline`: frozen UNet and text encoder, adapter in training.
        scheduler: a diffusers scheduler with `add_noise`; its `prediction_type` decides the target.
        encoder: encoded samples.
        options: weights and rates.
        autocast: makes the context in which adapter and UNet run; losses are float32.

    Raises:
        ObjectComposeError: the scheduler predicts something else than noise or velocity.
    """

    def __init__(
        self,
        pipeline: Any,
        scheduler: Any,
        encoder: ReferenceEncoder,
        options: LocRefLossOptions,
        autocast: Any = nullcontext,
    ) -> None:
        check_prediction_type(scheduler)
        self.pipeline, self.scheduler, self.encoder = pipeline, scheduler, encoder
        self.options, self.autocast = options, autocast
        config = pipeline.adapter.config
        # what the adapter is trained with is what it is used with: the defaults of its config
        self.settings = FusionSettings(config.ci_scale, config.ri_scale, config.gamma, config.region_mask)
        self._no_text = encode_caption(pipeline.tokenizer, pipeline.text_encoder, "")

    @contextmanager
    def __call__(self, draws: Sequence[Draw]) -> Iterator[dict[str, torch.Tensor]]:
        """Means over the draws: "loss"; "foreground" and "background", the unweighted errors inside and outside the
        boxes; "share", that of cells inside."""
        unet, adapter, device = self.pipeline.unet, self.pipeline.adapter, self.pipeline.unet.device
        variants = [int(torch.randint(self.encoder.variants, (), generator=draw.generator)) for draw in draws]
        dropped = [draw_dropped(self.options, draw.generator) for draw in draws]
        samples = [self.encoder[draw.index, variant] for draw, variant in zip(draws, variants, strict=True)]
        scenes, vectors = stack_references(samples, device)
        texts = [self._no_text if one.text else sample.text for one, sample in zip(dropped, samples, strict=True)]

        moments = torch.stack([sample.moments for sample in samples]).to(device)
        task = denoising_task(draws, moments, self.scheduler, self.pipeline.vae.config.scaling_factor)
        with self.autocast():
            parts = scene_parts(adapter, scenes, without_dropped(vectors, dropped), self.settings)
        with use_parts(unet, parts):
            with self.autocast():
                text = torch.stack(texts).to(device)
                prediction = unet(task.noisy, task.timesteps, text, return_dict=False)[0].float()
            foreground = foreground_of(scenes).to(device)
            weights = cell_weights(foreground, self.options.foreground_weight, self.options.background_weight)
            with torch.no_grad():
                errors = (prediction - task.target).square().mean(1, keepdim=True)
                inside = (errors * foreground).sum() / foreground.sum().clamp_min(1)
                outside = (errors * (1 - foreground)).sum() / (1 - foreground).sum().clamp_min(1)
            loss = weighted_loss(prediction, task.target, weights)
            yield {"loss": loss, "foreground": inside, "background": outside, "share": foreground.mean()}


def without_dropped(vectors: SceneVectors, dropped: Sequence[Dropped]) -> SceneVectors:
    """The vectors with zeros in place of what is dropped."""
    keeps = [[not one.references for one in dropped], [not one.composite for one in dropped]]
    references, composite = (
        None if rows is None else torch.where(torch.tensor(keep, device=rows.device)[:, None, None], rows, 0.0)
        for rows, keep in zip((vectors.references, vectors.composite), keeps, strict=True)
    )
    assert references is not None
    return SceneVectors(references, composite)
