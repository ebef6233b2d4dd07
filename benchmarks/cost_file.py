"""What the cost benchmarks share: their options, and how their result files are written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measure import MIN_PAIRS
from objectcompose.evaluation.results import RESULTS_FOLDER, Metrics, write_result


def cost_parser(description: str | None, pairs: int = MIN_PAIRS) -> argparse.ArgumentParser:
    """Parser with the options that every cost benchmark has; `pairs` is the default number of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="of times and FLOPs; memory uses CUDA where there is one")
    parser.add_argument("--pairs", type=int, default=pairs, help="timed runs of each side, at least 7 (%(default)s)")
    parser.add_argument("--folder", default=str(RESULTS_FOLDER), help="where the result goes (%(default)s)")
    return parser


def parse_cost(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ends the program where there are too few pairs for a ratio."""
    args = parser.parse_args(argv)
    if args.pairs < MIN_PAIRS:
        parser.error(f"`--pairs` must be at least {MIN_PAIRS}, got {args.pairs}.")
    return args


def write_cost(
    script: str,
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    metrics_of_rows: Callable[[list[dict[str, Any]]], Metrics],
    protocol: str,
    name: str | None = None,
) -> int:
    """Write the result file of a benchmark and print its figures; returns 0, for `main`.

    Args:
        script: the benchmark's module, without package.
        args: of the run; all but the folder become the command in the file.
        rows: what was measured.
        metrics_of_rows: the module's public function of this name.
        protocol: in words.
        name: of the result file; default: that of the script.
    """
    metrics = metrics_of_rows(rows)
    given = {key: value for key, value in vars(args).items() if key != "folder" and value is not False}
    options = [f"--{key.replace('_', '-')}{'' if value is True else f' {value}'}" for key, value in given.items()]
    write_result(
        name or script,
        metrics,
        rows,
        command=" ".join([f"python -m benchmarks.{script}", *options]),
        seeds=[0],
        protocol=protocol,
        recompute=f"benchmarks.{script}:metrics_of_rows",
        folder=args.folder,
    )
    for key, value in metrics.items():
        print(f"{key}: {value:.4f}")
    return 0
