"""`objectcompose evaluate visor`: object accuracy on prompts of two objects and a relation (VISOR, arXiv:2212.10015).

    objectcompose evaluate visor --out outputs/visor                                           # the embedded toybox
    objectcompose evaluate visor --model stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda \\
        --out outputs/visor-sd

The share of pictures that show both objects, wherever they are: VISOR's OA, which TokenCompose reports.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from objectcompose.evaluation.presence import (
    PresenceMetric,
    add_detector_arguments,
    add_painting_arguments,
    run_presence,
)
from objectcompose.evaluation.prompt_lists import spatial_prompts
from objectcompose.evaluation.report import share_metrics
from objectcompose.toybox.weights import active_categories


HELP = "VISOR's object accuracy: the share of pictures that show both objects of a spatial prompt."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_painting_arguments(parser, rounds=4)
    add_detector_arguments(parser, "owlvit")


def main(args: argparse.Namespace) -> int:
    """Run the command; see `run_presence`."""
    records = spatial_prompts(active_categories()) if args.model is None else spatial_prompts()
    protocol = "VISOR's object accuracy: pictures with both objects of a prompt with a spatial relation."
    return run_presence(args, records, PresenceMetric("visor", visor_metrics, "owlvit", protocol))


def visor_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`object_accuracy` in per cent with its bounds; pictures of one pair of objects are one group.

    Args:
        rows: of `presence_rows`.
    """
    both = [float(len(row["found"]) == len(row["named"])) for row in rows]
    return share_metrics("object_accuracy", both, [" ".join(sorted(row["named"])) for row in rows])
