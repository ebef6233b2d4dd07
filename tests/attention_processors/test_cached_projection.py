"""Keys and values that are kept between calls: never stale, and no longer than the weights they came from."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from objectcompose.attention_processors.branch import Branch, cached_projection
from objectcompose.attention_processors.install import match_layers, use_parts
from tests.attention_processors.helpers import KINDS, predict, unet_and_inputs


class TestCachedProjection:
    @pytest.fixture
    def projection(self):
        linear = torch.nn.Linear(4, 6)
        counted = []

        def project(tokens):
            counted.append(1)
            return {"layer": (linear(tokens), linear(tokens) + 1)}

        return linear, project, counted

    @torch.no_grad()
    def test_is_computed_once_for_equal_content(self, projection):
        linear, project, counted = projection
        cache, tokens = {}, torch.randn(1, 3, 4)
        first = cached_projection(cache, tokens, project, linear.parameters())
        assert cached_projection(cache, tokens, project, linear.parameters()) is first
        assert cached_projection(cache, tokens.clone(), project, linear.parameters()) is first
        assert len(counted) == 1

    @pytest.mark.parametrize(
        "change",
        ["new", "in place", "data", "shape", "dtype", "weights", "new weights", "rounded weights", "autocast"],
    )
    @torch.no_grad()
    def test_is_never_stale(self, projection, change):
        linear, project, counted = projection
        cache, tokens = {}, torch.randn(2, 3, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
            before = cached_projection(cache, tokens, project, linear.parameters())["layer"][0].clone()
        if change == "new":
            tokens = tokens + 1
        elif change == "in place":
            tokens += 1
        elif change == "data":
            tokens.data[0, 0, 0] = 9  # does not count as a new version of the tensor
        elif change == "shape":
            tokens = tokens[:1]
        elif change == "dtype":
            tokens, linear = tokens.double(), linear.double()
        elif change == "weights":
            linear.weight.add_(1)
        elif change == "rounded weights":
            linear.bfloat16().float()  # whose memory may be where it was
        elif change == "new weights":
            linear.weight = torch.nn.Parameter(linear.weight + 1)
        after = cached_projection(cache, tokens, project, linear.parameters())["layer"][0]
        assert len(counted) == 2
        assert before.shape != after.shape or before.dtype != after.dtype or not torch.equal(before, after)

    def test_nothing_is_kept_while_gradients_flow(self, projection):
        linear, project, counted = projection
        cache, tokens = {}, torch.randn(1, 3, 4)
        for _ in range(2):
            assert cached_projection(cache, tokens, project, linear.parameters())["layer"][0].requires_grad
        assert len(counted) == 2 and cache == {}

    @torch.no_grad()
    def test_what_inference_mode_made_stays_there(self, projection):
        linear, project, counted = projection
        cache, tokens = {}, torch.randn(1, 3, 4)
        with torch.inference_mode():
            first = cached_projection(cache, tokens, project, linear.parameters())
            assert cached_projection(cache, tokens, project, linear.parameters()) is first
        key, _ = cached_projection(cache, tokens, project, linear.parameters())["layer"]
        assert len(counted) == 2 and not key.is_inference() and torch.equal(key, first["layer"][0])
        key.requires_grad_()

    @pytest.mark.parametrize("end", ["moved", "replaced", "gone"])
    @torch.no_grad()
    def test_is_held_no_longer_than_the_memory_of_the_weights(self, end):
        linear, cache = torch.nn.Linear(4, 6), {}

        def fill():
            weights = [*linear.parameters()]
            found = cached_projection(cache, torch.randn(1, 3, 4), lambda x: {"layer": (linear(x),) * 2}, weights)
            return weakref.ref(found["layer"][0])

        key, weight = fill(), weakref.ref(linear.weight)
        assert cache and key() is not None
        if end == "moved":  # to another device, for a module keeps its parameters, and gives them other memory
            linear.weight.data = linear.weight.data.clone()
        elif end == "replaced":
            linear.weight = torch.nn.Parameter(linear.weight + 1)
        else:
            del linear
        gc.collect()
        assert cache == {} and key() is None and (weight() is None) == (end != "moved")

    @torch.no_grad()
    def test_weights_may_move_while_they_are_used(self):
        """As offloading moves them to the device, when they are used, and away at the end of the call."""
        linear, cache, counted = torch.nn.Linear(4, 6), {}, []

        def project(tokens):
            counted.append(1)
            linear.weight.data = linear.weight.data.clone()
            return {"layer": (linear(tokens),) * 2}

        tokens = torch.randn(1, 3, 4)
        for _ in range(2):
            cached_projection(cache, tokens, project, linear.parameters())
        assert len(counted) == 1
        linear.weight.data = linear.weight.data.clone()
        assert cache == {}

    @pytest.mark.parametrize("kind", KINDS)
    @torch.no_grad()
    def test_once_per_call_of_many_steps_and_new_tokens_change_the_picture(self, kind):
        unet, inputs = unet_and_inputs(kind)
        cross = match_layers(unet, r"attn2$")
        projections = {name: torch.nn.Linear(8, unet.get_submodule(name).to_q.out_features) for name in cross}
        weights = [weight for linear in projections.values() for weight in linear.parameters()]
        counted, cache, outputs = [], {}, []

        def project(tokens):
            counted.append(1)
            return {name: (linear(tokens), linear(tokens)) for name, linear in projections.items()}

        for tokens in (torch.randn(1, 4, 8), torch.randn(1, 4, 8)):
            for _ in range(3):
                with use_parts(unet, [Branch(cached_projection(cache, tokens, project, weights))]):
                    outputs.append(predict(unet, inputs))
        assert len(counted) == 2
        assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[2], outputs[3])
