"""Toybox's tokenizer: a real `CLIPTokenizer` over a small byte-level vocabulary learned from its captions."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from objectcompose.toybox.backgrounds import COLOURS, GROUNDS
from objectcompose.toybox.categories import CATEGORIES
from objectcompose.toybox.models import MAX_TOKENS
from objectcompose.toybox.scenes import with_article


_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_WORDS = "a photo of an and on the background striped two picture with in next to left right above below behind"


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer, always the same: 256 bytes, merges learned from what captions can say, CLIP's two specials."""
    corpus = [_WORDS, *COLOURS, *GROUNDS, *CATEGORIES, *(with_article(name) for name in CATEGORIES)]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=450, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(sorted(corpus) * 2, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
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
