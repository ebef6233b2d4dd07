"""The command line: a registry that each room's commands enter.

A command is a module with `HELP: str`, `add_arguments(parser)` and `main(args) -> int`; `COMMANDS` names it. A module
with `HELP` and `COMMANDS` of its own holds further commands instead: `objectcompose evaluate multigen`. Modules are
imported only for the command that was asked for, and for its help.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from objectcompose import __version__
from objectcompose.errors import ObjectComposeError


COMMANDS: dict[str, str] = {
    "evaluate": "objectcompose.evaluation.command",
    "generate": "objectcompose.pipelines.generate",
    "ground": "objectcompose.grounding.command",
    "ground-captions": "objectcompose.training.ground_captions",
}


def _overview(program: str, commands: Mapping[str, str], description: str) -> argparse.ArgumentParser:
    names = ", ".join(sorted(commands))
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=f"Commands: {names}. `{program} COMMAND --help` explains one.",
    )
    parser.add_argument("--version", action="version", version=f"objectcompose {__version__}")
    parser.add_argument("command", choices=sorted(commands), metavar="COMMAND", help=f"one of: {names}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` by default.

    Returns:
        Exit code: the command's own, or 2 for input that it cannot use (printed as one line on stderr).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _run("objectcompose", COMMANDS, "Compose several objects in one picture.", arguments)


def _run(program: str, commands: Mapping[str, str], description: str, arguments: list[str]) -> int:
    name = _overview(program, commands, description).parse_args(arguments[:1]).command
    command = import_module(commands[name])
    program = f"{program} {name}"
    further = getattr(command, "COMMANDS", None)
    if further is not None:
        return _run(program, further, command.HELP, arguments[1:])
    parser = argparse.ArgumentParser(prog=program, description=command.HELP)
    command.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments[1:])  # so that options may stand before and between phrases
    try:
        return int(command.main(args) or 0)
    except ObjectComposeError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
