"""What `objectcompose ground-captions` knows of each picture that it has done, and how a run goes on.

`records/<id>.json` is written when a picture is done, after its masks and its copy; where it is there with the right
key, and so are the files that it names, the picture is done. Pictures that are left out have one too, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from objectcompose.errors import ObjectComposeError
from objectcompose.files import write_atomically
from objectcompose.training.caption_sources import CaptionedPicture
from objectcompose.training.grounded_captions import IMAGE_FOLDER, MASK_FOLDER, METADATA


RECORDS_FOLDER = "records"
REPORT_FILE = "report.json"
SHEET_FILE = "contact_sheet.png"
#: Changes with everything that changes results without changing captions, weights or settings.
RECORD_FORMAT = 1
_LONGEST_ID = 100


class LeftOut(StrEnum):
    """Why a picture is not in the training set."""

    UNREADABLE = "the picture cannot be used"
    NO_NOUNS = "the caption has no nouns"
    NOT_AMONG_TOKENS = "no noun is found among the caption's tokens"
    TOO_LONG = "a caption is too long"
    NOT_ASKED = "the detector cannot be asked"
    NOTHING_SEEN = "no noun has a mask"


@dataclass(frozen=True)
class PictureOutcome:
    """What became of one picture.

    Attributes:
        picture: its name below the input folder.
        key: digest of the picture, its captions and all that looks at them.
        caption: the one that was chosen; None if it did not come to that.
        reason: of `LeftOut`; None when the picture is in the training set.
        detail: of the reason.
        line: of the metadata; None when left out.
        unmasked: nouns that nothing was found for.
        empty: nouns that were found, but with masks that hold no pixel; they have no mask either.
        cropped: nouns whose mask lies outside the square in the middle, which is what the trainer sees.
        untokenized: nouns that cannot be found among the caption's tokens; they are not in the data set.
    """

    picture: str
    key: str
    caption: str | None = None
    reason: str | None = None
    detail: str | None = None
    line: dict[str, Any] | None = None
    unmasked: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    cropped: tuple[str, ...] = ()
    untokenized: tuple[str, ...] = ()


def picture_ids(names: Sequence[str]) -> list[str]:
    """One id per picture, safe as a file's name: its path without suffix, and a number where that is taken.

    Args:
        names: of `CaptionedPicture`, all different.
    """
    ids: list[str] = []
    taken: set[str] = set()
    for name in names:
        stem = re.sub(r"[^\w.-]", "_", name.rpartition(".")[0] or name).strip(".") or "_"
        if len(stem.encode()) > _LONGEST_ID:
            stem = f"{stem.encode()[: _LONGEST_ID - 17].decode(errors='ignore')}-{_digest(name.encode())[:16]}"
        one, number = stem, 2
        while one.casefold() in taken:
            one, number = f"{stem}-{number}", number + 1
        taken.add(one.casefold())
        ids.append(one)
    return ids


def picture_key(picture: CaptionedPicture, settings: Sequence[Any]) -> str:
    """64 hex digits that name a picture's bytes, its captions and the settings (JSON)."""
    try:
        content = picture.path.read_bytes()
    except OSError:  # the outcome says that it cannot be read
        content = b""
    asked = json.dumps([RECORD_FORMAT, picture.name, picture.captions, settings])
    return _digest(asked.encode() + b"\0" + content)


def check_output_is_ours(out: Path) -> None:
    """Raise ObjectComposeError for a folder with a data set that `ground-captions` did not write: it cleans up."""
    others = [out / part for part in (IMAGE_FOLDER.parts[0], MASK_FOLDER) if (out / part).exists()]
    if others and not (out / RECORDS_FOLDER).is_dir():
        raise ObjectComposeError(
            f"`--out` must be a new folder or one that this command wrote, got {str(out)!r}, which holds "
            f"{others[0].name} and no {RECORDS_FOLDER}."
        )


class OutcomeFolder:
    """The outcomes below an output folder.

    Args:
        out: the data set's folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / RECORDS_FOLDER

    def start(self) -> None:
        """Mark the folder as ours and as unfinished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.out / IMAGE_FOLDER / METADATA).unlink(missing_ok=True)

    def load(self, identifier: str, key: str) -> PictureOutcome | None:
        """What an earlier run wrote, if it is whole and answers the same question; else None."""
        try:
            outcome = self.read(identifier)
        except ObjectComposeError:
            return None
        is_whole = outcome.key == key and all(path.is_file() for path in self.files_of(outcome))
        return outcome if is_whole else None

    def read(self, identifier: str) -> PictureOutcome:
        """An outcome as it was stored; raises ObjectComposeError when it is not there or broken."""
        path = self.folder / f"{identifier}.json"
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
            }
            return PictureOutcome(**fields)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ObjectComposeError(f"`{path}` must be a record of this command: {error}.") from error

    def store(self, identifier: str, outcome: PictureOutcome) -> None:
        """Write an outcome, after everything that it names."""
        content = json.dumps(asdict(outcome), indent=1) + "\n"
        write_atomically(self.folder / f"{identifier}.json", content.encode())

    def files_of(self, outcome: PictureOutcome) -> list[Path]:
        """The copy of the picture, then its masks; none when it is left out."""
        if outcome.line is None:
            return []
        masks = [path for _, path in outcome.line["attn_list"] if path is not None]
        return [
            self.out / IMAGE_FOLDER / outcome.line["file_name"],
            *(self.out / MASK_FOLDER / Path(path).relative_to("seg") for path in masks),
        ]

    def remove_strays(self, outcomes: Sequence[PictureOutcome], identifiers: Sequence[str]) -> None:
        """Remove what no outcome names: of pictures that are gone or now left out, and of a killed run."""
        kept = {path for outcome in outcomes for path in self.files_of(outcome)}
        kept |= {self.folder / f"{identifier}.json" for identifier in identifiers}
        for folder in (self.out / IMAGE_FOLDER, self.out / MASK_FOLDER, self.folder):
            for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
                if path.is_dir():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path not in kept:
                    path.unlink()
        for name in (REPORT_FILE, SHEET_FILE):
            for path in self.out.glob(f".{name}.*.tmp"):
                path.unlink()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
