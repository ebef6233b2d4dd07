"""`ObjectPromptAdapter`: two streams of tokens, their pairing, the warm start, and what kind of branch they make."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from safetensors.torch import save_file

from objectcompose.adapters.object_prompt_adapter import (
    TOKEN_STREAMS,
    ObjectPromptAdapter,
    check_token_counts_agree,
    plus_resampler_weights,
)
from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.install import attention_layers, match_layers, use_parts
from objectcompose.errors import CheckpointError, CheckpointFileError, ObjectComposeError
from tests.tiny import IMAGE_PROJECTION_WIDTH, IMAGE_WIDTH, TEXT_WIDTH, tiny_image_encoder, tiny_unet


NUM_TOKENS, GRID = 5, 7


def make_adapter(streams="mixed", unet=None, **options):
    torch.manual_seed(1)
    unet = tiny_unet() if unet is None else unet
    options = {"num_tokens": NUM_TOKENS, "resampler_width": 12, "resampler_depth": 2, **options}
    return ObjectPromptAdapter.from_unet(unet, "owner/base", tiny_image_encoder(), streams=streams, **options)


def features(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(*shape, IMAGE_PROJECTION_WIDTH, generator=generator)
    return embeds, torch.randn(*shape, GRID, IMAGE_WIDTH, generator=generator)


def forward(unet, parts=(), text=None):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, TEXT_WIDTH, generator=generator) if text is None else text
    with torch.no_grad(), use_parts(unet, parts):
        return unet(latents, 10, encoder_hidden_states=text).sample


# ---- sizes


def test_parameters_on_stable_diffusion_1_shapes():
    """The method spec's table: 12.6 M layout, 29.9 M resampler, 19.2 M keys and values, 61.7 M in all."""
    config = {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        widths = {
            name: attention_layers(unet)[name].to_k.out_features for name in match_layers(unet, "", kind="cross")
        }
        adapter = ObjectPromptAdapter(widths, 768)
    assert len(widths) == 16 and sum(widths.values()) == 12_480

    def millions(module):
        return round(sum(weight.numel() for weight in module.parameters()) / 1e6, 1)

    parts = (adapter.layout_adapter, adapter.appearance_adapter, adapter.projections)
    assert [millions(part) for part in parts] == [12.6, 29.9, 19.2]
    assert millions(adapter) == 61.7


def test_a_stream_that_feeds_nothing_has_no_weights():
    for streams, used in TOKEN_STREAMS.items():
        adapter = make_adapter(streams)
        assert (adapter.layout_adapter is not None) == ("layout" in used)
        assert (adapter.appearance_adapter is not None) == ("appearance" in used)


@pytest.mark.parametrize("change", [{"num_tokens": 0}, {"streams": "both"}, {"resampler_depth": 0}])
def test_sizes_that_cannot_be(change):
    with pytest.raises(CheckpointError, match="num_tokens|streams|resampler_depth"):
        make_adapter(**change)


# ---- tokens


def test_each_stream_reads_its_own_features():
    embeds, grid = features(3)
    other_embeds, other_grid = features(3, seed=5)
    for streams, (for_keys, for_values) in TOKEN_STREAMS.items():
        adapter = make_adapter(streams).requires_grad_(False)
        keys, values = adapter.object_tokens(embeds, grid)
        assert keys.shape == values.shape == (3, NUM_TOKENS, TEXT_WIDTH)
        moved = {
            "layout": adapter.object_tokens(other_embeds, grid),
            "appearance": adapter.object_tokens(embeds, other_grid),
        }
        for stream, (new_keys, new_values) in moved.items():
            assert torch.equal(new_keys, keys) == (for_keys != stream)
            assert torch.equal(new_values, values) == (for_values != stream)


def test_layout_tokens_are_a_normalised_linear_map():
    adapter = make_adapter().requires_grad_(False)
    embeds, grid = features(2)
    keys, _ = adapter.object_tokens(embeds, grid)
    linear = adapter.layout_adapter.proj
    raw = (embeds @ linear.weight.T + linear.bias).reshape(2, NUM_TOKENS, TEXT_WIDTH)
    expected = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(keys, expected)


def test_forward_folds_objects_and_keeps_their_order():
    adapter = make_adapter().requires_grad_(False)
    embeds, grid = features(2, 3)
    found = adapter(embeds, grid)
    keys, values = adapter.object_tokens(embeds[1], grid[1])  # the second row's three objects
    name = next(iter(found))
    assert torch.allclose(found[name][0][1], adapter.keys_of(keys.flatten(0, 1)[None])[name][0], atol=1e-6)
    assert torch.allclose(found[name][1][1], adapter.values_of(values.flatten(0, 1)[None])[name][0], atol=1e-6)


def test_other_encoders_are_refused():
    embeds, grid = features(1)
    with pytest.raises(ObjectComposeError, match="widths 13 .* and 10 .*, got 13 and 9"):
        make_adapter().object_tokens(embeds, grid[..., :9])


def test_unequal_token_counts_are_refused():
    adapter = make_adapter()
    adapter.appearance_adapter.latents = torch.nn.Parameter(torch.randn(1, NUM_TOKENS + 1, 12))
    embeds, grid = features(1, 2)
    with pytest.raises(ObjectComposeError, match="as many"):
        adapter(embeds, grid)
    with pytest.raises(ObjectComposeError, match="as many"):
        check_token_counts_agree(torch.zeros(1, 4, 3), torch.zeros(1, 16, 3))


def test_gradients_reach_every_weight():
    unet = tiny_unet().requires_grad_(False)
    adapter = make_adapter(unet=unet)
    with use_parts(unet, [Branch(adapter(*features(2, 2)), num_objects=2)]):
        noise = torch.randn(2, 4, 16, 16)
        unet(noise, 10, encoder_hidden_states=torch.randn(2, 77, TEXT_WIDTH)).sample.square().mean().backward()
    without = [name for name, weight in adapter.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not without and all(weight.grad is None for weight in unet.parameters())


# ---- the branch


def test_order_of_objects_is_nothing():
    unet, adapter = tiny_unet(), make_adapter().requires_grad_(False)
    embeds, grid = features(2, 3)
    order = [2, 0, 1]
    first = forward(unet, [Branch(adapter(embeds, grid), num_objects=3)])
    second = forward(unet, [Branch(adapter(embeds[:, order], grid[:, order]), num_objects=3)])
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    keys, _ = adapter.object_tokens(embeds.flatten(0, 1), grid.flatten(0, 1))
    _, values = adapter.object_tokens(embeds[:, order].flatten(0, 1), grid[:, order].flatten(0, 1))
    mispaired = adapter.projections(keys.reshape(2, -1, TEXT_WIDTH), values.reshape(2, -1, TEXT_WIDTH))
    assert not torch.allclose(first, forward(unet, [Branch(mispaired, num_objects=3)]), atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_equal_streams_are_an_ip_adapter(scale):
    """Against diffusers' own processor, with the same weights and tokens."""
    unet, adapter = tiny_unet(), make_adapter().requires_grad_(False)
    for weight in adapter.projections.parameters():
        torch.nn.init.normal_(weight)
    tokens = torch.randn(2, 3 * NUM_TOKENS, TEXT_WIDTH)
    text = torch.randn(2, 77, TEXT_WIDTH)
    found = forward(unet, [Branch(adapter.projections(tokens, tokens), num_objects=3, scale=scale)], text)
    for name, module in attention_layers(unet).items():
        if name in adapter.made_for.layer_widths:
            width, key = module.inner_dim, name.replace(".", "-")
            processor = IPAdapterAttnProcessor2_0(width, TEXT_WIDTH, num_tokens=(3 * NUM_TOKENS,), scale=scale)
            processor.to_k_ip[0].weight = adapter.projections.key_maps[key].weight
            processor.to_v_ip[0].weight = adapter.projections.value_maps[key].weight
            module.set_processor(processor)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = unet(latents, 10, encoder_hidden_states=(text, [tokens[:, None]])).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(found, forward(tiny_unet(), (), text), atol=1e-3)


def test_scale_zero_is_bit_equal():
    unet, adapter = tiny_unet(), make_adapter().requires_grad_(False)
    branch = Branch(adapter(*features(2, 2)), num_objects=2, scale=0.0)
    assert torch.equal(forward(unet, [branch]), forward(unet))


def test_padded_slots_are_not_seen():
    unet, adapter = tiny_unet(), make_adapter().requires_grad_(False)
    embeds, grid = features(2, 2)
    padding = features(2, 1, seed=8)
    padded = adapter(torch.cat([embeds, padding[0]], 1), torch.cat([grid, padding[1]], 1))
    present = torch.tensor([True, True, False])
    found = forward(unet, [Branch(padded, present=present)])
    torch.testing.assert_close(found, forward(unet, [Branch(adapter(embeds, grid), num_objects=2)]), atol=1e-5, rtol=0)


# ---- warm start


def published_weights(adapter, unet):
    """`{"image_proj", "ip_adapter"}` as diffusers' loader takes it, the resampler under diffusers' names."""
    layers = {}
    for place, name in enumerate(match_layers(unet, "", kind="cross")):
        for maps, theirs in (("key_maps", "to_k_ip"), ("value_maps", "to_v_ip")):
            key = f"projections.{maps}.{name.replace('.', '-')}.weight"
            layers[f"{2 * place + 1}.{theirs}.weight"] = adapter.state_dict()[key]
    resampler = IPAdapterPlusImageProjection(
        embed_dims=IMAGE_WIDTH, output_dims=TEXT_WIDTH, hidden_dims=12, dim_head=64, heads=1, num_queries=NUM_TOKENS
    )
    for weight in resampler.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return {"image_proj": resampler.state_dict(), "ip_adapter": layers}


def published_names(resampler):
    """A resampler's weights under the names of IP-Adapter's own files, keys and values in one matrix."""
    names = [
        (r"\.ln0\.", ".0.norm1."),
        (r"\.ln1\.", ".0.norm2."),
        (r"\.attn\.to_q\.", ".0.to_q."),
        (r"\.attn\.to_out\.0\.", ".0.to_out."),
        (r"\.ff\.1\.net\.0\.proj\.", ".1.1."),
        (r"\.ff\.1\.net\.2\.", ".1.3."),
        (r"\.ff\.0\.", ".1.0."),
    ]
    renamed = {}
    for key, weight in resampler.items():
        if ".attn.to_v." in key:
            continue
        if ".attn.to_k." in key:
            both = [weight, resampler[key.replace("to_k", "to_v")]]
            renamed[key.replace(".attn.to_k.", ".0.to_kv.")] = torch.cat(both)
            continue
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        renamed[key] = weight
    return renamed


@pytest.fixture
def published(tmp_path):
    """A file of a tiny IP-Adapter-Plus, and the UNet of diffusers that has loaded it."""
    unet = tiny_unet()
    torch.manual_seed(3)
    donor = make_adapter("fine", unet, resampler_depth=4)
    for weight in donor.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    weights = published_weights(donor, unet)
    weights["image_proj"] = published_names(weights["image_proj"])
    loaded = tiny_unet()
    loaded._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    tensors = {f"{part}.{key}": one.contiguous() for part, group in weights.items() for key, one in group.items()}
    save_file(tensors, tmp_path / "plus.safetensors")
    return tmp_path / "plus.safetensors", loaded


def test_names_of_the_published_resampler_are_those_that_diffusers_finds(published):
    _, loaded = published
    expected = loaded.encoder_hid_proj.image_projection_layers[0].state_dict()
    found = plus_resampler_weights(published_names(expected))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert plus_resampler_weights(expected).keys() == expected.keys()


def test_warm_start_paints_what_diffusers_paints(published):
    """Resampler, keys and values of every layer, numbered as the processors are: down, up, middle."""
    path, theirs = published
    ours = tiny_unet()
    adapter = make_adapter("fine", ours, resampler_depth=4).requires_grad_(False)
    adapter.load_ip_adapter_plus(path, ours)
    _, grid = features(2, 1)
    text = torch.randn(2, 77, TEXT_WIDTH, generator=torch.Generator().manual_seed(4))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given = {"image_embeds": [grid]}
        expected = theirs(latents, 10, encoder_hidden_states=text, added_cond_kwargs=given).sample
    found = forward(ours, [Branch(adapter(features(2, 1)[0], grid), num_objects=1)], text)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_warm_start_leaves_the_layout_adapter(published):
    path, _ = published
    adapter = make_adapter(resampler_depth=4)
    before = {key: weight.clone() for key, weight in adapter.state_dict().items()}
    adapter.load_ip_adapter_plus(path, tiny_unet())
    for key, weight in adapter.state_dict().items():
        assert torch.equal(weight, before[key]) == key.startswith("layout_adapter."), key


@pytest.mark.parametrize("change", [{"num_tokens": 4}, {"resampler_width": 16}, {"resampler_depth": 5}])
def test_warm_start_from_other_shapes_changes_nothing(published, change):
    path, _ = published
    adapter = make_adapter(**{"resampler_depth": 4, **change})
    before = {key: weight.clone() for key, weight in adapter.state_dict().items()}
    with pytest.raises(CheckpointError, match="must hold IP-Adapter-Plus weights for this adapter"):
        adapter.load_ip_adapter_plus(path, tiny_unet())
    assert all(torch.equal(weight, before[key]) for key, weight in adapter.state_dict().items())


def test_warm_start_reads_safetensors_only(tmp_path):
    adapter = make_adapter()
    with pytest.raises(CheckpointFileError, match="cannot be loaded"):
        adapter.load_ip_adapter_plus(tmp_path / "missing.safetensors", tiny_unet())
    torch.save({"image_proj": {}}, tmp_path / "plus.bin")
    with pytest.raises(CheckpointFileError, match="cannot be loaded"):
        adapter.load_ip_adapter_plus(tmp_path / "plus.bin", tiny_unet())


# ---- folders


@pytest.mark.parametrize("streams", TOKEN_STREAMS)
def test_save_and_load(tmp_path, streams):
    adapter = make_adapter(streams).requires_grad_(False)
    adapter.save_pretrained(tmp_path / "saved")
    loaded = ObjectPromptAdapter.from_pretrained(tmp_path / "saved")
    assert loaded.made_for == adapter.made_for and loaded.config.streams == streams
    given = features(1, 2)
    expected, found = adapter(*given), loaded(*given)
    assert expected.keys() == found.keys()
    for name in expected:
        assert all(torch.equal(one, other) for one, other in zip(expected[name], found[name], strict=True))


def test_another_base_is_refused():
    torch.manual_seed(99)
    other = UNet2DConditionModel.from_config(tiny_unet().config)
    with pytest.raises(CheckpointError, match="`adapter` was made for owner/base"):
        make_adapter().check_base(other)
