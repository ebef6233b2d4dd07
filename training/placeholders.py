"""Learned tokens: new words of a tokenizer whose embeddings are trained, and nothing else of the embedding table.

The trained vectors are a parameter of their own, put in the place of the new words by a hook behind the embedding
table. So the table's other rows cannot move, and gradients and optimizer state are of the new vectors only. At the end
they are written into the table, and to files that diffusers' `load_textual_inversion` reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from objectcompose.errors import LayoutError, PhraseNotFoundError
from objectcompose.files import write_atomically
from objectcompose.layout_fields import check_text, shown_value


RANDOM, MEAN = "random", "mean"


class Placeholders:
    """N new tokens of v vectors each, entered into a tokenizer and a text encoder.

    Args:
        tokenizer: of the text encoder; gets the tokens, those of further vectors as `<name>_1`, `<name>_2`, ...
        text_encoder: its embedding table grows by N * v rows.
        names: such as `<asset0>`; new to the tokenizer.
        vectors: v, at least 1.
        initial: "random" (drawn with the mean and deviation of the whole vocabulary), "mean" (the vocabulary's mean:
            all alike, as the authors' code has it), or one word per name, whose first piece is copied.
        seed: of "random".

    Attributes:
        vectors: `(N * v, D)`, float32, the parameter to train.
        ids: per name the ids of its tokens.

    Raises:
        LayoutError: a name is no word, or known already; another number of words than names; no vectors.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        names: Sequence[str],
        vectors: int = 1,
        initial: str | Sequence[str] = RANDOM,
        seed: int = 0,
    ) -> None:
        known = tokenizer.get_vocab()
        for name in names:
            check_text(name, "names", one_word=True)
            if name in known:
                raise LayoutError(f"`names` must be new to the tokenizer, got {shown_value(name)}.")
        if not names or vectors < 1 or len(set(names)) != len(names):
            raise LayoutError(f"`names` must be different and `vectors` at least 1, got {list(names)}, {vectors}.")
        if not isinstance(initial, str) and len(initial) != len(names):
            raise LayoutError(f"`initial` must be one word per name ({len(names)}), got {len(initial)}.")
        if isinstance(initial, str) and initial not in (RANDOM, MEAN):
            raise LayoutError(f'`initial` must be "random", "mean" or a list of words, got {initial!r}.')
        self.names, self.vectors_per_name = list(names), vectors
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        table = text_encoder.get_input_embeddings().weight.detach()
        values = self._initial_values(table[: len(tokenizer)].float(), initial, seed)
        self.vectors = torch.nn.Parameter(values.to(table.device))

        self.tokens = [[name, *(f"{name}_{index}" for index in range(1, vectors))] for name in names]
        first = len(tokenizer)
        tokenizer.add_tokens([token for tokens in self.tokens for token in tokens])
        self.ids = [tokenizer.convert_tokens_to_ids(tokens) for tokens in self.tokens]
        flat = [index for ids in self.ids for index in ids]
        assert flat == list(range(first, first + len(flat))), "new tokens have consecutive ids"
        self._first = first
        trainable = text_encoder.get_input_embeddings().weight.requires_grad
        # Rows that transformers would draw itself are overwritten below; its own way of drawing them takes long.
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        text_encoder.get_input_embeddings().weight.requires_grad_(trainable)
        self.write_into_table()

    def _initial_values(self, table: torch.Tensor, initial: str | Sequence[str], seed: int) -> torch.Tensor:
        count = len(self.names) * self.vectors_per_name
        if initial == RANDOM:
            noise = torch.randn(count, table.shape[1], generator=torch.Generator().manual_seed(seed)).to(table.device)
            return table.mean(0) + noise * table.std(0)
        if initial == MEAN:
            return table.mean(0).expand(count, -1).clone()
        pieces = [self.tokenizer(word, add_special_tokens=False).input_ids for word in initial]
        empty = [word for word, ids in zip(initial, pieces, strict=True) if not ids]
        if empty:
            raise LayoutError(f"`initial` must be words, got {shown_value(empty[0])}.")
        return table[[ids[0] for ids in pieces]].repeat_interleave(self.vectors_per_name, 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the text encoder reads the parameter instead of its table's rows; gradients reach it."""

        def exchange(module: Any, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            ids = inputs[0]
            own = self.vectors[(ids - self._first).clamp(min=0, max=len(self.vectors) - 1)].to(output.dtype)
            return torch.where((ids >= self._first)[..., None], own, output)

        handle = self.text_encoder.get_input_embeddings().register_forward_hook(exchange)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def write_into_table(self) -> None:
        """Copy the vectors into the text encoder's table."""
        table = self.text_encoder.get_input_embeddings().weight
        table[self._first : self._first + len(self.vectors)] = self.vectors.to(table)

    def prompt(self, chosen: Sequence[int], template: str = "a photo of {}") -> str:
        """The prompt of some names in an order, all vectors written out: "a photo of <asset1> and <asset0>"."""
        return template.format(" and ".join(" ".join(self.tokens[index]) for index in chosen))

    def positions(self, ids: Sequence[int], chosen: Sequence[int]) -> list[list[int]]:
        """Where the tokens of each chosen name stand among a prompt's ids.

        Raises:
            PhraseNotFoundError: not each of its tokens occurs exactly once.
        """
        found = []
        for index in chosen:
            if any(list(ids).count(token) != 1 for token in self.ids[index]):
                raise PhraseNotFoundError(f"{self.names[index]} must occur exactly once in the prompt.")
            found.append([list(ids).index(token) for token in self.ids[index]])
        return found

    def export(self, folder: Path) -> list[Path]:
        """Write one file per name, `<asset0>` to `asset0.safetensors`, for `load_textual_inversion`."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, vectors in zip(self.names, self.vectors.detach().cpu().split(self.vectors_per_name), strict=True):
            path = folder / f"{name.strip('<>')}.safetensors"
            write_atomically(path, save({name: vectors.contiguous()}))
            paths.append(path)
        return paths
