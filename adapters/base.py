"""What every adapter is: a model of its own beside a frozen base, which knows that base and is saved as one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from objectcompose.adapters.base_identity import BaseIdentity, check_same_base
from objectcompose.adapters.folders import FolderPushMixin, folder_saved_whole, loading_errors, take_push_options
from objectcompose.adapters.model_card import plain_card_text
from objectcompose.errors import CheckpointError


class AdapterMixin(FolderPushMixin):
    """Compatibility with a base model, and folders that are complete or do not load: the first base of every adapter.

    An adapter is a class `SomeAdapter(AdapterMixin, ModelMixin, ConfigMixin)` that registers the arguments
    `layer_widths`, `token_width`, `base_fingerprint` and `base_model` in its config, beside its own; see
    `BaseIdentity` for what they hold. Its module must import `ModelMixin` itself: diffusers looks for it there.
    """

    config: Any
    config_name: str

    @property
    def made_for(self) -> BaseIdentity:
        """The base that the weights were made for."""
        config: Any = self.config
        return BaseIdentity(dict(config.layer_widths), config.token_width, config.base_fingerprint, config.base_model)

    def check_base(self, unet: Any, base_model: str | None = None) -> None:
        """Raise `CheckpointError` unless `unet` is the base of this adapter or descends from it.

        Args:
            unet: the UNet to use the adapter with.
            base_model: its id, for the message.
        """
        check_same_base(self.made_for, unet, base_model, "adapter")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """Load from a folder or a Hub id; arguments as for `ModelMixin.from_pretrained`.

        Weights must be safetensors unless `use_safetensors=False` is given.

        Raises:
            CheckpointFileError: the files are missing, corrupt or pickled, or the Hub cannot be reached.
            CheckpointError: the files lack some of the weights, which would be random otherwise.
        """
        options = {"use_safetensors": True, **options}
        with loading_errors(pretrained_model_name_or_path, bool(options["use_safetensors"])):
            adapter, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, **{**options, "output_loading_info": True}
            )
        if info["missing_keys"]:
            raise CheckpointError(
                f"{str(pretrained_model_name_or_path)!r} cannot be loaded: {len(info['missing_keys'])} weights are"
                f" missing, the first of them {min(info['missing_keys'])}."
            )
        return (adapter, info) if options.get("output_loading_info") else adapter

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
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
            options: further arguments of `ModelMixin.save_pretrained`.

        Raises:
            CheckpointFileError: the folder cannot be written, or not be pushed.
        """
        push_options = take_push_options(options, save_directory)
        # named in the signature, because a pipeline that saves its components passes on only what it finds there
        options |= {
            "safe_serialization": safe_serialization,
            "variant": variant,
            "max_shard_size": max_shard_size,
        }
        with folder_saved_whole(save_directory, self.config_name) as folder:
            super().save_pretrained(folder, **options)  # type: ignore[misc]
        if push_to_hub:
            self.push_to_hub(**push_options, **options)

    def default_card(self, repo_id: str) -> str:
        """Text of the card where none is given."""
        name = type(self).__name__
        usage = f'from {type(self).__module__} import {name}\n\nadapter = {name}.from_pretrained("{repo_id}")'
        return plain_card_text(name, self.made_for.base_model, usage)
