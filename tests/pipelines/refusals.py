"""That bad input is refused before any model runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from objectcompose.errors import ObjectComposeError


#: Components of our pipelines that compute; those that a pipeline does not have are left out.
MODELS = ("unet", "text_encoder", "image_encoder", "adapter", "dino", "vae", "tiny_vae")


@contextmanager
def watched_models(pipeline: Any) -> Iterator[set[str]]:
    """Collects the names of the models of which any module runs, also inside of `vae.decode` and the like."""
    ran: set[str] = set()
    models = {name: getattr(pipeline, name, None) for name in MODELS}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
        for name, model in models.items()
        if model is not None
        for module in model.modules()
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def refused(
    call: Callable[..., Any],
    pipeline: Any,
    error: type[ObjectComposeError],
    message: str | re.Pattern[str],
    **arguments: Any,
) -> None:
    """`call(pipeline, **arguments)` raises, and no model of the pipeline ran."""
    with watched_models(pipeline) as ran, pytest.raises(error, match=message):
        call(pipeline, **arguments)
    assert not ran, f"refused after {ran} ran"
