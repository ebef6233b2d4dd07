"""What TokenCompose and Separate-and-Enhance cost beside plain sampling and beside training on L_LDM alone.

    python -m benchmarks.tokencompose_cost

Times and FLOPs are of a UNet with the blocks, layers and heads of SD 1 and few channels, at 64 x 64 latents; memory is
of SD 1.5's full shape. A training step goes through the whole UNet with gradient checkpointing, as the authors train.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from benchmarks.cost_file import cost_parser, parse_cost, write_cost
from benchmarks.measure import (
    flops,
    measuring_inputs,
    measuring_unet,
    paired_ratio,
    peak_memory,
    ratio_metrics,
    ratio_of_pairs,
)
from objectcompose.attention_processors.early_exit import run_until
from objectcompose.attention_processors.install import use_parts
from objectcompose.attention_processors.losses import enhance_loss, mean_object_maps, separate_loss
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.attention_processors.regions import grids_of
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from objectcompose.training.caption_encoding import EncodedCaption
from objectcompose.training.loop import Draw
from objectcompose.training.token_compose_losses import TokenComposeLosses, TokenComposeLossOptions
from objectcompose.training.trainable import select_trainable


SIDE, TEXT_LENGTH, STEPS = 64, 77, 4
NOUNS = ((5,), (8, 9), (12,))  # as many as an average caption of the authors' data supervises, one of two tokens
MEMORY_REPEATS = 1  # repeats differ by less than 0.1 %
#: Separate-and-Enhance reads the 16 x 16 maps, the last of them in `up_blocks.1`.
SEPARATE_ENHANCE_LAYERS = r"(down_blocks\.2|up_blocks\.1)\..*attn2$"
PROTOCOL = (
    "SD1-shaped UNet at 64x64 latents, float32, random weights. Inference: 4 DDIM steps with guidance to latents,"
    " from given text states, width 40, TokenComposePipeline beside StableDiffusionPipeline on the same components."
    " Training: one sample with 3 nouns (4 tokens), forward and backward with gradient checkpointing, gradients for"
    " the whole UNet, then AdamW; L_LDM + 1e-3 L_token + 5e-5 L_pixel in the 10 layers of middle and decoder, beside"
    " L_LDM alone; width 40. Sides alternated. Memory: peak of forward and backward above weights and gradients, at"
    " full width (320, text 768), each in a fresh process, over the same with L_LDM alone. FLOPs: forward and"
    " backward to the keys of Separate-and-Enhance's pass, left after up_blocks.1, over those of the denoising loss;"
    " width 40."
)


def encoded_caption(text_width: int, nouns: Sequence[Sequence[int]] = NOUNS) -> EncodedCaption:
    """A sample as the trainer sees it: each noun's mask is a band of the picture."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for rows, columns in grids_of(SIDE, SIDE, 4):
        bands = torch.zeros(len(nouns), rows, columns)
        for number, band in enumerate(bands):
            band[:, number * columns // len(nouns) : (number + 1) * columns // len(nouns)] = 1
        masks[rows * columns] = bands
    moments = torch.randn(8, SIDE, SIDE, generator=generator)
    text = torch.randn(TEXT_LENGTH, text_width, generator=generator)
    return EncodedCaption(moments, text, tuple(tuple(noun) for noun in nouns), masks)


class OneCaption:
    """A data set of one encoded sample."""

    def __init__(self, text_width: int) -> None:
        self.sample = encoded_caption(text_width)

    def __getitem__(self, index: int) -> EncodedCaption:
        return self.sample


def measuring_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def prepare_training_pass(
    is_grounded: bool, device: str = "cpu", width: int = 320, text_width: int = 768
) -> Callable[[], None]:
    """For `peak_memory`: forward and backward of TokenCompose's trainer, or of L_LDM alone; gradients are there."""
    unet = measuring_unet(width=width, cross_attention_dim=text_width).to(device).train()
    unet.enable_gradient_checkpointing()
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return training_pass(unet, is_grounded)


def training_pass(unet: UNet2DConditionModel, is_grounded: bool) -> Callable[[], None]:
    """Forward and backward on one sample."""
    options = TokenComposeLossOptions() if is_grounded else TokenComposeLossOptions(token_weight=0.0, pixel_weight=0.0)
    data: Any = OneCaption(unet.config.cross_attention_dim)
    losses = TokenComposeLosses(unet, measuring_scheduler(), data, 1.0, options)

    def run() -> None:
        with losses([Draw(0, torch.Generator().manual_seed(0))]) as found:
            found["loss"].backward()

    return run


def prepare_training_step(is_grounded: bool, device: str = "cpu") -> Callable[[], None]:
    """For `paired_ratio`: a whole step of training."""
    unet = measuring_unet().to(device).train()
    unet.enable_gradient_checkpointing()
    one_pass, optimizer = training_pass(unet, is_grounded), torch.optim.AdamW(unet.parameters(), lr=1e-6)

    def run() -> None:
        one_pass()
        optimizer.step()
        optimizer.zero_grad()

    return run


def prepare_sampling(pipeline_class: Any, device: str = "cpu") -> Callable[[], Any]:
    """A short guided sampling to latents."""
    pipeline = pipeline_class(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=measuring_unet().to(device),
        scheduler=measuring_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    text = measuring_inputs(pipeline.unet)["encoder_hidden_states"]

    def run() -> Any:
        return pipeline(
            prompt_embeds=text[:1],
            negative_prompt_embeds=text[1:],
            num_inference_steps=STEPS,
            height=SIDE * 8,
            width=SIDE * 8,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )

    return run


def time_rows(device: str, pairs: int) -> list[dict[str, Any]]:
    """Paired times of sampling and of a training step."""
    sides = {
        "inference": [prepare_sampling(kind, device) for kind in (TokenComposePipeline, StableDiffusionPipeline)],
        "train": [prepare_training_step(is_grounded, device) for is_grounded in (True, False)],
    }
    return [
        {"case": case, **row}
        for case, (ours, plain) in sides.items()
        for row in paired_ratio(ours, plain, pairs=pairs).rows()
    ]


def memory_rows() -> list[dict[str, Any]]:
    """Peak memory of a training step with and without the grounding losses."""
    rows = []
    for _ in range(MEMORY_REPEATS):
        for is_grounded in (True, False):
            peak = peak_memory("benchmarks.tokencompose_cost:prepare_training_pass", is_grounded=is_grounded)
            rows.append(
                {"case": "memory", "is_grounded": is_grounded, "device": peak.device, "extra_bytes": peak.extra_bytes}
            )
    return rows


def flops_rows(device: str) -> list[dict[str, Any]]:
    """FLOPs of forward and backward to the keys: of Separate-and-Enhance's pass, and of the whole UNet's loss."""
    unet = measuring_unet().to(device)
    trained = select_trainable(unet, "to_k")
    inputs = measuring_inputs(unet, batch_size=1)
    probe = TokenMapProbe([token for noun in NOUNS for token in noun], SEPARATE_ENHANCE_LAYERS, head_mean=False)
    owners = torch.zeros(sum(map(len, NOUNS)), len(NOUNS), device=device)
    owners[torch.arange(len(owners)), [number for number, noun in enumerate(NOUNS) for _ in noun]] = 1

    def denoising() -> None:
        unet(**inputs).sample.square().mean().backward()

    def separate_enhance() -> None:
        with use_parts(unet, [probe]):
            run_until(unet, SEPARATE_ENHANCE_LAYERS, **inputs)
            maps = mean_object_maps(probe.maps, owners)
            (separate_loss(maps) + 0.5 * enhance_loss(maps, (SIDE // 4, SIDE // 4))).backward()
        probe.clear()

    rows = []
    for side, run in (("denoising", denoising), ("separate_enhance", separate_enhance)):
        rows.append({"case": "flops", "side": side, "flops": flops(run)})
        for parameter in trained.values():
            parameter.grad = None
    return rows


def metrics_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, float | bool]:
    """All figures of the result file from its raw rows."""
    metrics: dict[str, float | bool] = {}
    for case in ("inference", "train"):
        pairs = [row for row in rows if row["case"] == case]
        found = ratio_of_pairs([row["seconds_a"] for row in pairs], [row["seconds_b"] for row in pairs])
        name = f"{case}_time_ratio"
        metrics |= ratio_metrics(name, found)
    grounded, plain = (
        statistics.median(
            row["extra_bytes"] for row in rows if row["case"] == "memory" and row["is_grounded"] == is_grounded
        )
        for is_grounded in (True, False)
    )
    metrics["train_memory_ratio"] = grounded / plain
    count = {row["side"]: row["flops"] for row in rows if row["case"] == "flops"}
    metrics["sepen_flops_share"] = count["separate_enhance"] / count["denoising"]
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write `benchmarks/results/tokencompose_cost.json`."""
    args = parse_cost(cost_parser(__doc__, pairs=9), argv)
    rows = flops_rows(args.device) + memory_rows() + time_rows(args.device, args.pairs)
    return write_cost("tokencompose_cost", args, rows, metrics_of_rows, PROTOCOL)


if __name__ == "__main__":
    raise SystemExit(main())
