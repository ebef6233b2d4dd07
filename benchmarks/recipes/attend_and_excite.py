"""Attend-and-Excite (arXiv 2301.13826) from diffusers, set for the toybox: the rival that pays at inference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.pipelines.token_utils import find_phrases


ATTEND_AND_EXCITE = "attend_and_excite"
#: (grid of the maps, step size, thresholds): what the dev split chooses from. The authors read maps of a quarter of
#: the latents' sides and ask for 0.05, 0.5 and 0.8 at the first step and after a fifth and two fifths of them.
SETTINGS = ((4, 20, (0.05, 0.5, 0.8)), (8, 20, (0.05, 0.5, 0.8)), (8, 5, (0.05, 0.2, 0.4)))
STEPS = 20


def load_attend_and_excite(device: str) -> Any:
    """diffusers' pipeline on the toybox base, silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated there, still importable
        from diffusers import StableDiffusionAttendAndExcitePipeline

    base = load_checkpoint(None, device)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    pipeline = StableDiffusionAttendAndExcitePipeline(
        **{name: getattr(base, name) for name in names},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_arguments(count: int) -> list[dict[str, Any]]:
    """For `paint_records`: one entry for each of the first settings. The pipeline takes one prompt at a time."""
    return [
        {
            "batch_size": 1,
            "call_arguments": _arguments(grid, scale, thresholds),
            "call_identity": f"grid {grid}, step size {scale}, thresholds {thresholds}",
        }
        for grid, scale, thresholds in SETTINGS[:count]
    ]


def _arguments(
    grid: int, scale: int, thresholds: tuple[float, float, float]
) -> Callable[[Sequence[PromptRecord]], dict[str, Any]]:
    tokenizer = load_checkpoint(None, "cpu").tokenizer

    def arguments(records: Sequence[PromptRecord]) -> dict[str, Any]:
        # the last token of a phrase stands for it, as in the authors' prompts of one token each
        indices = [
            [place[-1] for place in find_phrases(tokenizer, record.text, list(record.categories))]
            for record in records
        ]
        return {
            "token_indices": indices,
            "attn_res": (grid, grid),
            "scale_factor": scale,
            "max_iter_to_alter": STEPS // 2,  # as the authors'
            "thresholds": dict(zip((0, STEPS // 5, 2 * STEPS // 5), thresholds, strict=True)),
        }

    return arguments
