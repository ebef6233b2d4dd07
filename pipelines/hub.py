"""Flattener: writes a pipeline and the modules of the package that it needs as one self-contained file.

`custom_pipeline=` of diffusers runs one file in a process that may not have this package, so `make hub-files` merges
each `pipeline_*.py` with everything it imports from the package into `hub_files/<stem>/pipeline.py`, and each
`adapters/*_adapter.py` into `hub_files/<stem>/<stem>.py`; `saving.py` copies these files. Nothing is
guessed: whatever cannot be merged exactly (a name defined in two modules, an alias, an import inside a function, ...)
is a build error that names the file and line.

How modules must be written to be mergeable: imports from the package at the top level, `from package.folder.module
import Name` without alias; module-level names unique across the merged modules. Imports under `if TYPE_CHECKING:` are
dropped. A module with `from __future__ import annotations` gets its annotations quoted instead, because that import
would act on the whole merged file, where diffusers reads the real annotations of the pipeline's `__init__`.
"""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


HUB_FOLDER = Path(__file__).resolve().parent / "hub_files"


class HubBuildError(Exception):
    """A module cannot be merged into one file; the message says which line and what to write instead."""


@dataclass
class _HubModule:
    """What the merge needs to know of one module."""

    name: str
    body: str = ""  # source without the imports that were hoisted or merged
    docstring: str | None = None
    needs: list[tuple[str, str, int]] = field(default_factory=list)  # (module, name, line) imported from the package
    imports: dict[str, str] = field(default_factory=dict)  # bound name -> import statement from elsewhere
    defines: dict[str, int] = field(default_factory=dict)  # top-level name -> line


def flatten(module_name: str) -> str:
    """Source of `module_name` merged with all modules of its package that it needs.

    Args:
        module_name: full dotted name, importable in this process.

    Returns:
        Python source that imports nothing from the package. Equal input gives equal output, byte for byte.

    Raises:
        HubBuildError: a module cannot be merged exactly.
    """
    package = module_name.partition(".")[0]
    ordered: list[_HubModule] = []
    _visit_module(module_name, package, ordered, [])
    _check_merged_names(ordered)
    entry = ordered[-1]
    banner = (
        f"# Generated from {module_name} by `make hub-files`: change the sources, not this file.\n"
        f"# Merged modules: {', '.join(module.name for module in ordered)}.\n"
        "# SPDX-License-Identifier: Apache-2.0\n"
    )
    docstring = f"\n{entry.docstring}\n" if entry.docstring else ""
    statements = {statement for module in ordered for statement in module.imports.values()}
    imports = "\n".join(sorted(statements, key=lambda text: (text.startswith("from "), text)))
    bodies = "\n\n\n".join(f"# --- {module.name}\n\n{module.body}" for module in ordered)
    source = f"{banner}{docstring}\n{imports}\n\n\n{bodies}\n"
    compile(source, f"<flattened {module_name}>", "exec")
    return source


def _visit_module(name: str, package: str, ordered: list[_HubModule], path: list[str]) -> None:
    if any(module.name == name for module in ordered):
        return
    if name in path:
        raise HubBuildError(f"import circle: {' -> '.join([*path, name])}")
    module = _parse_module(name, package)
    for needed, _, _ in module.needs:
        _visit_module(needed, package, ordered, [*path, name])
    by_name = {found.name: found for found in ordered}
    for needed, wanted, line in module.needs:
        if wanted not in by_name[needed].defines:
            raise HubBuildError(
                f"{name}, line {line}: {needed} does not define {wanted!r} itself; import it from the module that does"
            )
    ordered.append(module)


def _parse_module(name: str, package: str) -> _HubModule:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise HubBuildError(f"{name}: no Python source found")
    text = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(text)
    module = _HubModule(name)
    lines = text.splitlines(keepends=True)
    removed: set[int] = set()
    quote_annotations = False
    for position, statement in enumerate(tree.body):
        if position == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            module.docstring = ast.get_source_segment(text, statement)
            removed |= _lines_of(statement)
        elif isinstance(statement, ast.ImportFrom | ast.Import):
            quote_annotations |= _take_import(statement, module, package)
            removed |= _lines_of(statement)
        elif _is_type_checking(statement):
            if statement.orelse:  # type: ignore[attr-defined]
                raise HubBuildError(f"{name}, line {statement.lineno}: `if TYPE_CHECKING` may not have an `else`")
            removed |= _lines_of(statement)
        elif _assigns_only(statement, "__all__"):
            removed |= _lines_of(statement)
        else:
            _refuse_package_use(statement, name, package)
            for bound, line in _bound_names(statement):
                module.defines.setdefault(bound, line)
    _refuse_shared_lines(tree, removed, name)
    if quote_annotations:
        _quote_annotations(tree, lines)
    module.body = "".join(line for number, line in enumerate(lines, 1) if number not in removed).strip("\n")
    return module


def _take_import(statement: ast.ImportFrom | ast.Import, module: _HubModule, package: str) -> bool:
    """Sort one top-level import into `needs` or `imports`; True for `from __future__ import annotations`."""
    place = f"{module.name}, line {statement.lineno}"
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            if alias.name.partition(".")[0] == package:
                raise HubBuildError(f"{place}: write `from {alias.name} import Name`, a whole module cannot be merged")
            rendered = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
            module.imports[alias.asname or alias.name.partition(".")[0]] = rendered
            if not alias.asname and "." in alias.name:  # `import a.b` and `import a` bind the same name
                module.imports[alias.name] = module.imports.pop(alias.name.partition(".")[0])
        return False
    source = statement.module or ""
    if statement.level:
        raise HubBuildError(f"{place}: relative import; write the absolute one")
    if source == "__future__":
        if [alias.name for alias in statement.names] != ["annotations"]:
            raise HubBuildError(f"{place}: only `annotations` may come from __future__")
        return True
    for alias in statement.names:
        if alias.name == "*":
            raise HubBuildError(f"{place}: star import")
        if source.partition(".")[0] != package:
            rendered = f"from {source} import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
            module.imports[alias.asname or alias.name] = rendered
        elif alias.asname not in (None, alias.name):
            raise HubBuildError(f"{place}: {alias.name!r} is imported under another name")
        elif importlib.util.find_spec(source) and _is_submodule(source, alias.name):
            raise HubBuildError(f"{place}: {alias.name!r} is a module; import names from it instead")
        else:
            module.needs.append((source, alias.name, statement.lineno))
    return False


def _is_submodule(package_name: str, name: str) -> bool:
    spec = importlib.util.find_spec(package_name)
    if spec is None or spec.submodule_search_locations is None:
        return False
    return importlib.util.find_spec(f"{package_name}.{name}") is not None


def _refuse_package_use(statement: ast.stmt, name: str, package: str) -> None:
    """No import of the package, and no `__file__`, may hide inside a function or class."""
    for node in ast.walk(statement):
        place = f"{name}, line {getattr(node, 'lineno', statement.lineno)}"
        if isinstance(node, ast.Import):
            sources = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            sources = [package if node.level else node.module or ""]
        else:
            if isinstance(node, ast.Name) and node.id == "__file__":
                raise HubBuildError(f"{place}: `__file__` means another place in the merged file")
            continue
        if any(source.partition(".")[0] == package for source in sources):
            raise HubBuildError(f"{place}: import of the package inside a block; move it to the top level")


def _check_merged_names(modules: Sequence[_HubModule]) -> None:
    """One name, one meaning: across all modules that share the merged file."""
    owners: dict[str, str] = {}
    for module in modules:
        for name, line in module.defines.items():
            if name in owners:
                raise HubBuildError(
                    f"{module.name}, line {line}: {name!r} is also defined in {owners[name]}; rename it"
                )
            owners[name] = module.name
    imported: dict[str, tuple[str, str]] = {}
    for module in modules:
        for name, statement in module.imports.items():
            if name in owners:
                raise HubBuildError(f"{module.name}: `{statement}` hides {name!r} of {owners[name]}")
            first, owner = imported.setdefault(name, (statement, module.name))
            if first != statement:
                raise HubBuildError(f"{module.name}: `{statement}` and, in {owner}, `{first}` bind the same name")


def _bound_names(statement: ast.stmt) -> list[tuple[str, int]]:
    """Names that a top-level statement binds at the top level."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [(statement.name, statement.lineno)]
    found: list[tuple[str, int]] = []
    for node in _walk_same_scope(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append((node.id, node.lineno))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append((node.name, node.lineno))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += [((alias.asname or alias.name).partition(".")[0], node.lineno) for alias in node.names]
    return found


def _walk_same_scope(node: ast.AST) -> list[ast.AST]:
    """All nodes below, without entering the scopes of functions, classes, lambdas and comprehensions."""
    inner = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    inner |= ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    found = [node]
    if not isinstance(node, inner):
        for child in ast.iter_child_nodes(node):
            found += _walk_same_scope(child)
    return found


def _quote_annotations(tree: ast.Module, lines: list[str]) -> None:
    """Put every annotation into quotes, in place: what `from __future__ import annotations` would have done."""
    spots = []
    for node in ast.walk(tree):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(annotation, ast.expr):
                spots.append(annotation)
    for spot in sorted(spots, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        first, last = spot.lineno - 1, (spot.end_lineno or spot.lineno) - 1
        # ast counts columns in UTF-8 bytes
        before = lines[first].encode()[: spot.col_offset].decode()
        after = lines[last].encode()[spot.end_col_offset :].decode()
        quoted = '"' + ast.unparse(spot).replace("\\", "\\\\").replace('"', "'") + '"'
        # keep the number of lines, so that the line numbers of removed statements stay true
        lines[first : last + 1] = [before + quoted + after, *[""] * (last - first)]


def _lines_of(statement: ast.stmt) -> set[int]:
    return set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))


def _is_type_checking(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _assigns_only(statement: ast.stmt, name: str) -> bool:
    if not isinstance(statement, ast.Assign):
        return False
    return [ast.unparse(target) for target in statement.targets] == [name]


def _refuse_shared_lines(tree: ast.Module, removed: set[int], name: str) -> None:
    taken: set[int] = set()
    for statement in tree.body:
        lines = _lines_of(statement)
        if lines & taken & removed:
            raise HubBuildError(f"{name}, line {statement.lineno}: two statements on one line")
        taken |= lines


def hub_sources() -> dict[Path, str]:
    """Path below `HUB_FOLDER` -> source, for each module of a pipeline and of an adapter."""
    package = __name__.split(".")[0] if __name__ != "__main__" else "objectcompose"
    folders = HUB_FOLDER.parents[1]
    pipelines = sorted(path.stem for path in folders.glob("pipelines/pipeline_*.py") if path.stem != "pipeline_output")
    adapters = sorted(path.stem for path in folders.glob("adapters/*_adapter.py"))
    sources = {Path(stem) / "pipeline.py": flatten(f"{package}.pipelines.{stem}") for stem in pipelines}
    return sources | {Path(stem) / f"{stem}.py": flatten(f"{package}.adapters.{stem}") for stem in adapters}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the hub files, or with `--check` only compare them with the committed ones."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when a committed file is not current"
    )
    check = parser.parse_args(argv).check
    try:
        sources = hub_sources()
    except HubBuildError as error:
        print(f"hub-files: {error}", file=sys.stderr)
        return 1
    present = {path.relative_to(HUB_FOLDER) for path in HUB_FOLDER.glob("*/*.py")}
    stale = sorted(present - set(sources))
    for path, source in sources.items():
        target = HUB_FOLDER / path
        if target.is_file() and target.read_text(encoding="utf-8") == source:
            continue
        stale.append(path)
        if not check:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source, encoding="utf-8")
    for path in sorted(present - set(sources)):
        if not check:
            (HUB_FOLDER / path).unlink()
    for path in stale:
        print(f"{'not current' if check else 'written'}: {path}")
    print(f"{len(sources)} hub files{'' if stale else ' are current'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
