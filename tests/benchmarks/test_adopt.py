"""The weights that the repository carries are those that were measured."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import adopt
from benchmarks.recipes.common import model_file
from objectcompose.evaluation.results import RESULTS_FOLDER, hash_weights
from objectcompose.toybox.weights import toybox_path


MEASURED = [name for name in adopt.ADOPTED if (RESULTS_FOLDER / f"{name}_toybox.json").is_file()]


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_carried_was_measured(name):
    folder = toybox_path(name)
    assert hash_weights(model_file(folder)) == adopt.measured_hash(name)
    card = (folder / "README.md").read_text()
    assert "Nothing yet" not in card and all(f"| {figure} |" in card for figure in adopt.ADOPTED[name].figures)


@pytest.mark.parametrize("name", MEASURED)
def test_other_weights_are_not_adopted(name, tmp_path, capsys):
    before = (toybox_path(name) / "README.md").read_bytes()
    copied = tmp_path / adopt.ADOPTED[name].arm / "weights"
    shutil.copytree(toybox_path(name), copied)
    weights = model_file(copied)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    assert adopt.main([name, str(tmp_path)]) == 1
    assert "is not what" in capsys.readouterr().err and (toybox_path(name) / "README.md").read_bytes() == before
