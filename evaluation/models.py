"""The model that is evaluated: a checkpoint, and what was trained on top of it."""

from __future__ import annotations

import argparse
from typing import Any

from objectcompose.pipelines.model_arguments import add_checkpoint_arguments, load_from_arguments


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which model is evaluated and where it runs."""
    add_checkpoint_arguments(parser).add_argument(
        "--safety-checker", action="store_true", help="keep the checkpoint's own, which blacks pictures out"
    )


def load_evaluated(args: argparse.Namespace, device: str, method: str = "token-compose", **parts: str | None) -> Any:
    """The pipeline that the arguments of `add_model_arguments` name; the rest is as for `load_from_arguments`."""
    pipeline = load_from_arguments(args, device, method, **parts)
    if not args.safety_checker:
        pipeline.register_modules(safety_checker=None)
    return pipeline
