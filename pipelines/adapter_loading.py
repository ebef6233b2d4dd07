"""The main road: a stock base and an adapter from repositories of their own, put together in memory.

    pipe = SomePipeline.from_pretrained(base, adapter=SomeAdapter.from_pretrained(repo))
    pipe.load_adapter(other_repo)
    pipe.unload_adapter()

Only public functions of diffusers are used.
"""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

from objectcompose.adapters.folders import hub_id
from objectcompose.errors import CheckpointError


class AdapterLoaderMixin:
    """For pipelines with a component `adapter`, whose `__init__` names the adapter's class in its annotation."""

    adapter: Any
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
            CheckpointError: it was made for another base, or offloading is enabled already.
        """
        if any(hasattr(component, "_hf_hook") for component in self.components.values()):
            raise CheckpointError("`adapter` must be loaded before offloading is enabled, which would not move it.")
        if not hasattr(adapter, "made_for"):
            adapter = adapter_class_of(type(self)).from_pretrained(adapter, **options)
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
        """Raise `CheckpointError` unless there is no adapter or it was made for this base; for `__init__`."""
        if adapter is not None and unet is not None:
            adapter.check_base(unet, hub_id(getattr(self, "name_or_path", None)))  # no name yet in `__init__`


def adapter_class_of(pipeline_class: type) -> Any:
    """The class that a pipeline's `__init__` wants for `adapter`."""
    annotation = get_type_hints(pipeline_class.__init__)["adapter"]  # type: ignore[misc]
    return next(kind for kind in get_args(annotation) or (annotation,) if kind is not type(None))
