"""Train toybox's DINO: an encoder that tells identities apart across poses, for matching and for guidance.

    python -m objectcompose.training.train_toybox_dino --preset cpu
    python -m objectcompose.training.train_toybox_dino --preset gpu

Contrastive between two poses of one identity among its look-alikes, on the CLS token and on the mean patch token each:
so the patches carry identity too, which matching by patches needs.
"""

from __future__ import annotations

import torch
from transformers import BitImageProcessorPil

from objectcompose.toybox.models import build_dino
from objectcompose.training.toybox_contrastive import ENCODER_SIDE, ViewStream, info_nce, normalise
from objectcompose.training.toybox_loop import fit, parse_toybox, toybox_parser


STEPS = {"cpu": 1500, "gpu": 6000}
BATCH_SIZE = 32  # identities, each in two views


def build_processor() -> BitImageProcessorPil:
    """What brings a PIL picture to the encoder: 64x64 pixels in [-1, 1]."""
    half = [0.5, 0.5, 0.5]
    return BitImageProcessorPil(
        size={"shortest_edge": ENCODER_SIDE},
        crop_size={"height": ENCODER_SIDE, "width": ENCODER_SIDE},
        image_mean=half,
        image_std=half,
    )


def main() -> None:
    """Command line."""
    parser = toybox_parser(__doc__, batch_size=BATCH_SIZE, steps=STEPS)
    args, preset, device = parse_toybox(parser)
    dino = build_dino(preset).to(device)
    stream = ViewStream(preset, "train", args.batch_size, args.steps, device)

    def loss_of_step(step: int) -> torch.Tensor:
        first, second, _ = stream(step)
        tokens = dino(normalise(torch.cat([first, second]))).last_hidden_state  # (2 N, 1 + patches, width)
        return info_nce(*tokens[:, 0].chunk(2)) + info_nce(*tokens[:, 1:].mean(1).chunk(2))

    averaged, step = fit("dino", dino, loss_of_step, args, lr=1e-3, ema_decay=0.998)
    averaged.half().save_pretrained(args.weights / "dino")
    build_processor().save_pretrained(args.weights / "dino")
    print(f"DINO after {step} steps: {args.weights / 'dino'}")


if __name__ == "__main__":
    main()
