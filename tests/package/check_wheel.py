"""Run by a Python that has the built wheel installed: is everything of the checkout in it, and does it import?"""

import importlib
import sys
import tomllib
from pathlib import Path


def expected_modules(root: Path) -> set[str]:
    """Names of all modules in the folders that pyproject.toml maps into the package."""
    folders = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    names = set()
    for package, folder in folders.items():
        for path in sorted((root / folder).glob("*.py")):
            names.add(package if path.stem == "__init__" else f"{package}.{path.stem}")
    return names


def expected_data(root: Path) -> set[str]:
    """Data files of the checkout that must be in the wheel, relative to the installed package."""
    patterns = {
        "pipelines": ["hub_files/*/*.py"],
        "toybox": ["*.json", "pictures/*/*.png", "pictures/*.json", "pictures/LICENSES*"],
    }
    found = {"py.typed"}
    for folder, globs in patterns.items():
        for pattern in globs:
            found |= {f"{folder}/{path.relative_to(root / folder)}" for path in (root / folder).glob(pattern)}
    return found


def main() -> int:
    root = Path(sys.argv[1]).resolve()
    package = importlib.import_module("objectcompose")
    installed = Path(package.__file__ or "").resolve().parent
    if root / "objectcompose" == installed:
        raise SystemExit(f"the checkout {installed} was imported, not the wheel")
    modules, data = expected_modules(root), expected_data(root)
    failures = [f"missing data file {name}" for name in sorted(data) if not (installed / name).is_file()]
    for name in sorted(modules):
        try:
            importlib.import_module(name)
        except Exception as error:
            failures.append(f"cannot import {name}: {type(error).__name__}: {error}")
    failures += [f"cannot load public name {name}" for name in package._PUBLIC if not hasattr(package, name)]
    if not any(name.startswith("pipelines/hub_files/") for name in data):
        failures.append("no hub files in pipelines/hub_files")
    print("\n".join(failures) or f"wheel: {len(modules)} modules import, {len(data)} data files present")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
