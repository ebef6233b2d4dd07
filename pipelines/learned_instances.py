"""What `objectcompose.training.learn_mifo` leaves, put on a pipeline: placeholders, and LoRA or a delta if any."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from objectcompose.adapters.folders import loading_errors
from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.errors import CheckpointError, MissingPackageError


EMBEDDING_FOLDER, WEIGHT_FOLDER = "embeddings", "weights"
_LORA_NAME = "pytorch_lora_weights.safetensors"


def learned_names(folder: str | Path) -> dict[str, Path]:
    """The placeholders of a run's output folder and their files, `<asset0>` before `<asset10>`.

    Raises:
        CheckpointError: there is none, or a file is no embedding.
    """
    place = Path(folder) / EMBEDDING_FOLDER
    paths = sorted(place.glob("*.safetensors"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.stem)])
    if not paths:
        raise CheckpointError(f"`folder` {str(folder)!r} must hold {EMBEDDING_FOLDER}/*.safetensors, got none.")
    names = {}
    for path in paths:
        names[_name_and_width(path)[0]] = path
    return names


def load_instances(pipeline: Any, folder: str | Path) -> list[str]:
    """Load learned instances; the pipeline is changed.

    Args:
        pipeline: with tokenizer and text encoder of the base that they were learned on. Placeholders that it has
            already, as a checkpoint of stage 2 has them, stay as they are.
        folder: output of `learn_mifo`, or one laid out like it: `embeddings/*.safetensors`, and LoRA layers or a
            `UNetDelta` in `weights/` where stage 2 trained them. These come with placeholders that are new: a second
            call changes nothing.

    Returns:
        The placeholders' names.

    Raises:
        CheckpointError: there are none, they are of another base, the pipeline knows their names from another run,
            or stage 2 left a whole pipeline, which is loaded in place of the base. The pipeline is as it was then.
        MissingPackageError: LoRA layers need peft.
    """
    names = learned_names(folder)
    weights = Path(folder) / WEIGHT_FOLDER
    table, known = pipeline.text_encoder.get_input_embeddings().weight, pipeline.tokenizer.get_vocab()
    width = table.shape[1]
    new = {name: path for name, path in names.items() if name not in known}
    if new and (weights / "model_index.json").is_file():
        raise CheckpointError(
            f"`folder` {str(folder)!r} holds a whole fine-tuned pipeline: load it with"
            f" `MIFOPipeline.from_pretrained({str(weights)!r})`, in commands with `--model {weights}`."
        )
    for name, path in names.items():
        found = _name_and_width(path)[1]
        if found != width:
            raise CheckpointError(
                f"`folder` {str(folder)!r} must be of this pipeline's base: {name} has {found} numbers a vector,"
                f" the text encoder {width}."
            )
        if name in known:
            _check_same(name, path, table, known)
    if new and (weights / DELTA_NAME).is_file():
        UNetDelta.load(weights / DELTA_NAME).attach(pipeline.unet)
    for path in new.values():
        pipeline.load_textual_inversion(str(path.parent), weight_name=path.name)
    if new and (weights / _LORA_NAME).is_file():
        with loading_errors(str(weights), refuses_pickles=True):
            try:
                pipeline.load_lora_weights(str(weights), weight_name=_LORA_NAME, use_safetensors=True)
            except ImportError as error:
                raise MissingPackageError(
                    f'LoRA layers in {str(weights)!r} need peft: pip install "objectcompose[train]" ({error}).'
                ) from error
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                raise CheckpointError(f"`folder` {str(weights)!r} cannot be loaded: {error}.") from error
    return list(names)


def _check_same(name: str, path: Path, table: torch.Tensor, known: Mapping[str, int]) -> None:
    """Refuse an embedding other than the table's under its name, but for what a cast rounds off."""
    vectors = load_file(path)[name].reshape(-1, table.shape[1])
    # diffusers calls the further vectors of a placeholder <name>_1, <name>_2 and so on
    rows = [known.get(name if not number else f"{name}_{number}") for number in range(len(vectors))]
    if table.is_meta:  # offloaded by layers: nothing to look at
        return
    if None in rows or not torch.allclose(table[rows].float().cpu(), vectors.float(), rtol=1e-2, atol=1e-4):
        raise CheckpointError(
            f"{str(path)!r} holds {name}, which this pipeline knows from another run: learn one of the two under"
            " another name (`--names`), or load it into a pipeline of its own."
        )


def _name_and_width(path: Path) -> tuple[str, int]:
    try:
        with safe_open(path, framework="pt") as content:
            [name] = content.keys()
            return name, content.get_slice(name).get_shape()[-1]
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} must hold one embedding under its placeholder's name: {error}."
        ) from error
