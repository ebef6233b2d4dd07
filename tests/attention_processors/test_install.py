"""Installing and restoring: off is exact, nothing stays behind, foreign processors are kept or refused."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)

from objectcompose.attention_processors import branch as branch_module
from objectcompose.attention_processors import mask as mask_module
from objectcompose.attention_processors import probe as probe_module
from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.install import attention_layers, match_layers, use_parts
from objectcompose.attention_processors.mask import KeyMask, RegionKeyMask
from objectcompose.attention_processors.probe import RegionMassProbe, TokenMapProbe
from objectcompose.attention_processors.processor import ComposedAttnProcessor
from objectcompose.errors import LayerNotFoundError, ObjectComposeError, PartConflictError
from tests.attention_processors.helpers import KINDS, half_regions, predict, random_keys_values, unet_and_inputs


def processors(unet):
    return {name: module.processor for name, module in attention_layers(unet).items()}


def same_objects(first, second):
    return first.keys() == second.keys() and all(first[name] is second[name] for name in first)


def neutral_parts(unet, batch_size=2):
    """A part of every kind that must change nothing."""
    cross = match_layers(unet, r"attn2$")
    keys_values = random_keys_values(unet, cross, batch_size, 6)
    return [
        KeyMask(torch.ones(11, dtype=torch.bool)),
        RegionKeyMask(OnesEverywhere()),
        Branch(keys_values, half_regions(), scale=torch.zeros(())),
        Branch(keys_values, half_regions(), mode="replace", scale=0.0, gamma=1.0),
        TokenMapProbe([1, 4]),
        RegionMassProbe(half_regions()),
    ]


class OnesEverywhere:
    def at_tokens(self, num_tokens, device=None):
        side = int(num_tokens**0.5)
        return torch.ones(1, side, side)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_off_is_bit_equal_and_installs_nothing(kind):
    unet, inputs = unet_and_inputs(kind)
    plain, before = predict(unet, inputs), processors(unet)
    with use_parts(unet, []) as installed:
        assert installed == {}
        assert same_objects(processors(unet), before)
        assert torch.equal(predict(unet, inputs), plain)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_neutral_parts_equal_the_plain_model(kind):
    unet, inputs = unet_and_inputs(kind)
    plain, before = predict(unet, inputs), processors(unet)
    with use_parts(unet, neutral_parts(unet)):
        composed = predict(unet, inputs)
        assert all(isinstance(p, ComposedAttnProcessor) for p in processors(unet).values())
    assert same_objects(processors(unet), before)
    torch.testing.assert_close(composed, plain, atol=1e-5, rtol=0)
    assert torch.equal(predict(unet, inputs), plain)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_probes_leave_the_output_bit_identical(kind):
    unet, inputs = unet_and_inputs(kind)
    plain = predict(unet, inputs)
    with use_parts(unet, [TokenMapProbe([2]), RegionMassProbe(half_regions())]):
        assert torch.equal(predict(unet, inputs), plain)


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_restored_after_an_exception_at_any_step(kind, step):
    unet, inputs = unet_and_inputs(kind)
    plain, before = predict(unet, inputs), processors(unet)
    with pytest.raises(RuntimeError, match="stop"):
        with use_parts(unet, neutral_parts(unet)):
            for index in range(3):
                predict(unet, inputs)
                if index == step:
                    raise RuntimeError("stop")
    assert same_objects(processors(unet), before)
    assert torch.equal(predict(unet, inputs), plain)


def test_restored_when_a_layer_fails_inside_the_model():
    unet, inputs = unet_and_inputs("sd2")
    before = processors(unet)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][..., :-1]
    with pytest.raises(RuntimeError), use_parts(unet, [TokenMapProbe([1])]):
        predict(unet, inputs)
    assert same_objects(processors(unet), before)


@pytest.mark.parametrize("wrong", ["attn9$", "(", [], ["mid_block.attentions.0.transformer_blocks.0.attn3"]])
def test_patterns_that_match_nothing_raise_before_anything_is_installed(wrong):
    unet, _ = unet_and_inputs("sd1")
    before = processors(unet)
    with pytest.raises(LayerNotFoundError, match="layers"):
        with use_parts(unet, [TokenMapProbe([1]), TokenMapProbe([1], layers=wrong)]):
            pass
    assert same_objects(processors(unet), before)


def test_a_probe_of_self_attention_refuses_cross_attention_layers():
    unet, _ = unet_and_inputs("sd1")
    with (
        pytest.raises(LayerNotFoundError, match="self-attention"),
        use_parts(unet, [RegionMassProbe(half_regions(), layers=r"attn2$")]),
    ):
        pass


def test_a_branch_without_keys_for_a_layer_is_refused():
    unet, _ = unet_and_inputs("sd1")
    names = match_layers(unet, r"attn2$")
    branch = Branch(random_keys_values(unet, names[:1], 1, 3), layers=names)
    with pytest.raises(LayerNotFoundError, match=names[1]), use_parts(unet, [branch]):
        pass


def test_something_that_is_no_part_is_refused():
    unet, _ = unet_and_inputs("sd1")
    with pytest.raises(ObjectComposeError, match="str"), use_parts(unet, ["attn2"]):
        pass


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_parts_of_a_second_copy_of_the_package_are_taken(kind):
    """A flattened Hub file holds its own classes: parts are told apart by what they say, not by class."""
    unet, inputs = unet_and_inputs(kind)
    copies = {}
    for module in (branch_module, mask_module, probe_module):
        spec = importlib.util.spec_from_file_location(f"second_{module.__name__.split('.')[-1]}", module.__file__)
        copies[module] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = copies[module]  # where dataclasses look for their module
        spec.loader.exec_module(copies[module])
    keys_values = random_keys_values(unet, match_layers(unet, r"attn2$"), 2, 6)

    def parts(branch, mask, probe):
        return [
            branch.Branch(keys_values, half_regions()),
            mask.KeyMask(torch.arange(11) != 4),
            mask.RegionKeyMask(half_regions(3)),
            probe.TokenMapProbe([1, 4]),
            probe.RegionMassProbe(half_regions()),
        ]

    own, second = parts(branch_module, mask_module, probe_module), parts(*copies.values())
    assert not any(isinstance(one, type(other)) for one, other in zip(own, second, strict=True))
    with use_parts(unet, own):
        expected = predict(unet, inputs)
    with use_parts(unet, second):
        assert torch.equal(predict(unet, inputs), expected)
    assert second[-1].mass.keys() == own[-1].mass.keys()


def test_names_with_the_processor_suffix_are_accepted():
    unet, _ = unet_and_inputs("sd1")
    names = match_layers(unet, r"mid_block.*attn2$")
    assert match_layers(unet, [f"{names[0]}.processor"], "cross") == names


@torch.no_grad()
def test_nested_blocks_add_their_parts():
    unet, inputs = unet_and_inputs("sd1")
    before = processors(unet)
    outer, inner = TokenMapProbe([1]), TokenMapProbe([2])
    with use_parts(unet, [outer]):
        middle = processors(unet)
        with use_parts(unet, [inner]):
            predict(unet, inputs)
        assert same_objects(processors(unet), middle)
    assert same_objects(processors(unet), before)
    assert outer.maps.keys() == inner.maps.keys() != set()


@pytest.mark.parametrize("change", ["explicit", "sliced", "fused projections"])
@torch.no_grad()
def test_other_plain_processors_are_replaced_and_come_back(change):
    unet, inputs = unet_and_inputs("sd2")
    if change == "fused projections":
        unet.fuse_qkv_projections()
    else:
        unet.set_attn_processor(AttnProcessor() if change == "explicit" else SlicedAttnProcessor(1))
    plain, before = predict(unet, inputs), processors(unet)
    with use_parts(unet, neutral_parts(unet)):
        torch.testing.assert_close(predict(unet, inputs), plain, atol=1e-5, rtol=0)
    assert same_objects(processors(unet), before)
    assert torch.equal(predict(unet, inputs), plain)


def test_unknown_processors_are_refused_by_name():
    class OtherProcessor(AttnProcessor2_0):
        pass

    unet, _ = unet_and_inputs("sd1")
    name = match_layers(unet, r"attn2$")[0]
    attention_layers(unet)[name].set_processor(OtherProcessor())
    with pytest.raises(PartConflictError, match="OtherProcessor"), use_parts(unet, [TokenMapProbe([1])]):
        pass
    assert isinstance(attention_layers(unet)[name].processor, OtherProcessor)


def load_ip_adapter(unet, num_tokens=4, image_width=9):
    """What `load_ip_adapter` does to a UNet, with random weights."""
    width, number = unet.config.cross_attention_dim, 1
    generator = torch.Generator().manual_seed(1)
    attention = {}
    for name, module in attention_layers(unet).items():
        if name.endswith("attn2"):
            for which in ("k", "v"):
                weight = torch.randn(module.to_k.out_features, width, generator=generator)
                attention[f"{number}.to_{which}_ip.weight"] = weight
            number += 2
    projection = {
        "proj.weight": torch.randn(num_tokens * width, image_width, generator=generator),
        "proj.bias": torch.zeros(num_tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}])
    return torch.randn(2, 1, image_width, generator=generator)


@pytest.mark.filterwarnings("ignore:.*low_cpu_mem_usage")
class TestIPAdapter:
    """An IP-Adapter's own processors stay, and parts act beside them."""

    @pytest.fixture(params=KINDS)
    def prepared(self, request):
        unet, inputs = unet_and_inputs(request.param)
        image = load_ip_adapter(unet)
        assert any(isinstance(processor, IPAdapterAttnProcessor2_0) for processor in processors(unet).values())
        inputs["added_cond_kwargs"] = {**inputs.get("added_cond_kwargs", {}), "image_embeds": [image]}
        return unet, inputs

    @torch.no_grad()
    def test_is_kept_called_and_restored(self, prepared):
        unet, inputs = prepared
        plain, before, state = predict(unet, inputs), processors(unet), list(unet.state_dict())
        with use_parts(unet, neutral_parts(unet)):
            torch.testing.assert_close(predict(unet, inputs), plain, atol=1e-5, rtol=0)
        assert same_objects(processors(unet), before)
        assert list(unet.state_dict()) == state
        assert torch.equal(predict(unet, inputs), plain)

    @torch.no_grad()
    def test_its_weights_stay_in_the_model_while_parts_are_installed(self, prepared):
        unet, _ = prepared
        weights = {id(parameter) for parameter in unet.parameters()}
        with use_parts(unet, neutral_parts(unet)):
            assert {id(parameter) for parameter in unet.parameters()} == weights

    @torch.no_grad()
    def test_a_mask_acts_on_the_text_only(self, prepared):
        unet, inputs = prepared
        plain = predict(unet, inputs)
        hidden = KeyMask(torch.zeros(11, dtype=torch.bool))
        with use_parts(unet, [hidden]):
            masked = predict(unet, inputs)
            for processor in processors(unet).values():
                if getattr(processor, "original", None) is not None:
                    processor.original.scale = [0.0]
            nothing = predict(unet, inputs)
        assert not torch.allclose(masked, plain)
        assert not torch.allclose(masked, nothing)  # the image part is still there


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["added", "wrapped by PEFT"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_lora_layers_keep_working(kind, is_wrapped):
    peft = pytest.importorskip("peft")
    unet, inputs = unet_and_inputs(kind)
    plain = predict(unet, inputs)
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    if is_wrapped:
        unet = peft.get_peft_model(unet, lora)
    else:
        unet.add_adapter(lora)
    with_lora = predict(unet, inputs)
    assert not torch.allclose(plain, with_lora)
    with use_parts(unet, neutral_parts(unet)):
        torch.testing.assert_close(predict(unet, inputs), with_lora, atol=1e-5, rtol=0)
    with use_parts(unet, [TokenMapProbe([1]), RegionMassProbe(half_regions())]):
        assert torch.equal(predict(unet, inputs), with_lora)
