"""Deltas: exact values, low rank, on and off a UNet, and every file or base that does not fit."""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors.torch import save_file

from objectcompose.adapters.base_identity import identify_base
from objectcompose.adapters.unet_delta import UNetDelta
from objectcompose.errors import CheckpointError, CheckpointFileError
from tests.tiny import tiny_unet


KEY = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def states(change: float = 0.5):
    """A UNet, its parameters, and the same with two matrices moved."""
    unet = tiny_unet()
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    after = {name: value.clone() for name, value in before.items()}
    generator = torch.Generator().manual_seed(3)
    for name in (KEY, "conv_in.weight"):
        rows, columns = after[name].flatten(1).shape
        move = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
        after[name] += change * move.view_as(after[name])
    return unet, before, after


def test_values_go_on_and_off_exactly(tmp_path):
    unet, before, after = states()
    delta = UNetDelta.between(before, after, identify_base(unet, "me/base"), dtype=torch.float32, notes={"step": "3"})
    assert set(delta.tensors) == {f"{KEY}:value", "conv_in.weight:value"}
    loaded = UNetDelta.load(delta.save(tmp_path / "delta.safetensors"))
    assert loaded.made_for == delta.made_for and loaded.notes == {"step": "3"}
    loaded.attach(unet)
    assert all(torch.equal(parameter, after[name]) for name, parameter in unet.named_parameters())
    with pytest.raises(CheckpointError, match="already attached"):
        loaded.attach(unet)
    loaded.detach(unet)
    assert all(torch.equal(parameter, before[name]) for name, parameter in unet.named_parameters())


def test_low_rank_is_exact_where_the_change_has_that_rank():
    unet, before, after = states()
    delta = UNetDelta.between(before, after, identify_base(unet), rank=2, dtype=torch.float32)
    assert delta.tensors[f"{KEY}:up"].shape[1] == delta.tensors["conv_in.weight:down"].shape[0] == 2
    delta.attach(unet)
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter.detach(), after[name], rtol=1e-4, atol=1e-5)
    delta.detach(unet)
    UNetDelta.between(before, after, identify_base(unet), rank=1, dtype=torch.float32).attach(unet)
    assert not torch.allclose(dict(unet.named_parameters())[KEY], after[KEY], atol=1e-3)


def keys_moved():
    """A UNet, its cross-attention keys, and a delta of all of them, as Separate-and-Enhance leaves."""
    unet = tiny_unet()
    before = {name: one.detach().clone() for name, one in unet.named_parameters() if ".attn2.to_k." in name}
    after = {name: value + 0.01 for name, value in before.items()}
    return unet, before, after, UNetDelta.between(before, after, identify_base(unet), dtype=torch.float32)


def own_keys(unet):
    """The values of the cross-attention keys, inside LoRA layers or not."""
    named = {name.replace(".base_layer", ""): parameter.detach() for name, parameter in unet.named_parameters()}
    return {name: value for name, value in named.items() if ".attn2.to_k.weight" in name}


def equal_states(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def add_lora(unet):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        options = {"r": 2, "lora_alpha": 0.1, "init_lora_weights": False}
        unet.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_k"], **options))


def remove_lora(unet):
    unet.unload_lora()


@pytest.mark.parametrize("first", ["lora", "delta"])
@pytest.mark.parametrize("first_off", ["lora", "delta"])
def test_lora_on_the_same_layers_comes_and_goes_in_any_order(first, first_off):
    unet, before, after, delta = keys_moved()
    on = {"lora": lambda: add_lora(unet), "delta": lambda: delta.attach(unet)}
    off = {"lora": lambda: remove_lora(unet), "delta": lambda: delta.detach(unet)}
    for name in (first, "delta" if first == "lora" else "lora"):
        on[name]()
    assert equal_states(own_keys(unet), after)
    off[first_off]()
    assert equal_states(own_keys(unet), before if first_off == "delta" else after)
    off["delta" if first_off == "lora" else "lora"]()
    assert equal_states(own_keys(unet), before)
    assert not any("base_layer" in name for name, _ in unet.named_parameters())
    delta.attach(unet)  # and it can be used again
    assert equal_states(own_keys(unet), after)


def test_fused_lora_is_refused_until_it_is_unfused():
    unet, before, _, delta = keys_moved()
    add_lora(unet)
    unet.fuse_lora()
    with pytest.raises(CheckpointError, match="unfuse_lora"):
        delta.attach(unet)
    unet.unfuse_lora()
    with torch.no_grad():
        for name, value in own_keys(unet).items():
            value.copy_(before[name])  # fusing and back is not exact
    delta.attach(unet)
    unet.fuse_lora()
    with pytest.raises(CheckpointError, match="unfuse_lora"):
        delta.detach(unet)
    unet.unfuse_lora()
    delta.detach(unet)
    assert equal_states(own_keys(unet), before)


def test_only_the_unet_that_it_is_on_can_give_it_back():
    unet, before, after, delta = keys_moved()
    other = tiny_unet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    kept = {name: value.clone() for name, value in own_keys(other).items()}
    with pytest.raises(CheckpointError, match="`unet` must be the one"):
        delta.detach(unet)  # it is on none
    delta.attach(unet)
    with pytest.raises(CheckpointError, match="`unet` must be the one"):
        delta.detach(other)
    assert equal_states(own_keys(other), kept) and equal_states(own_keys(unet), after)
    delta.detach(unet)
    assert equal_states(own_keys(unet), before)


def test_deltas_on_the_same_tensors_come_off_in_the_opposite_order():
    unet, before, after, first = keys_moved()
    further = {name: value + 0.01 for name, value in after.items()}
    second = UNetDelta.between(after, further, first.made_for, dtype=torch.float32)
    elsewhere = UNetDelta(first.made_for, {"conv_in.bias:value": torch.ones_like(unet.conv_in.bias)})
    first.attach(unet)
    second.attach(unet)
    elsewhere.attach(unet)
    with pytest.raises(CheckpointError, match="attached after this one holds .*attn2.to_k.weight too; detach that"):
        first.detach(unet)
    assert equal_states(own_keys(unet), further)
    second.detach(unet)  # nobody else holds its tensors
    assert equal_states(own_keys(unet), after)
    first.detach(unet)
    assert equal_states(own_keys(unet), before)
    first.attach(unet)
    second.attach(unet)
    second.detach(unet)
    first.detach(unet)
    assert equal_states(own_keys(unet), before)


def test_a_unet_that_is_gone_sets_the_delta_free():
    unet, _, after, delta = keys_moved()
    delta.attach(unet)
    del unet
    gc.collect()
    other = tiny_unet()
    delta.attach(other)
    assert equal_states(own_keys(other), after)


def test_values_that_offloading_moved_away_are_waited_for():
    unet, before, _, delta = keys_moved()
    delta.attach(unet)
    weight = unet.get_submodule(KEY.removesuffix(".weight")).weight
    unet.get_submodule(KEY.removesuffix(".weight")).weight = torch.nn.Parameter(weight.to("meta"))
    with pytest.raises(CheckpointError, match="offloading"):
        delta.detach(unet)
    unet.get_submodule(KEY.removesuffix(".weight")).weight = weight
    delta.detach(unet)
    assert equal_states(own_keys(unet), before)


def test_another_base_is_refused():
    unet, before, after = states()
    delta = UNetDelta.between(before, after, identify_base(unet, "me/base"))
    with pytest.raises(CheckpointError, match=r"`delta` was made for me/base"):
        delta.attach(tiny_unet("sdxl"))
    stranger = tiny_unet()
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    kept = {name: parameter.detach().clone() for name, parameter in stranger.named_parameters()}
    with pytest.raises(CheckpointError, match="signs"):
        delta.attach(stranger)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in stranger.named_parameters())


def test_tensors_that_do_not_fit_leave_the_unet_alone():
    unet, before, after = states()
    made_for = identify_base(unet)
    for tensors, message in (
        ({"no.such.weight:value": torch.ones(1)}, "does not have"), ({f"{KEY}:value": torch.ones(2, 2)}, "shape"),
        ({f"{KEY}:up": torch.ones(3, 1), f"{KEY}:down": torch.ones(1, 3)}, "does not fit"),
        ({"conv_in.bias:value": before["conv_in.bias"] * float("nan")}, "finite"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            UNetDelta(made_for, tensors).attach(unet)
    assert all(torch.equal(parameter, before[name]) for name, parameter in unet.named_parameters())


def test_no_change_no_delta():
    unet, before, after = states()
    made_for = identify_base(unet)
    with pytest.raises(CheckpointError, match="equal"):
        UNetDelta.between(before, before, made_for)
    with pytest.raises(CheckpointError, match="rank"):
        UNetDelta.between(before, after, made_for, rank=0)
    with pytest.raises(CheckpointError, match="names"):
        UNetDelta.between({}, after, made_for)
    with pytest.raises(CheckpointError, match="shape"):
        UNetDelta.between(before, {**after, KEY: torch.ones(1)}, made_for)


def test_bad_files(tmp_path):
    with pytest.raises(CheckpointFileError, match="cannot be loaded"):
        UNetDelta.load(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointFileError, match="cannot be loaded"):
        UNetDelta.load(tmp_path / "torn.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="must be a delta"):
        UNetDelta.load(tmp_path / "other.safetensors")
    unet, before, after = states()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointFileError, match="cannot be written"):
        UNetDelta.between(before, after, identify_base(unet)).save(tmp_path / "file" / "delta.safetensors")
