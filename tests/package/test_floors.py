"""The lower bounds of pyproject.toml are the row of versions that `make test-oldest` installs."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# what the library itself imports; the rest is for developers, and `app` follows gradio
LIBRARY = [*PROJECT["dependencies"], *EXTRAS["grounding"], *EXTRAS["train"], *EXTRAS["eval"]]
REQUIREMENTS = [Requirement(line) for line in sorted({*LIBRARY, *EXTRAS["app"], *EXTRAS["dev"]})]


def bound(requirement):
    """The one version that a requirement names, after `>=` or `==`."""
    (specifier,) = requirement.specifier
    assert specifier.operator in (">=", "=="), requirement
    return Version(specifier.version)


def oldest():
    """Versions in oldest.txt, by package."""
    lines = (Path(__file__).parent / "oldest.txt").read_text(encoding="utf-8").splitlines()
    rows = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(row.specifier).startswith("==") for row in rows)
    versions = {canonicalize_name(row.name): bound(row) for row in rows}
    assert len(versions) == len(rows), "a package is named twice"
    return versions


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_lower_bound_is_the_oldest_version_tested(requirement):
    tested = oldest().get(canonicalize_name(requirement.name))
    if tested is None:
        assert str(requirement) not in {str(Requirement(line)) for line in LIBRARY}, "missing in oldest.txt"
    else:
        assert bound(requirement) == tested


def test_oldest_names_only_what_is_required():
    assert set(oldest()) <= {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
