"""Stable Diffusion 1.5 with box control: two phrases of the prompt, each in its box, and where each was looked at.

    python -m objectcompose.examples.stable_diffusion                 # downloads 5 GB, wants a GPU
    python -m objectcompose.examples.stable_diffusion --model FOLDER  # any checkpoint of Stable Diffusion 1.x or 2.x

Nothing is trained for this one: box control and attention maps work on any checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from objectcompose import MIFOPipeline
from objectcompose.pipelines.plot import draw_layout, overlay_output, save_png


def main(argv: Sequence[str] | None = None) -> int:
    """Paint one picture; write it with boxes, and one map per phrase."""
    parser = argparse.ArgumentParser(description="Phrases in boxes on a stock checkpoint.")
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="id or folder")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/stable_diffusion.png"), help="PNG (%(default)s)")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = MIFOPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # with PNDM a guided step is lost
    objects = [
        {"phrase": "a corgi", "box": [0.05, 0.40, 0.45, 0.95]},
        {"phrase": "a red umbrella", "box": [0.50, 0.05, 0.98, 0.60]},
    ]
    output = pipe(
        "a photo of a corgi and a red umbrella on a beach",
        objects=objects,
        num_inference_steps=args.steps,
        generator=torch.Generator("cpu").manual_seed(0),
        return_attention=True,
    )
    print(save_png(draw_layout(output.images[0], objects), args.out))
    for number, overlay in enumerate(overlay_output(output)[0].values()):
        print(save_png(overlay, args.out.with_stem(f"{args.out.stem}_attention_{number}")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
