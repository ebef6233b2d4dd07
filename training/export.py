"""What a finished fine-tuning run leaves: weights in the form that loads most easily, and their card."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from objectcompose.adapters.base_identity import BaseIdentity
from objectcompose.adapters.folders import folder_saved_whole
from objectcompose.adapters.model_card import ModelCardFacts, write_model_card
from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.errors import ObjectComposeError
from objectcompose.training.common import current_commit
from objectcompose.training.trainable import LORA_ADAPTER, TrainModules


LORA_NAME = "pytorch_lora_weights.safetensors"


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Enter the options of the exported weights and their card."""
    add_card_arguments(parser)
    group = parser.add_argument_group("export")
    group.add_argument("--train_modules", choices=("unet", "attn2", "to_k", "lora"), help="what is trained")
    group.add_argument("--lora_rank", type=int, default=8, help="of --train_modules lora")
    group.add_argument(
        "--delta_rank", type=int, default=None, help="export differences at this rank instead of the whole UNet"
    )


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Enter what the card must be told."""
    group = parser.add_argument_group("card")
    group.add_argument("--base_license", default="see the base model's card", help="of the base")
    group.add_argument("--data_license", default="see the data set's card", help="of the data")
    group.add_argument("--weights_license", default="other", help="of the result; an identifier that the Hub knows")


def export_weights(
    folder: Path,
    unet: Any,
    modules: TrainModules,
    before: Mapping[str, torch.Tensor] | None,
    made_for: BaseIdentity,
    card: ModelCardFacts,
    delta_rank: int | None = None,
) -> Path:
    """Write trained weights and their card; the folder is whole or not there.

    Args:
        folder: where to.
        unet: the trained UNet.
        modules: what was trained. "unet" gives `unet/`, for `UNet2DConditionModel.from_pretrained(folder,
            subfolder="unet")`; "lora" a file for `load_lora_weights`; the others a `UNetDelta`.
        before: the trained parameters' values before training, by name; None where nothing needs them ("lora", and
            "unet" without a rank).
        made_for: the base.
        card: what the card says.
        delta_rank: a `UNetDelta` of this rank also for "unet".

    Returns:
        The folder.

    Raises:
        CheckpointFileError: it cannot be written.
        CheckpointError: training changed nothing, or the rank is below 1.
    """
    is_delta = modules in ("attn2", "to_k") or delta_rank is not None
    marker = LORA_NAME if modules == "lora" else DELTA_NAME if is_delta else "unet/config.json"
    with folder_saved_whole(folder, marker) as target:
        if modules == "lora":
            from peft.utils import get_peft_model_state_dict

            layers = get_peft_model_state_dict(unet, adapter_name=LORA_ADAPTER)
            StableDiffusionPipeline.save_lora_weights(target, unet_lora_layers=layers, weight_name=LORA_NAME)
        elif is_delta:
            assert before is not None
            after = {name: parameter for name, parameter in unet.named_parameters() if name in before}
            UNetDelta.between(before, after, made_for, delta_rank, notes={"command": card.command}).save(
                target / DELTA_NAME
            )
        else:
            unet.save_pretrained(target / "unet")
        write_model_card(target, card)
    return folder


def loading_line(folder: Path) -> str:
    """The line of Python that loads what a script left; scripts end by printing it.

    Args:
        folder: of `export_weights`, of an adapter or a pipeline, or the output folder of `learn_mifo`.
    """
    place = repr(str(folder))
    if (folder / "model_index.json").is_file():
        return f"MIFOPipeline.from_pretrained({place})"
    if (folder / LORA_NAME).is_file():
        return f"pipe.load_lora_weights({place})"
    if (folder / DELTA_NAME).is_file():
        return f"UNetDelta.load({str(folder / DELTA_NAME)!r}).attach(pipe.unet)"
    if (folder / "unet" / "config.json").is_file():
        return f'UNet2DConditionModel.from_pretrained({place}, subfolder="unet")'
    if (folder / "config.json").is_file():
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
        return f"{kind}.from_pretrained({place})"
    return f"load_instances(pipe, {place})"


def values_before(
    parameters: Mapping[str, torch.Tensor], modules: TrainModules, delta_rank: int | None
) -> dict[str, torch.Tensor] | None:
    """Copies of the parameters on the CPU, where `export_weights` will need them.

    Raises:
        ObjectComposeError: see `check_delta_rank`.
    """
    check_delta_rank(modules, delta_rank)
    if modules == "lora" or (modules == "unet" and delta_rank is None):
        return None
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}


def check_delta_rank(modules: TrainModules, delta_rank: int | None, whole_pipeline: bool = False) -> None:
    """Raise ObjectComposeError for a rank below 1, and for one that would change nothing.

    Args:
        modules: what is trained; "lora" has a rank of its own.
        delta_rank: as given.
        whole_pipeline: "unet" is written as part of a whole pipeline, so that there is no delta.
    """
    if delta_rank is None:
        return
    if delta_rank < 1:
        raise ObjectComposeError(f"`delta_rank` must be at least 1, got {delta_rank}.")
    if modules == "lora":
        raise ObjectComposeError(
            f'`delta_rank` must not be given with "lora", which has `lora_rank`, got {delta_rank}.'
        )
    if modules == "unet" and whole_pipeline:
        raise ObjectComposeError(
            f'`delta_rank` needs `train_modules` "attn2" or "to_k", got {delta_rank} with "unet", which also trains'
            " the text encoder and is written as a whole pipeline."
        )


def card_of_run(
    args: argparse.Namespace, title: str, summary: str, data: str, base_model: str, command: str
) -> ModelCardFacts:
    """The card of a run that `command` starts."""
    return ModelCardFacts(
        title=title,
        summary=summary,
        base_model=base_model,
        base_license=args.base_license,
        code_license="Apache-2.0",
        weights_license=args.weights_license,
        data=data,
        data_license=args.data_license,
        command=command,
        commit=current_commit(),
    )
