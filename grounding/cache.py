"""Results on disk, keyed by content: the pixels, the phrases, and the weights and settings of the models.

One file per result, with the masks as packed bits and the rest as JSON in its header, so that it is there whole or not
at all. A file that cannot be read, or whose checksum is wrong, is worth nothing and is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from objectcompose.errors import ObjectComposeError
from objectcompose.files import write_atomically
from objectcompose.grounding.detection import Detection


#: Changes with everything that changes results without changing weights or settings.
CACHE_FORMAT = 1
CACHE_VARIABLE = "OBJECTCOMPOSE_CACHE"


def default_cache_folder() -> Path:
    """`$OBJECTCOMPOSE_CACHE/grounding`, else `objectcompose/grounding` in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given) / "grounding"
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "objectcompose" / "grounding"


def result_key(picture: Image.Image, phrases: Sequence[str] | None, identity: str) -> str:
    """64 hex digits that name a result.

    Args:
        picture: the pixels.
        phrases: in their order; None for text-free segmentation.
        identity: of everything that computes the result (see `Grounder.identity`).
    """
    asked = json.dumps([CACHE_FORMAT, picture.mode, picture.size, phrases, identity])
    return hashlib.sha256(asked.encode() + b"\0" + picture.tobytes()).hexdigest()


class GroundingCache:
    """A folder of results; safe for several processes at once, since files are moved into place.

    Args:
        folder: made when the first result is written; None: `default_cache_folder()`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_cache_folder() if folder is None else Path(folder)

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> list[Detection] | None:
        """The result of a key; None where there is none, or none that is sound."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                header, bits = file.metadata(), file.get_tensor("masks")
            rows = json.loads(header["detections"])
            if header["sha256"] != _checksum(header["detections"], bits):
                return None
            return [_detection_of_row(row, bits) for row in rows]
        except (OSError, SafetensorError, ObjectComposeError, ValueError, KeyError, TypeError, IndexError):
            return None

    def store(self, key: str, found: Sequence[Detection]) -> None:
        """Write a result.

        Raises:
            ObjectComposeError: the folder cannot be written.
        """
        masks = [one.mask for one in found if one.mask is not None]
        bits = torch.from_numpy(np.packbits(torch.stack(masks).bool().numpy(), axis=-1)) if masks else torch.empty(0)
        bits = bits.to(torch.uint8)
        numbers = iter(range(len(masks)))
        rows = [
            {
                "phrase": one.phrase,
                "box": one.box,
                "score": one.score,
                "mask": None if one.mask is None else [next(numbers), *one.mask.shape],
            }
            for one in found
        ]
        text = json.dumps(rows)
        content = save({"masks": bits}, {"detections": text, "sha256": _checksum(text, bits)})
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise ObjectComposeError(
                f"`cache` must be a folder that can be written, got {str(self.folder)!r}: {error.strerror or error}."
            ) from error


def _checksum(text: str, bits: torch.Tensor) -> str:
    return hashlib.sha256(text.encode() + b"\0" + bits.numpy().tobytes()).hexdigest()


def _detection_of_row(row: dict, bits: torch.Tensor) -> Detection:
    mask = None
    if row["mask"] is not None:
        number, height, width = row["mask"]
        unpacked = np.unpackbits(bits[number].numpy(), axis=-1, count=width)
        mask = torch.from_numpy(unpacked.reshape(height, width).astype(np.float32))
    return Detection(row["phrase"], tuple(row["box"]), mask, row["score"])
