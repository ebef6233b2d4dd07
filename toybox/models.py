"""The sizes of toybox's models, for each preset: the only place where their numbers stand.

All are real classes of diffusers and transformers, built from a config with random weights; the scripts in
`objectcompose.training` train them.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from objectcompose.toybox.categories import Preset


LATENT_FACTOR = 4  # pixels per latent cell: three VAE levels
MAX_TOKENS = 48  # of a caption, BOS and EOS counted: five objects and a background fit


@dataclass(frozen=True)
class ModelSizes:
    """Widths that differ between the presets.

    Attributes:
        vae: channels of the VAE's three levels.
        vae_layers: residual blocks per level.
        unet: channels of the UNet's three levels.
        text: width of the text encoder.
        encoder: width of the image encoder, of DINO and of CLIPSeg.
        encoder_layers: their depth.
        projection: width of the joint space of pictures and text.
    """

    vae: tuple[int, int, int]
    vae_layers: int
    unet: tuple[int, int, int]
    text: int
    encoder: int
    encoder_layers: int
    projection: int


SIZES = {
    "cpu": ModelSizes((16, 32, 64), 1, (32, 64, 128), 64, 96, 4, 64),
    "gpu": ModelSizes((32, 64, 128), 1, (64, 96, 144), 128, 128, 6, 96),
}


def build_vae(preset: Preset) -> AutoencoderKL:
    """Autoencoder with 4 latent channels and a factor of 4 in each direction."""
    sizes = SIZES[preset.name]
    return AutoencoderKL(
        block_out_channels=sizes.vae,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=sizes.vae_layers,
        norm_num_groups=8,
        sample_size=preset.image_size,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_unet(preset: Preset) -> UNet2DConditionModel:
    """Denoiser with cross-attention at three resolutions and in the middle, like Stable Diffusion's."""
    sizes = SIZES[preset.name]
    return UNet2DConditionModel(
        sample_size=preset.image_size // LATENT_FACTOR,
        in_channels=4,
        out_channels=4,
        block_out_channels=sizes.unet,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=sizes.text,
        attention_head_dim=4,  # number of heads: diffusers' historical name
        norm_num_groups=16,
    )


def build_text_encoder(preset: Preset, vocab_size: int, bos: int, eos: int) -> CLIPTextModel:
    """Text encoder, trained together with the UNet."""
    width = SIZES[preset.name].text
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def build_image_encoder(preset: Preset) -> CLIPVisionModelWithProjection:
    """Image encoder that conditions adapters: a small vision transformer with CLIP's projection."""
    sizes = SIZES[preset.name]
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=sizes.encoder,
            intermediate_size=2 * sizes.encoder,
            projection_dim=sizes.projection,
            num_hidden_layers=sizes.encoder_layers,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
        )
    )


def build_dino(preset: Preset) -> Dinov2Model:
    """Encoder that tells identities apart across poses, for matching."""
    sizes = SIZES[preset.name]
    return Dinov2Model(
        Dinov2Config(
            hidden_size=sizes.encoder,
            num_hidden_layers=sizes.encoder_layers,
            num_attention_heads=4,
            mlp_ratio=2,
            image_size=64,
            patch_size=8,
        )
    )


def build_clipseg(preset: Preset, vocab_size: int, bos: int, eos: int) -> CLIPSegForImageSegmentation:
    """Phrase to mask."""
    sizes = SIZES[preset.name]
    depth = sizes.encoder_layers
    return CLIPSegForImageSegmentation(
        CLIPSegConfig(
            text_config={
                "vocab_size": vocab_size,
                "hidden_size": sizes.text,
                "intermediate_size": 2 * sizes.text,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": MAX_TOKENS,
                "bos_token_id": bos,
                "eos_token_id": eos,
                "pad_token_id": eos,
            },
            vision_config={
                "hidden_size": sizes.encoder,
                "intermediate_size": 2 * sizes.encoder,
                "num_hidden_layers": depth,
                "num_attention_heads": 4,
                "image_size": preset.image_size,
                "patch_size": 4,
            },
            projection_dim=sizes.projection,
            reduce_dim=32,
            extract_layers=[depth - 3, depth - 2, depth - 1],
            decoder_num_attention_heads=4,
            decoder_intermediate_size=128,
        )
    )
