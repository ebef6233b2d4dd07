"""A forward pass that ends once the layers of interest have run.

Guidance and the losses on attention maps read nothing after the last probed layer, so the rest of the UNet is not
run: same values and gradients for less than half of the work. Nothing counts calls or assumes an order of layers: the
pass ends when every listed layer has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from objectcompose.attention_processors.compiled import is_compiled, prepare_parts
from objectcompose.attention_processors.install import match_layers, plain_unet


class _LeaveForward(Exception):
    """Raised inside the model, caught by `run_until`."""


def can_leave_early(unet: Any) -> bool:
    """Whether a forward of this model may be left by an exception.

    Not with `torch.compile` (whole or by block), wrappers for several devices, or hooks that move weights back after
    each layer (sequential and group offloading); `enable_model_cpu_offload` is no obstacle.
    """
    if is_compiled(unet) or isinstance(unet, torch.nn.parallel.DistributedDataParallel):
        return False
    return not any(_offloads_by_layer(module) for module in unet.modules())


def run_until(unet: Any, last_layers: str | Sequence[str], *args: Any, **kwargs: Any) -> None:
    """Call `unet(*args, **kwargs)` and leave it as soon as all of `last_layers` have run.

    Read results from probes (`use_parts`); there is no prediction. With offloading hooks or a compiled model the
    whole forward runs (`can_leave_early`).

    Args:
        unet: the model.
        last_layers: the layers that must have run, a regex or a list of names; all probed layers will do.
        args: for the model.
        kwargs: for the model.

    Raises:
        LayerNotFoundError: `last_layers` matches nothing.
    """
    names = match_layers(unet, last_layers)
    if not can_leave_early(unet):
        if is_compiled(unet):
            prepare_parts(unet, args[0] if args else kwargs["sample"])
        unet(*args, **kwargs)
        return
    modules = {_exit_module_name(unet, name) for name in names}
    waiting = set(modules)
    leave = _LeaveForward()
    handles = []

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            waiting.discard(name)
            if not waiting:
                raise leave

        return hook

    try:
        for name in modules:
            handles.append(plain_unet(unet).get_submodule(name).register_forward_hook(note(name)))
        unet(*args, **kwargs)
    except _LeaveForward as error:
        if error is not leave:
            raise
    finally:
        for handle in handles:
            handle.remove()
        leave.__traceback__ = None  # its frames hold every activation of the pass


def _exit_module_name(unet: Any, layer: str) -> str:
    """Where to leave after `layer`: at the layer, or around the checkpointed blocks that hold it.

    An exception inside a checkpointed block would leave its bookkeeping half done. The nearest ancestor that can
    checkpoint its blocks is itself outside them.
    """
    if not torch.is_grad_enabled():
        return layer
    model, path = plain_unet(unet), layer.split(".")
    for length in range(len(path) - 1, 0, -1):
        name = ".".join(path[:length])
        if getattr(model.get_submodule(name), "gradient_checkpointing", None) is not None:
            return name if model.get_submodule(name).gradient_checkpointing else layer
    return layer


def _offloads_by_layer(module: Any) -> bool:
    attributes = vars(module)  # `getattr` of what is missing costs a module ten times as much
    hook = attributes.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))  # several hooks in sequence, or one
    if any(getattr(one, "offload", False) for one in hooks if one is not None):
        return True
    registry = attributes.get("_diffusers_hook")
    return registry is not None and any("offload" in name for name in registry.hooks)
