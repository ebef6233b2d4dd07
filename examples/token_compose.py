"""One picture with TokenComposePipeline, and where each phrase was looked at.

    python -m objectcompose.examples.token_compose
    python -m objectcompose.examples.token_compose --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompt "a photo of a cat and a wine glass" --phrases "a cat" "a wine glass" --steps 50
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from objectcompose.errors import ObjectComposeError
from objectcompose.examples.gallery import GalleryRow, save_gallery
from objectcompose.layout import SceneObject
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.pipelines.plot import overlay_output
from objectcompose.toybox.scenes import list_objects
from objectcompose.toybox.weights import active_categories


def main(argv: Sequence[str] | None = None) -> int:
    """Paint one prompt with four seeds; returns the exit code."""
    parser = argparse.ArgumentParser(description="Paint a prompt and show where each phrase was looked at.")
    parser.add_argument("--model", help="folder or Hub id of a Stable Diffusion checkpoint; default: toybox")
    parser.add_argument("--prompt", help="default: a photo of two things that the toybox knows")
    parser.add_argument("--phrases", nargs="+", help="phrases of the prompt")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/token_compose.png"), help="PNG to write")
    args = parser.parse_args(argv)
    try:
        prompt, phrases = args.prompt, args.phrases
        if prompt is None:  # only the default prompt needs the toybox
            names = list(active_categories()[:2])
            prompt, phrases = f"a photo of {list_objects(names)}", phrases or names
        if not phrases:
            raise ObjectComposeError("`--phrases` must name the objects of your own `--prompt`.")
        pipeline = load_checkpoint(args.model)
        seeds = range(4)
        output = pipeline(
            prompt,
            num_inference_steps=args.steps,
            guidance_scale=5.0,
            num_images_per_prompt=len(seeds),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            objects=[SceneObject(phrase=phrase) for phrase in phrases],
            return_attention=True,
        )
        overlays = [list(by_label.values()) for by_label in overlay_output(output)]
        row = GalleryRow(prompt, output.images, [f"seed {seed}: {', '.join(phrases)}" for seed in seeds], overlays)
        print(save_gallery([row], args.out))
    except ObjectComposeError as error:
        print(f"token_compose: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
