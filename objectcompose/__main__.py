"""The command line: a registry that each sub-package's commands enter.

A command is a module with `HELP: str`, `add_arguments(parser)` and `main(args) -> int`; `COMMANDS` names it. A module
with `HELP` and `COMMANDS` of its own holds further commands instead: `objectcompose evaluate multigen`. Modules are
imported only for the command that was asked for.
"""

import argparse
import ast
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from objectcompose import __version__
from objectcompose.command_help import examples_epilog
from objectcompose.errors import ObjectComposeError


COMMANDS: dict[str, str] = {
    "evaluate": "objectcompose.evaluation.command",
    "generate": "objectcompose.pipelines.generate",
    "ground": "objectcompose.grounding.command",
    "ground-captions": "objectcompose.training.ground_captions",
}


def _overview(program: str, commands: Mapping[str, str], description: str) -> argparse.ArgumentParser:
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {_help_of(commands[name])}" for name in sorted(commands)]
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="\n".join(["commands:", *lines, "", f"`{program} COMMAND --help` explains one, with examples."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"objectcompose {__version__}")
    parser.add_argument("command", choices=sorted(commands), metavar="COMMAND", help="one of those below")
    return parser


def _help_of(module: str) -> str:
    """`HELP` of a command's module, which is read and not imported: that takes seconds."""
    if module in sys.modules:
        return str(sys.modules[module].HELP)
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    for statement in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "HELP":
            return str(ast.literal_eval(statement.value))
    raise AssertionError(f"{module} has no HELP")


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
    name = arguments[0] if arguments else ""
    if name not in commands:  # ends the program, with help or an error
        name = _overview(program, commands, description).parse_args(arguments[:1]).command
    command = import_module(commands[name])
    program = f"{program} {name}"
    further = getattr(command, "COMMANDS", None)
    if further is not None:
        return _run(program, further, command.HELP, arguments[1:])
    parser = argparse.ArgumentParser(
        prog=program,
        description=command.HELP,
        epilog=examples_epilog(command.__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments[1:])  # so that options may stand before and between phrases
    try:
        return int(command.main(args) or 0)
    except ObjectComposeError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
