"""Phrases among the tokens of a prompt. The tiny vocabulary: "dog" is one token, "corgi" two ("cor", "gi")."""

from __future__ import annotations

import re

import pytest
from diffusers.loaders import TextualInversionLoaderMixin

from objectcompose.errors import LayoutError, PhraseNotFoundError, PromptTooLongError
from objectcompose.pipelines.token_utils import (
    check_prompt_length,
    expand_placeholders,
    find_everywhere,
    find_phrase,
    find_phrases,
    max_prompt_length,
    other_numbers,
    prompt_token_ids,
)


@pytest.mark.parametrize(
    ("prompt", "phrase", "positions"),
    [
        ("a photo of a dog", "dog", [5]),
        ("a photo of a dog", "a dog", [4, 5]),
        ("A  Photo of a\nDOG", "dog", [5]),
        ("a photo of a dog", "DOG", [5]),
        ("a corgi and a cat", "corgi", [2, 3]),
        ("a corgi and a cat", "cat", [6]),
        ("a carton and a car", "car", [5]),
        ("a wineglass and a wine glass", "wine glass", [6, 7]),
        ("a wineglass and a glass", "glass", [6]),
        ("a dog, a cat", "dog", [2]),
        ("the dog's cup", "dog", [2]),
        ("dog", "dog", [1]),
        ("a 13 and 3", "3", [5]),
        ("a dog2 and a dog", "dog", [6]),
        ("a 2dog and a dog", "dog", [6]),
        ("a teddy bear", "teddy bear", [2, 3]),
        ("a dog-cat", "cat", [4]),
    ],
)
def test_positions(tiny_tokenizer, prompt, phrase, positions):
    assert find_phrase(tiny_tokenizer, prompt, phrase) == positions


def test_positions_hold_the_phrase_ids(tiny_tokenizer):
    prompt = "a photo of a corgi and a carton"
    ids = tiny_tokenizer(prompt, padding="max_length").input_ids
    assert tiny_tokenizer.convert_ids_to_tokens([ids[p] for p in find_phrase(tiny_tokenizer, prompt, "corgi")]) == [
        "cor",
        "gi</w>",
    ]


class TestRepeats:
    def test_two_dogs_are_two_places(self, tiny_tokenizer):
        assert find_phrases(tiny_tokenizer, "a dog and a dog", ["dog", "dog"]) == [[2], [5]]
        assert find_phrase(tiny_tokenizer, "a dog and a dog", "dog", occurrence=1) == [5]

    def test_order_of_phrases_is_kept(self, tiny_tokenizer):
        found = find_phrases(tiny_tokenizer, "a cat, a dog and a dog", ["dog", "cat", "dog"])
        assert found == [[5], [2], [8]]

    def test_longer_phrases_choose_first(self, tiny_tokenizer):
        found = find_phrases(tiny_tokenizer, "a teddy bear and a bear", ["bear", "teddy bear"])
        assert found == [[6], [2, 3]]

    def test_exact_words_choose_before_plurals(self, tiny_tokenizer):
        assert find_phrases(tiny_tokenizer, "dogs and a dog", ["dog", "dogs"]) == [[4], [1]]
        assert find_phrases(tiny_tokenizer, "a dog and the dogs", ["dog", "dog"]) == [[2], [5]]

    def test_too_few_places(self, tiny_tokenizer):
        with pytest.raises(PhraseNotFoundError, match=r"'dog' must occur in the prompt 2 time\(s\).* found 1"):
            find_phrases(tiny_tokenizer, "a dog and a cat", ["dog", "dog"])
        with pytest.raises(PhraseNotFoundError, match="2 time"):
            find_phrase(tiny_tokenizer, "a dog", "dog", occurrence=1)
        with pytest.raises(PhraseNotFoundError):
            find_phrases(tiny_tokenizer, "a teddy bear", ["teddy bear", "bear"])

    @pytest.mark.parametrize(
        ("prompt", "phrases", "positions"),
        [
            ("two dogs", ["dogs", "dogs", "dogs"], [[2], [2], [2]]),
            ("two dogs", ["dog", "Dog"], [[2], [2]]),
            ("a dog and a dog", ["dog", "dog", "dog"], [[2], [5], [5]]),
            ("a dog and the dogs", ["dog", "dog", "dog"], [[2], [5], [5]]),
            ("a corgi and a dog", ["corgi", "dog", "corgi"], [[2, 3], [6], [2, 3]]),
        ],
    )
    def test_repeated_phrases_may_share_their_last_place(self, tiny_tokenizer, prompt, phrases, positions):
        assert find_phrases(tiny_tokenizer, prompt, phrases, may_share=True) == positions
        with pytest.raises(PhraseNotFoundError, match=f"{len(phrases)} time" if len({*phrases}) == 1 else "time"):
            find_phrases(tiny_tokenizer, prompt, phrases)

    def test_places_are_shared_by_the_same_phrase_only(self, tiny_tokenizer):
        with pytest.raises(PhraseNotFoundError, match=r"1 time\(s\).*found 0"):
            find_phrases(tiny_tokenizer, "a teddy bear", ["teddy bear", "bear", "bear"], may_share=True)

    def test_everywhere(self, tiny_tokenizer):
        prompt = "The dog and the corgi of the carton"
        assert find_everywhere(tiny_tokenizer, prompt, ["the", "corgi", "and the", "to", "dogs"]) == [1, 3, 4, 5, 6, 8]
        assert find_everywhere(tiny_tokenizer, prompt, []) == []


class TestPlural:
    @pytest.mark.parametrize(
        ("prompt", "phrase", "positions"),
        [
            ("two dogs", "dog", [2]),
            ("a dog", "dogs", [2]),
            ("two glasses", "glass", [2]),
            ("a wine glass", "wine glasses", [2, 3]),
            ("two corgis", "corgi", [2, 3]),
        ],
    )
    def test_found(self, tiny_tokenizer, prompt, phrase, positions):
        assert find_phrase(tiny_tokenizer, prompt, phrase) == positions

    @pytest.mark.parametrize(
        ("phrase", "form"),
        [("puppy", "puppies"), ("puppies", "puppy"), ("old man", "old men"), ("knives", "knife"), ("fox", "foxes")],
    )
    def test_spelling(self, phrase, form):
        assert form in other_numbers(phrase)

    def test_other_words_are_no_plural(self, tiny_tokenizer):
        with pytest.raises(PhraseNotFoundError):
            find_phrase(tiny_tokenizer, "a carton", "car")


class TestPlaceholders:
    def test_one_vector(self, tiny_tokenizer):
        tiny_tokenizer.add_tokens(["<asset0>", "<asset1>"])
        prompt = "a photo of <asset1> and <asset0> on the table"
        assert find_phrases(tiny_tokenizer, prompt, ["<asset0>", "<asset1>"]) == [[6], [4]]

    def test_several_vectors_stand_where_diffusers_puts_them(self, tiny_tokenizer):
        tiny_tokenizer.add_tokens(["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<dog-toy>"])
        prompt = "a <cat-toy> and a dog"
        encoded = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tiny_tokenizer)
        assert expand_placeholders(tiny_tokenizer, prompt) == encoded
        assert prompt_token_ids(tiny_tokenizer, prompt) == tiny_tokenizer(encoded).input_ids
        assert find_phrases(tiny_tokenizer, prompt, ["dog", "<cat-toy>"]) == [[7], [2, 3, 4]]

    def test_written_out_prompt_stays(self, tiny_tokenizer):
        tiny_tokenizer.add_tokens(["<cat-toy>", "<cat-toy>_1"])
        once = expand_placeholders(tiny_tokenizer, "<cat-toy> and <cat-toy>")
        assert once == "<cat-toy> <cat-toy>_1 and <cat-toy> <cat-toy>_1"
        assert expand_placeholders(tiny_tokenizer, once) == once

    @pytest.mark.parametrize("prompt", ["a cat2", "<v>_1", "a <v>_12"])
    def test_longer_tokens_and_further_vectors_are_no_placeholder(self, tiny_tokenizer, prompt):
        tiny_tokenizer.add_tokens(["<v>", "<v>_1", "cat", "cat_1", "cat2", "<v>_12"])
        assert expand_placeholders(tiny_tokenizer, prompt) == prompt

    def test_expansion_counts_towards_the_limit(self, tiny_tokenizer):
        tiny_tokenizer.add_tokens(["<v>", *(f"<v>_{index}" for index in range(1, 80))])
        with pytest.raises(PromptTooLongError, match="got 83"):
            find_phrase(tiny_tokenizer, "a <v>", "<v>")


class TestLength:
    def test_limit_is_inclusive(self, tiny_tokenizer):
        prompt = "dog " * 75
        assert check_prompt_length(tiny_tokenizer, prompt) == 77
        assert find_phrase(tiny_tokenizer, prompt, "dog", occurrence=74) == [75]
        with pytest.raises(PromptTooLongError, match=r"at most 77 .* got 78"):
            check_prompt_length(tiny_tokenizer, "dog " * 76)

    def test_too_long_prompt_is_never_searched(self, tiny_tokenizer):
        with pytest.raises(PromptTooLongError):
            find_phrase(tiny_tokenizer, "a cat and " + "dog " * 80, "cat")

    def test_limit_of_a_tokenizer_saved_without_one(self, tiny_tokenizer):
        tiny_tokenizer.model_max_length = int(1e30)
        assert max_prompt_length(tiny_tokenizer) == 77


class TestErrors:
    @pytest.mark.parametrize(
        ("prompt", "phrase", "close"),
        [
            ("a photo of a corgi", "corgy", "corgi"),
            ("a teddy bear, and a cup", "tedy bear", "teddy bear"),
            ("a photo of a Dog", "dig", "dog"),
        ],
    )
    def test_closest_matches_are_named(self, tiny_tokenizer, prompt, phrase, close):
        with pytest.raises(PhraseNotFoundError, match=re.escape(f"closest: '{close}'")):
            find_phrase(tiny_tokenizer, prompt, phrase)

    def test_nothing_close(self, tiny_tokenizer):
        with pytest.raises(PhraseNotFoundError, match="nothing in it comes close"):
            find_phrase(tiny_tokenizer, "a dog", "zebra crossing")

    @pytest.mark.parametrize(
        ("phrase", "prompt"),
        [
            ("ton", "a carton"),
            ("gi", "a corgi"),
            ("glass", "a wineglass"),
            ("car", "a carton"),
            ("3", "13"),
            ("1", "13"),
        ],
    )
    def test_parts_of_words_are_not_phrases(self, tiny_tokenizer, phrase, prompt):
        with pytest.raises(PhraseNotFoundError):
            find_phrase(tiny_tokenizer, prompt, phrase)

    @pytest.mark.parametrize("bad", [3, None, "", "  ", "\ud800"])
    def test_phrase_must_be_text(self, tiny_tokenizer, bad):
        with pytest.raises(LayoutError, match="`phrase`"):
            find_phrase(tiny_tokenizer, "a dog", bad)

    def test_prompt_and_phrases_must_be_text(self, tiny_tokenizer):
        with pytest.raises(LayoutError, match="`prompt`"):
            find_phrase(tiny_tokenizer, ["a dog"], "dog")
        with pytest.raises(LayoutError, match="`phrases`"):
            find_phrases(tiny_tokenizer, "a dog", "dog")

    def test_empty_prompt(self, tiny_tokenizer):
        with pytest.raises(PhraseNotFoundError):
            find_phrase(tiny_tokenizer, "", "dog")
        assert find_phrases(tiny_tokenizer, "", []) == []
