"""Pipelines in folders and on the Hub, for people with and without this package.

A saved pipeline holds its code: the file that `make hub-files` built, under two names. One is what `model_index.json`
points at, so that `DiffusionPipeline.from_pretrained(id, trust_remote_code=True)` runs it where the package is not
installed; `pipeline.py` is what `custom_pipeline=id` looks for. Components of our own classes carry theirs in the
component's folder. `OurPipeline.from_pretrained(id)` ignores these pointers: the installed class, no remote code.

Stock base and adapter need none of this. One private name of diffusers is used, on loading what was saved here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from objectcompose.adapters.folders import (
    FolderPushMixin,
    folder_saved_whole,
    hub_id,
    loading_errors,
    take_push_options,
)
from objectcompose.adapters.model_card import plain_card_text
from objectcompose.errors import CheckpointError


saving_logger = logging.get_logger(__name__)

GENERATED_MARK = "# Generated from "
_PRIVATE_NAMES = ("_dict_from_json_file",)
MISSING_PRIVATE_NAMES = tuple(name for name in _PRIVATE_NAMES if not hasattr(DiffusionPipeline, name))


def check_private_names() -> None:
    """Raise `CheckpointError` where diffusers lacks a private name that bundled pipelines need."""
    if MISSING_PRIVATE_NAMES:
        raise CheckpointError(
            f"diffusers {diffusers.__version__} has no {', '.join(MISSING_PRIVATE_NAMES)}, which bundled pipelines"
            " need: use another version, or load the base and the adapter from repositories of their own."
        )


def hub_code(owner: type) -> str | None:
    """The one file that holds a class and everything it needs from the package.

    Args:
        owner: class of a pipeline or of a component.

    Returns:
        Python source; None for classes that are neither the package's own nor came from such a file.

    Raises:
        CheckpointError: the class came from such a file, which is gone or holds another pipeline by now.
    """
    module_file = getattr(sys.modules.get(owner.__module__), "__file__", None)
    if module_file is None:
        return None
    path = Path(module_file)
    if owner.__module__.split(".")[0] == "diffusers_modules":
        # all local folders share one place there, where a file of the same name may have been put since
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not text.startswith(GENERATED_MARK) or f"\nclass {owner.__name__}(" not in text:
            raise CheckpointError(
                f"the code of {owner.__name__} is no longer at {path}: load the pipeline again before saving it."
            )
        return text
    folder = path.parent.parent / "pipelines" / "hub_files" / path.stem
    files = sorted(folder.glob("*.py"))
    return files[0].read_text(encoding="utf-8") if files else None


class HubSavingMixin(FolderPushMixin):
    """Saving, pushing and loading of a pipeline; the first base of every pipeline class."""

    name_or_path: Any
    config_name: str
    components: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """Load from a folder or a Hub id; arguments as for `DiffusionPipeline.from_pretrained`.

        Code in the repository is not run. Weights must be safetensors unless `use_safetensors=False` is given, and are
        float32 unless `dtype` is: a text encoder would otherwise take the dtype that its config happens to name.

        Raises:
            CheckpointFileError: files are missing, corrupt or pickled, or the Hub cannot be reached.
            CheckpointError: the components do not fit together.
        """
        options = {"use_safetensors": True, **options}
        if not {"dtype", "torch_dtype", "quantization_config"} & options.keys():
            options["dtype"] = torch.float32
        with loading_errors(pretrained_model_name_or_path, bool(options["use_safetensors"])):
            try:
                return super().from_pretrained(pretrained_model_name_or_path, **options)  # type: ignore[misc]
            except (ValueError, TypeError, AttributeError):
                check_private_names()
                raise

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save to a folder, which is complete afterwards or does not load.

        Args:
            save_directory: the folder; made if need be.
            safe_serialization: as safetensors; pickled otherwise.
            variant: part of the weights' file names, such as "fp16".
            max_shard_size: of one weights file.
            push_to_hub: also push it; then `repo_id` (default: the folder's name) and the other arguments of
                `push_to_hub` may be given.
            options: further arguments of `DiffusionPipeline.save_pretrained`.

        Raises:
            CheckpointFileError: the folder cannot be written, or not be pushed.
            CheckpointError: LoRA or IP-Adapter weights are loaded, which a saved UNet would lose.
        """
        check_private_names()
        check_saveable(self)
        push_options = take_push_options(options, save_directory)
        options |= {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        with folder_saved_whole(save_directory, self.config_name) as folder:
            super().save_pretrained(folder, **options)  # type: ignore[misc]
            self._bundle_code(folder)
        if push_to_hub:
            self.push_to_hub(**push_options, **options)

    def default_card(self, repo_id: str) -> str:
        """Text of the card where none is given."""
        name = type(self).__name__
        usage = (
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)\n'
            f'# with the package objectcompose, without remote code: {name}.from_pretrained("{repo_id}")'
        )
        return plain_card_text(name, hub_id(self.name_or_path), usage)

    def _bundle_code(self, folder: Path) -> None:
        """Put the code beside the weights and point `model_index.json` at it."""
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        if hub_id(index.get("_name_or_path")) is None:
            index.pop("_name_or_path", None)  # a folder of this machine
        name, code = type(self).__name__, hub_code(type(self))
        if code is None:
            saving_logger.warning(
                f"{name} is not one of the package's pipelines: its code is not saved with it, so that only"
                f" `{name}.from_pretrained` loads the result."
            )
        else:
            stem = _code_stem(code)
            index["_class_name"] = [stem, name]
            for file_name in (f"{stem}.py", "pipeline.py"):
                (folder / file_name).write_text(code, encoding="utf-8")
        for component_name, component in self.components.items():
            is_foreign = (index.get(component_name) or [None])[0] == type(component).__module__  # to all libraries
            component_code = hub_code(type(component)) if is_foreign else None
            if component_code is not None:
                stem = _code_stem(component_code)
                (folder / component_name / f"{stem}.py").write_text(component_code, encoding="utf-8")
                index[component_name] = [stem, type(component).__name__]
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for config_file in folder.glob("*/config.json"):
            config = json.loads(config_file.read_text(encoding="utf-8"))
            if "dtype" in config:  # a half-precision variant must not change what loading without `dtype` gives
                config_file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: Any, **options: Any) -> Any:
        """Read `model_index.json`; an explicit class was asked for, so the pointer to the repository's is dropped."""
        index = super()._dict_from_json_file(json_file, **options)  # type: ignore[misc]
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][1]
        return index

    @classmethod
    def load_config(cls, *args: Any, **options: Any) -> Any:
        """As in diffusers; components whose code is in the repository are those of the installed class."""
        loaded = super().load_config(*args, **options)  # type: ignore[misc]
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, annotation in get_type_hints(cls.__init__).items():
            for component_class in get_args(annotation) or (annotation,):
                entry = index.get(name)
                if isinstance(entry, list) and entry[1] == getattr(component_class, "__name__", None):
                    if component_class.__module__.split(".")[0] not in ("diffusers", "transformers"):
                        index[name] = [component_class.__module__, entry[1]]
        return loaded


def _code_stem(code: str) -> str:
    """Name of the module that a generated file was made from, from its first line."""
    return code.split(maxsplit=4)[3].rpartition(".")[2]


def check_saveable(pipeline: Any) -> None:
    """Raise `CheckpointError` where a saved pipeline would silently lose weights that are loaded now."""
    unet = getattr(pipeline, "unet", None)
    if unet is not None and unet.config.encoder_hid_dim_type == "ip_image_proj":
        raise CheckpointError(
            "an IP-Adapter is loaded, whose weights a saved UNet loses: call `unload_ip_adapter()` before saving."
        )
    for name in ("unet", "text_encoder"):
        if getattr(getattr(pipeline, name, None), "peft_config", None):
            raise CheckpointError(
                f"LoRA layers are on `{name}`, which saved weights cannot hold: call `fuse_lora()` (to keep them) and"
                " `unload_lora_weights()` before saving."
            )
