"""Adapters: keys and values per layer, which base they are for, and folders that are whole or do not load."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from objectcompose.adapters.base_identity import check_same_base, fingerprint_distance, identify_base
from objectcompose.adapters.layer_adapter import LayerAdapter
from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.install import attention_layers, match_layers, use_parts
from objectcompose.errors import CheckpointError, CheckpointFileError, LayerNotFoundError
from tests.tiny import TEXT_WIDTH, tiny_unet


def tokens(count=5, seed=0):
    return torch.randn(1, count, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def forward(unet, parts=()):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), use_parts(unet, parts):
        return unet(latents, 10, encoder_hidden_states=tokens(77, 2)).sample


def other_unet(**changes):
    """Same shapes, trained apart."""
    torch.manual_seed(99)
    return UNet2DConditionModel.from_config({**tiny_unet().config, **changes}).eval()


def fine_tuned_unet(strength=0.1):
    unet = tiny_unet()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in unet.parameters():
            change = torch.randn(parameter.shape, generator=generator)
            parameter += strength * parameter.std(correction=0) * change
    return unet


# ---- what it computes


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_starts_from_the_text_projections_of_every_cross_attention_layer(kind):
    unet = tiny_unet(kind)
    adapter = LayerAdapter.from_unet(unet)
    modules = attention_layers(unet)
    width = unet.config.cross_attention_dim
    key_tokens, value_tokens = torch.randn(2, 5, width), torch.randn(2, 5, width)
    found = adapter(key_tokens, value_tokens)
    assert list(found) == match_layers(unet, "", kind="cross")
    for name, (key, value) in found.items():
        assert torch.equal(key, modules[name].to_k(key_tokens)) and torch.equal(
            value, modules[name].to_v(value_tokens)
        )


def test_its_keys_and_values_make_a_branch():
    unet = tiny_unet()
    adapter = LayerAdapter.from_unet(unet)
    plain = forward(unet)
    branch = Branch(adapter(tokens()), num_objects=1)
    assert not torch.allclose(forward(unet, [branch]), plain)
    assert torch.equal(forward(unet, [Branch(adapter(tokens()), num_objects=1, scale=0.0)]), plain)


def test_only_the_adapter_gets_gradients():
    unet = tiny_unet().requires_grad_(False)
    adapter = LayerAdapter.from_unet(unet)
    latents = torch.randn(1, 4, 16, 16)
    with use_parts(unet, [Branch(adapter(tokens()), num_objects=1)]):
        unet(latents, 10, encoder_hidden_states=tokens(77)).sample.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_layers_may_be_chosen():
    unet = tiny_unet()
    adapter = LayerAdapter.from_unet(unet, layers="mid_block")
    assert list(adapter(tokens())) == match_layers(unet, "mid_block", kind="cross")
    adapter.check_base(unet)
    with pytest.raises(LayerNotFoundError, match="middle"):
        LayerAdapter.from_unet(unet, layers="middle")


def test_lora_does_not_take_its_maps_for_the_bases_layers():
    peft = pytest.importorskip("peft")
    adapter = LayerAdapter.from_unet(tiny_unet())
    with pytest.raises(ValueError, match="not found"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"]), adapter)


@pytest.mark.parametrize("widths", [{}, {"mid_block.attn2": 0}])
def test_empty_adapters_are_refused(widths):
    with pytest.raises(CheckpointError, match="layer_widths"):
        LayerAdapter(widths, TEXT_WIDTH)


# ---- which base it is for


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fits_its_own_base_in_any_dtype(dtype):
    adapter = LayerAdapter.from_unet(tiny_unet(), "owner/base")
    base = tiny_unet().to(dtype)
    adapter.check_base(base)
    assert identify_base(base).fingerprint == adapter.made_for.fingerprint


def test_fits_a_fine_tuned_copy():
    adapter = LayerAdapter.from_unet(tiny_unet())
    fine_tuned = fine_tuned_unet()
    assert identify_base(fine_tuned).fingerprint != adapter.made_for.fingerprint
    adapter.check_base(fine_tuned)


def test_fits_its_base_with_lora_on_it():
    peft = pytest.importorskip("peft")
    unet = tiny_unet()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    LayerAdapter.from_unet(tiny_unet()).check_base(unet)
    assert LayerAdapter.from_unet(unet).made_for == identify_base(tiny_unet())


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        (lambda: other_unet(), "signs of .* differ"),
        (lambda: other_unet(cross_attention_dim=16), "text has width 22, here it has 16"),
        (lambda: other_unet(block_out_channels=(12, 18, 36)), "width 24, the layer has 18"),
        (
            lambda: other_unet(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            ),
            "no cross-attention layer down_blocks.1",
        ),
    ],
    ids=["weights", "text width", "layer width", "layers"],
)
def test_another_base_is_refused(unet, words):
    adapter = LayerAdapter.from_unet(tiny_unet(), "owner/base")
    with pytest.raises(CheckpointError, match=f"`adapter` was made for owner/base, not for owner/other: .*{words}"):
        adapter.check_base(unet(), "owner/other")


def test_weights_that_are_offloaded_cannot_be_compared():
    adapter = LayerAdapter.from_unet(tiny_unet())
    with pytest.raises(CheckpointError, match="before offloading"):
        adapter.check_base(tiny_unet().to("meta"))


def test_quantized_weights_are_compared_by_shape_only():
    adapter, quantized = LayerAdapter.from_unet(tiny_unet()), other_unet()
    for name in adapter.made_for.layer_widths:
        packed = torch.zeros(7, 1, dtype=torch.uint8)
        attention_layers(quantized)[name].to_k.weight = torch.nn.Parameter(packed, requires_grad=False)
    adapter.check_base(quantized)


def test_without_a_fingerprint_only_shapes_count():
    widths = identify_base(tiny_unet()).layer_widths
    LayerAdapter(widths, TEXT_WIDTH).check_base(other_unet())


def test_fingerprint_distance():
    assert fingerprint_distance("ff00", "ff00") == 0.0
    assert fingerprint_distance("ff00", "ff0f") == 0.25
    assert fingerprint_distance("ff", "ff00") == 1.0
    first, second = identify_base(tiny_unet()), identify_base(other_unet())
    assert 0.35 < fingerprint_distance(first.fingerprint, second.fingerprint) < 0.65
    check_same_base(first, tiny_unet(), None, "delta")


# ---- folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    LayerAdapter.from_unet(tiny_unet(), "owner/base").save_pretrained(folder)
    return folder


def test_save_and_load(saved):
    made = LayerAdapter.from_unet(tiny_unet(), "owner/base")
    loaded = LayerAdapter.from_pretrained(saved)
    assert loaded.made_for == made.made_for and loaded.made_for.base_model == "owner/base"
    expected, found = made(tokens()), loaded(tokens())
    assert expected.keys() == found.keys()
    for name in expected:
        assert all(torch.equal(one, other) for one, other in zip(expected[name], found[name], strict=True))
    assert sorted(path.name for path in saved.parent.iterdir()) == ["saved"]


def test_half_precision_variant_beside_the_full_one(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    LayerAdapter.from_pretrained(saved).half().save_pretrained(folder, variant="fp16")
    assert LayerAdapter.from_pretrained(folder).dtype == torch.float32
    assert LayerAdapter.from_pretrained(folder, variant="fp16", dtype=torch.float16).dtype == torch.float16
    names = sorted(path.name for path in folder.iterdir())
    weights = ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    assert names == ["config.json", *weights]


@pytest.mark.parametrize("damage", ["cut", "missing", "config", "no config"])
def test_damaged_folders(saved, tmp_path, damage):
    folder = shutil.copytree(saved, tmp_path / "copy")
    weights = folder / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == "missing":
        weights.unlink()
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointFileError, match="cannot be loaded"):
        LayerAdapter.from_pretrained(folder)


def test_missing_weights_are_not_made_up(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    gone = sorted(weights)[0]
    save_file({name: weight for name, weight in weights.items() if name != gone}, path)
    with pytest.raises(CheckpointError, match=f"1 weights are missing, the first of them {gone}"):
        LayerAdapter.from_pretrained(folder)


def test_pickled_weights_need_to_be_asked_for(tmp_path):
    made = LayerAdapter.from_unet(tiny_unet())
    made.save_pretrained(tmp_path / "a", safe_serialization=False)
    with pytest.raises(CheckpointFileError, match="use_safetensors=False"):
        LayerAdapter.from_pretrained(tmp_path / "a")
    loaded = LayerAdapter.from_pretrained(tmp_path / "a", use_safetensors=False)
    assert loaded.made_for == made.made_for


def test_config_names_the_base(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["base_model"] == "owner/base" and len(config["base_fingerprint"]) == 7 * 32 // 4
    assert set(config["layer_widths"]) == set(match_layers(tiny_unet(), "", kind="cross"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_the_fingerprint_is_that_of_every_dtype(dtype):
    base = tiny_unet()
    expected = identify_base(base).fingerprint
    assert identify_base(base.to(dtype)).fingerprint == expected
