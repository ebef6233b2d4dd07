"""Attention maps of phrases, accumulated while a pipeline samples.

One map per phrase is kept as a running sum at one grid; the maps of a step are dropped as soon as they are
added. A map is what TokenCompose (arXiv:2312.03626, section 3.2) supervises: the attention probability of the
phrase's tokens, summed over the tokens and averaged over heads, layers and steps. Under guidance only the
conditional half is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from objectcompose.attention_processors.install import attention_layers, match_layers, use_parts
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.attention_processors.regions import token_grid
from objectcompose.errors import PartConflictError
from objectcompose.pipelines.pipeline_output import PlacedObject


#: The layers that TokenCompose supervises: cross-attention of the middle and the decoder.
DECODER_CROSS_LAYERS = r"(mid_block|up_blocks)\..*\.attn2"


def phrase_map_layers(unet: Any, layers: str | Sequence[str] | None) -> list[str]:
    """Names of the cross-attention layers to measure.

    Args:
        unet: the model whose layers are meant.
        layers: a regex or a list of names; None stands for `DECODER_CROSS_LAYERS`.

    Raises:
        LayerNotFoundError: the pattern chooses nothing, or a name is no cross-attention layer.
    """
    return match_layers(unet, DECODER_CROSS_LAYERS if layers is None else layers, kind="cross")


def check_installable(unet: Any, parts: Sequence[Any], map_layers: Sequence[str] = ()) -> None:
    """Put parts, and a probe on `map_layers`, onto the model and take them off again.

    Raises:
        LayerNotFoundError, PartConflictError: what `use_parts` raises, here before any long work.
    """
    probes = [TokenMapProbe([0], layers=list(map_layers))] if map_layers else []
    with use_parts(unet, [*parts, *probes]):
        pass


def check_still_installed(unet: Any, layers: Iterable[str]) -> None:
    """Raise unless the layers still have the processors that `use_parts` gave them; for use after a callback.

    Attention slicing, fused projections, IP-Adapters and xformers all put their own processors on every layer, which
    in the middle of a call would end the parts' work without a word.

    Raises:
        PartConflictError: a layer has another processor.
    """
    modules = attention_layers(unet) if layers else {}
    for name in layers:
        processor = modules[name].processor
        if not hasattr(processor, "composed_parts"):
            raise PartConflictError(
                f"`callback_on_step_end` put {type(processor).__name__} on layer {name}, where attention parts are at"
                " work: change processors before the call, not in it."
            )


class PhraseMapRecorder:
    """Running mean of the attention maps of phrases.

    Args:
        placed: per picture the objects whose phrases are measured; B lists.
        layers: names of cross-attention layers.
        latent_size: height and width of the latents.

    Attributes:
        probe: the part to install; set its `rows` with `measure_rows` before each forward.
    """

    def __init__(self, placed: Sequence[Sequence[PlacedObject]], layers: Sequence[str], latent_size: tuple[int, int]):
        self.placed = placed
        self.latent_size = latent_size
        # a token that two phrases share is measured once; a picture without objects measures its start token in vain
        tokens = [sorted({index for item in row for index in item.token_indices}) or [0] for row in placed]
        self.probe = TokenMapProbe(tokens, layers=list(layers), head_mean=True)
        self._membership = torch.zeros(len(placed), max(map(len, tokens)), max(max(map(len, placed)), 1))
        for row, items in enumerate(placed):
            for column, item in enumerate(items):
                for index in item.token_indices:
                    self._membership[row, tokens[row].index(index), column] = 1.0
        self._grid: tuple[int, int] | None = None
        self._sum: torch.Tensor | None = None
        self._count = 0

    def measure_rows(self, is_guided: bool) -> None:
        """Say whether the next forward's batch is `[uncond, cond]` (measure the second half) or `cond` alone."""
        batch = len(self.placed)
        self.probe.rows = slice(batch, 2 * batch) if is_guided else None

    def record(self) -> None:
        """Add the maps of the forward that just ran."""
        maps = self.probe.maps
        if self._grid is None:
            self._grid = token_grid(max(m.shape[1] for m in maps.values()), *self.latent_size)
        for layer_map in maps.values():  # (B, HW, T)
            self._membership = self._membership.to(layer_map.device)
            phrase_map = (layer_map.detach().float() @ self._membership).transpose(1, 2)  # (B, N, HW)
            phrase_map = phrase_map.unflatten(-1, token_grid(layer_map.shape[1], *self.latent_size))
            if phrase_map.shape[-2:] != self._grid:
                phrase_map = F.interpolate(phrase_map, size=self._grid, mode="bilinear", align_corners=False)
            self._sum = phrase_map if self._sum is None else self._sum + phrase_map
            self._count += 1
        self.discard()

    def discard(self) -> None:
        """Drop the maps of the forward that just ran."""
        self.probe.clear()

    def mean_maps(self) -> list[dict[str, torch.Tensor]]:
        """Per picture a map `(h, w)` for each object's label, float32 on the CPU; empty when no step was recorded."""
        if self._sum is None:
            return [{} for _ in self.placed]
        means = (self._sum / self._count).cpu()
        return [{item.label: means[b, n] for n, item in enumerate(row)} for b, row in enumerate(self.placed)]
