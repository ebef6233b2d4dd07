"""Train toybox's text-to-image model: text encoder and UNet, on the latents of a finished autoencoder.

    python -m objectcompose.training.train_toybox_base --preset cpu --compile --minutes 60     # run again to go on
    python -m objectcompose.training.train_toybox_base --preset gpu --compile --minutes 9      # twice
    python -m objectcompose.training.train_toybox_base --preset cpu --continue_weights     # in a fresh clone

Epsilon prediction with min-SNR weighting (Hang et al., 2023, arXiv:2303.09556, gamma = 5) and 10 % caption dropout.
The scenes' latents are computed once. Ends by writing `base/` as a Stable Diffusion pipeline in fp16.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from tqdm.auto import tqdm

from objectcompose.errors import CheckpointError
from objectcompose.toybox.models import build_text_encoder, build_unet
from objectcompose.toybox.tokenizer import build_tokenizer
from objectcompose.training.common import shuffled_batch
from objectcompose.training.toybox_data import ScenePool, scene_pool
from objectcompose.training.toybox_loop import fit, parse_toybox, toybox_parser


#: The learning rate is zero at the end; more steps make the pictures sharper.
STEPS = {"cpu": 13_250, "gpu": 60_000}
BATCH_SIZE = 32
MIN_SNR_GAMMA = 5.0
CAPTION_DROPOUT = 0.1


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pool: ScenePool, device: torch.device) -> torch.Tensor:
    """Scaled latent means (N, 4, h, w) of all scenes, fp16 on the CPU."""
    parts = torch.arange(len(pool.pixels)).split(128)
    latents = [vae.encode(pool.images(part, device) * 2 - 1).latent_dist.mode().half().cpu() for part in tqdm(parts)]
    return torch.cat(latents) * vae.config.scaling_factor


def min_snr_weights(scheduler: DDIMScheduler, gamma: float = MIN_SNR_GAMMA) -> torch.Tensor:
    """Weight of each timestep for epsilon prediction: min(SNR, gamma) / SNR, shape (T,)."""
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    return snr.clamp_max(gamma) / snr


def steps_begun(preset: str, weights: Path) -> tuple[int, float]:
    """Steps and seconds that the written base was trained for, as `toybox.json` records them.

    Raises:
        CheckpointError: there is no such record, or it is of another preset.
    """
    path = weights / "toybox.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if record.get("preset") != preset or "base" not in record["models"]:
        raise CheckpointError(f"`--continue_weights` needs a base of preset {preset!r} in `{path}`, which has none.")
    return record["models"]["base"]["steps"], float(record["models"]["base"]["seconds"])


def main() -> None:
    """Command line."""
    parser = toybox_parser(__doc__, batch_size=BATCH_SIZE, steps=STEPS)
    parser.add_argument("--scenes", type=int, default=32_000, help="size of the pool of training scenes")
    parser.add_argument(
        "--continue_weights", action="store_true", help="where there is no checkpoint, go on from the written base"
    )
    args, preset, device = parse_toybox(parser)
    begun = steps_begun(args.preset, args.weights) if args.continue_weights else (0, 0.0)
    vae = AutoencoderKL.from_pretrained(args.weights / "base" / "vae", dtype=torch.float32).to(device)
    pool = scene_pool(preset, "train", args.scenes, args.runs / "pools")
    latents = encode_pool(vae, pool, device)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    captions = ["", *pool.captions]  # row 0 is the dropped caption
    input_ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    weights, alphas = min_snr_weights(scheduler).to(device), scheduler.alphas_cumprod.to(device)
    text_encoder = build_text_encoder(preset, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    unet = build_unet(preset)
    if args.continue_weights:
        written = StableDiffusionPipeline.from_pretrained(args.weights / "base", dtype=torch.float32)
        text_encoder, unet = written.text_encoder.train(), written.unet.train()
    model = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).to(device)
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format  # a tenth faster on CPUs
    model["unet"].to(memory_format=layout)
    denoise = torch.compile(model["unet"]) if args.compile else model["unet"]

    def loss_of_step(step: int) -> torch.Tensor:
        rows = shuffled_batch(step, len(latents), args.batch_size, args.seed)
        clean = latents[rows].to(device).float()
        noise, timesteps = torch.randn_like(clean), torch.randint(0, len(alphas), (len(rows),), device=device)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=layout)
        kept = (rows + 1) * (torch.rand(len(rows)) >= CAPTION_DROPOUT)
        text = model["text_encoder"](input_ids[kept.to(device)]).last_hidden_state
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            prediction = denoise(noisy, timesteps, text, return_dict=False)[0]
        return (F.mse_loss(prediction.float(), noise, reduction="none").mean((1, 2, 3)) * weights[timesteps]).mean()

    lr = 1e-3 if args.preset == "cpu" else 5e-4
    averaged, step = fit("base", model, loss_of_step, args, lr=lr, ema_decay=0.9985, begun=begun)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=averaged["text_encoder"],
        tokenizer=tokenizer,
        unet=averaged["unet"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(args.weights / "base")
    print(f"base after {step} steps of {args.batch_size}: {args.weights / 'base'}")


if __name__ == "__main__":
    main()
