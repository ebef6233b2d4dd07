"""What an evaluation leaves: `report.json` with metrics and protocol, `rows.jsonl` with every outcome, and a table."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from objectcompose.checkout import checkout_state
from objectcompose.evaluation.results import Metrics, check_metrics, describe_device
from objectcompose.evaluation.statistics import bootstrap_mean, interval_metrics
from objectcompose.files import write_atomically


REPORT_FILE, ROWS_FILE = "report.json", "rows.jsonl"
_BOUNDS = (".lo", ".hi", ".std")


def share_metrics(name: str, values: Sequence[float], groups: Sequence[object]) -> dict[str, float]:
    """Mean of values in [0, 1] as per cent, with its bootstrap interval where there are two groups or more.

    Args:
        name: of the metric.
        values: one per row, at least one.
        groups: one label per row, such as its prompt; rows of a group are drawn together.
    """
    if len(set(groups)) < 2:
        return {name: 100 * sum(values) / len(values)}
    metrics = interval_metrics(name, bootstrap_mean(values, groups=groups))
    return {key: 100 * value for key, value in metrics.items()}


def write_report(
    out: str | Path,
    metric: str,
    metrics: Metrics,
    protocol: str,
    rows: Sequence[Mapping[str, Any]],
    details: Mapping[str, Any],
) -> Path:
    """Write `report.json` and `rows.jsonl`, rows first, and print a table.

    Args:
        out: folder; made when missing.
        metric: what was evaluated.
        metrics: flat and finite; bounds as `<name>.lo` and `<name>.hi`.
        protocol: in words: prompts, detector, thresholds, what was excluded.
        rows: the outcomes that the metrics follow from.
        details: further entries, such as `model`, the identity of what was evaluated.

    Returns:
        Path of the report.

    Raises:
        ObjectComposeError: a metric is not finite or lies outside its bounds.
    """
    check_metrics(metrics)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    commit, is_dirty = checkout_state()
    report = {
        "metric": metric,
        "metrics": dict(metrics),
        "protocol": protocol,
        "command": command_line(),
        "commit": commit,
        "dirty": is_dirty,
        "device": describe_device(),
        "num_rows": len(rows),
        **details,
    }
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    write_atomically(out / ROWS_FILE, lines.encode())
    path = out / REPORT_FILE
    write_atomically(path, (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
    print(table_of_metrics(metrics))
    print(path)
    return path


def command_line() -> str:
    """What was typed."""
    name = Path(sys.argv[0]).name
    return shlex.join(["objectcompose" if name == "__main__.py" else name, *sys.argv[1:]])


def table_of_metrics(metrics: Metrics) -> str:
    """One line per figure: name, value, 95 % interval, standard deviation over rounds."""
    names = [name for name in metrics if not name.endswith(_BOUNDS)]
    width = max(map(len, names), default=0)
    lines = []
    for name in names:
        line = f"{name:{width}}  {_shown(metrics[name]):>9}"
        if f"{name}.lo" in metrics:
            line += f"  [{_shown(metrics[f'{name}.lo'])}, {_shown(metrics[f'{name}.hi'])}]"
        if f"{name}.std" in metrics:
            line += f"  std {_shown(metrics[f'{name}.std'])}"
        lines.append(line)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
