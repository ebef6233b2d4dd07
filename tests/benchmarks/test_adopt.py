"""The weights that the repository carries are those that were measured."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import adopt
from objectcompose.evaluation.results import RESULTS_FOLDER, hash_weights
from objectcompose.toybox.weights import toybox_path


MEASURED = [name for name in adopt.ADOPTED if (RESULTS_FOLDER / f"{name}_toybox.json").is_file()]


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_carried_was_measured(name):
    folder = toybox_path(name)
    carried = {hash_weights(file) for file in folder.rglob("*.safetensors")}
    assert carried and carried <= adopt.measured_hashes(name)
    card = (folder / "README.md").read_text()
    assert "Nothing yet" not in card and all(f"| {figure} |" in card for figure in adopt.ADOPTED[name].figures)


@pytest.mark.parametrize("name", MEASURED)
def test_other_weights_are_not_adopted(name, tmp_path, capsys):
    before = (toybox_path(name) / "README.md").read_bytes()
    adopted = adopt.ADOPTED[name]
    for part, place in adopted.parts:
        shutil.copytree(toybox_path(name) / place, tmp_path / adopted.arm / part)
    weights = max((tmp_path / adopted.arm / adopted.parts[-1][0]).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    assert adopt.main([name, str(tmp_path)]) == 1
    assert "is not what" in capsys.readouterr().err and (toybox_path(name) / "README.md").read_bytes() == before


def test_a_folder_without_weights_is_refused(tmp_path, capsys):
    assert adopt.main([MEASURED[0], str(tmp_path)]) == 1
    assert "holds no weights" in capsys.readouterr().err
