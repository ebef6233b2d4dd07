"""Tokenizer, paths, judge and losses: the real classes, untrained."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from objectcompose.errors import CheckpointError, ImageInputError
from objectcompose.toybox.categories import CATEGORIES, PRESETS
from objectcompose.toybox.judge import Judge, build_identity_encoder, build_segmenter
from objectcompose.toybox.models import MAX_TOKENS, build_clipseg
from objectcompose.toybox.scenes import list_objects
from objectcompose.toybox.tokenizer import build_tokenizer
from objectcompose.toybox.weights import ENVIRONMENT_VARIABLE, active_preset, toybox_path, weights_hash
from objectcompose.training.toybox_contrastive import ViewStream, info_nce
from objectcompose.training.train_toybox_clipseg import PHRASES, draw_phrases, naming_loss, segment
from objectcompose.training.train_toybox_image_encoder import caption_loss


CPU = PRESETS["cpu"]


@pytest.fixture
def judge() -> Judge:
    return Judge(CPU, build_segmenter(CPU), build_identity_encoder(CPU))


def test_tokenizer_round_trip():
    tokenizer, again = build_tokenizer(), build_tokenizer()  # `tokenizers`' own BPE trainer fails this
    assert tokenizer.get_vocab() == again.get_vocab() and tokenizer.model_max_length == MAX_TOKENS
    for name in CATEGORIES:
        ids = tokenizer(f"a photo of {name}").input_ids
        assert ids == again(f"a photo of {name}").input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == f"a photo of {name}"
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    strange = "Größe 7 &"
    assert tokenizer.decode(tokenizer(strange).input_ids, skip_special_tokens=True).strip() == strange.lower()
    longest = sorted(CATEGORIES, key=lambda name: -len(tokenizer.tokenize(name)))[:5]
    caption = f"a photo of {list_objects(longest)} on a striped yellow background"
    assert len(tokenizer(caption).input_ids) <= MAX_TOKENS


def test_path_errors(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"toybox\.json"):
        toybox_path("base")
    (tmp_path / "toybox.json").write_text(json.dumps({"preset": "gpu"}))
    with pytest.raises(CheckpointError, match="'unknown'"):
        toybox_path("unknown")
    with pytest.raises(CheckpointError, match="`dino`"):
        toybox_path("dino")
    (tmp_path / "dino").mkdir()
    assert toybox_path("dino") == tmp_path / "dino" and active_preset().name == "gpu"


def test_hash_sees_names_and_contents(tmp_path):
    hashes = []
    for number, (name, content) in enumerate([("a", b"1"), ("a", b"2"), ("b", b"2")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"{name}.safetensors").write_bytes(content)
        (folder / "ignored.txt").write_text(str(number))
        hashes.append(weights_hash(folder))
    assert len(set(hashes)) == 3 and all(len(one) == 16 for one in hashes)


def test_judge_shapes_and_errors(judge):
    images = torch.rand(2, 3, 48, 80)
    probabilities = judge.probabilities(images)
    assert probabilities.shape == (2, 1 + len(CPU.categories), 48, 80)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 48, 80))
    embeddings = judge.embed(torch.rand(3, 3, 30, 20))
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))
    assert len(judge.detect(images)) == 2
    for bad in (torch.rand(3, 48, 48), torch.rand(1, 4, 48, 48)):
        with pytest.raises(ImageInputError, match="`images`"):
            judge.detect(bad)


def test_judge_detections_are_components(judge, monkeypatch):
    """Two blobs of one category are two detections, a speck and a doubtful blob are none; the surest comes first."""
    classes = 1 + len(CPU.categories)
    maps = torch.zeros(1, classes, 40, 40)
    maps[:, 0] = 1.0

    def put(number: int, rows: slice, columns: slice, probability: float) -> None:
        maps[0, :, rows, columns] = (1 - probability) / (classes - 1)
        maps[0, number, rows, columns] = probability

    put(2, slice(0, 10), slice(0, 20), 0.9)
    put(2, slice(20, 30), slice(0, 10), 0.7)
    put(3, slice(30, 40), slice(20, 40), 0.95)
    put(4, slice(0, 2), slice(30, 32), 0.99)  # a speck: 4 of 1600 pixels
    put(5, slice(12, 18), slice(25, 40), 0.4)  # doubtful: most probable, but below one half
    monkeypatch.setattr(judge, "probabilities", lambda images: maps)
    [found] = judge.detect(torch.rand(1, 3, 40, 40))
    assert [one.category for one in found] == [CPU.categories[number - 1] for number in (3, 2, 2)]
    assert [round(one.score, 2) for one in found] == [0.95, 0.9, 0.7]
    assert found[1].box == pytest.approx((0.0, 0.0, 0.5, 0.25)) and found[0].box == pytest.approx((0.5, 0.75, 1, 1))
    assert found[2].mask.sum() == 100 and found[2].mask[20:30, :10].all()


def test_caption_loss_of_shared_captions():
    captions = torch.eye(4)
    right = caption_loss(captions[[0, 0, 2]], captions, torch.tensor([0, 0, 2]))
    wrong = caption_loss(captions[[0, 0, 2]], captions, torch.tensor([1, 1, 0]))
    # a caption of two pictures cannot give either more than one half: log 2 for one of the two captions in use
    assert right.item() == pytest.approx(torch.tensor(2.0).log().item() / 4, abs=1e-4)
    assert wrong > 5


def test_info_nce_prefers_what_belongs_together():
    first = torch.eye(5)
    assert info_nce(first, first) < 1e-4 < info_nce(first, first.roll(1, 0))


def test_view_stream_depends_on_the_step_alone():
    device = torch.device("cpu")
    stream = ViewStream(CPU, "train", 4, 5, device)
    state = torch.get_rng_state()
    in_order = [stream(step) for step in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    resumed = ViewStream(CPU, "train", 4, 5, device)(2)
    assert all(torch.equal(one, other) for one, other in zip(resumed, in_order[2], strict=True))
    first, second, categories = resumed
    assert first.shape == second.shape == (4, 3, 64, 64) and categories.shape == (4,)
    assert not torch.equal(first, second)


def test_segment_is_the_models_own_forward_with_gradients():
    tokenizer = build_tokenizer()
    model = build_clipseg(CPU, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id).eval()
    text = tokenizer(["a dog", "the wine glass"], padding=True, return_tensors="pt")
    pixels = torch.randn(2, 3, 64, 64)
    logits = segment(model, pixels, text.input_ids, text.attention_mask)
    torch.testing.assert_close(logits, model(pixel_values=pixels, **text).logits)
    assert logits.shape == (2, 64, 64)
    logits.square().mean().backward()
    assert model.clip.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert model.clip.text_model.embeddings.token_embedding.weight.grad.abs().sum() > 0


def test_half_of_a_pictures_phrases_are_not_in_it():
    present = np.array([[3, -1, -1, -1, -1], [0, 5, 7, -1, -1]])
    for seed in range(20):
        categories, forms = draw_phrases(CPU, present, np.random.default_rng(seed))
        assert categories.shape == forms.shape == (2, PHRASES)
        assert all(len(set(row)) == PHRASES for row in categories.tolist())
        shown = [len(set(row) & set(there)) for row, there in zip(categories.tolist(), present.tolist(), strict=True)]
        assert shown == [1, 2]


def test_naming_loss_matches_patches_with_their_category():
    tokenizer = build_tokenizer()
    model = build_clipseg(CPU, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    names = torch.randn(len(CPU.categories), 64)
    maps = torch.zeros(2, 64, 64, dtype=torch.long)
    maps[0, :32], maps[1, 40:, 8:] = 1, 6  # categories 0 and 5
    patches = maps[:, 2::4, 2::4].flatten(1)
    inverse = torch.linalg.pinv(model.clip.visual_projection.weight).T  # what projects to a given embedding
    right = torch.cat([torch.zeros(2, 1, 96), names[(patches - 1).clamp(min=0)] @ inverse], dim=1)
    wrong = torch.cat([torch.zeros(2, 1, 96), names[(patches % 8)] @ inverse], dim=1)
    assert naming_loss(model, right, names, maps) < 0.05 < 2 < naming_loss(model, wrong, names, maps)
    assert naming_loss(model, right.requires_grad_(), names, torch.zeros_like(maps)) == 0
