"""LocRefPipeline: each object in its box, looking like its reference picture.

    python -m objectcompose.examples.locref

With a base of your own, train an adapter for it (`objectcompose.training.train_locref`) and name both here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from objectcompose import LocRefAdapter, LocRefPipeline, SceneObject
from objectcompose.evaluation.toybox_object_sets import reference_picture
from objectcompose.pipelines.plot import draw_layout, save_png
from objectcompose.toybox.identities import Identity
from objectcompose.toybox.weights import active_preset, toybox_path


def main(argv: Sequence[str] | None = None) -> int:
    """Paint one scene and write it with its boxes drawn in."""
    parser = argparse.ArgumentParser(description="Two references in two boxes.")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/locref.png"), help="PNG to write (%(default)s)")
    args = parser.parse_args(argv)

    encoder = toybox_path("image_encoder")
    pipe = LocRefPipeline.from_pretrained(
        toybox_path("base"),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder),
        feature_extractor=CLIPImageProcessor.from_pretrained(encoder),
        adapter=LocRefAdapter.from_pretrained(toybox_path("locref")),
    )
    preset = active_preset()  # references are any pictures; here two drawings of the toybox, cut out (RGBA)
    dog, clock = (
        reference_picture(preset, Identity(name, preset.styles[0], hue), seed=3)
        for name, hue in (("dog", 210.0), ("clock", 310.0))
    )
    objects = [
        SceneObject(phrase="dog", image=dog, box=(0.03, 0.38, 0.50, 0.86)),
        SceneObject(phrase="clock", image=clock, box=(0.56, 0.06, 0.97, 0.48)),
    ]
    output = pipe(
        "a photo of a dog and a clock",
        objects=objects,
        num_inference_steps=args.steps,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(0),
    )
    print(save_png(draw_layout(output.images[0].resize((512, 512)), objects), args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
