"""ObjectPromptPipeline: object pictures as prompts; where the objects go is the model's choice.

    python -m objectcompose.examples.object_prompt

With `compositional_guidance` the picture is painted twice: the second time each object picture acts only where the
object was found in the first one. What finds it here is toybox's CLIPSeg; `load_grounder` has those for photographs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import BitImageProcessorPil, CLIPImageProcessor, CLIPVisionModelWithProjection, Dinov2Model

from objectcompose import ObjectPromptAdapter, ObjectPromptPipeline, load_grounder
from objectcompose.evaluation.toybox_object_sets import reference_picture
from objectcompose.pipelines.plot import save_png
from objectcompose.toybox.identities import Identity
from objectcompose.toybox.weights import active_preset, toybox_path


def main(argv: Sequence[str] | None = None) -> int:
    """Paint two prompted objects and print where they were found."""
    parser = argparse.ArgumentParser(description="Two object pictures in one scene.")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/object_prompt.png"), help="PNG (%(default)s)")
    args = parser.parse_args(argv)

    encoder, dino = toybox_path("image_encoder"), toybox_path("dino")
    pipe = ObjectPromptPipeline.from_pretrained(
        toybox_path("base"),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder),
        feature_extractor=CLIPImageProcessor.from_pretrained(encoder),
        adapter=ObjectPromptAdapter.from_pretrained(toybox_path("object_prompt")),
        dino=Dinov2Model.from_pretrained(dino),  # compares segments with object pictures
        dino_processor=BitImageProcessorPil.from_pretrained(dino),
    )
    preset = active_preset()
    dog, umbrella = (
        reference_picture(preset, Identity(name, preset.styles[0], hue), seed=5)
        for name, hue in (("dog", 110.0), ("umbrella", 210.0))
    )
    output = pipe(
        "a photo of a dog and an umbrella",
        objects=[{"phrase": "dog", "image": dog}, {"phrase": "umbrella", "image": umbrella}],
        compositional_guidance=True,
        segmenter=load_grounder("clipseg", toybox_path("clipseg")),
        num_inference_steps=args.steps,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(0),
    )
    for placed in output.objects[0]:
        print(f"{placed.label}: matched {placed.matched}, similarity {placed.similarity}, box {placed.box}")
    print(save_png(output.images[0].resize((512, 512)), args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
