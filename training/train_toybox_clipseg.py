"""Train toybox's CLIPSeg: from a phrase to the mask of what it names.

    python -m objectcompose.training.train_toybox_clipseg --preset cpu
    python -m objectcompose.training.train_toybox_clipseg --preset gpu

Binary cross-entropy at the picture's resolution (Lueddecke and Ecker, 2022, arXiv:2112.10003, section 3), for several
phrases of each picture, half of which name what is not there: the picture is encoded once for all, and absence is
learned too. There is no pretrained CLIP in toybox to keep frozen, so the encoders are trained along with the decoder.
By that loss alone the phrases' embeddings fall together before the pictures' features tell categories apart, and the
mask shows all objects whatever the phrase; so in place of CLIP's pretraining the patches of an object are also matched
with the phrases of all categories (`naming_loss`).
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
from objectcompose.training.toybox_data import scene_pool
from objectcompose.training.toybox_loop import fit, parse_toybox, toybox_parser


STEPS = {"cpu": 6000, "gpu": 20_000}
BATCH_SIZE = 8  # pictures
PHRASES = 4  # for each picture
NAMING_WEIGHT = 0.5  # of `naming_loss`
#: How a phrase may name a category.
PHRASINGS = ("{name}", "{article_name}", "the {name}", "a photo of {article_name}")


def draw_phrases(preset: Preset, present: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Phrases for each picture: half of them, or as many as there are objects, name what it shows.

    Args:
        preset: the world.
        present: (B, 5): categories of each picture's objects, -1 where there is no object.
        rng: source of randomness.

    Returns:
        Categories (B, `PHRASES`), and which of `PHRASINGS` (B, `PHRASES`).
    """
    chosen = []
    for row in present:
        shown = rng.permutation(np.unique(row[row >= 0]))[: PHRASES // 2]
        others = rng.permutation(np.setdiff1d(np.arange(len(preset.categories)), row))
        chosen.append(np.concatenate([shown, others[: PHRASES - len(shown)]]))
    return np.array(chosen), rng.integers(len(PHRASINGS), size=(len(present), PHRASES))


def embed_phrases(
    model: CLIPSegForImageSegmentation, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Embeddings (R, D) of tokens (R, L), with gradients."""
    return model.clip.get_text_features(input_ids, attention_mask=attention_mask).pooler_output


def decode(
    model: CLIPSegForImageSegmentation,
    states: tuple[torch.Tensor, ...],
    phrases: torch.Tensor,
    owners: torch.Tensor,
) -> torch.Tensor:
    """Logits of phrases, each in a picture.

    Args:
        model: the segmenter.
        states: hidden states of the vision encoder for B pictures.
        phrases: (R, D), of `embed_phrases`.
        owners: (R,): the picture of each phrase, in 0 to B - 1.

    Returns:
        (R, S, S).
    """
    return model.decoder([states[layer + 1][owners] for layer in model.extract_layers], phrases).logits


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
    owners = torch.arange(len(pixel_values), device=pixel_values.device)
    return decode(model, states, embed_phrases(model, input_ids, attention_mask), owners)


def naming_loss(
    model: CLIPSegForImageSegmentation, last_state: torch.Tensor, names: torch.Tensor, categories: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of matching each patch that shows an object with the phrases of all categories, by cosine.

    Args:
        model: the segmenter; its projections and temperature are CLIP's.
        last_state: (B, 1 + P * P, C): the vision encoder's last hidden state, class token first.
        names: (categories, D): a phrase of each category, of `embed_phrases`.
        categories: (B, S, S): 0 for background, c + 1 for category c.

    Returns:
        Scalar; 0 where no patch shows an object.
    """
    patches = F.normalize(model.clip.visual_projection(last_state[:, 1:]), dim=-1)
    step = categories.shape[-1] // round(patches.shape[1] ** 0.5)
    at_centres = categories[:, step // 2 :: step, step // 2 :: step].flatten(1)
    is_object = at_centres > 0
    if not is_object.any():
        return last_state.sum() * 0
    similarity = patches[is_object] @ F.normalize(names, dim=-1).T * model.clip.logit_scale.exp()
    return F.cross_entropy(similarity, at_centres[is_object] - 1)


def build_processor(preset: Preset) -> CLIPSegProcessor:
    """What brings a PIL picture and a phrase to the segmenter."""
    half, side = [0.5, 0.5, 0.5], preset.image_size
    pictures = ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=half, image_std=half)
    return CLIPSegProcessor(image_processor=pictures, tokenizer=build_tokenizer())


def segmentation_target(maps: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
    """Masks (B * K, S, S), {0, 1}, of K categories (B, K) in each picture's map (B, S, S) of categories."""
    return (maps[:, None] == categories[:, :, None, None] + 1).flatten(0, 1).float()


def main() -> None:
    """Command line."""
    parser = toybox_parser(__doc__, batch_size=BATCH_SIZE, steps=STEPS)
    parser.add_argument("--scenes", type=int, default=16_000, help="size of the pool of training scenes")
    args, preset, device = parse_toybox(parser)
    pool = scene_pool(preset, "train", args.scenes, args.runs / "pools")
    tokenizer = build_tokenizer()
    phrases = [
        form.format(name=name, article_name=with_article(name)) for name in preset.categories for form in PHRASINGS
    ]
    text = tokenizer(phrases, padding=True, return_tensors="pt")
    model = build_clipseg(preset, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id).to(device)

    input_ids, attention_mask = text.input_ids.to(device), text.attention_mask.to(device)

    def loss_of_step(step: int) -> torch.Tensor:
        rows = shuffled_batch(step, len(pool.pixels), args.batch_size, args.seed)
        rng = np.random.default_rng((args.seed, step))
        categories, forms = draw_phrases(preset, pool.categories[rows].numpy(), rng)
        said = torch.from_numpy(categories * len(PHRASINGS) + forms).flatten().to(device)
        owners = torch.arange(len(rows), device=device).repeat_interleave(PHRASES)
        maps = pool.category_maps(rows, device)
        states = model.clip.vision_model(normalise(pool.images(rows, device)), output_hidden_states=True).hidden_states
        embedded = embed_phrases(model, input_ids, attention_mask)  # of all phrases: they are few
        logits = decode(model, states, embedded[said], owners)
        target = segmentation_target(maps, torch.from_numpy(categories).to(device))
        every = torch.arange(len(preset.categories), device=device) * len(PHRASINGS)
        names = embedded[every + torch.from_numpy(rng.integers(len(PHRASINGS), size=len(every))).to(device)]
        masks = F.binary_cross_entropy_with_logits(logits, target)
        return masks + NAMING_WEIGHT * naming_loss(model, states[-1], names, maps)

    averaged, step = fit("clipseg", model, loss_of_step, args, lr=1e-3, ema_decay=0.998)
    averaged.half().save_pretrained(args.weights / "clipseg")
    build_processor(preset).save_pretrained(args.weights / "clipseg")
    print(f"CLIPSeg after {step} steps: {args.weights / 'clipseg'}")


if __name__ == "__main__":
    main()
