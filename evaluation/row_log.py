"""Rows of a long computation on disk, one JSON object a line, so that a killed run goes on where it was.

Each process appends to a file of its own; all files of the folder are read, so a run may go on with another number of
processes. A line that a kill tore is left out and its row made anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from objectcompose.processes import groups_of_process


Item = TypeVar("Item")
Found = TypeVar("Found")


class RowLog:
    """Rows by key.

    Args:
        folder: of the files; made when missing.
        process: number of this process.

    Attributes:
        rows: what was there when the log was opened, and what was added since: key to row.
    """

    def __init__(self, folder: str | Path, process: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = read_rows(self.folder)
        path = self.folder / f"process-{process}.jsonl"
        is_torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._stream = path.open("a", encoding="utf-8")
        if is_torn:
            self._stream.write("\n")

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a row; a later one of the same key takes the place of an earlier one."""
        self.rows[key] = row
        self._stream.write(json.dumps({"key": key, **row}, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Hand what was added to the operating system, where a killed process leaves it."""
        self._stream.flush()

    def __enter__(self) -> RowLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def measure_groups(
    items: Sequence[Item],
    measure: Callable[[list[Item], RowLog], list[Found]],
    folder: str | Path,
    batch_size: int,
    state: PartialState,
    label: str,
) -> list[Found]:
    """What `measure` finds in all items, this process measuring its share.

    Args:
        items: the same in all processes.
        measure: from a group of items and the log to what is found; it looks into the log first, and adds to it.
        folder: of the log.
        batch_size: items in a group; the log is written out after each.
        state: the processes.
        label: of the progress bar.

    Returns:
        In every process, what was found in all of them, process by process.

    Raises:
        ObjectComposeError: `batch_size` is below 1.
    """
    found: list[Found] = []
    bar = tqdm(total=len(items), desc=label, unit="picture", disable=not state.is_main_process)
    with RowLog(folder, state.process_index) as log, bar:
        for group in groups_of_process(items, batch_size, state):
            found += measure(group, log)
            log.flush()
            bar.update(len(group) * state.num_processes)
    state.wait_for_everyone()
    return gather_object(found)


def read_rows(folder: str | Path) -> dict[str, dict[str, Any]]:
    """All rows of a folder's files by key, without torn lines; of one key in several files any is as good."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(folder).glob("process-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                rows[row.pop("key")] = row
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return rows
