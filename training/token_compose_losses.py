"""TokenCompose's training losses on a batch of grounded captions (arXiv 2312.03626, equation 7).

`loss = ldm_weight * L_LDM + token_weight * L_token + pixel_weight * L_pixel`; the defaults are those of the authors'
run on Stable Diffusion 1.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.install import match_layers, use_parts
from objectcompose.attention_processors.losses import pixel_loss, token_loss
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.training.caption_encoding import CaptionEncoder, stack_targets
from objectcompose.training.denoising import check_prediction_type, denoising_task
from objectcompose.training.loop import Draw, check_loss_weights


#: Middle and decoder; supervising the encoder hurts (table 2 of the paper).
SUPERVISED_LAYERS = r"^(mid_block|up_blocks)\..*attn2$"


@dataclass(frozen=True)
class TokenComposeLossOptions:
    """The losses.

    Attributes:
        token_weight: lambda, of `token_loss`, summed over the supervised layers; 0 leaves it out.
        pixel_weight: gamma, of `pixel_loss`, summed over resolutions; 0 leaves it out.
        ldm_weight: of the denoising loss.
        head_mode: token loss of each head, averaged ("ratio_mean", the authors' code), or of the heads' mean map
            ("map_mean", the paper's formula).
        pixel_sum: of the pixel loss, over "resolutions", layers averaged (the authors' code), or over "layers" (the
            paper's formula).
        layers: the supervised cross-attention layers, a regex or a list of names.

    Raises:
        ObjectComposeError: a negative weight, or nothing to train on.
    """

    token_weight: float = 1e-3
    pixel_weight: float = 5e-5
    ldm_weight: float = 1.0
    head_mode: Literal["ratio_mean", "map_mean"] = "ratio_mean"
    pixel_sum: Literal["resolutions", "layers"] = "resolutions"
    layers: str | Sequence[str] = SUPERVISED_LAYERS

    def __post_init__(self) -> None:
        check_loss_weights(token_weight=self.token_weight, pixel_weight=self.pixel_weight, ldm_weight=self.ldm_weight)


class TokenComposeLosses:
    """Losses of a batch of draws, as `run_loop` wants them.

    Args:
        unet: the UNet in training.
        scheduler: a diffusers scheduler with `add_noise`; its `prediction_type` decides the target.
        encoder: encoded samples by number.
        scaling_factor: of the latents.
        options: of the losses.
        autocast: makes the context in which the UNet runs, such as `accelerator.autocast`; losses are float32.

    Raises:
        LayerNotFoundError: the pattern of layers matches nothing.
        ObjectComposeError: the scheduler predicts something else than noise or velocity.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        encoder: CaptionEncoder,
        scaling_factor: float,
        options: TokenComposeLossOptions,
        autocast: Any = nullcontext,
    ) -> None:
        check_prediction_type(scheduler)
        self.unet, self.scheduler, self.encoder = unet, scheduler, encoder
        self.scaling_factor, self.options, self.autocast = scaling_factor, options, autocast
        self.layers = match_layers(unet, options.layers, "cross")

    @contextmanager
    def __call__(self, draws: Sequence[Draw]) -> Iterator[dict[str, torch.Tensor]]:
        """Means over the draws: "loss", "ldm", "token", "pixel", and for each grid "empty_masks_<h>x<w>", the share of
        noun masks that have no cell on it."""
        device = next(self.unet.parameters()).device
        samples = [self.encoder[draw.index] for draw in draws]
        moments = torch.stack([sample.moments for sample in samples]).to(device)
        task = denoising_task(draws, moments, self.scheduler, self.scaling_factor)
        text = torch.stack([sample.text for sample in samples]).to(device)
        targets = stack_targets(samples)
        is_grounded = any(targets.token_indices) and bool(self.options.token_weight or self.options.pixel_weight)
        probes = [TokenMapProbe(targets.token_indices, self.layers, head_mean=False)] if is_grounded else []
        with use_parts(self.unet, probes):
            with self.autocast():
                prediction = self.unet(task.noisy, task.timesteps, text, return_dict=False)[0]
            losses = {"ldm": F.mse_loss(prediction.float(), task.target)}
            total = self.options.ldm_weight * losses["ldm"]
            zero = torch.zeros((), device=device)
            losses |= {"token": zero, "pixel": zero}
            if is_grounded:
                probes[0].hold()  # the backward pass may run the blocks again
                maps, owners = probes[0].maps, targets.owners.to(device)
                losses["token"] = token_loss(maps, targets.masks, owners, head_mode=self.options.head_mode)
                losses["pixel"] = pixel_loss(maps, targets.masks, owners, pixel_sum=self.options.pixel_sum)
                total = total + self.options.token_weight * losses["token"]
                total = total + self.options.pixel_weight * losses["pixel"]
            empty = _empty_shares(targets.masks, targets.owners)
            yield {"loss": total, **losses, **{name: share.to(device) for name, share in empty.items()}}
        for probe in probes:
            probe.clear()


def _empty_shares(masks: dict[int, torch.Tensor], owners: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each grid, the share of nouns whose mask has no cell; 0 without nouns."""
    nouns = owners.sum(1) > 0  # (B, N)
    shares = {}
    for grid in masks.values():
        empty = (grid.flatten(2).sum(2) == 0)[nouns].float()
        shares[f"empty_masks_{grid.shape[-2]}x{grid.shape[-1]}"] = empty.sum() / max(len(empty), 1)
    return shares
