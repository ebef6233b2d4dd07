"""The command line: a registry that each room's commands enter.

A command is a module with `HELP: str`, `add_arguments(parser)` and `main(args) -> int`; `COMMANDS` names it. Command
modules are imported only for the command that was asked for, and for its help.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from objectcompose import __version__
from objectcompose.errors import ObjectComposeError


COMMANDS: dict[str, str] = {
    "generate": "objectcompose.pipelines.generate",
    "ground": "objectcompose.grounding.command",
}


def _overview() -> argparse.ArgumentParser:
    names = ", ".join(sorted(COMMANDS))
    parser = argparse.ArgumentParser(
        prog="objectcompose",
        description="Compose several objects in one picture.",
        epilog=f"Commands: {names}. `objectcompose COMMAND --help` explains one.",
    )
    parser.add_argument("--version", action="version", version=f"objectcompose {__version__}")
    parser.add_argument("command", choices=sorted(COMMANDS), metavar="COMMAND", help=f"one of: {names}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` by default.

    Returns:
        Exit code: the command's own, or 2 for input that it cannot use (printed as one line on stderr).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = _overview().parse_args(arguments[:1]).command
    command = import_module(COMMANDS[name])
    parser = argparse.ArgumentParser(prog=f"objectcompose {name}", description=command.HELP)
    command.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments[1:])  # so that options may stand before and between phrases
    try:
        return int(command.main(args) or 0)
    except ObjectComposeError as error:
        print(f"objectcompose {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
