"""What `objectcompose ground` writes for one picture, and how it is known again when a run goes on.

`overlay.png`, `masks/<number>_<phrase>.png` (0 and 255), `layout.json` with its masks beside it, and last of all
`detections.json`: where that file is there with the right key, the picture is done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from objectcompose.errors import ObjectComposeError
from objectcompose.files import write_atomically, write_png
from objectcompose.grounding.detection import Detection, detections_to_layout
from objectcompose.grounding.overlay import overlay_detections
from objectcompose.layout import save_layout


DONE_FILE = "detections.json"
LAYOUT_FILE = "layout.json"


def write_grounding(
    folder: Path,
    picture: Image.Image,
    found: Sequence[Detection],
    phrases: Sequence[str],
    key: str,
    prompt: str | None = None,
) -> dict[str, Any]:
    """Write everything about one picture.

    Args:
        folder: made when missing; mask files of an earlier result are removed.
        picture: RGB.
        found: its detections; those without phrase give no layout.
        phrases: what was asked for; empty for text-free segmentation.
        key: names pixels, phrases, models and settings.
        prompt: of the layout; None: made from the phrases.

    Returns:
        What `detections.json` says.

    Raises:
        ObjectComposeError: the folder cannot be written.
        PhraseNotFoundError: a phrase is not in the prompt.
    """
    layout = detections_to_layout(found, prompt) if phrases else None
    names = [f"masks/{_mask_name(number, one)}" if one.mask is not None else None for number, one in enumerate(found)]
    hit = {one.phrase for one in found}
    report = {
        "key": key,
        "size": list(picture.size),
        "prompt": prompt,
        "phrases": list(phrases),
        "missing": [phrase for phrase in phrases if phrase not in hit],
        "detections": [
            {"phrase": one.phrase, "box": list(one.box), "score": one.score, "mask": name}
            for one, name in zip(found, names, strict=True)
        ],
    }
    try:
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        (folder / DONE_FILE).unlink(missing_ok=True)  # until the new one is whole, the picture is not done
        for one, name in zip(found, names, strict=True):
            if one.mask is not None and name is not None:
                write_png(folder / name, Image.fromarray((one.mask.numpy() * 255).astype(np.uint8)))
        for stale in (folder / "masks").glob("*.png"):
            if f"masks/{stale.name}" not in names:
                stale.unlink()
        write_png(folder / "overlay.png", overlay_detections(picture, found))
        if layout is None:
            (folder / LAYOUT_FILE).unlink(missing_ok=True)
        else:
            save_layout(layout, folder / LAYOUT_FILE)
        write_atomically(folder / DONE_FILE, (json.dumps(report, indent=2) + "\n").encode())
    except OSError as error:
        raise ObjectComposeError(
            f"`--out` must be a folder that can be written, got {str(folder)!r}: {error.strerror or error}."
        ) from error
    return report


def finished_report(folder: Path, key: str, prompt: str | None) -> dict[str, Any] | None:
    """What an earlier run wrote, if it is whole and answers the same question; else None."""
    try:
        report = json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))
        if report["key"] != key or report["prompt"] != prompt:
            return None
        files = [one["mask"] for one in report["detections"] if one["mask"] is not None]
        files += ["overlay.png", *([LAYOUT_FILE] if report["phrases"] else [])]
        return report if all((folder / name).is_file() for name in files) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mask_name(number: int, one: Detection) -> str:
    words = re.sub(r"[^\w-]+", "_", (one.phrase or "part").lower())[:40]
    return f"{number:02d}_{words}.png"
