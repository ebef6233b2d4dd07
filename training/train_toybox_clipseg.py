"""Train toybox's CLIPSeg: from a phrase to the mask of what it names.

    python -m objectcompose.training.train_toybox_clipseg --preset cpu
    python -m objectcompose.training.train_toybox_clipseg --preset gpu

Binary cross-entropy at the picture's resolution (Lueddecke and Ecker, 2022, arXiv:2112.10003, section 3). A quarter of
the phrases names what is not in the picture, so that absence is learned too. There is no pretrained CLIP in toybox to
keep frozen, so the encoders are trained along with the decoder.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor, ViTImageProcessorPil

from objectcompose.toybox.categories import Preset
from objectcompose.toybox.models import build_clipseg
from objectcompose.toybox.scenes import with_article
from objectcompose.toybox.tokenizer import build_tokenizer
from objectcompose.training.common import shuffled_batch
from objectcompose.training.toybox_contrastive import normalise
from objectcompose.training.toybox_data import ScenePool, scene_pool
from objectcompose.training.toybox_loop import fit, parse_toybox, toybox_parser


STEPS = {"cpu": 2000, "gpu": 10_000}
BATCH_SIZE = 16
ABSENT_SHARE = 0.25
#: How a phrase may name a category.
PHRASINGS = ("{name}", "{article_name}", "the {name}", "a photo of {article_name}")


def draw_phrases(preset: Preset, present: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One phrase per picture.

    Args:
        preset: the world.
        present: (B, 5): categories of each picture's objects, -1 where there is no object.
        rng: source of randomness.

    Returns:
        Categories (B,), and which of `PHRASINGS` (B,).
    """
    chosen = []
    for row in present:
        names = row[row >= 0]
        others = np.setdiff1d(np.arange(len(preset.categories)), names)
        chosen.append(rng.choice(others if rng.random() < ABSENT_SHARE else names))
    return np.array(chosen), rng.integers(len(PHRASINGS), size=len(present))


def segment(
    model: CLIPSegForImageSegmentation,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> torch.Tensor:
    """The model's own forward with gradients everywhere: transformers runs both encoders under `no_grad`.

    Args:
        model: the segmenter.
        pixel_values: (B, 3, S, S), in [-1, 1].
        input_ids: (B, L).
        attention_mask: (B, L).

    Returns:
        Logits (B, S, S).
    """
    states = model.clip.vision_model(pixel_values, output_hidden_states=True).hidden_states
    phrases = model.clip.get_text_features(input_ids, attention_mask=attention_mask).pooler_output
    return model.decoder([states[layer + 1] for layer in model.extract_layers], phrases).logits


def build_processor(preset: Preset) -> CLIPSegProcessor:
    """What brings a PIL picture and a phrase to the segmenter."""
    half, side = [0.5, 0.5, 0.5], preset.image_size
    pictures = ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=half, image_std=half)
    return CLIPSegProcessor(image_processor=pictures, tokenizer=build_tokenizer())


def segmentation_target(pool: ScenePool, rows: torch.Tensor, categories: np.ndarray) -> torch.Tensor:
    """Masks (B, S, S), {0, 1}, of one category in each picture."""
    return (pool.category_maps(rows) == torch.from_numpy(categories)[:, None, None] + 1).float()


def main() -> None:
    """Command line."""
    parser = toybox_parser(__doc__.splitlines()[0], batch_size=BATCH_SIZE, steps=STEPS)
    parser.add_argument("--scenes", type=int, default=16_000, help="size of the pool of training scenes")
    args, preset, device = parse_toybox(parser)
    pool = scene_pool(preset, "train", args.scenes, args.runs / "pools")
    tokenizer = build_tokenizer()
    phrases = [
        form.format(name=name, article_name=with_article(name)) for name in preset.categories for form in PHRASINGS
    ]
    text = tokenizer(phrases, padding=True, return_tensors="pt")
    model = build_clipseg(preset, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id).to(device)

    def loss_of_step(step: int) -> torch.Tensor:
        rows = shuffled_batch(step, len(pool.pixels), args.batch_size, args.seed)
        rng = np.random.default_rng((args.seed, step))
        categories, forms = draw_phrases(preset, pool.categories[rows].numpy(), rng)
        said = torch.from_numpy(categories * len(PHRASINGS) + forms)
        input_ids, attention_mask = text.input_ids[said].to(device), text.attention_mask[said].to(device)
        logits = segment(model, normalise(pool.images(rows, device)), input_ids, attention_mask)
        return F.binary_cross_entropy_with_logits(logits, segmentation_target(pool, rows, categories).to(device))

    averaged, step = fit("clipseg", model, loss_of_step, args, lr=1e-3, ema_decay=0.998)
    averaged.half().save_pretrained(args.weights / "clipseg")
    build_processor(preset).save_pretrained(args.weights / "clipseg")
    print(f"CLIPSeg after {step} steps: {args.weights / 'clipseg'}")


if __name__ == "__main__":
    main()
