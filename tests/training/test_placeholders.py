"""Learned tokens: what is trained, what stays, and files that diffusers reads."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from objectcompose.errors import LayoutError, PhraseNotFoundError
from objectcompose.training.placeholders import Placeholders
from tests.tiny import TEXT_WIDTH, tiny_components, tiny_text_encoder, tiny_tokenizer


NAMES = ["<asset0>", "<asset1>"]


def learned(vectors=1, initial="random", seed=0):
    tokenizer = tiny_tokenizer()
    encoder = tiny_text_encoder(tokenizer)
    before = encoder.get_input_embeddings().weight.detach().clone()
    return Placeholders(tokenizer, encoder, NAMES, vectors, initial, seed), before


def encode(placeholders, prompt):
    ids = placeholders.tokenizer(prompt, return_tensors="pt").input_ids
    return placeholders.text_encoder(ids)[0]


def test_the_vocabulary_stays_and_new_rows_differ():
    placeholders, before = learned(vectors=2)
    table = placeholders.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[: len(before)], before) and table.shape == (len(before) + 4, TEXT_WIDTH)
    assert torch.equal(table[len(before) :], placeholders.vectors.detach())
    assert len(placeholders.vectors.unique(dim=0)) == 4
    assert placeholders.tokens == [["<asset0>", "<asset0>_1"], ["<asset1>", "<asset1>_1"]]


def test_random_rows_have_the_vocabulary_s_spread_and_follow_the_seed():
    first, again, other = (learned(vectors=200, seed=seed)[0].vectors for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    table = learned()[1]
    assert torch.allclose(first.mean(0), table.mean(0), atol=5 * float(table.std()) / 20)
    assert torch.allclose(first.std(0), table.std(0), rtol=0.3)


def test_other_initial_values():
    mean, before = learned(initial="mean")
    assert torch.allclose(mean.vectors, before.mean(0).expand(2, -1))
    words, before = learned(initial=["dog", "corgi"])
    first_pieces = [words.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("dog", "corgi")]
    assert torch.equal(words.vectors.detach(), before[first_pieces])


def test_gradients_reach_the_vectors_only_inside_the_block():
    placeholders, _ = learned()
    placeholders.text_encoder.requires_grad_(False)
    prompt = placeholders.prompt([1])
    with placeholders.in_place():
        encode(placeholders, prompt).square().sum().backward()
    gradient = placeholders.vectors.grad
    assert gradient[1].abs().sum() > 0 and gradient[0].abs().sum() == 0
    assert not encode(placeholders, prompt).requires_grad


def test_the_block_reads_what_the_table_will_hold():
    placeholders, _ = learned(vectors=2)
    with torch.no_grad():
        placeholders.vectors += 1
        prompt = placeholders.prompt([1, 0])
        with placeholders.in_place():
            inside = encode(placeholders, prompt)
        assert not torch.allclose(encode(placeholders, prompt), inside)
        placeholders.write_into_table()
        assert torch.allclose(encode(placeholders, prompt), inside, atol=1e-6)


def test_prompts_and_positions_follow_the_order():
    placeholders, _ = learned(vectors=2)
    prompt = placeholders.prompt([1, 0])
    assert prompt == "a photo of <asset1> <asset1>_1 and <asset0> <asset0>_1"
    ids = placeholders.tokenizer(prompt).input_ids
    assert placeholders.positions(ids, [1, 0]) == [[4, 5], [7, 8]]
    with pytest.raises(PhraseNotFoundError, match="<asset0> must occur exactly once"):
        placeholders.positions(placeholders.tokenizer("a dog").input_ids, [0])


@pytest.mark.parametrize("vectors", [1, 3])
def test_diffusers_reads_the_files(vectors, tmp_path):
    placeholders, _ = learned(vectors=vectors)
    paths = placeholders.export(tmp_path / "embeddings")
    assert [path.name for path in paths] == ["asset0.safetensors", "asset1.safetensors"]
    pipeline = StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False)
    for path in paths:
        pipeline.load_textual_inversion(path.parent, weight_name=path.name)
    table = pipeline.text_encoder.get_input_embeddings().weight
    ids = pipeline.tokenizer.convert_tokens_to_ids([token for tokens in placeholders.tokens for token in tokens])
    assert torch.equal(table[ids].detach(), placeholders.vectors.detach())


@pytest.mark.parametrize(
    ("names", "vectors", "initial", "message"),
    [
        (["dog</w>"], 1, "random", "new to the tokenizer"),
        (["two words"], 1, "random", "one word"),
        ([], 1, "random", "different"),
        (["<a>", "<a>"], 1, "random", "different"),
        (["<a>"], 0, "random", "at least 1"),
        (["<a>"], 1, ["dog", "cat"], "one word per name"),
        (["<a>"], 1, "zeros", '"random", "mean"'),
        (["<a>"], 1, [" "], "must be words"),
    ],
)
def test_bad_arguments_are_refused(names, vectors, initial, message):
    tokenizer = tiny_tokenizer()
    with pytest.raises(LayoutError, match=message):
        Placeholders(tokenizer, tiny_text_encoder(tokenizer), names, vectors, initial)
