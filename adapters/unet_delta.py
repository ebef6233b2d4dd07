"""What fine-tuning changed of a UNet, as one small file: new values of a few tensors, or low-rank differences of all.

A delta knows the base it was made for and is put on and taken off again exactly: the base's own values are kept
meanwhile. LoRA may come and go before, between and after: it stands beside the values that a delta replaces.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import save

from objectcompose.adapters.base_identity import BaseIdentity, check_same_base
from objectcompose.adapters.folders import checkpoint_file_errors
from objectcompose.attention_processors.install import plain_unet
from objectcompose.errors import CheckpointError
from objectcompose.files import write_atomically


#: File of a delta in the folder that training leaves.
DELTA_NAME = "unet_delta.safetensors"
_FORMAT = "objectcompose.unet_delta.1"
_VALUE, _DOWN, _UP = "value", "down", "up"


@dataclass
class UNetDelta:
    """Changed tensors of a UNet.

    Attributes:
        made_for: the base.
        tensors: parameter name and kind, `<name>:value` (the new value), or `<name>:down` (r, I) and `<name>:up`
            (O, r), whose product, in the parameter's shape, is added.
        notes: how it was trained; free text by key.
    """

    made_for: BaseIdentity
    tensors: dict[str, torch.Tensor]
    notes: dict[str, str] = field(default_factory=dict)
    _originals: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _attached_to: weakref.ref[Any] | None = field(default=None, repr=False)
    _mark: tuple[str, frozenset[str]] = field(default=("", frozenset()), repr=False)

    @classmethod
    def between(
        cls,
        before: Mapping[str, torch.Tensor],
        after: Mapping[str, torch.Tensor],
        made_for: BaseIdentity,
        rank: int | None = None,
        dtype: torch.dtype = torch.float16,
        notes: Mapping[str, str] | None = None,
    ) -> UNetDelta:
        """The delta from one state to another; tensors that are equal are left out.

        Args:
            before: parameters of the base by name.
            after: the same after training.
            made_for: the base.
            rank: None keeps the new values; a number keeps differences of matrices and convolutions at this rank (by
                singular values, the closest there is), and new values of all other tensors.
            dtype: of the tensors.
            notes: see the class.

        Raises:
            CheckpointError: the names or shapes differ, nothing changed, or `rank` is below 1.
        """
        if rank is not None and rank < 1:
            raise CheckpointError(f"`rank` must be at least 1, got {rank}.")
        if set(before) != set(after):
            raise CheckpointError("`before` and `after` must have parameters of the same names.")
        tensors = {}
        for name, old in before.items():
            new = after[name].detach().to("cpu")
            old = old.detach().to("cpu")
            if old.shape != new.shape:
                raise CheckpointError(f"{name} must keep its shape {tuple(old.shape)}, got {tuple(new.shape)}.")
            if torch.equal(old, new):
                continue
            if rank is None or new.ndim < 2 or min(new.shape[0], new[0].numel()) <= rank:
                tensors[f"{name}:{_VALUE}"] = new.to(dtype)
                continue
            left, values, right = torch.linalg.svd((new.float() - old.float()).flatten(1), full_matrices=False)
            root = values[:rank].sqrt()
            tensors[f"{name}:{_UP}"] = (left[:, :rank] * root).to(dtype)
            tensors[f"{name}:{_DOWN}"] = (root[:, None] * right[:rank]).to(dtype)
        if not tensors:
            raise CheckpointError("`after` is equal to `before`: there is no delta to keep.")
        return cls(made_for, tensors, dict(notes or {}))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all.

        Raises:
            CheckpointFileError: it cannot be written.
        """
        path = Path(path)
        about = {"format": _FORMAT, "made_for": json.dumps(asdict(self.made_for)), "notes": json.dumps(self.notes)}
        with checkpoint_file_errors(f"the delta {str(path)!r} cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({name: one.contiguous() for name, one in self.tensors.items()}, about))
        return path

    @classmethod
    def load(cls, path: str | Path) -> UNetDelta:
        """Read what `save` wrote.

        Raises:
            CheckpointFileError: no such file, or a damaged one.
            CheckpointError: a file of another kind.
        """
        with checkpoint_file_errors(f"the delta {str(path)!r} cannot be loaded"):
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        if about.get("format") != _FORMAT:
            raise CheckpointError(f"{str(path)!r} must be a delta ({_FORMAT}), got {about.get('format')!r}.")
        return cls(BaseIdentity(**json.loads(about["made_for"])), tensors, json.loads(about["notes"]))

    @torch.no_grad()
    def attach(self, unet: Any, base_model: str | None = None) -> None:
        """Put the delta on a UNet. Of several deltas on the same tensors, the last one comes off first.

        Args:
            unet: the base, or a descendant of it; with or without LoRA, which stays on.
            base_model: its id, for messages.

        Raises:
            CheckpointError: another base, the delta is already on a UNet, or LoRA is fused into the values.
        """
        if self._attached_to is not None and self._attached_to() is not None:
            raise CheckpointError("the delta is already attached; detach it first.")
        check_same_base(self.made_for, unet, base_model, "delta")
        names = {name.rpartition(":")[0] for name in self.tensors}
        parameters = _own_parameters(unet, names)
        new = {name: self._new_value(name, parameters[name]) for name in names}
        self._originals = {name: parameters[name].detach().clone() for name in names}
        self._attached_to, self._mark = weakref.ref(plain_unet(unet)), (uuid4().hex, frozenset(names))
        _attached_deltas(unet).append(self._mark)
        for name, value in new.items():
            parameters[name].copy_(value)

    @torch.no_grad()
    def detach(self, unet: Any) -> None:
        """Take the delta off: the UNet has its own values back, bit for bit.

        Args:
            unet: that the delta is on.

        Raises:
            CheckpointError: the delta is not on this UNet, another one that was attached later holds some of its
                tensors, LoRA is fused into the values, or offloading moved them away. The delta stays where it is.
        """
        if self._attached_to is None or self._attached_to() is not plain_unet(unet):
            raise CheckpointError("`unet` must be the one that the delta is attached to; nothing was detached.")
        attached = _attached_deltas(unet)
        for _, names in attached[attached.index(self._mark) + 1 :]:
            if shared := names & self._originals.keys():
                raise CheckpointError(
                    f"the delta that was attached after this one holds {min(shared)} too; detach that one first."
                )
        parameters = _own_parameters(unet, self._originals)
        for name, value in self._originals.items():
            parameters[name].copy_(value)
        attached.remove(self._mark)
        self._originals, self._attached_to = {}, None

    def _new_value(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        if f"{name}:{_VALUE}" in self.tensors:
            value = self.tensors[f"{name}:{_VALUE}"].to(parameter.device, torch.float32)
        else:
            up, down = (self.tensors[f"{name}:{kind}"].to(parameter.device, torch.float32) for kind in (_UP, _DOWN))
            change = up @ down
            if change.numel() != parameter.numel():
                raise CheckpointError(f"`delta` does not fit {name} of shape {tuple(parameter.shape)}.")
            value = parameter.float() + change.view_as(parameter)
        if value.shape != parameter.shape:
            raise CheckpointError(f"`delta` has shape {tuple(value.shape)} for {name}, not {tuple(parameter.shape)}.")
        if not value.isfinite().all():
            raise CheckpointError(f"`delta` has values for {name} that are not finite.")
        return value


def _attached_deltas(unet: Any) -> list[tuple[str, frozenset[str]]]:
    """Marks of the deltas on a UNet and the names of their tensors, in the order of attachment; to be changed."""
    return vars(plain_unet(unet)).setdefault("_attached_deltas", [])


def _own_parameters(unet: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The UNet's own parameters of these names, also where PEFT has put them inside LoRA layers and renamed them.

    Raises:
        CheckpointError: there is none of that name, or its values are not the UNet's own at the moment.
    """
    model = plain_unet(unet)
    found = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    fused = {name for name, module in model.named_modules() if getattr(module, "merged", False)}
    for name in names:
        if name not in found:
            raise CheckpointError(f"`delta` has a tensor for {name}, which the UNet does not have.")
        if name.rpartition(".")[0] in fused:
            raise CheckpointError(f"LoRA is fused into {name}; unfuse it first (`unfuse_lora`).")
        if found[name].is_meta:
            raise CheckpointError(f"`unet` has no values of {name} in memory: do this before offloading is enabled.")
    return {name: found[name] for name in names}
