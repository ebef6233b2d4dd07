"""How well attention maps of nouns cover their objects: maps of noised pictures against true masks.

As in TokenCompose's evaluation (arXiv:2312.03626, section 4.4) with DAAM's maps (arXiv:2210.04885): each layer's map
is resized to the latents' grid, clamped at 0 and averaged over heads and layers; a noun's map is the mean over its
tokens, resized to the picture and stretched to [0, 1]. It differs in what is measured: the authors invert pictures and
sum over all steps of sampling; here a true picture is noised to given timesteps, so that the true mask is known and no
sampling is in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from objectcompose.attention_processors.install import match_layers, use_parts
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.attention_processors.regions import token_grid
from objectcompose.errors import ObjectComposeError
from objectcompose.evaluation.prompt_lists import stable_number
from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics
from objectcompose.training.caption_encoding import CaptionEncoder, encode_caption
from objectcompose.training.grounded_captions import CaptionDataset, CaptionSample


#: Thresholds that the dev split chooses from.
THRESHOLDS = tuple(round(0.05 * number, 2) for number in range(1, 20))


@dataclass(frozen=True)
class MaskedCaption:
    """A sample whose nouns have masks and places.

    Attributes:
        name: fixes its noise.
        sample: pixels, caption, phrases and masks of the nouns that are measured.
        tokens: positions (BOS = 0) of each noun's tokens.
    """

    name: str
    sample: CaptionSample
    tokens: tuple[tuple[int, ...], ...]


class AttentionMaps:
    """Maps of a pipeline's UNet on noised pictures.

    Args:
        pipeline: of the Stable Diffusion 1.x/2.x layout.
        layers: cross-attention layers, a regex or a list of names.

    Raises:
        LayerNotFoundError: the pattern chooses nothing.
    """

    def __init__(self, pipeline: Any, layers: str | Sequence[str]) -> None:
        self.pipeline = pipeline
        self.layers = match_layers(pipeline.unet, layers, "cross")
        self.scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)

    def check_timestep(self, timestep: int) -> None:
        """Raise ObjectComposeError unless the model was trained at this timestep."""
        last = self.scheduler.config.num_train_timesteps - 1
        if not 0 <= timestep <= last:
            raise ObjectComposeError(f"`timesteps` must lie in [0, {last}], got {timestep}.")

    def masked_captions(self, dataset: CaptionDataset, numbers: Sequence[int], split: str) -> list[MaskedCaption]:
        """Samples with the nouns that have a mask with at least one pixel and are found in their caption."""
        parts = self.pipeline
        levels = len(parts.unet.config.block_out_channels)
        encoder = CaptionEncoder(dataset, parts.tokenizer, parts.text_encoder, parts.vae, levels, on_missing="skip")
        found = []
        for number in numbers:
            sample = dataset[number]
            seen = [place for place, mask in enumerate(sample.masks) if mask.max() > 0.5]
            sample = _with_nouns(sample, seen)
            kept, tokens = encoder.find_tokens(sample)
            found.append(MaskedCaption(f"{split}-{number}", _with_nouns(sample, kept), tokens))
        return found

    @torch.no_grad()
    def maps(self, captions: Sequence[MaskedCaption], timestep: int) -> list[torch.Tensor]:
        """Maps of each sample's nouns at one timestep.

        Args:
            captions: each with at least one noun, pictures of one size.
            timestep: of the noise that is added.

        Returns:
            For each sample (N, H, W), at least 0, at the masks' size.
        """
        self.check_timestep(timestep)
        unet, vae = self.pipeline.unet, self.pipeline.vae
        pixels = torch.stack([one.sample.pixels for one in captions])
        clean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        noise = torch.stack([_noise_of(one.name, timestep, clean.shape[1:]) for one in captions])
        steps = torch.full((len(captions),), timestep, device=clean.device)
        noisy = self.scheduler.add_noise(clean.float(), noise.to(clean.device), steps).to(unet.dtype)
        states = [
            encode_caption(self.pipeline.tokenizer, self.pipeline.text_encoder, one.sample.caption) for one in captions
        ]
        rows = [[position for noun in one.tokens for position in noun] for one in captions]
        probe = TokenMapProbe(rows, self.layers, head_mean=True)
        with use_parts(unet, [probe]):
            unet(noisy, steps, torch.stack(states).to(unet.device, unet.dtype), return_dict=False)
        columns = _mean_over_layers(probe.maps, (clean.shape[-2], clean.shape[-1])).cpu()  # (B, T, h, w)
        return [
            _noun_maps(columns[place], one.tokens, (one.sample.masks.shape[-2], one.sample.masks.shape[-1]))
            for place, one in enumerate(captions)
        ]


def _with_nouns(sample: CaptionSample, places: Sequence[int]) -> CaptionSample:
    phrases = tuple(sample.phrases[place] for place in places)
    return CaptionSample(sample.pixels, sample.caption, phrases, sample.masks[list(places)])


def _noise_of(name: str, timestep: int, shape: Sequence[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(stable_number("map-iou", name, timestep))
    return torch.randn(tuple(shape), generator=generator)


def _mean_over_layers(maps: Mapping[str, torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """(B, T, h, w) at the latents' grid from maps (B, HW, T) at the layers' own."""
    resized = [
        _resized(layer.float().transpose(1, 2).unflatten(-1, token_grid(layer.shape[1], *grid)), grid)
        for layer in maps.values()
    ]
    return torch.stack(resized).mean(0)


def _noun_maps(columns: torch.Tensor, tokens: Sequence[Sequence[int]], size: tuple[int, int]) -> torch.Tensor:
    """(N, H, W) from the columns (T, h, w) of a sample's tokens, which stand noun by noun."""
    per_noun = columns[: sum(map(len, tokens))].split([len(noun) for noun in tokens])
    return _resized(torch.stack([noun.mean(0) for noun in per_noun])[None], size)[0]


def _resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bicubic", align_corners=False).clamp(min=0)


def map_scores(maps: torch.Tensor, masks: torch.Tensor) -> list[dict[str, Any]]:
    """How maps cover masks.

    Args:
        maps: (N, H, W), at least 0.
        masks: (N, H, W) in [0, 1]; above 0.5 is the object.

    Returns:
        For each, `ious`: the IoU of the map, stretched to [0, 1], above each of `THRESHOLDS` with the mask; and
        `inside`, the share of the map's mass in the mask, which needs no threshold. A map that is the same everywhere
        is 0 everywhere when stretched.
    """
    truth = masks > 0.5
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = (maps - low) / (high - low).clamp_min(1e-12)
    inside = (maps * truth).sum((1, 2)) / maps.sum((1, 2)).clamp_min(1e-12)
    ious = []
    for threshold in THRESHOLDS:
        chosen = stretched > threshold
        union = (chosen | truth).sum((1, 2)).clamp_min(1)
        ious.append((chosen & truth).sum((1, 2)) / union)
    return [
        {"ious": [round(float(value), 6) for value in row], "inside": round(float(share), 6)}
        for row, share in zip(torch.stack(ious, dim=1), inside, strict=True)
    ]


def best_threshold(rows: Sequence[Mapping[str, Any]]) -> float:
    """The one of `THRESHOLDS` with the highest mean IoU over the rows; the lower one of equals.

    Raises:
        ObjectComposeError: there are no rows.
    """
    if not rows:
        raise ObjectComposeError("the dev split must have at least one noun with a mask to choose the threshold by.")
    means = np.mean([row["ious"] for row in rows], axis=0)
    return THRESHOLDS[int(np.argmax(means))]


def map_metrics(rows: Sequence[Mapping[str, Any]], threshold: float) -> dict[str, float]:
    """Figures in [0, 1] of rows with `sample`, `t`, `ious` and `inside`.

    Args:
        rows: of the test split, one per sample, noun and timestep.
        threshold: one of `THRESHOLDS`.

    Returns:
        `map_iou` and `map_inside` over all rows and per timestep, with bounds over samples, and `threshold`.

    Raises:
        ObjectComposeError: no rows, or a threshold that was not measured.
    """
    if not rows:
        raise ObjectComposeError("the test split must have at least one noun with a mask, got none.")
    if threshold not in THRESHOLDS:
        raise ObjectComposeError(f"`threshold` must be one of {THRESHOLDS}, got {threshold}.")
    place = THRESHOLDS.index(threshold)
    metrics: dict[str, float] = {}
    for timestep in (None, *sorted({row["t"] for row in rows})):
        counted = [row for row in rows if timestep is None or row["t"] == timestep]
        suffix = "" if timestep is None else f".t{timestep}"
        samples = [row["sample"] for row in counted]
        for name, values in (
            ("map_iou", [row["ious"][place] for row in counted]),
            ("map_inside", [row["inside"] for row in counted]),
        ):
            if len(set(samples)) < 2:
                metrics[name + suffix] = float(np.mean(values))
            else:
                metrics |= interval_metrics(name + suffix, bootstrap_mean(values, groups=samples))
    return {**metrics, "threshold": threshold}
