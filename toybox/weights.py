"""Where toybox's committed weights lie, and what identifies them."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from objectcompose.errors import CheckpointError
from objectcompose.toybox.categories import PRESETS, Preset


ENVIRONMENT_VARIABLE = "OBJECTCOMPOSE_TOYBOX"
FOLDERS = ("base", "image_encoder", "dino", "clipseg", "judge", "tokencompose", "locref", "object_prompt", "mifo")


def toybox_root() -> Path:
    """The folder of all toybox models: `$OBJECTCOMPOSE_TOYBOX`, else `examples/toybox` of the checkout.

    Raises:
        CheckpointError: neither exists.
    """
    given = os.environ.get(ENVIRONMENT_VARIABLE)
    root = Path(given) if given else Path(__file__).resolve().parents[1] / "examples" / "toybox"
    if not (root / "toybox.json").is_file():
        raise CheckpointError(
            f"toybox weights must lie in `{root}`, but `toybox.json` is not there. They come with a clone of the "
            f"repository, not with the wheel; set {ENVIRONMENT_VARIABLE} to a clone's examples/toybox."
        )
    return root


def toybox_path(name: str = "base") -> Path:
    """The folder of one model, to be given to its `from_pretrained`; of "tokencompose" a delta for the base's UNet.

    Args:
        name: one of `FOLDERS`.

    Raises:
        CheckpointError: no such model, or its weights are missing.
    """
    if name not in FOLDERS:
        raise CheckpointError(f"`name` must be one of {FOLDERS}, got {name!r}.")
    path = toybox_root() / name
    if not path.is_dir():
        raise CheckpointError(f"toybox has no `{name}` in `{path.parent}`.")
    return path


def toybox_card() -> dict[str, Any]:
    """What `toybox.json` says: version, preset, how each model was trained."""
    return json.loads((toybox_root() / "toybox.json").read_text(encoding="utf-8"))


def active_preset() -> Preset:
    """The preset that the committed weights were trained with."""
    return PRESETS[toybox_card()["preset"]]


def active_categories() -> tuple[str, ...]:
    """The category names that the committed weights know."""
    return active_preset().categories


@lru_cache(maxsize=16)
def weights_hash(folder: Path) -> str:
    """SHA-256 over the safetensors files under a folder, with their relative names: 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
