"""Training in five minutes: TokenCompose on the toybox, and attention maps before and after.

    python -m objectcompose.examples.train_in_five_minutes

150 steps on two CPU cores. A run that was broken off goes on; a second run finds the weights and only paints.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from objectcompose import TokenComposePipeline
from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.examples.gallery import GalleryRow, save_gallery
from objectcompose.pipelines.plot import overlay_output
from objectcompose.toybox.weights import active_categories, toybox_path
from objectcompose.training import train_token_compose


def main(argv: Sequence[str] | None = None) -> int:
    """Train, then paint one prompt with the base and with what was trained."""
    parser = argparse.ArgumentParser(description="Train TokenCompose on the toybox, and look.")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (%(default)s)")
    parser.add_argument("--scenes", type=int, default=2000, help="to train on (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/five_minutes"), help="folder (%(default)s)")
    args = parser.parse_args(argv)

    train_token_compose.main([
        "--toybox_scenes", str(args.scenes), "--max_train_steps", str(args.steps), "--train_batch_size", "16",
        "--gradient_accumulation_steps", "1", "--learning_rate", "1e-4", "--token_weight", "0.02",
        "--pixel_weight", "0.001", "--delta_rank", "16", "--checkpointing_steps", "50", "--output_dir", str(args.out),
    ])  # fmt: skip
    pipe = TokenComposePipeline.from_pretrained(toybox_path("base"))
    first, second = active_categories()[3:5]
    rows = []
    for title in ("before", "after"):
        if title == "after":
            UNetDelta.load(args.out / "weights" / DELTA_NAME).attach(pipe.unet)
        output = pipe(
            f"a photo of a {first} and a {second}",
            objects=[{"phrase": first}, {"phrase": second}],
            num_images_per_prompt=2,
            num_inference_steps=20,
            guidance_scale=5.0,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in (11, 12)],
            return_attention=True,
        )
        overlays = [list(maps.values()) for maps in overlay_output(output)]
        rows.append(GalleryRow(title, output.images, ["seed 11", "seed 12"], overlays))
    print(save_gallery(rows, args.out / "gallery.png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
