"""Train toybox's autoencoder.

    python -m objectcompose.training.train_toybox_vae --preset cpu --minutes 10      # run again to go on
    python -m objectcompose.training.train_toybox_vae --preset gpu

L1 on pixels and on their finite differences (which keeps outlines sharp), and a small KL term.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from objectcompose.toybox.models import build_vae
from objectcompose.training.common import shuffled_batch
from objectcompose.training.toybox_data import scene_pool
from objectcompose.training.toybox_loop import fit, parse_toybox, toybox_parser


STEPS = {"cpu": 3400, "gpu": 12_000}
BATCH_SIZE = 16
KL_WEIGHT = 3e-7  # larger ones silence latent channels: at 1e-5 two of four died
EDGE_WEIGHT = 0.5


def edges(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite differences of pictures (B, 3, H, W) along height and width."""
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., :, 1:] - pixels[..., :, :-1]


def reconstruction_loss(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L1 on the values and on the edges of pictures in [-1, 1]."""
    pairs = zip(edges(reconstruction), edges(pixels), strict=True)
    return F.l1_loss(reconstruction, pixels) + EDGE_WEIGHT * sum(F.l1_loss(a, b) for a, b in pairs)


@torch.no_grad()
def silence_channels(vae: Any, pixels: torch.Tensor, tolerance: float = 0.1) -> list[int]:
    """Set latent channels to zero that the decoder does not miss, in place.

    Some die early in training. Standardised, they would be noise of full strength that the diffusion has to learn.

    Args:
        vae: an `AutoencoderKL`.
        pixels: pictures to look at, (N, 3, H, W), in [-1, 1].
        tolerance: a channel is silenced when its mean in its place costs less than this, in dB.

    Returns:
        The silenced channels.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(32)])
    mean = latents.mean((0, 2, 3))

    def psnr(changed: torch.Tensor) -> float:
        decoded = torch.cat([vae.decode(part).sample for part in changed.split(32)])
        return float(-10 * ((decoded - pixels) / 2).square().mean().log10())

    whole, silenced = psnr(latents), []
    for channel in range(latents.shape[1]):
        without = latents.clone()
        without[:, channel] = mean[channel]
        if whole - psnr(without) < tolerance:
            silenced.append(channel)
    vae.quant_conv.weight[silenced] = 0
    vae.quant_conv.bias[silenced] = 0
    decode = vae.post_quant_conv
    decode.bias += decode.weight[:, silenced, 0, 0] @ mean[silenced]
    decode.weight[:, silenced] = 0
    return silenced


@torch.no_grad()
def standardise_latents(vae: Any, pixels: torch.Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1 (silent ones stay 0), folded into 1x1 convolutions, in place.

    Reconstructions stay what they were. Without it one global factor leaves channels ten times fainter than others,
    which drown in the diffusion's noise.

    Args:
        vae: an `AutoencoderKL`.
        pixels: pictures to take the statistics from, (N, 3, H, W), in [-1, 1].
    """
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(32)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    deviation[deviation == 0] = 1
    encode, decode, channels = vae.quant_conv, vae.post_quant_conv, latents.shape[1]
    encode.weight[:channels] /= deviation[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / deviation
    encode.bias[channels:] -= 2 * deviation.log()  # the second half are log variances
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= deviation[None, :, None, None]


@torch.no_grad()
def narrow_posterior(vae: Any) -> None:
    """Make a sample of the posterior its mean but for noise of deviation 0.007, in place.

    The base learns from means. Channels that the decoder hardly reads have wide posteriors, and who draws from them,
    as every fine-tuning script does, would show the base latents that it has never seen.
    """
    half = vae.quant_conv.out_channels // 2
    vae.quant_conv.weight[half:] = 0
    vae.quant_conv.bias[half:] = -10  # log variance


def main() -> None:
    """Command line."""
    parser = toybox_parser(__doc__, batch_size=BATCH_SIZE, steps=STEPS)
    parser.add_argument("--scenes", type=int, default=16_000, help="size of the pool of training scenes")
    args, preset, device = parse_toybox(parser)
    pool = scene_pool(preset, "train", args.scenes, args.runs / "pools")
    vae: Any = build_vae(preset).to(device)

    def loss_of_step(step: int) -> torch.Tensor:
        pixels = pool.images(shuffled_batch(step, len(pool.pixels), args.batch_size, args.seed), device) * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        return reconstruction_loss(vae.decode(posterior.sample()).sample, pixels) + KL_WEIGHT * posterior.kl().mean()

    averaged, step = fit("vae", vae, loss_of_step, args, lr=2e-3 if args.preset == "cpu" else 1e-3)
    seen = pool.images(torch.arange(min(512, len(pool.pixels))), device) * 2 - 1
    print(f"silenced latent channels: {silence_channels(averaged, seen) or 'none'}")
    standardise_latents(averaged, seen)
    narrow_posterior(averaged)
    averaged.register_to_config(scaling_factor=1.0)
    averaged.half().save_pretrained(args.weights / "base" / "vae")
    print(f"autoencoder after {step} steps: {args.weights / 'base' / 'vae'}")


if __name__ == "__main__":
    main()
