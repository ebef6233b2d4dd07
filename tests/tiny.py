"""The real model classes at tiny size, shared by all tests: nothing is downloaded and nothing is mocked.

Every constructor is seeded on its own, so a component has the same weights whichever test asks for it first. Widths
are chosen so that two axes of one tensor do not have the same length by accident (text width 22, sequence 77).
"""

from __future__ import annotations

import copy
import json
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)


TEXT_WIDTH = 22
SECOND_TEXT_WIDTH = 26
POOLED_WIDTH = 14
IMAGE_WIDTH = 10
IMAGE_PROJECTION_WIDTH = 13
KINDS = ("sd1", "sd2", "sdxl")

# Each is one token at the end of a word. Order matters: a word's merges must not be cut short by those of a word
# above it, so words stand above the words that could break them ("carton" above "to").
WHOLE_WORDS = (
    "table", "carton", "car", "cat", "cats", "cup", "dog", "dogs", "wine", "glass", "glasses", "teddy", "bear",
    "bird", "photo", "and", "of", "the", "two", "red", "blue", "on", "with", "to",
)  # fmt: skip
# Pieces that stand inside words: "corgi" = "cor" + "gi", "wineglass" = "wine" + "glass", "cupboard" = "cup" + "board".
WORD_STARTS = ("cor", "wine", "cup")
WORD_ENDS = ("gi", "board", "gis")


def byte_alphabet() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes as."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def chain_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Merges that build a token from its pieces, left to right."""
    merges, left = [], pieces[0]
    for right in pieces[1:]:
        merges.append((left, right))
        left += right
    return merges


def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level CLIP vocabulary of about 580 tokens and its merges, in rank order."""
    merges: dict[tuple[str, str], None] = {}
    for word in WHOLE_WORDS:
        merges.update(dict.fromkeys(chain_merges([*word[:-1], word[-1] + "</w>"])))
    for piece in WORD_STARTS:
        merges.update(dict.fromkeys(chain_merges([*piece])))
    for piece in WORD_ENDS:
        merges.update(dict.fromkeys(chain_merges([*piece[:-1], piece[-1] + "</w>"])))
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(character + "</w>" for character in alphabet)]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, list(merges)


@lru_cache(maxsize=1)
def _cached_tokenizer() -> CLIPTokenizer:
    vocabulary, merges = vocabulary_and_merges()
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab_file.write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=77)


def tiny_tokenizer() -> CLIPTokenizer:
    """A fresh CLIP tokenizer, so that a test may add tokens to it. "corgi" is two tokens, "dog" and "carton" one."""
    return copy.deepcopy(_cached_tokenizer())


def tiny_text_encoder(tokenizer: CLIPTokenizer | None = None, projected: bool = False) -> CLIPTextModel:
    """A two-layer CLIP text model of width 22, or with `projected` the second SDXL encoder (width 26, pooled 14)."""
    tokenizer = tokenizer or _cached_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=SECOND_TEXT_WIDTH if projected else TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=POOLED_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1 if projected else 0)
        model = CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)
    return model.eval()


def tiny_image_encoder() -> CLIPVisionModelWithProjection:
    """A two-layer CLIP vision model for pictures of 24 x 24 pixels, patches of 8: width 10, joint space 13."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=19,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
        projection_dim=IMAGE_PROJECTION_WIDTH,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPVisionModelWithProjection(config)
    return model.eval()


def tiny_dino() -> Dinov2Model:
    """A two-layer DINOv2 for pictures of 28 x 28 pixels, patches of 7, width 16."""
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=7
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(config)
    return model.eval()


def tiny_tiny_vae() -> AutoencoderTiny:
    """A tiny decoder for the latents of `tiny_vae`: one cell is 2 x 2 pixels."""
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4, **blocks)
    return model.eval()


_UNET_KINDS = {
    # As in SD 1.x: the same number of heads everywhere, convolutional projections.
    "sd1": {
        "block_out_channels": (12, 24, 36),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    },
    # As in SD 2.x: linear projections, the number of heads grows with the width.
    "sd2": {
        "block_out_channels": (12, 24, 36),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 3, 6),
        "use_linear_projection": True,
        "cross_attention_dim": TEXT_WIDTH,
    },
    # As in SDXL: no attention at the finest level, two transformer blocks at the next, pooled text and sizes added.
    "sdxl": {
        "block_out_channels": (12, 24),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 3),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED_WIDTH,
        "cross_attention_dim": TEXT_WIDTH + SECOND_TEXT_WIDTH,
    },
}  # fmt: skip


def tiny_unet(kind: str = "sd1") -> UNet2DConditionModel:
    """A UNet of the given kind ("sd1", "sd2", "sdxl") for latents `(B, 4, h, w)`, default 16 x 16.

    "sd1" and "sd2" have three levels, cross-attention at the two finest and in the middle; "sdxl" has two levels and
    also needs `added_cond_kwargs` (see `tiny_added_cond`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=3, **_UNET_KINDS[kind]
        )
    return unet.eval()


def tiny_added_cond(batch_size: int) -> dict[str, torch.Tensor]:
    """`added_cond_kwargs` for `tiny_unet("sdxl")`: pooled text `(B, 14)` and the six size numbers `(B, 6)`."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([32.0, 32.0, 0.0, 0.0, 32.0, 32.0]).expand(batch_size, 6)
    return {"text_embeds": torch.randn(batch_size, POOLED_WIDTH, generator=generator), "time_ids": sizes}


def tiny_vae() -> AutoencoderKL:
    """A two-level VAE: one latent cell is 2 x 2 pixels, 4 latent channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=2,
            sample_size=32,
        )
    return vae.eval()


def tiny_scheduler() -> DDIMScheduler:
    """DDIM with Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tiny_components(kind: str = "sd1") -> dict[str, object]:
    """All components of a `StableDiffusionPipeline`, or for "sdxl" a `StableDiffusionXLPipeline`; pictures 32 x 32."""
    tokenizer = tiny_tokenizer()
    components: dict[str, object] = {
        "unet": tiny_unet(kind),
        "vae": tiny_vae(),
        "scheduler": tiny_scheduler(),
        "text_encoder": tiny_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "feature_extractor": None,
        "image_encoder": None,
    }
    if kind == "sdxl":
        second = tiny_tokenizer()
        components.update(text_encoder_2=tiny_text_encoder(second, projected=True), tokenizer_2=second)
    else:
        components.update(safety_checker=None)
    return components
