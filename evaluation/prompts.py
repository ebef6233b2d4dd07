"""Prompts that pictures are painted from and scored by: one record each, and readers of published lists."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from objectcompose.errors import LayoutError
from objectcompose.layout_fields import check_text, shown_value


_ID_PATTERN = re.compile(r"[A-Za-z0-9.-]+")


@dataclass(frozen=True)
class PromptRecord:
    """One prompt.

    Attributes:
        id: names its pictures and fixes their noise: letters, digits, "." and "-".
        text: the prompt.
        categories: what must be seen for it, each once; empty where nothing is detected.
        kind: what figures are broken down by, such as a spatial relation; may be empty.

    Raises:
        LayoutError: an id of other characters, an empty text, or a category twice.
    """

    id: str
    text: str
    categories: tuple[str, ...] = ()
    kind: str = ""

    def __post_init__(self) -> None:
        if not _ID_PATTERN.fullmatch(self.id):
            raise LayoutError(f"`id` must hold letters, digits, '.' and '-' only, got {shown_value(self.id)}.")
        check_text(self.text, f"text of prompt {self.id}")
        for category in self.categories:
            check_text(category, f"categories of prompt {self.id}")
        if len(set(self.categories)) < len(self.categories):
            raise LayoutError(f"`categories` of prompt {self.id} must differ, got {list(self.categories)}.")


def check_records(records: Sequence[PromptRecord]) -> None:
    """Raise LayoutError unless there is a prompt and all ids differ, also where a file system ignores case."""
    if not records:
        raise LayoutError("`prompts` must hold at least one prompt, got none.")
    seen: set[str] = set()
    for record in records:
        if record.id.lower() in seen:
            raise LayoutError(f"`prompts` must have different ids, got {record.id!r} twice.")
        seen.add(record.id.lower())


def prompts_digest(records: Sequence[PromptRecord]) -> str:
    """64 hex digits that change with any id or text, and with their order."""
    return hashlib.sha256(json.dumps([[record.id, record.text] for record in records]).encode()).hexdigest()


def read_multigen(path: str | Path) -> list[PromptRecord]:
    """The official MULTIGEN list: JSON, entries with `unique_id`, `num_objects`, `obj_<i>_attributes` and `text`.

    Raises:
        LayoutError: not readable, not such a list, or no entry in it; names the line or the entry.
    """
    path = Path(path)
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise LayoutError(f"`prompts` {path} must be JSON: line {error.lineno}: {error.msg}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(f"`prompts` {path} cannot be read: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise LayoutError(f"`prompts` {path} must be a list of at least one entry, got {shown_value(entries)}.")
    records = [_multigen_record(entry, f"{path}, entry {number}") for number, entry in enumerate(entries)]
    check_records(records)
    return records


def _multigen_record(entry: Any, where: str) -> PromptRecord:
    try:
        names = [entry[f"obj_{number}_attributes"][0] for number in range(1, int(entry["num_objects"]) + 1)]
        return PromptRecord(str(entry["unique_id"]), entry["text"], tuple(dict.fromkeys(names)))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise LayoutError(
            f"`prompts` {where} must have `unique_id`, `num_objects`, `obj_<i>_attributes` and `text`: {reason}."
        ) from error


def read_prompt_lines(path: str | Path) -> list[PromptRecord]:
    """A text file with one prompt per line, as T2I-CompBench has them; empty lines are left out.

    What stands behind a tab, such as "seen" or "unseen", becomes the record's `kind`. Ids count the prompts from 0; a
    prompt may occur twice.

    Raises:
        LayoutError: not readable, or no prompt in it.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(f"`prompts` {path} cannot be read: {error}.") from error
    pairs = [line.partition("\t") for line in lines if line.partition("\t")[0].strip()]
    if not pairs:
        raise LayoutError(f"`prompts` {path} must have at least one line, got none.")
    return [PromptRecord(str(number), text.strip(), kind=kind.strip()) for number, (text, _, kind) in enumerate(pairs)]
