"""Train toybox's image encoder, which conditions adapters: pictures of objects into the space of captions.

    python -m objectcompose.training.train_toybox_image_encoder --preset cpu
    python -m objectcompose.training.train_toybox_image_encoder --preset gpu

Contrastive against captions, as CLIP (Radford et al., 2021, arXiv:2103.00020), with a small text encoder that is
trained beside it and dropped; and between two poses of one identity among its look-alikes, which captions
cannot tell apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModelWithProjection

from objectcompose.toybox.categories import Preset
from objectcompose.toybox.models import MAX_TOKENS, SIZES, build_image_encoder
from objectcompose.toybox.scenes import with_article
from objectcompose.toybox.tokenizer import build_tokenizer
from objectcompose.training.toybox_contrastive import ENCODER_SIDE, TEMPERATURE, ViewStream, info_nce, normalise
from objectcompose.training.toybox_loop import fit, parse_toybox, toybox_parser


STEPS = {"cpu": 1500, "gpu": 6000}
BATCH_SIZE = 32  # identities, each in two views
CAPTION_WEIGHT = 0.5


def build_companion(preset: Preset, vocab_size: int, bos: int, eos: int) -> CLIPTextModelWithProjection:
    """The text encoder that captions pass through while the image encoder is trained; never saved."""
    width = SIZES[preset.name].text
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=SIZES[preset.name].projection,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def caption_loss(pictures: torch.Tensor, captions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Contrastive loss of pictures and captions where several pictures share a caption.

    Args:
        pictures: embeddings (N, D).
        captions: embeddings (C, D), each caption once.
        rows: (N,): the caption of each picture, in [0, C).

    Returns:
        Scalar: cross-entropy over captions for each picture, and over pictures for each caption that has any, averaged
        over the pictures that share it.
    """
    logits = F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T / TEMPERATURE
    belongs = F.one_hot(rows, len(captions)).to(logits.dtype)
    shared = belongs / belongs.sum(0).clamp_min(1)  # a column sums to 1, or to 0 where unused
    among_pictures = -(logits.log_softmax(0) * shared).sum() / (belongs.sum(0) > 0).sum()
    return (F.cross_entropy(logits, rows) + among_pictures) / 2


def build_processor() -> CLIPImageProcessorPil:
    """What brings a PIL picture to the encoder: 64x64 pixels in [-1, 1]."""
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(
        size={"shortest_edge": ENCODER_SIDE},
        crop_size={"height": ENCODER_SIDE, "width": ENCODER_SIDE},
        image_mean=half,
        image_std=half,
    )


def main() -> None:
    """Command line."""
    parser = toybox_parser(__doc__, batch_size=BATCH_SIZE, steps=STEPS)
    args, preset, device = parse_toybox(parser)
    tokenizer = build_tokenizer()
    captions = [f"a photo of {with_article(name)}" for name in preset.categories]
    input_ids = tokenizer(captions, padding=True, return_tensors="pt").input_ids.to(device)
    companion = build_companion(preset, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    model = torch.nn.ModuleDict({"image_encoder": build_image_encoder(preset), "companion": companion}).to(device)
    stream = ViewStream(preset, "train", args.batch_size, args.steps, device)

    def loss_of_step(step: int) -> torch.Tensor:
        first, second, categories = stream(step)
        pictures = model["image_encoder"](normalise(torch.cat([first, second]))).image_embeds
        against_captions = caption_loss(pictures, model["companion"](input_ids).text_embeds, categories.repeat(2))
        return info_nce(*pictures.chunk(2)) + CAPTION_WEIGHT * against_captions

    averaged, step = fit("image_encoder", model, loss_of_step, args, lr=1e-3, ema_decay=0.998)
    averaged["image_encoder"].half().save_pretrained(args.weights / "image_encoder")
    build_processor().save_pretrained(args.weights / "image_encoder")
    print(f"image encoder after {step} steps: {args.weights / 'image_encoder'}")


if __name__ == "__main__":
    main()
