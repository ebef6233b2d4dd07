"""Train toybox's judge: a segmenter and an identity encoder that only evaluation uses.

    python -m objectcompose.training.train_toybox_judge --preset cpu
    python -m objectcompose.training.train_toybox_judge --preset gpu

Other architectures (SegFormer, ConvNeXt), other seeds and other scenes than everything that conditions, matches,
guides or trains a method.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from objectcompose.toybox.judge import build_identity_encoder, build_segmenter
from objectcompose.training.common import shuffled_batch
from objectcompose.training.toybox_contrastive import ViewStream, info_nce, normalise
from objectcompose.training.toybox_data import scene_pool
from objectcompose.training.toybox_loop import fit, parse_toybox, toybox_parser


STEPS = {"cpu": 1500, "gpu": 12_000}
BATCH_SIZE = 32


def main() -> None:
    """Command line."""
    parser = toybox_parser(__doc__, batch_size=BATCH_SIZE, steps=STEPS)
    parser.add_argument("--scenes", type=int, default=8000, help="size of the judge's own pool of scenes")
    args, preset, device = parse_toybox(parser)
    pool = scene_pool(preset, "judge", args.scenes, args.runs / "pools")
    segmenter: Any = build_segmenter(preset).to(device)

    def segmentation_loss(step: int) -> torch.Tensor:
        rows = shuffled_batch(step, len(pool.pixels), args.batch_size, args.seed)
        logits = segmenter(normalise(pool.images(rows, device))).logits
        target = pool.category_maps(rows, device)
        return F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear"), target)

    averaged, step = fit("judge_segmenter", segmenter, segmentation_loss, args, lr=1e-3, ema_decay=0.998)
    averaged.half().save_pretrained(args.weights / "judge" / "segmenter")
    encoder: Any = build_identity_encoder(preset).to(device)
    stream = ViewStream(preset, "judge", 2 * args.batch_size, args.steps, device)

    def identity_loss(step: int) -> torch.Tensor:
        first, second, _ = stream(step)
        embeddings = encoder(normalise(torch.cat([first, second]))).pooler_output
        return info_nce(*embeddings.chunk(2))

    averaged, step = fit("judge_identity", encoder, identity_loss, args, lr=1e-3, ema_decay=0.998)
    averaged.half().save_pretrained(args.weights / "judge" / "identity")
    print(f"judge after {step} steps: {args.weights / 'judge'}")


if __name__ == "__main__":
    main()
