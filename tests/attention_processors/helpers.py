"""What the tests of the attention core share: inputs, and attention the plain way, with whole softmax tables."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from objectcompose.attention_processors.install import attention_layers
from tests.tiny import tiny_added_cond, tiny_unet


KINDS = ("sd1", "sd2", "sdxl")


def unet_and_inputs(kind: str, batch_size: int = 2, grid: tuple[int, int] = (16, 16)):
    """A tiny UNet and the keyword arguments of one forward pass."""
    unet = tiny_unet(kind)
    generator = torch.Generator().manual_seed(3)
    width = unet.config.cross_attention_dim
    inputs = {
        "sample": torch.randn(batch_size, 4, *grid, generator=generator),
        "timestep": torch.tensor([37]),
        # Far apart, so that attention is not uniform.
        "encoder_hidden_states": 4 * torch.randn(batch_size, 11, width, generator=generator),
    }
    if kind == "sdxl":
        inputs["added_cond_kwargs"] = tiny_added_cond(batch_size)
    return unet, inputs


def predict(unet, inputs):
    return unet(**inputs).sample


@contextmanager
def explicit_probabilities(unet):
    """Softmax tables `(B, heads, Q, K)` of every layer, from hooks on the projections."""
    tables, states, handles = {}, {}, []
    for name, module in attention_layers(unet).items():

        def keep(which, name=name):
            def hook(_, __, output):
                states[name, which] = output

            return hook

        def finish(module, _, __, name=name):
            query, key = (
                states[name, which].unflatten(-1, (module.heads, -1)).transpose(1, 2) for which in ("q", "k")
            )
            logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            tables[name] = logits.softmax(-1)

        handles += [
            module.to_q.register_forward_hook(keep("q")),
            module.to_k.register_forward_hook(keep("k")),
            module.register_forward_hook(finish),
        ]
    try:
        yield tables
    finally:
        for handle in handles:
            handle.remove()


class TensorSizes(TorchDispatchMode):
    """Bytes of the tensors made inside the block: `largest` of one, and `peak` of all that lived at a time.

    What a fused kernel keeps inside is not seen, what a kernel that materialises makes is.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.peak = self._living = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._living += size
        self.largest, self.peak = max(self.largest, size), max(self.peak, self._living)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self._known.discard(key)
        self._living -= size


def half_regions(num_regions: int = 2):
    """Column stripes: left, right, ... on any square grid, the last third is background when there are three."""

    class Stripes:
        def at_tokens(self, num_tokens, device=None):
            side = int(num_tokens**0.5)
            columns = torch.arange(side) * num_regions // side
            return torch.stack([(columns == n).float().expand(side, side) for n in range(num_regions)])

    return Stripes()


class OneOf:
    """Some of the regions of another set."""

    def __init__(self, regions, chosen):
        self.regions, self.chosen = regions, chosen

    def at_tokens(self, num_tokens, device=None):
        return self.regions.at_tokens(num_tokens, device)[list(self.chosen)]


def random_keys_values(unet, layers, batch_size, num_tokens, seed=5):
    """Keys and values as an adapter gives them, one pair per layer."""
    generator = torch.Generator().manual_seed(seed)
    modules = attention_layers(unet)
    return {
        name: tuple(
            torch.randn(batch_size, num_tokens, modules[name].to_q.out_features, generator=generator) for _ in "kv"
        )
        for name in layers
    }
