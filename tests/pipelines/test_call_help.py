"""`help` on a pipeline's call says what every argument is: installed, as a Hub file, and without docstrings at all."""

from __future__ import annotations

import inspect
import re
import sys
from types import ModuleType

import pytest

import objectcompose
from objectcompose.pipelines import hub
from objectcompose.pipelines.call_arguments import CallArguments, describes_shared_arguments


PIPELINES = {
    "pipeline_locref": "LocRefPipeline",
    "pipeline_mifo": "MIFOPipeline",
    "pipeline_object_prompt": "ObjectPromptPipeline",
    "pipeline_token_compose": "TokenComposePipeline",
}


def described(call):
    """The arguments that a docstring has an entry for, in its order."""
    arguments = inspect.getdoc(call).partition("Args:\n")[2].partition("\n\n")[0]
    return re.findall(r"^    (\w+): \S", arguments, re.MULTILINE)


def parameters(call):
    return set(inspect.signature(call).parameters) - {"self"}


def hub_file(stem, optimize, monkeypatch):
    """The committed file of a pipeline as a module; `optimize=2` compiles as `python -OO` does."""
    path = hub.HUB_FOLDER / stem / "pipeline.py"
    module = ModuleType(f"hub_{stem}_{optimize}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec", optimize=optimize), module.__dict__)
    return module


@pytest.mark.parametrize("stem", PIPELINES)
def test_every_argument_of_a_call_is_described_once(stem, monkeypatch):
    for module in (objectcompose, hub_file(stem, 0, monkeypatch)):
        call = getattr(module, PIPELINES[stem]).__call__
        names = described(call)
        assert len(names) == len(set(names)) and set(names) == parameters(call)
        assert "CallArguments" not in call.__doc__ and "\nReturns:\n" in inspect.getdoc(call)


@pytest.mark.parametrize("stem", PIPELINES)
def test_without_docstrings_hub_files_still_load(stem, monkeypatch):
    module = hub_file(stem, 2, monkeypatch)
    call = getattr(module, PIPELINES[stem]).__call__
    assert call.__doc__ is None and {"prompt", "objects"} < parameters(call)


def test_a_call_that_refers_to_nothing_is_a_mistake():
    def call(prompt):
        """Paint."""

    with pytest.raises(AssertionError, match="refer to the shared"):
        describes_shared_arguments(call)


def test_the_shared_arguments_are_described_themselves():
    entries = re.findall(r"^    (\w+): \S", inspect.getdoc(CallArguments), re.MULTILINE)
    assert entries == list(CallArguments.__dataclass_fields__)
