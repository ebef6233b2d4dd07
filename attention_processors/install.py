"""Parts on the layers of a UNet, for as long as a `with` block lasts.

Layers are chosen by name. Processors that compute plain attention are replaced; those of an IP-Adapter are kept and
called; any other is refused, because what it does would silently be lost.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from objectcompose.attention_processors.processor import ComposedAttnProcessor
from objectcompose.errors import LayerNotFoundError, ObjectComposeError, PartConflictError


# By name, not by class: some exist only in some diffusers versions, and a subclass may compute something else.
PLAIN_PROCESSOR_NAMES = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
)
KEPT_PROCESSOR_NAMES = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")
_KEPT_MODULE_NAME = "kept_processor"


def plain_unet(unet: Any) -> Any:
    """The diffusers model inside compile, data-parallel and PEFT wrappers."""
    while True:
        if hasattr(unet, "_orig_mod"):
            unet = unet._orig_mod
        elif isinstance(unet, torch.nn.parallel.DistributedDataParallel):
            unet = unet.module
        elif hasattr(unet, "get_base_model"):
            unet = unet.get_base_model()
        else:
            return unet


def attention_layers(unet: Any) -> dict[str, Any]:
    """Name to module of every attention layer, in the model's own order (which is not call order)."""
    return {name: module for name, module in plain_unet(unet).named_modules() if hasattr(module, "set_processor")}


def layer_levels(unet: Any) -> dict[str, int]:
    """Level of every attention layer of a diffusers UNet: 0 is the grid of the latents, each next one half of it."""
    depth = len(getattr(plain_unet(unet), "down_blocks", ()))
    levels = {}
    for name in attention_layers(unet):
        block = re.match(r"(down|up)_blocks\.(\d+)\.", name)
        if block is not None:
            levels[name] = int(block[2]) if block[1] == "down" else depth - 1 - int(block[2])
        elif name.startswith("mid_block."):
            levels[name] = depth - 1
    return levels


def match_layers(unet: Any, layers: str | Sequence[str], kind: Literal["self", "cross"] | None = None) -> list[str]:
    """Names of the attention layers that `layers` chooses.

    Args:
        unet: a model with diffusers attention layers.
        layers: a regex, searched in names such as `mid_block.attentions.0.transformer_blocks.0.attn2`, or a list of
            such names (with or without `.processor` at the end).
        kind: only layers of self- or of cross-attention; None is both.

    Raises:
        LayerNotFoundError: the pattern is no regex or chooses nothing, or a name does not exist.
    """
    modules = attention_layers(unet)
    candidates = [name for name, module in modules.items() if kind is None or _is_cross(module) == (kind == "cross")]
    which = "attention" if kind is None else f"{kind}-attention"
    if isinstance(layers, str):
        try:
            chosen = [name for name in candidates if re.search(layers, name)]
        except re.error as error:
            raise LayerNotFoundError(f"`layers` is not a regular expression ({error}): {layers!r}.") from error
        if not chosen:
            example = candidates[0] if candidates else "none"
            raise LayerNotFoundError(
                f"`layers` {layers!r} matches none of the {len(candidates)} {which} layers of the model,"
                f" which have names like {example}."
            )
        return chosen
    chosen = [name.removesuffix(".processor") for name in layers]
    if not chosen:
        raise LayerNotFoundError("`layers` must name at least one layer, got an empty list.")
    for name in chosen:
        if name not in candidates:
            close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.0)
            raise LayerNotFoundError(
                f"`layers` names {name!r}, which is no {which} layer of the model; closest: {close}."
            )
    return list(dict.fromkeys(chosen))


def _is_cross(module: Any) -> bool:
    return bool(getattr(module, "is_cross_attention", False))


def layers_of_parts(unet: Any, parts: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """Layer name to the parts that act on it, in the order given.

    Raises:
        LayerNotFoundError: a part's pattern matches nothing, or it lacks keys and values for a layer.
        ObjectComposeError: something that is no part.
    """
    by_layer: dict[str, list[Any]] = {}
    for part in parts:
        if getattr(part, "kind", None) not in ("mask", "branch", "probe"):
            raise ObjectComposeError(f"`parts` must hold masks, branches and probes, got {type(part).__name__}.")
        attention = getattr(part, "attention", "any")  # "self", "cross" or "any"
        kind: Any = None if attention == "any" else attention
        names = match_layers(unet, part.layers, kind)
        if hasattr(part, "check_layers"):
            part.check_layers(names)
        for name in names:
            by_layer.setdefault(name, []).append(part)
    return {name: tuple(chosen) for name, chosen in by_layer.items()}


@contextmanager
def use_parts(unet: Any, parts: Sequence[Any], outer_probes: bool = True) -> Iterator[Mapping[str, tuple[Any, ...]]]:
    """Install parts on the layers they choose; the original processors come back on exit, also on an exception.

    Without parts nothing is installed, though probes may be laid to rest. Blocks may be nested: the inner one adds its
    parts to those of the outer one.
    With gradient checkpointing, run the backward pass inside the block too: it computes the layers again.

    Args:
        unet: a diffusers UNet, also compiled or with LoRA layers.
        parts: masks, branches and probes; see the modules of this package.
        outer_probes: whether the probes of an outer block go on measuring. Guidance, whose passes are no part of what
            they are to measure, lets them rest.

    Yields:
        Layer name to the parts on it; with resting probes, also the layers where these were.

    Raises:
        LayerNotFoundError: a part chooses no layer.
        PartConflictError: a layer has a processor that can neither be replaced nor kept.
    """
    parts = tuple(parts)
    if not parts and outer_probes:
        yield {}
        return
    by_layer = layers_of_parts(unet, parts)
    modules = attention_layers(unet)
    if not outer_probes:
        for name, module in modules.items():
            if any(part.kind == "probe" for part in getattr(module.processor, "composed_parts", ())):
                by_layer.setdefault(name, ())
    originals = {name: modules[name].processor for name in by_layer}
    composed = {
        name: _compose_processor(name, chosen, originals[name], outer_probes) for name, chosen in by_layer.items()
    }
    try:
        for name, processor in composed.items():
            _exchange_processor(modules[name], processor)
        yield by_layer
    finally:
        for name, processor in originals.items():
            _exchange_processor(modules[name], processor)


@contextmanager
def frozen_parameters(modules: Iterable[Any]) -> Iterator[None]:
    """Gradients pass through these models and stay out of their weights; as before on exit, also on an exception."""
    trainable = [
        weight for module in modules if module is not None for weight in module.parameters() if weight.requires_grad
    ]
    for weight in trainable:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trainable:
            weight.requires_grad_(True)


def _compose_processor(
    name: str, parts: tuple[Any, ...], current: Any, outer_probes: bool = True
) -> ComposedAttnProcessor:
    if hasattr(current, "composed_parts"):  # ours, of an outer block
        kept = (part for part in current.composed_parts if outer_probes or part.kind != "probe")
        return ComposedAttnProcessor(name, (*kept, *parts), current.original)
    class_name = type(current).__name__
    if type(current).__module__.split(".")[0] == "diffusers":
        if class_name in PLAIN_PROCESSOR_NAMES:
            return ComposedAttnProcessor(name, parts)
        if class_name in KEPT_PROCESSOR_NAMES:
            return ComposedAttnProcessor(name, parts, current)
    raise PartConflictError(
        f"layer {name} has the processor {class_name}, which can neither be replaced nor kept; set another one first,"
        " such as with `unet.set_attn_processor(AttnProcessor2_0())`."
    )


def _exchange_processor(module: Any, processor: Any) -> None:
    """Set a processor; a module that the new one keeps stays in the tree, so that offloading still moves it."""
    if _KEPT_MODULE_NAME in module._modules:
        del module._modules[_KEPT_MODULE_NAME]
    if "processor" in module._modules:
        del module._modules["processor"]
    kept = getattr(processor, "original", None)
    if isinstance(kept, torch.nn.Module):
        module.add_module(_KEPT_MODULE_NAME, kept)
    module.set_processor(processor)
