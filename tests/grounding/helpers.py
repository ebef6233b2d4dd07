"""The real detectors and segmenters at tiny size, with random weights: nothing is downloaded and nothing is mocked."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamHQProcessor,
    SamImageProcessor,
    SamModel,
    SamProcessor,
    SwinConfig,
    ViTImageProcessor,
)

from tests.tiny import tiny_tokenizer


WORDS = ("a", "the", "dog", "cup", "car", "##ton", "wine", "glass", "teddy", "bear", "cor", "##gi", "red")
SIDE = 48  # of the pictures that tests ask about


def picture(seed: int = 0, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Smooth noise, so that a picture survives resizing."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@lru_cache(maxsize=1)
def bert_tokenizer() -> BertTokenizer:
    """A BERT tokenizer with the ids that Grounding DINO counts on: [CLS] 101, [SEP] 102, "." 1012, "?" 1029."""
    vocabulary = {f"[unused{index}]": index for index in range(1040)}
    fixed = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    for place, word in [*fixed.items(), *enumerate(WORDS, start=500)]:
        del vocabulary[f"[unused{place}]"]
        vocabulary[word] = place
    return BertTokenizer(vocab=vocabulary, model_max_length=512)


def bert_folder(folder: Path) -> Path:
    """A text encoder of BERT's width for `groundingdino-py`: tokenizer and config, one layer deep."""
    bert_tokenizer().save_pretrained(folder)
    BertConfig(
        vocab_size=1040, hidden_size=768, num_hidden_layers=1, num_attention_heads=12, intermediate_size=64
    ).save_pretrained(folder)
    return folder


def grounding_dino() -> tuple[GroundingDinoForObjectDetection, GroundingDinoProcessor]:
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=12,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            image_size=64,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=1040, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        ),
        num_queries=20,
        encoder_layers=1,
        encoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=24,
        decoder_attention_heads=2,
        d_model=32,
        max_text_len=40,
    )
    pictures = GroundingDinoImageProcessor(size={"shortest_edge": 80, "longest_edge": 128})
    model = GroundingDinoForObjectDetection(config).eval()
    return model, GroundingDinoProcessor(pictures, bert_tokenizer())


def _text_config(length: int) -> dict:
    tokenizer = tiny_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def owlv2() -> tuple[Owlv2ForObjectDetection, Owlv2Processor]:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config=_text_config(16), vision_config={**vision, "image_size": 48, "patch_size": 12}, projection_dim=16
    )
    pictures = Owlv2ImageProcessor(size={"height": 48, "width": 48})
    model = Owlv2ForObjectDetection(config).eval()
    with torch.no_grad():
        model.box_head.dense2.weight.mul_(0.03)  # else the random boxes are slivers at the border
    return model, Owlv2Processor(pictures, tiny_tokenizer())


def owlvit() -> tuple[OwlViTForObjectDetection, OwlViTProcessor]:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OwlViTConfig(
        text_config=_text_config(16), vision_config={**vision, "image_size": 48, "patch_size": 12}, projection_dim=16
    )
    model = OwlViTForObjectDetection(config).eval()
    with torch.no_grad():
        model.box_head.dense2.weight.mul_(0.03)  # else the random boxes are slivers at the border
    return model, OwlViTProcessor(OwlViTImageProcessor(size={"height": 48, "width": 48}), tiny_tokenizer())


def clipseg() -> tuple[CLIPSegForImageSegmentation, CLIPSegProcessor]:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config=_text_config(20),
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        projection_dim=14,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
    )
    pictures = ViTImageProcessor(size={"height": 32, "width": 32})
    return CLIPSegForImageSegmentation(config).eval(), CLIPSegProcessor(pictures, tiny_tokenizer())


_SAM_DECODER = {"hidden_size": 32, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 24}


def _sam_vision() -> dict:
    return {
        "hidden_size": 24,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "mlp_dim": 24,
        "window_size": 4,
        "global_attn_indexes": [1],
        "num_pos_feats": 16,
    }


def _sam_prompt() -> dict:
    return {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}


def sam() -> tuple[SamModel, SamProcessor]:
    torch.manual_seed(0)
    config = SamConfig(
        vision_config=_sam_vision(), prompt_encoder_config=_sam_prompt(), mask_decoder_config=_SAM_DECODER
    )
    return SamModel(config).eval(), SamProcessor(_sam_pictures())


def sam_hq() -> tuple[SamHQModel, SamHQProcessor]:
    torch.manual_seed(0)
    config = SamHQConfig(
        vision_config=_sam_vision(),
        prompt_encoder_config=_sam_prompt(),
        mask_decoder_config={**_SAM_DECODER, "vit_dim": 24},
    )
    return SamHQModel(config).eval(), SamHQProcessor(_sam_pictures())


def _sam_pictures() -> SamImageProcessor:
    return SamImageProcessor(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )


def sam2() -> tuple[Sam2Model, Sam2Processor]:
    torch.manual_seed(0)
    config = Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "num_attention_heads": 1,
                "image_size": [64, 64],
                "blocks_per_stage": [1, 2, 2, 1],
                "embed_dim_per_stage": [8, 16, 24, 32],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 2, 4, 2],
                "global_attention_blocks": [4],
            },
            "backbone_channel_list": [32, 24, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={**_sam_prompt(), "patch_size": 16},
        mask_decoder_config=_SAM_DECODER,
    )
    pictures = Sam2ImageProcessor(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16})
    return Sam2Model(config).eval(), Sam2Processor(pictures)


def original_sam() -> torch.nn.Module:
    """A `segment_anything.modeling.Sam` for pictures of 128 pixels."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    return Sam(
        ImageEncoderViT(
            img_size=128, embed_dim=32, depth=2, num_heads=2, out_chans=32, use_rel_pos=True, window_size=4,
            global_attn_indexes=(1,),
        ),
        PromptEncoder(embed_dim=32, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=4),
        MaskDecoder(
            transformer_dim=32,
            transformer=TwoWayTransformer(depth=1, embedding_dim=32, mlp_dim=32, num_heads=2),
            iou_head_hidden_dim=16,
        ),
    ).eval()  # fmt: skip
