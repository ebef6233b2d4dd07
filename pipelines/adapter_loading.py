"""The main road: a stock base and an adapter from repositories of their own, put together in memory.

    pipe = SomePipeline.from_pretrained(base, adapter=SomeAdapter.from_pretrained(repo))
    pipe.load_adapter(other_repo)
    pipe.unload_adapter()

Only public functions of diffusers are used.
"""

from __future__ import annotations

import os
from typing import Any, get_args, get_type_hints

from objectcompose.adapters.folders import hub_id
from objectcompose.errors import CheckpointError
from objectcompose.pipelines.reference_images import encoder_side


class AdapterLoaderMixin:
    """For pipelines with a component `adapter`, whose `__init__` names the adapter's class in its annotation."""

    adapter: Any
    image_encoder: Any
    unet: Any
    components: Any
    register_modules: Any

    def load_adapter(self, adapter: Any, **options: Any) -> None:
        """Attach an adapter; the one that was there is dropped.

        Args:
            adapter: an adapter, or a folder or Hub id to load it from. It goes to the UNet's device and dtype.
            options: arguments of the adapter's `from_pretrained`, such as `revision`.

        Raises:
            CheckpointFileError: it cannot be loaded.
            CheckpointError: it is something else, of another method, or made for another base; or offloading is
                enabled already.
        """
        if any(hasattr(component, "_hf_hook") for component in self.components.values()):
            raise CheckpointError("`adapter` must be loaded before offloading is enabled, which would not move it.")
        if isinstance(adapter, (str, os.PathLike)):
            adapter = adapter_class_of(type(self)).from_pretrained(adapter, **options)
        if adapter is None:
            raise CheckpointError(
                "`adapter` must be an adapter, a folder or a Hub id, got None; see `unload_adapter`."
            )
        self.check_adapter(adapter, self.unet)
        self.register_modules(adapter=adapter.to(device=self.unet.device, dtype=self.unet.dtype))

    def unload_adapter(self) -> None:
        """Detach the adapter; the pipeline is the plain one then."""
        self.register_modules(adapter=None)

    def unload_ip_adapter(self) -> None:
        """Detach all IP-Adapters; the image encoder that this pipeline's own adapter reads pictures with stays."""
        own = {name: getattr(self, name) for name in ("image_encoder", "feature_extractor")}
        super().unload_ip_adapter()  # type: ignore[misc]
        if self.adapter is not None:
            self.register_modules(**own)

    def check_adapter(self, adapter: Any, unet: Any) -> None:
        """Raise `CheckpointError` unless there is no adapter or it is this pipeline's kind and made for this base."""
        if adapter is None:
            return
        wanted = adapter_class_of(type(self)).__name__
        # by name: code that was flattened for the Hub holds classes of its own
        if not hasattr(adapter, "made_for") or wanted not in (kind.__name__ for kind in type(adapter).__mro__):
            raise CheckpointError(f"`adapter` must be a {wanted}, got {type(adapter).__name__}.")
        if unet is not None:
            adapter.check_base(unet, hub_id(getattr(self, "name_or_path", None)))  # no name yet in `__init__`

    def check_encoders(self) -> list[str]:
        """Names of the layers that the adapter acts on.

        Raises:
            CheckpointError: there is no adapter or no image encoder, or they do not fit one another.
        """
        if self.adapter is None:
            raise CheckpointError(
                "`adapter` is needed for objects with an `image`, got None: give one to the pipeline, or call"
                " `load_adapter`."
            )
        encoder_side(self.image_encoder)
        wanted = self.adapter.encoder_widths
        found = {name: getattr(self.image_encoder.config, name) for name in wanted}
        if found != wanted:
            raise CheckpointError(f"`image_encoder` must have the widths {wanted} that `adapter` reads, got {found}.")
        return list(self.adapter.made_for.layer_widths)


def adapter_class_of(pipeline_class: type) -> Any:
    """The class that a pipeline's `__init__` wants for `adapter`."""
    annotation = get_type_hints(pipeline_class.__init__)["adapter"]  # type: ignore[misc]
    return next(kind for kind in get_args(annotation) or (annotation,) if kind is not type(None))
