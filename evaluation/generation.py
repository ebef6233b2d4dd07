"""Pictures for a list of prompts: always from the same noise, by any number of processes, resumable.

A picture's noise follows from its prompt's id and its round, so that all models are compared on the same noise. The
pictures are cut into batches before they are shared out, and a batch that was broken off is painted again as a whole:
neither the number of processes nor an interruption changes a picture. Another batch size changes it by what
floating-point sums differ by, at most a level or two out of 255 in some pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from objectcompose.errors import CheckpointError, ImageInputError, ObjectComposeError
from objectcompose.evaluation.pipeline_identity import pipeline_identity
from objectcompose.evaluation.prompt_lists import stable_number
from objectcompose.evaluation.prompts import PromptRecord, check_records, prompts_digest
from objectcompose.files import write_atomically, write_png
from objectcompose.processes import groups_of_process


MANIFEST_FILE = "manifest.json"
_FORMAT = 1
#: Changes whenever `picture_seed` does.
SEED_RULE = "sha256 of [id, round] as JSON, first 63 bits; torch's CPU generator"


@dataclass(frozen=True)
class Picture:
    """One picture of a list: its prompt, its round from 0 on, and its file."""

    record: PromptRecord
    round: int
    path: Path


def picture_seed(record_id: str, round_number: int) -> int:
    """Seed of a picture's noise."""
    return stable_number(record_id, round_number)


def picture_name(record: PromptRecord, round_number: int) -> str:
    """File name without suffix, as MULTIGEN's scripts have it."""
    return f"{record.id}_{round_number}"


def list_pictures(
    records: Sequence[PromptRecord],
    rounds: int,
    folder: str | Path,
    name: Callable[[PromptRecord, int], str] = picture_name,
) -> list[Picture]:
    """All pictures of a list, round by round, whether they are there or not.

    Raises:
        LayoutError: no prompt, or an id twice.
        ObjectComposeError: `rounds` is below 1.
    """
    check_records(records)
    if rounds < 1:
        raise ObjectComposeError(f"`rounds` must be at least 1, got {rounds}.")
    folder = Path(folder)
    return [
        Picture(record, number, folder / f"{name(record, number)}.png")
        for number in range(rounds)
        for record in records
    ]


def require_pictures(pictures: Sequence[Picture]) -> None:
    """Raise ImageInputError unless all files are there; says how many are not."""
    missing = [picture.path for picture in pictures if not picture.path.is_file()]
    if missing:
        raise ImageInputError(
            f"`pictures` must all be there to be scored: {len(missing)} of {len(pictures)} are missing in"
            f" {missing[0].parent}, such as {missing[0].name}."
        )


def paint_records(
    pipeline: Any,
    records: Sequence[PromptRecord],
    folder: str | Path,
    *,
    rounds: int = 1,
    steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    call_arguments: Callable[[Sequence[PromptRecord]], dict[str, Any]] | None = None,
    call_identity: str | None = None,
    name: Callable[[PromptRecord, int], str] = picture_name,
    state: PartialState | None = None,
) -> list[Picture]:
    """Paint what is missing of a list's pictures, this process its share, and wait for the others.

    Args:
        pipeline: any text-to-image pipeline of diffusers' kind, on its device.
        records: the prompts.
        folder: made when missing; `<id>_<round>.png` and a manifest of what they were painted with.
        rounds: pictures per prompt; more may be added to a folder later.
        steps, guidance_scale, negative_prompt, height, width: of the pipeline's call; sides in pixels, None: its own.
        batch_size: pictures at once.
        call_arguments: further arguments of the call for a batch of prompts, such as `objects`, one entry per prompt.
        call_identity: what `call_arguments` gives, in words or as a digest: it must change with it.
        name: file name without suffix for a prompt and a round.
        state: the processes; default: those of the launcher.

    Returns:
        All pictures of the list; their files are there.

    Raises:
        ObjectComposeError: a number is out of range, or `call_arguments` comes without `call_identity`.
        LayoutError: no prompt, or an id twice.
        CheckpointError: the folder holds pictures of other weights, prompts or settings; says which.
    """
    pictures = list_pictures(records, rounds, folder, name)
    if (call_arguments is None) != (call_identity is None):
        raise ObjectComposeError("`call_arguments` and `call_identity` must be given together or not at all.")
    for label, number in (("steps", steps), ("batch_size", batch_size)):
        if number < 1:
            raise ObjectComposeError(f"`{label}` must be at least 1, got {number}.")
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    state = state or PartialState()
    manifest = {
        "format": _FORMAT,
        "seed_rule": SEED_RULE,
        "prompts": prompts_digest(records),
        "settings": {**settings, "negative_prompt": negative_prompt, "call": call_identity},
        "model": pipeline_identity(pipeline),
    }
    check_manifest(folder, manifest, is_writer=state.is_main_process)
    state.wait_for_everyone()  # nobody paints into a folder whose manifest is not yet there
    pipeline.set_progress_bar_config(disable=True)
    of_round = [pictures[start : start + len(records)] for start in range(0, len(pictures), len(records))]
    bar = tqdm(total=len(pictures), desc="paint", unit="picture", disable=not state.is_main_process)
    for one_round in of_round:  # batches never span rounds, so that further rounds do not move their borders
        for group in groups_of_process(one_round, batch_size, state):
            if not all(picture.path.is_file() for picture in group):
                texts = [picture.record.text for picture in group]
                extra = {} if call_arguments is None else call_arguments([picture.record for picture in group])
                if negative_prompt is not None:
                    extra["negative_prompt"] = [negative_prompt] * len(group)
                _paint_group(pipeline, group, texts, {**settings, **extra})
            bar.update(len(group) * state.num_processes)
    bar.close()
    state.wait_for_everyone()
    return pictures


def _paint_group(pipeline: Any, group: Sequence[Picture], texts: list[str], arguments: dict[str, Any]) -> None:
    generators = [
        torch.Generator("cpu").manual_seed(picture_seed(picture.record.id, picture.round)) for picture in group
    ]
    images = pipeline(texts, generator=generators, **arguments).images
    for picture, image in zip(group, images, strict=True):
        if not picture.path.is_file():
            write_png(picture.path, image)


def check_manifest(folder: str | Path, manifest: dict[str, Any], is_writer: bool = True) -> None:
    """Write a folder's manifest, or compare it with the one that is there.

    Args:
        folder: of the pictures; made when missing.
        manifest: what they are painted with, as JSON values.
        is_writer: False for the processes that only compare.

    Raises:
        CheckpointError: the folder has another manifest, an unreadable one, or pictures without one.
    """
    path = Path(folder) / MANIFEST_FILE
    if path.is_file():
        differences = _differences(read_manifest(folder) or {}, json.loads(json.dumps(manifest)))
        if differences:
            raise CheckpointError(
                f"`folder` {folder} holds pictures that were painted otherwise: {'; '.join(differences)}. Take another"
                " folder, or empty this one."
            )
        return
    if is_writer:
        path.parent.mkdir(parents=True, exist_ok=True)
        if any(path.parent.glob("*.png")):
            raise CheckpointError(f"`folder` {folder} holds pictures without {MANIFEST_FILE}: take another folder.")
        write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """What the folder's pictures were painted with; None where nothing says so.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError(f"it must be an object, got {type(manifest).__name__}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`folder` {folder} has an unreadable {MANIFEST_FILE}: {error}.") from error
    return manifest


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted({*there, *here}):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key} is {old!r} there and {new!r} here")
    return lines
