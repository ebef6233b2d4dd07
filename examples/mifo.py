"""MIFOPipeline: instances that were learned from one picture, each in its box.

    python -m objectcompose.examples.mifo

The instances are two look-alikes of the toybox. `objectcompose.training.learn_mifo` learned them from the picture and
the masks that lie beside them, and learns from a folder of your own, with `img.png`, `mask0.png`, ..., as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from objectcompose import MIFOPipeline, SceneObject
from objectcompose.pipelines.learned_instances import load_instances
from objectcompose.pipelines.plot import draw_layout, save_png
from objectcompose.toybox.weights import toybox_path


def main(argv: Sequence[str] | None = None) -> int:
    """Paint both instances and write the picture with their boxes drawn in."""
    parser = argparse.ArgumentParser(description="Two learned instances in two boxes.")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/mifo.png"), help="PNG to write (%(default)s)")
    args = parser.parse_args(argv)

    pipe = MIFOPipeline.from_pretrained(toybox_path("base"))
    first, second = load_instances(pipe, toybox_path("mifo"))[:2]  # "<asset0>", "<asset1>"
    objects = [
        SceneObject(token=first, box=(0.05, 0.40, 0.45, 0.90)),
        SceneObject(token=second, box=(0.55, 0.10, 0.95, 0.60)),
    ]
    output = pipe(
        f"a photo of {first} and {second}",
        objects=objects,
        num_inference_steps=args.steps,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(0),
    )
    print(save_png(draw_layout(output.images[0].resize((512, 512)), objects), args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
