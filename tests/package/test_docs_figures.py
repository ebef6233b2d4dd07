"""Figures in the pages of the methods are those of the result files that their tables name."""

import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
HEADER = re.compile(r"^\|.*\|.*\| \[\w+\.json\]\((?P<path>[./]*benchmarks/results/\w+\.json)\) \|$")
ROW = re.compile(r"^\| [^|]+ \| (?P<figure>\d+(\.\d+)?)(?P<noisy> noisy)? \| `(?P<key>[\w.]+)` \|$")


def tables(page):
    """(path of the result file, lines of its table) for each table of figures on a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if found := HEADER.match(line):
            rows = lines[number + 2 :]
            end = next(index for index, row in enumerate(rows) if not row.startswith("|"))
            yield page.parent / found["path"], rows[:end]


@pytest.mark.parametrize("name", ["token_compose", "locref", "object_prompt", "mifo"])
def test_tables_of_costs_say_what_was_measured(name):
    found = list(tables(ROOT / "docs" / "methods" / f"{name}.md"))
    assert found
    for path, rows in found:
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        assert rows
        for row in rows:
            entry = ROW.match(row)
            assert entry, row
            digits = len(entry["figure"].partition(".")[2])
            assert f"{metrics[entry['key']]:.{digits}f}" == entry["figure"], row
            assert (metrics.get(f"{entry['key']}.valid") is False) == bool(entry["noisy"]), row
