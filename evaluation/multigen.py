"""`objectcompose evaluate multigen`: how many of the named objects a picture shows (TokenCompose, arXiv:2312.03626).

    objectcompose evaluate multigen --out outputs/multigen                                     # the embedded toybox
    objectcompose evaluate multigen --model stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda \\
        --prompts coco_obj_comp_5_1k.json --out outputs/multigen-sd

MGk is the share of pictures in which at least k of the prompt's categories are found; its standard deviation is the
population's, over rounds, as in the authors' script.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.evaluation.category_names import ADE20K_CATEGORIES, COCO_CATEGORIES
from objectcompose.evaluation.presence import (
    PresenceMetric,
    add_detector_arguments,
    add_painting_arguments,
    run_presence,
)
from objectcompose.evaluation.prompt_lists import multigen_prompts
from objectcompose.evaluation.prompts import PromptRecord, read_multigen
from objectcompose.evaluation.report import share_metrics
from objectcompose.evaluation.toybox_prompts import toybox_pairs, toybox_prompts
from objectcompose.toybox.weights import active_preset


HELP = "MULTIGEN: the share of pictures that show at least 2, 3, 4, 5 of the named objects."
AT_LEAST = (2, 3, 4, 5)
MULTIGEN_LISTS = ("coco", "ade20k", "toybox-dev", "toybox-test", "toybox-pairs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--prompts",
        metavar="LIST",
        help=f"an official JSON file, or one of {', '.join(MULTIGEN_LISTS)}; default: toybox-test without --model",
    )
    add_painting_arguments(parser, rounds=10)
    add_detector_arguments(parser, "owlv2")


def main(args: argparse.Namespace) -> int:
    """Run the command; see `run_presence`."""
    records = multigen_list(args.prompts, has_model=args.model is not None)
    name = args.prompts or "toybox-test"
    protocol = f"MULTIGEN on the list {name}: mg<k> counts pictures with at least k of the named categories."
    return run_presence(args, records, PresenceMetric("multigen", multigen_metrics, "owlv2", protocol))


def multigen_list(name: str | None, has_model: bool) -> list[PromptRecord]:
    """The prompts of a file or a list's name.

    Raises:
        LayoutError: neither, or a broken file.
    """
    if name is None and has_model:
        raise ObjectComposeError(f"`--prompts` must be a JSON file or one of {', '.join(MULTIGEN_LISTS)}, got none.")
    if name == "coco":
        return multigen_prompts(COCO_CATEGORIES)
    if name == "ade20k":
        return multigen_prompts(ADE20K_CATEGORIES)
    if name == "toybox-pairs":
        return toybox_pairs(active_preset())
    if name in (None, "toybox-dev", "toybox-test"):
        return toybox_prompts(active_preset(), "test" if name is None else name.removeprefix("toybox-"))
    if not Path(name).is_file():
        raise LayoutError(f"`--prompts` must be a JSON file or one of {', '.join(MULTIGEN_LISTS)}, got {name!r}.")
    return read_multigen(name)


def multigen_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """MG2 to MG5 in per cent.

    Args:
        rows: of `presence_rows`.

    Returns:
        `mg<k>` over the prompts that name at least k categories, left out where there are none, its bounds, and
        of two rounds and more `mg<k>.std`, the population standard deviation (ddof 0) of the rounds' values.
    """
    metrics: dict[str, float] = {}
    for least in AT_LEAST:
        counted = [row for row in rows if len(row["named"]) >= least]
        if not counted:
            continue
        hits = [float(len(row["found"]) >= least) for row in counted]
        metrics |= share_metrics(f"mg{least}", hits, [row["prompt"] for row in counted])
        rounds = np.array([row["round"] for row in counted])
        values = [100 * np.mean(np.array(hits)[rounds == number]) for number in np.unique(rounds)]
        if len(values) > 1:  # the 0 of a single round would say that rounds do not differ
            metrics[f"mg{least}.std"] = float(np.std(values))
    return metrics
