"""The package as installed: folders, public names, command line, and that rooms import leftward only."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import objectcompose
from objectcompose import __main__ as command_line
from objectcompose.errors import LayoutError


ROOT = Path(__file__).resolve().parents[2]
PAGES_FOR_USERS = [ROOT / "README.md", *sorted(ROOT.glob("docs/methods/*.md"))]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
# a room imports only from rooms to its left; grounding, whose ground truth toybox is, stands just behind it
LEFT_TO_RIGHT = [
    {"errors"},
    {"command_help", "files", "checkout", "processes"},
    {"layout_fields"},
    {"layout"},
    {"attention_processors"},
    {"adapters"},
    {"toybox"},
    {"grounding"},
    {"pipelines"},
    {"training"},
    {"evaluation"},
    {"examples"},
]


def test_package_list_names_every_folder_with_code():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert folders == set(SETUPTOOLS["package-dir"].values())
    assert set(SETUPTOOLS["packages"]) == set(SETUPTOOLS["package-dir"])
    nested = [path for folder in folders for path in (ROOT / folder).glob("*/__init__.py")]
    assert not nested, "rooms stay flat: a nested package would be missing from the wheel"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*.py")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_rooms_import_leftward_only(path):
    room = path.parent.name if path.parent.name != "objectcompose" else path.stem
    rank = {name: index for index, names in enumerate(LEFT_TO_RIGHT) for name in names}
    if room not in rank:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("objectcompose."):
            target = node.module.split(".")[1]
            assert target == room or rank[target] < rank[room], f"line {node.lineno}: {room} imports {target}"


def test_public_names_of_type_checkers_and_of_the_table_agree():
    for_checkers = set(re.findall(r" as (\w+)\n", (ROOT / "objectcompose" / "__init__.py").read_text()))
    assert for_checkers == set(objectcompose._PUBLIC)
    assert for_checkers <= set(dir(objectcompose))


@pytest.mark.parametrize("name", sorted(objectcompose._PUBLIC))
def test_public_name_loads(name):
    assert getattr(objectcompose, name).__name__ == name


@pytest.mark.parametrize("page", PAGES_FOR_USERS, ids=lambda path: path.name)
def test_pages_for_users_import_public_names_only(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    imports = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module.partition(".")[0] == "objectcompose"]
    assert ours and all(node.module in ("objectcompose", "objectcompose.toybox.weights") for node in ours)
    named = {alias.name for node in ours if node.module == "objectcompose" for alias in node.names}
    assert named <= set(objectcompose._PUBLIC)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = objectcompose.no_such_name


def test_import_is_light():
    program = "import sys, objectcompose; print([n for n in ('torch', 'diffusers', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class _Command:
    """What a room's command module looks like."""

    HELP = "Says what it was given."

    @staticmethod
    def add_arguments(parser):
        parser.add_argument("--count", type=int, required=True)

    @staticmethod
    def main(args):
        if args.count < 0:
            raise LayoutError(f"`count` must be at least 0,\n   got {args.count}.")
        return args.count


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(sys.modules, "tests.package.made_up_command", _Command)
    monkeypatch.setitem(command_line.COMMANDS, "made-up", "tests.package.made_up_command")


def test_command_line_runs_a_registered_command(registered):
    assert command_line.main(["made-up", "--count", "0"]) == 0
    assert command_line.main(["made-up", "--count", "3"]) == 3


def test_command_line_prints_our_errors_as_one_line(registered, capsys):
    assert command_line.main(["made-up", "--count", "-1"]) == 2
    assert capsys.readouterr().err == "objectcompose made-up: `count` must be at least 0, got -1.\n"


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["made-up", "--no-such-option"]])
def test_command_line_refuses_wrong_usage(registered, arguments):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize("name", sorted(command_line.COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main([name, "--help"])
    assert stopped.value.code == 0
    assert name in capsys.readouterr().out


def test_every_function_and_test_named_in_papers_exists():
    text = (ROOT / "PAPERS.md").read_text(encoding="utf-8")
    functions, tests = re.findall(r"`([a-z_]+)\.([a-z_]+)\.(\w+)`", text), re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert len(functions) >= 9 and len(tests) == len(functions)
    for room, module, name in functions:
        assert hasattr(import_module(f"objectcompose.{room}.{module}"), name)
    for path in tests:
        assert (ROOT / path).is_file(), path
