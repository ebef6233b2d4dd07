"""`objectcompose evaluate pairs`: both objects of a pair (Attend-and-Excite's 276 prompts, or toybox's).

    objectcompose evaluate pairs --out outputs/pairs                                           # the embedded toybox
    objectcompose evaluate pairs --model stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda \\
        --out outputs/pairs-sd

Separate-and-Enhance (arXiv:2312.06712) counts with Detic; an open-vocabulary detector stands in for it here, so the
figures compare with one another and not with the paper's. On toybox the kinds are pairs that training never shows
("held-out") and others ("seen").
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
from objectcompose.evaluation.prompt_lists import pair_prompts
from objectcompose.evaluation.report import share_metrics
from objectcompose.evaluation.toybox_prompts import toybox_pairs
from objectcompose.toybox.weights import active_preset


HELP = "The share of pictures that show both objects of a pair, by kind of pair."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_painting_arguments(parser, rounds=64)
    add_detector_arguments(parser, "owlv2")


def main(args: argparse.Namespace) -> int:
    """Run the command; see `run_presence`."""
    records = toybox_pairs(active_preset()) if args.model is None else pair_prompts()
    protocol = "Pairs: pictures with both objects."
    return run_presence(args, records, PresenceMetric("pairs", pair_metrics, "owlv2", protocol))


def pair_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`both` over all rows and `both.<kind>` of each kind, in per cent, with bounds.

    Args:
        rows: of `presence_rows`.
    """
    metrics: dict[str, float] = {}
    for kind in ("", *sorted({row["kind"] for row in rows} - {""})):
        counted = [row for row in rows if not kind or row["kind"] == kind]
        both = [float(len(row["found"]) == len(row["named"])) for row in counted]
        name = f"both.{kind.replace('-', '_')}" if kind else "both"
        metrics |= share_metrics(name, both, [row["prompt"] for row in counted])
    return metrics
