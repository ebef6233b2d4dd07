"""Toybox's tokenizer: a real `CLIPTokenizer` over a small byte-level vocabulary learned from its captions."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from objectcompose.toybox.backgrounds import COLOURS, GROUNDS
from objectcompose.toybox.categories import CATEGORIES
from objectcompose.toybox.models import MAX_TOKENS
from objectcompose.toybox.scenes import with_article


_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
NUM_MERGES = 288
_WORDS = "a photo of an and on the background striped two picture with in next to left right above below behind"


def learn_merges(words: list[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair merges of the most frequent neighbours; equal frequencies by the alphabet.

    `tokenizers`' own trainer breaks ties at random, so that two processes would number the same words differently.

    Args:
        words: with repetitions.
        count: merges to learn; fewer when every word is one piece before that.
    """
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    frequency, merges = Counter(words), list[tuple[str, str]]()
    while len(merges) < count:
        pairs = Counter[tuple[str, str]]()
        for word, pieces in spelled.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += frequency[word]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        for pieces in spelled.values():
            place = 0
            while place < len(pieces) - 1:
                if pieces[place] == left and pieces[place + 1] == right:
                    pieces[place : place + 2] = [left + right]
                place += 1
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer, always the same: 256 bytes, merges learned from what captions can say, CLIP's two specials."""
    corpus = [_WORDS, *COLOURS, *GROUNDS, *CATEGORIES, *(with_article(name) for name in CATEGORIES)]
    merges = learn_merges(" ".join(corpus).split(), NUM_MERGES)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [token for token in dict.fromkeys("".join(merge) for merge in merges) if token not in set(tokens)]
    tokens += _SPECIAL
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merge_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        merge_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer(str(vocabulary), str(merge_file), model_max_length=MAX_TOKENS)
