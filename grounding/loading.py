"""Loading of detectors and segmenters: published checkpoints, typed errors, and fingerprints for the cache.

Weights are read from safetensors; the original packages' checkpoints are pickles and read with `weights_only=True`,
which runs no code. Code from a model repository is never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from objectcompose.errors import CheckpointError, MissingPackageError, ObjectComposeError


INSTALL_LINE = 'pip install "objectcompose[grounding]"'


# the dtype is that of the weights, which the fingerprint holds anyway
_PASSING_SETTINGS = {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "processor_class",
    "name_or_path",
}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """Where weights can be had.

    Attributes:
        url: page or file.
        megabytes: size of the weights, in 10^6 bytes, rounded.
    """

    url: str
    megabytes: int


#: Hub id, or file name of an original checkpoint -> where it is.
PUBLISHED_CHECKPOINTS = {
    **{
        name: PublishedCheckpoint(f"https://huggingface.co/{name}", megabytes)
        for name, megabytes in (
            ("IDEA-Research/grounding-dino-tiny", 689),
            ("IDEA-Research/grounding-dino-base", 933),
            ("google/owlv2-base-patch16-ensemble", 620),
            ("google/owlv2-large-patch14-ensemble", 1750),
            ("google/owlvit-base-patch32", 613),
            ("facebook/sam-vit-base", 375),
            ("facebook/sam-vit-large", 1250),
            ("facebook/sam-vit-huge", 2564),
            ("facebook/sam2.1-hiera-tiny", 156),
            ("facebook/sam2.1-hiera-large", 898),
            ("syscv-community/sam-hq-vit-base", 379),
            ("syscv-community/sam-hq-vit-huge", 2570),
            ("CIDAS/clipseg-rd64-refined", 603),
            ("google-bert/bert-base-uncased", 440),
            ("openai/clip-vit-large-patch14-336", 1711),
        )
    },
    "groundingdino_swint_ogc.pth": PublishedCheckpoint(
        "https://github.com/IDEA-Research/GroundingDINO/releases/download/v0.1.0-alpha/groundingdino_swint_ogc.pth",
        694,
    ),
    "groundingdino_swinb_cogcoor.pth": PublishedCheckpoint(
        "https://github.com/IDEA-Research/GroundingDINO/releases/download/v0.1.0-alpha2/groundingdino_swinb_cogcoor.pth",
        938,
    ),
    **{
        name: PublishedCheckpoint(f"https://dl.fbaipublicfiles.com/segment_anything/{name}", megabytes)
        for name, megabytes in (
            ("sam_vit_b_01ec64.pth", 375),
            ("sam_vit_l_0b3195.pth", 1250),
            ("sam_vit_h_4b8939.pth", 2564),
        )
    },
}


def where_published(source: str) -> str:
    """A sentence that says where weights can be had and how large they are; empty when that is not known."""
    known = PUBLISHED_CHECKPOINTS.get(source) or PUBLISHED_CHECKPOINTS.get(Path(source).name)
    return f" It is published at {known.url} (about {known.megabytes} MB)." if known else ""


def optional_package(module: str, package: str) -> ModuleType:
    """An optional package's module.

    Raises:
        MissingPackageError: it, or something that it needs, is not installed; names the line that installs it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the packages' own, about moved modules
            return import_module(module)
    except ImportError as error:
        hint = ""
        if "libGL" in str(error):
            hint = " On a machine without a display: pip install --force-reinstall --no-deps opencv-python-headless."
        raise MissingPackageError(
            f"`{package}` must be installed for this backend: {INSTALL_LINE} ({error}).{hint}"
        ) from error


def load_pretrained(
    model_class: Any, processor_class: Any, source: str | Path, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any]:
    """A transformers model in eval mode and its processor, from a folder or a Hub id.

    Args:
        model_class, processor_class: classes of transformers; the checkpoint must be of `model_class`'s type.
        source: folder with `save_pretrained`'s files, or Hub id.
        device, dtype: where and how the model runs.

    Raises:
        CheckpointError: nothing there, corrupt, of another model, or weights missing from it.
        MissingPackageError: the processor needs a package that is not installed.
    """
    name = str(source)
    is_folder = Path(name).expanduser().exists() or name.startswith((".", "/", "~"))
    path = str(Path(name).expanduser()) if is_folder else name
    if is_folder and not (Path(path) / "config.json").is_file():
        raise CheckpointError(f"`model` must be a folder with config.json, got {name!r}.{where_published(name)}")
    try:
        with _quiet_transformers(is_folder):
            config, _ = model_class.config_class.get_config_dict(path)
            wanted = model_class.config_class.model_type
            if config.get("model_type") != wanted:
                raise CheckpointError(
                    f"`model` {name!r} must be of type {wanted!r}, got {config.get('model_type')!r}."
                )
            model, info = model_class.from_pretrained(
                path, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
            processor = processor_class.from_pretrained(path)
    except ObjectComposeError:
        raise
    except ImportError as error:
        raise MissingPackageError(
            f"`model` {name!r} needs a package: {INSTALL_LINE} ({first_line(error)})."
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"`model` {name!r} cannot be loaded: {first_line(error)}.{where_published(name)}"
        ) from error
    missing = sorted(info.get("missing_keys") or ()) + sorted(str(key) for key in info.get("mismatched_keys") or ())
    if missing:
        raise CheckpointError(f"`model` {name!r} lacks {len(missing)} weights, such as {missing[0]!r}.")
    return model.to(device).eval().requires_grad_(False), processor


def load_checkpoint_file(path: str | Path, publication: str) -> dict[str, torch.Tensor]:
    """The state dict in an original checkpoint, `.pth` (read with `weights_only=True`) or `.safetensors`.

    Args:
        path: the file.
        publication: name of the official file, for the message when `path` does not exist.

    Raises:
        CheckpointError: not there, corrupt, or not a state dict.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"`model` must be a checkpoint file, got {str(path)!r}.{where_published(publication)}")
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"`model` {str(path)!r} cannot be read: {first_line(error)}.") from error
    except (pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError) as error:
        raise CheckpointError(
            f"`model` {str(path)!r} is corrupt, or holds more than tensors, which is not read: {first_line(error)}."
        ) from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"`model` {str(path)!r} must hold a dict of tensors, got {type(state).__name__}.")
    return {key.removeprefix("module."): value for key, value in state.items()}


def fill_model(model: torch.nn.Module, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Load a state dict, of which every weight of the model is asked; keys that the model lacks are an error too.

    Args:
        model: to be filled.
        state: the weights.
        path: for messages.

    Raises:
        CheckpointError: the state dict is of another model.
    """
    try:
        wrong = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"`model` {str(path)!r} is of another model: {first_line(error)}.") from error
    keys = [*wrong.missing_keys, *wrong.unexpected_keys]
    if keys:
        raise CheckpointError(
            f"`model` {str(path)!r} is of another model: {len(keys)} weights are missing or unknown, such as "
            f"{keys[0]!r}."
        )


class NamedByContent:
    """What names itself by its model's weights, which must stay as they are, and by its settings, which may change.

    Attributes:
        name: of its kind.
        model: with the weights.
    """

    name: str
    model: Any

    def identity_settings(self) -> list[Any]:
        """All that decides results beside the weights, as `fingerprint` takes it."""
        raise NotImplementedError

    def identity(self) -> str:
        """Names the weights and the settings as they are now; equal identities give equal results."""
        settings = self.identity_settings()
        known: dict[bytes, str] = self.__dict__.setdefault("_identities", {})  # the weights take a while to read
        key = _settings_bytes(settings)
        if key not in known:
            known[key] = f"{self.name}:{fingerprint(self.model, *settings)}"
        return known[key]


def fingerprint(model: torch.nn.Module, *settings: Any) -> str:
    """32 hex digits that change with any weight, its dtype, or a setting (JSON, or a config with `to_dict`)."""
    digest = hashlib.sha256(_settings_bytes(settings))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _settings_bytes(settings: Iterable[Any]) -> bytes:
    plain = [_lasting_settings(one.to_dict()) if hasattr(one, "to_dict") else one for one in settings]
    return b"".join(json.dumps(values, sort_keys=True, default=str).encode() + b"\0" for values in plain)


def _lasting_settings(values: Any) -> Any:
    """A config without what differs from one save or release to the next and changes no result."""
    if isinstance(values, dict):
        named = {str(key): value for key, value in values.items()}  # a saved config's numbers are strings as keys
        kept = [key for key in named if key not in _PASSING_SETTINGS and not key.startswith("_")]
        return {key: _lasting_settings(named[key]) for key in kept}
    return [_lasting_settings(value) for value in values] if isinstance(values, (list, tuple)) else values


def require_float32(dtype: torch.dtype, package: str) -> None:
    """Refuse other dtypes for the packages whose code mixes in float32 constants; raises ObjectComposeError."""
    if dtype != torch.float32:
        raise ObjectComposeError(
            f"`dtype` must be float32 with {package}, got {dtype}; transformers' models take others."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the error's type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextlib.contextmanager
def _quiet_transformers(is_quiet: bool) -> Iterator[None]:
    """No progress bars or load reports while a folder is read; what matters of them becomes an error afterwards."""
    if not is_quiet:
        yield
        return
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()
