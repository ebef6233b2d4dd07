"""Keys and values under guidance, where the unconditional half sees null objects: one of them is kept for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from objectcompose.attention_processors.branch import KeysValues


class GuidedKeysValues(Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
    """Keys and values of `[uncond, cond]` rows for a `Branch`, put together when a layer asks for its own.

    Null objects are alike in all rows and slots, so that one of them is kept: about half of the memory.

    Args:
        nulls: per layer keys and values of one null object, `(1, T, C)`.
        shown: per layer those of the conditional rows, `(B, N * T, C)`.

    Attributes:
        nulls, shown: as given.
    """

    def __init__(self, nulls: KeysValues, shown: KeysValues):
        self.nulls, self.shown = nulls, shown

    def __getitem__(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (
            torch.cat([null.repeat(len(shown), shown.shape[1] // null.shape[1], 1), shown])
            for null, shown in zip(self.nulls[layer], self.shown[layer], strict=True)
        )
        return key, value

    def __contains__(self, layer: object) -> bool:  # that of `Mapping` would put keys and values together
        return layer in self.shown

    def __iter__(self) -> Iterator[str]:
        return iter(self.shown)

    def __len__(self) -> int:
        return len(self.shown)
