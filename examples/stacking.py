"""Everything at once: a UNet that TokenCompose tuned, a LoRA, a reference in a box, a learned token under box control.

    python -m objectcompose.examples.stacking

Each method is a statement about attention, so they add up in one call: `LocRefPipeline` brings the reference,
`parts=[MIFOBoxControl(...)]` keeps the learned instance in its box, and `return_attention` looks at both phrases.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from objectcompose import LocRefAdapter, LocRefPipeline, MIFOBoxControl, SceneObject
from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.evaluation.toybox_object_sets import reference_picture
from objectcompose.examples.gallery import GalleryRow, save_gallery
from objectcompose.pipelines.learned_instances import load_instances
from objectcompose.pipelines.plot import draw_layout, overlay_output
from objectcompose.toybox.identities import Identity
from objectcompose.toybox.weights import active_preset, toybox_path


def main(argv: Sequence[str] | None = None) -> int:
    """Paint one scene with the methods together, and with the prompt alone."""
    parser = argparse.ArgumentParser(description="TokenCompose, LocRef and MIFO in one call.")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/stacking.png"), help="PNG to write (%(default)s)")
    args = parser.parse_args(argv)

    encoder = toybox_path("image_encoder")
    pipe = LocRefPipeline.from_pretrained(
        toybox_path("base"),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder),
        feature_extractor=CLIPImageProcessor.from_pretrained(encoder),
        adapter=LocRefAdapter.from_pretrained(toybox_path("locref")),
    )
    tuning = UNetDelta.load(toybox_path("tokencompose") / DELTA_NAME)
    tuning.attach(pipe.unet)
    learned = load_instances(pipe, toybox_path("mifo"))[0]  # "<asset0>", and the LoRA that was learned with it
    preset = active_preset()
    banana = reference_picture(preset, Identity("banana", preset.styles[0], 60.0), seed=3)
    places = {"banana": (0.03, 0.45, 0.47, 0.93), learned: (0.52, 0.10, 0.97, 0.60)}
    prompt = f"a photo of a banana and {learned}"

    def paint(**options: Any) -> Any:
        generator = torch.Generator("cpu").manual_seed(1)
        return pipe(prompt, num_inference_steps=args.steps, guidance_scale=5.0, generator=generator, **options)

    output = paint(
        objects=[SceneObject(phrase="banana", image=banana, box=places["banana"]), SceneObject(phrase=learned)],
        parts=[MIFOBoxControl([{"token": learned, "box": places[learned]}])],
        return_attention=True,
    )
    plain = paint()
    boxes = [{"phrase": name, "box": box} for name, box in places.items()]
    drawn = draw_layout(output.images[0].resize((256, 256)), boxes)
    overlays = [list(overlay_output(output)[0].values()), []]
    row = GalleryRow(prompt, [drawn, plain.images[0]], ["all together", "prompt, tuning and LoRA alone"], overlays)
    print(save_gallery([row], args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
