"""Commands in README and docs: each is one that the package has, with options that it knows."""

import argparse
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from objectcompose.__main__ import COMMANDS, main
from objectcompose.adapters.folders import KNOWN_MIRRORS
from objectcompose.command_help import attributes_help, examples_epilog
from objectcompose.evaluation.command import COMMANDS as METRICS
from objectcompose.training.mifo_losses import MIFOLossOptions


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: After a command's own options, so that it runs in seconds.
SHORT = ["--max_train_steps", "2"]
SHORT_OF = {"learn_mifo": ["--stage2_steps", "1", "--reward_steps", "1"], "train_separate_enhance": []}


TRAINERS = ("train_token_compose", "train_separate_enhance", "train_locref", "train_object_prompt", "learn_mifo")
#: Modules whose help ends in examples, by how they are called.
EXAMPLES = {
    **{f"objectcompose {name}": module for name, module in COMMANDS.items() if name != "evaluate"},
    **{f"objectcompose evaluate {name}": module for name, module in METRICS.items()},
    **{f"objectcompose.training.{name}": f"objectcompose.training.{name}" for name in TRAINERS},
}


def commands_of(page):
    """Words of each command in a page's shell blocks, without comments; `...` stands for more, and is no command."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        yield from commands_in(block)


def commands_in(block):
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and "..." not in words:
            yield words


def module_of(words):
    """The module that a command runs, and its arguments; (None, []) of a command that is not ours."""
    for index, word in enumerate(words):
        if word.startswith("objectcompose.") and words[index - 1] == "-m":
            return word, words[index + 1 :]
    return None, []


def check(words):
    """Parse a command as the program would; ends the program where that fails."""
    module, arguments = module_of(words)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-][a-z -]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert words[1] in " ".join(targets).split(), words
    elif module and module.startswith("objectcompose.training."):
        import_module(module).create_parser().parse_args(arguments)
    elif module:
        assert find_spec(module), module
    elif words[0] == "objectcompose" and words[2:] != ["--help"]:
        command = import_module(COMMANDS[words[1]])
        rest = words[2:]
        if further := getattr(command, "COMMANDS", None):
            command, rest = import_module(further[rest[0]]), rest[1:]
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        parser.parse_intermixed_args(rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_these_options(page):
    for words in commands_of(page):
        check(words)


@pytest.mark.parametrize(("called", "module"), EXAMPLES.items(), ids=list(EXAMPLES))
def test_help_ends_in_examples_that_exist(called, module, capsys):
    epilog = examples_epilog(import_module(module).__doc__)
    found = list(commands_in(epilog.partition("\n")[2]))
    assert any(called in " ".join(words) for words in found)
    assert not any(gone in epilog for gone in KNOWN_MIRRORS)
    for words in found:
        check(words)
    with pytest.raises(SystemExit):
        if called.startswith("objectcompose."):
            import_module(module).create_parser().parse_args(["--help"])
        else:
            main([*called.split()[1:], "--help"])
    shown = capsys.readouterr().out
    assert shown.endswith(epilog + "\n") and "see " not in shown.replace("see the", "").replace("see those", "")


@pytest.mark.parametrize(("arguments", "modules"), [([], COMMANDS), (["evaluate"], METRICS)])
def test_the_overview_says_what_each_command_does(arguments, modules, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    shown = capsys.readouterr().out
    assert all(re.search(f"  {name} +{re.escape(import_module(one).HELP)}\n", shown) for name, one in modules.items())


def test_help_of_options_is_that_of_their_attributes():
    texts = attributes_help(MIFOLossOptions)
    assert set(texts) == set(MIFOLossOptions.__dataclass_fields__)
    assert texts["reward_steps"] == "n0, steps with the reward; the penalty follows"
    assert texts["latent_mask"].endswith('as the authors\' code ("nearest")')  # on two lines


def test_a_wrong_option_is_found():
    with pytest.raises(SystemExit):
        check(shlex.split("python -m objectcompose.training.train_locref --no_such_option 1"))
    with pytest.raises(AssertionError):
        check(["make", "no-such-target"])


def toybox_trainings():
    """The README's training commands that need nothing but the checkout."""
    found = [module_of(words) for words in commands_of(ROOT / "README.md") if words[0] == "python"]
    return [
        (name.rpartition(".")[2], arguments)
        for name, arguments in found
        if name and name.startswith("objectcompose.training.")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), toybox_trainings(), ids=[name for name, _ in toybox_trainings()])
def test_toybox_trainings_run_as_they_stand(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # one of them reads the checkout's scene
    more = [*SHORT, *SHORT_OF.get(name, ["--toybox_scenes", "8"]), "--output_dir", str(tmp_path)]
    assert import_module(f"objectcompose.training.{name}").main([*arguments, *more]) == 0
    assert any(tmp_path.rglob("*.safetensors"))


def test_all_trainers_have_a_command():
    assert {name for name, _ in toybox_trainings()} == set(TRAINERS)
