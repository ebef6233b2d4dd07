"""What `--help` of commands and training scripts shows beside their options, read from docstrings.

A module's docstring holds its commands as an indented block, and a dataclass of options describes them under
`Attributes:`; neither is written a second time.
"""

import argparse
import inspect
import re


class _ScriptFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option, and the examples as they stand."""


def examples_epilog(docstring: str | None) -> str | None:
    """The commands in a module's docstring, under a heading; None if it has none."""
    blocks = re.findall(r"(?:^    .+\n)+", inspect.cleandoc(docstring or "") + "\n", re.M)
    return "examples:\n" + blocks[0].replace("    ", "  ", 1).replace("\n    ", "\n  ").rstrip() if blocks else None


def script_parser(docstring: str, shows_defaults: bool = True) -> argparse.ArgumentParser:
    """A parser that describes itself by the first line of a script's docstring and by its commands.

    Args:
        docstring: of the module.
        shows_defaults: behind the help of each option.
    """
    return argparse.ArgumentParser(
        description=docstring.splitlines()[0],
        epilog=examples_epilog(docstring),
        formatter_class=_ScriptFormatter if shows_defaults else argparse.RawDescriptionHelpFormatter,
    )


def attributes_help(options: type) -> dict[str, str]:
    """What the `Attributes:` of a class say, by name, as help of the options that set them."""
    section = (inspect.getdoc(options) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+(?:, \w+)*): (.+(?:\n {8}.+)*)", section, re.M)
    texts = {names: " ".join(text.split()).rstrip(".").replace("%", "%%") for names, text in found}
    return {name: text for names, text in texts.items() for name in names.split(", ")}
