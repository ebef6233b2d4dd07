"""Leaving the UNet early: same probe values and gradients; the full forward where an exception must not pass."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.early_exit import can_leave_early, run_until
from objectcompose.attention_processors.install import match_layers, use_parts
from objectcompose.attention_processors.probe import RegionMassProbe, TokenMapProbe
from objectcompose.errors import LayerNotFoundError
from tests.attention_processors.helpers import KINDS, half_regions, predict, unet_and_inputs


def last_layers(kind):
    """Layers that end before the last up block, so that there is something to leave out."""
    return r"(down_blocks|mid_block).*attn" if kind == "sdxl" else r"(down_blocks.1|mid_block|up_blocks.1).*attn"


def probe_run(kind, run, checkpointing=False):
    unet, inputs = unet_and_inputs(kind)
    inputs["sample"].requires_grad_()
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    pattern = last_layers(kind)
    probes = [
        TokenMapProbe([2, 3], layers=pattern + "2$"),
        RegionMassProbe(half_regions(), layers=pattern + "1$"),
    ]
    with use_parts(unet, probes):
        run(unet, inputs, pattern)
        values = {**probes[0].maps, **probes[1].mass}
        scalar = sum((x**2).sum() for x in values.values())
        gradients = torch.autograd.grad(scalar, [inputs["sample"], *unet.down_blocks[0].parameters()])
    return values, gradients


def run_full(unet, inputs, pattern):
    predict(unet, inputs)


def run_early(unet, inputs, pattern):
    finished = []
    handle = unet.conv_out.register_forward_hook(lambda *_: finished.append(True))
    run_until(unet, pattern, **inputs)
    handle.remove()
    assert not finished
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_same_values_and_gradients_as_a_full_forward(kind, checkpointing):
    full_values, full_gradients = probe_run(kind, run_full)
    values, gradients = probe_run(kind, run_early, checkpointing)
    assert values.keys() == full_values.keys()
    for name in values:
        torch.testing.assert_close(values[name], full_values[name], atol=1e-6, rtol=1e-5)
    for one, other in zip(gradients, full_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def layers_that_ran(unet, inputs, last):
    names = match_layers(unet, r"attn[12]$")
    ran, handles = [], []
    for name in names:
        module = unet.get_submodule(name)
        handles.append(module.register_forward_hook(lambda *_, name=name: ran.append(name)))
    with torch.no_grad():
        run_until(unet, last, **inputs)
    for handle in handles:
        handle.remove()
    return ran


def test_leaves_right_after_the_last_layer_in_call_order():
    unet, inputs = unet_and_inputs("sd1")
    mid = match_layers(unet, r"mid_block.*attn2$")
    ran = layers_that_ran(unet, inputs, [*mid, *match_layers(unet, r"down_blocks.0.*attn2$")])
    assert ran[-1] == mid[0] and not any(name.startswith("up_blocks") for name in ran)


def test_an_unknown_layer_is_refused():
    unet, inputs = unet_and_inputs("sd1")
    with pytest.raises(LayerNotFoundError):
        run_until(unet, r"attn3$", **inputs)


def test_other_exceptions_pass_and_leave_no_hook():
    unet, inputs = unet_and_inputs("sd1")
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][..., :-1]
    with pytest.raises(RuntimeError):
        run_until(unet, r"mid_block.*attn2$", **inputs)
    assert not any(module._forward_hooks for module in unet.modules())


def ran_to_the_end(unet, inputs, plain=None):
    finished = []
    handle = (plain or unet).conv_out.register_forward_hook(lambda *_: finished.append(True))
    probe = TokenMapProbe([2], layers=r"mid_block.*attn2$")
    with torch.no_grad(), use_parts(unet, [probe]):
        run_until(unet, probe.layers, **inputs)
    handle.remove()
    assert probe.maps
    return bool(finished)


def test_full_forward_with_sequential_offload():
    from accelerate import cpu_offload

    unet, inputs = unet_and_inputs("sd1")
    assert not ran_to_the_end(unet, inputs)
    cpu_offload(unet, execution_device=torch.device("cpu"))
    assert not can_leave_early(unet)
    assert ran_to_the_end(unet, inputs)


def test_model_offload_is_no_obstacle():
    from accelerate import cpu_offload_with_hook

    unet, inputs = unet_and_inputs("sd1")
    cpu_offload_with_hook(unet, execution_device=torch.device("cpu"))
    assert can_leave_early(unet)
    assert not ran_to_the_end(unet, inputs)


def test_full_forward_with_group_offload():
    from diffusers.hooks import apply_group_offloading

    unet, inputs = unet_and_inputs("sd1")
    apply_group_offloading(unet, onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert not can_leave_early(unet)
    assert ran_to_the_end(unet, inputs)


@pytest.mark.parametrize("part", ["model", "block"])
def test_a_compiled_model_or_block_is_not_left(part):
    unet, _ = unet_and_inputs("sd1")
    if part == "model":
        unet = torch.compile(unet, backend="eager")
    else:
        unet.mid_block.compile(backend="eager")
    assert not can_leave_early(unet)


@pytest.mark.slow
def test_full_forward_with_a_compiled_model():
    unet, inputs = unet_and_inputs("sd1")
    compiled = torch.compile(unet, backend="eager")
    assert ran_to_the_end(compiled, inputs, plain=unet)
