"""Result files: every figure with its command, commit, seeds, protocol, and the raw rows that it was computed from.

`benchmarks/results/<name>.json` holds flat metrics; `<name>.raw.jsonl.gz` one row per picture (or per timing). Metrics
are recomputed from the rows by the function that the file names, already when it is written: a file whose figures do
not follow from its rows is never made. `objectcompose.evaluation.verify` repeats that for committed files.
"""

import gzip
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from objectcompose.checkout import checkout_state
from objectcompose.errors import ObjectComposeError
from objectcompose.files import write_atomically


RESULTS_FOLDER = Path("benchmarks") / "results"
METRIC_TOLERANCE = 1e-6  # recomputed metrics may differ by rounding only

Metrics = Mapping[str, float | int | bool | str]


def write_result(
    name: str,
    metrics: Metrics,
    raw_rows: Sequence[Mapping[str, Any]],
    *,
    command: str,
    seeds: Sequence[int],
    protocol: str,
    recompute: str,
    weights: Mapping[str, str | Path] | None = None,
    regenerate: str | None = None,
    stated: Sequence[str] = (),
    timing_fields: Sequence[str] = (),
    device: str | None = None,
    folder: str | Path = RESULTS_FOLDER,
    checkout: tuple[str, bool] | None = None,
) -> Path:
    """Write one result file and its raw rows, atomically, raw rows first.

    Args:
        name: file stem: letters, digits, `_` and `-`.
        metrics: flat, finite; bounds of an interval as `<metric>.lo` and `<metric>.hi` (see `interval_metrics`).
        raw_rows: JSON-serialisable rows, at least one.
        command: what to type to make this file again.
        seeds: seeds of the run.
        protocol: in words: prompts, split, steps, guidance, arms, what was excluded.
        recompute: `module:function`; the function takes the rows and returns all metrics that are not in `stated`.
        weights: what was measured: label -> file or folder; stored as SHA-256 (see `hash_weights`).
        regenerate: `module:function`; the function takes a few rows and returns them made anew. None: timings.
        stated: names of metrics that do not follow from rows (a file size, a preset).
        timing_fields: fields of a row that differ from run to run and are not compared.
        device: what it ran on; found out by default.
        folder: where the two files go.
        checkout: of `measured_checkout`, when a long run began; None: as it is now.

    Returns:
        Path of the JSON file.

    Raises:
        ObjectComposeError: a name or value is unusable, or `recompute` gives other metrics.
    """
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ObjectComposeError(f"`name` must hold letters, digits, `_` and `-` only, got {name!r}.")
    if not raw_rows:
        raise ObjectComposeError("`raw_rows` must hold at least one row, got none.")
    rows = json.loads(json.dumps([dict(row) for row in raw_rows], allow_nan=False))
    check_metrics(metrics)
    differences = metric_differences(metrics, recompute_metrics(recompute, rows), stated)
    if differences:
        raise ObjectComposeError(f"`metrics` do not follow from `raw_rows` by {recompute}: {'; '.join(differences)}.")
    if regenerate is not None:
        named_function(regenerate)
    folder = Path(folder)
    raw = _gzip_rows(rows)
    commit, is_dirty = checkout or measured_checkout()
    result: dict[str, Any] = {
        "name": name,
        "command": command,
        "commit": commit,
        "dirty": is_dirty,
        "device": device or describe_device(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": [int(seed) for seed in seeds],
        "protocol": protocol,
        "weights": {label: hash_weights(path) for label, path in (weights or {}).items()},
        "metrics": dict(metrics),
        "stated": sorted(stated),
        "timing_fields": sorted(timing_fields),
        "recompute": recompute,
        "regenerate": regenerate,
        "num_rows": len(rows),
        "raw": f"{name}.raw.jsonl.gz",
        "raw_sha256": hashlib.sha256(raw).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / result["raw"], raw)
    path = folder / f"{name}.json"
    write_atomically(path, (json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path


def measured_checkout() -> tuple[str, bool]:
    """The commit that is checked out, and whether other files than results differ from it."""
    return checkout_state(":(top)", f":(top,exclude){RESULTS_FOLDER.as_posix()}")


def load_result(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a result file and its raw rows.

    Returns:
        The JSON object and the rows.

    Raises:
        ObjectComposeError: a file is missing or broken, or the rows are not those that the JSON file was written with.
    """
    path = Path(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        raw = (path.parent / result["raw"]).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ObjectComposeError(f"`path` {path} is not a readable result file: {error}.") from error
    if hashlib.sha256(raw).hexdigest() != result.get("raw_sha256"):
        raise ObjectComposeError(f"`path` {path}: {result['raw']} is not the file that this result was written with.")
    return result, [json.loads(line) for line in gzip.decompress(raw).decode().splitlines()]


def check_metrics(metrics: Metrics) -> None:
    """Metrics are flat, finite and, where they have bounds, ordered; raises ObjectComposeError otherwise."""
    for name, value in metrics.items():
        if not isinstance(value, bool | int | float | str):
            raise ObjectComposeError(
                f"`metrics[{name!r}]` must be a number, bool or string, got {type(value).__name__}."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ObjectComposeError(f"`metrics[{name!r}]` must be finite, got {value}.")
    for name in [name.removesuffix(".lo") for name in metrics if name.endswith(".lo")]:
        if name not in metrics or f"{name}.hi" not in metrics:
            raise ObjectComposeError(f"`metrics` must hold {name!r}, '{name}.lo' and '{name}.hi' together.")
        if not metrics[f"{name}.lo"] <= metrics[name] <= metrics[f"{name}.hi"]:  # type: ignore[operator]
            raise ObjectComposeError(f"`metrics[{name!r}]` must lie within its bounds, got {metrics[name]}.")


def metric_differences(written: Metrics, recomputed: Metrics, stated: Sequence[str]) -> list[str]:
    """One line for each metric that the rows do not confirm; `stated` metrics are not asked for."""
    lines = [f"`stated` names {name!r}, which is no metric" for name in stated if name not in written]
    for name in sorted({*written, *recomputed} - set(stated)):
        if name not in recomputed or name not in written:
            lines.append(f"{name} is {'not recomputed' if name in written else 'recomputed but not written'}")
        elif not values_agree(written[name], recomputed[name], METRIC_TOLERANCE):
            lines.append(f"{name} is {written[name]} in the file, {recomputed[name]} from the rows")
    return lines


def values_agree(first: Any, second: Any, tolerance: float) -> bool:
    """Equal, or numbers that differ by at most `tolerance` absolutely or relatively; lists and dicts by element."""
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(values_agree, first, second, [tolerance] * len(first)))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(values_agree(first[k], second[k], tolerance) for k in first)
    if isinstance(first, float) or isinstance(second, float):
        numbers = all(isinstance(value, int | float) for value in (first, second))
        return numbers and math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance)
    return bool(first == second)


def named_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; ObjectComposeError when there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ObjectComposeError(f"`{name}` must name an importable `module:function`: {error}.") from error


def recompute_metrics(name: str, rows: list[dict[str, Any]]) -> Metrics:
    """Metrics of the rows by the named function, checked."""
    metrics = named_function(name)(rows)
    check_metrics(metrics)
    return metrics


def hash_weights(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder: over the relative names and contents of its files, hidden ones left out.

    Raises:
        ObjectComposeError: nothing is there.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    files = [found for found in files if not any(part.startswith(".") for part in found.relative_to(path).parts)]
    if not files:
        raise ObjectComposeError(f"`weights` must be a file or a folder with files, got {path}.")
    digest = hashlib.sha256()
    for found in files:
        if found != path:
            digest.update(found.relative_to(path).as_posix().encode() + b"\0")
        with found.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def describe_device() -> str:
    """The accelerator's name, or the number of CPU threads that torch uses."""
    import torch  # only here: reading and verifying results needs no torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu: {torch.get_num_threads()} threads"


def _gzip_rows(rows: list[dict[str, Any]]) -> bytes:
    lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    return gzip.compress(lines.encode(), mtime=0)  # without the time, equal rows give equal bytes
