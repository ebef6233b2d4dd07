"""`objectcompose evaluate compbench`: pictures for the official scorers of T2I-CompBench (arXiv:2307.06350).

    objectcompose evaluate compbench --prompts color_val.txt \\
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda --out outputs/color_val

Its scorers (BLIP-VQA, UniDet, CLIP) are packages of their own and read a folder of files `<prompt>_<6 digits>.png`:
that is what this command leaves in the output folder's `pictures`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from objectcompose.errors import LayoutError
from objectcompose.evaluation.presence import PICTURE_FOLDER, add_painting_arguments, chosen_records, paint_for
from objectcompose.evaluation.prompts import PromptRecord, read_prompt_lines
from objectcompose.processes import process_state


HELP = "Paint T2I-CompBench's prompts into the folder that its official scorers read."
_MAX_NAME_BYTES = 255  # of a file, on common file systems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE.txt", help="one prompt per line, such as color_val.txt"
    )
    add_painting_arguments(parser, rounds=10)


def main(args: argparse.Namespace) -> int:
    """Run the command; see `paint_for`."""
    records = chosen_records(read_prompt_lines(args.prompts), args)
    pictures = paint_for(args, records, compbench_names(records, args.rounds))
    if process_state(args.device).is_main_process:
        print(f"{len(pictures)} pictures: {args.out / PICTURE_FOLDER}")
    return 0


def compbench_names(records: Sequence[PromptRecord], rounds: int) -> Callable[[PromptRecord, int], str]:
    """Names without suffix: the prompt and a number that no other picture has; the first round counts first.

    Raises:
        LayoutError: a prompt cannot stand in a file's name, or there are more pictures than numbers.
    """
    if len(records) * rounds > 10**6:
        raise LayoutError(f"`prompts` times `rounds` must be at most 1000000, got {len(records) * rounds}.")
    for record in records:
        size = len(record.text.encode()) + len("_000000.png")
        if "/" in record.text or "\0" in record.text or size > _MAX_NAME_BYTES:
            raise LayoutError(
                f"`prompts` must fit into a file's name, without '/' and in {_MAX_NAME_BYTES} bytes with its number,"
                f" got {record.text!r}."
            )
    places = {record.id: place for place, record in enumerate(records)}
    return lambda record, number: f"{record.text}_{number * len(records) + places[record.id]:06d}"
