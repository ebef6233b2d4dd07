"""One progress bar over several calls of pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def step_counter(progress: Any, num_images: int) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """A `callback_on_step_end` that tells a bar of every step, as many units as there are pictures.

    Args:
        progress: its `update` is called, as tqdm's.
        num_images: pictures of the call.
    """

    def count_step(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress.update(num_images)
        return tensors

    return count_step
