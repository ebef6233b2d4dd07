"""LocRef's adapter: sizes, choices, what its tokens are, folders, and the warm start from IP-Adapter files."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from safetensors.torch import save_file

from objectcompose.adapters.locref_adapter import BOX_FEATURE_WIDTH, LocRefAdapter, box_features
from objectcompose.attention_processors.install import attention_layers, match_layers
from objectcompose.errors import CheckpointError, CheckpointFileError, LayerNotFoundError
from tests.pipelines.helpers import CLIP_WIDTH, add_ip_adapter
from tests.tiny import IMAGE_PROJECTION_WIDTH, IMAGE_WIDTH, TEXT_WIDTH, tiny_image_encoder, tiny_unet


SD15 = {
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "layers_per_block": 2,
}


def tiny_adapter(**choices):
    torch.manual_seed(5)
    return LocRefAdapter.from_unet(tiny_unet(), "tester/base", tiny_image_encoder(), **{"num_tokens": 3, **choices})


def parameters_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def references(rows=2, count=2, width=IMAGE_WIDTH, seed=0):
    return torch.randn(rows, count, width, generator=torch.Generator().manual_seed(seed))


# ---- sizes


def test_defaults_have_the_papers_56_million_parameters_on_stable_diffusion_1_5():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
        layers = attention_layers(unet)
        widths = {name: layers[name].to_k.out_features for name in match_layers(unet, "", kind="cross")}
        adapter = LocRefAdapter(widths, 768)
    assert len(widths) == 16 and sum(widths.values()) == 12_480
    network = 1280 * 1280 + 1280 + 1280 * 16 * 768 + 16 * 768 + 2 * 768
    assert parameters_of(adapter) == network + 2 * (2 * 768 * 12_480) == 55_720_704


def test_sizes_follow_the_choices():
    plain, maps = parameters_of(tiny_adapter()), parameters_of(tiny_adapter().reference_maps)
    network = parameters_of(tiny_adapter().reference_projection)
    assert parameters_of(tiny_adapter(shared_projection=False)) == plain + network
    assert parameters_of(tiny_adapter(composite="none")) == plain - maps
    linear = tiny_adapter(projection="linear").reference_projection
    assert parameters_of(linear) == (IMAGE_WIDTH + 1) * 3 * TEXT_WIDTH + 2 * TEXT_WIDTH
    boxes = tiny_adapter(composite="coordinates", hidden_width=7).composite_projection
    assert parameters_of(boxes) == (BOX_FEATURE_WIDTH + 1) * 7 + 8 * TEXT_WIDTH + 2 * TEXT_WIDTH


# ---- what it computes


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_both_pairs_start_from_the_text_projections(kind):
    unet = tiny_unet(kind)
    adapter, modules = LocRefAdapter.from_unet(unet, num_tokens=2), attention_layers(unet)
    tokens = torch.randn(1, 4, unet.config.cross_attention_dim)
    for maps in (adapter.reference_maps, adapter.composite_maps):
        found = maps(tokens, tokens)
        assert list(found) == match_layers(unet, "", kind="cross")
        for name, (key, value) in found.items():
            assert torch.equal(key, modules[name].to_k(tokens)) and torch.equal(value, modules[name].to_v(tokens))


def test_tokens_are_normalised_and_shared_by_default():
    adapter = tiny_adapter()
    vectors = references()
    tokens = adapter.reference_projection(vectors)
    assert tokens.shape == (2, 2, 3, TEXT_WIDTH)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 2, 3), atol=1e-5, rtol=0)
    keys_values = adapter(vectors, vectors[:, :1])
    for name in adapter.config.layer_widths:
        flat = tokens.flatten(1, 2)
        assert torch.equal(keys_values["references"][name][0], adapter.reference_maps(flat, flat)[name][0])
        # one network for both streams; and both pairs of maps still start alike
        torch.testing.assert_close(keys_values["composite"][name][1], keys_values["references"][name][1][:, :3])
    apart = tiny_adapter(shared_projection=False)
    assert not torch.equal(apart.composite_projection(vectors), apart.reference_projection(vectors))


def test_objects_do_not_mix_and_zeros_are_one_learned_null():
    adapter, vectors = tiny_adapter(), references()
    before = adapter(vectors, vectors[:, :1])["references"]
    vectors[:, 1] = 0.0
    after = adapter(vectors, vectors[:, :1])["references"]
    for name, (key, _) in before.items():
        assert torch.equal(after[name][0][:, :3], key[:, :3])
        nulls = after[name][0][:, 3:]
        assert torch.equal(nulls[0], nulls[1]) and nulls.any()


def test_coordinates_give_a_token_for_each_box():
    adapter = tiny_adapter(composite="coordinates")
    boxes = torch.tensor([[[0.0, 0.1, 0.5, 0.6], [0.2, 0.2, 1.0, 1.0]]])
    keys_values = adapter(references(rows=1), box_features(boxes))
    assert {len(key[0]) for key, _ in keys_values["composite"].values()} == {2}
    assert {len(key[0]) for key, _ in keys_values["references"].values()} == {6}
    flipped = adapter(references(rows=1), box_features(boxes.flip(1)))["composite"]
    for name, (key, _) in keys_values["composite"].items():
        torch.testing.assert_close(flipped[name][0], key.flip(1))


def test_box_features_are_sines_and_cosines_of_all_coordinates():
    found = box_features(torch.tensor([0.0, 0.25, 0.5, 1.0])).reshape(4, 2, 8)
    assert torch.equal(found[0], torch.stack([torch.zeros(8), torch.ones(8)]))
    torch.testing.assert_close(found[2, 0, 4], torch.tensor(0.5 * 10.0).sin())
    assert found.unique(dim=0).shape[0] == 4


def test_without_a_composite_image_there_is_one_stream():
    adapter = tiny_adapter(composite="none")
    assert list(adapter(references())) == ["references"] and adapter.composite_maps is None


def test_training_reaches_every_weight_and_only_the_adapters():
    adapter, unet = tiny_adapter(), tiny_unet()
    keys_values = adapter(references(), references()[:, :1])
    sum(key.square().sum() + value.sum() for kind in keys_values.values() for key, value in kind.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_wrong_vectors_are_refused():
    adapter = tiny_adapter()
    with pytest.raises(CheckpointError, match=r"`references`.*\(rows, pictures, 10\).*\(2, 2, 9\)"):
        adapter(references(width=9), references()[:, :1])
    with pytest.raises(CheckpointError, match="`composite`.*None"):
        adapter(references())
    with pytest.raises(CheckpointError, match=r"`composite`.*64"):
        tiny_adapter(composite="coordinates")(references(), references()[:, :1])


# ---- choices and folders


def test_width_follows_the_encoder_and_the_feature():
    assert tiny_adapter().config.image_width == IMAGE_WIDTH == tiny_adapter().config.hidden_width
    assert tiny_adapter(feature="embeds").config.image_width == IMAGE_PROJECTION_WIDTH
    assert LocRefAdapter.from_unet(tiny_unet()).config.image_width == 1280
    assert LocRefAdapter.from_unet(tiny_unet(), feature="embeds").config.image_width == 1024


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"feature": "patches"}, "`feature` must be one of pooled, embeds, got 'patches'"),
        ({"projection": "resampler"}, "`projection` must be one of mlp, linear, got 'resampler'"),
        ({"composite": "boxes"}, "`composite` must be one of image, coordinates, none, got 'boxes'"),
        ({"num_tokens": 0}, "at least 1"),
        ({"hidden_width": -1}, "at least 1"),
        ({"gamma": -0.5}, "`gamma` must be a finite number of at least 0, got -0.5"),
        ({"region_mask": "no"}, "`region_mask` must be True or False, got 'no'"),
        ({"null_references": 1}, "`null_references` must be True or False, got 1"),
        ({"ri_scale": float("nan")}, "`ri_scale` must be a finite number"),
        ({"ci_scale": float("inf")}, "`ci_scale` must be a finite number"),
    ],
)
def test_bad_choices_are_refused(choices, message):
    with pytest.raises(CheckpointError, match=message):
        tiny_adapter(**choices)


def test_layers_are_chosen_by_name():
    adapter = tiny_adapter(layers="mid_block")
    assert set(adapter(references(), references()[:, :1])["references"]) == set(adapter.config.layer_widths)
    assert all(name.startswith("mid_block") for name in adapter.config.layer_widths)
    with pytest.raises(LayerNotFoundError):
        tiny_adapter(layers="attn7")
    with pytest.raises(CheckpointError, match="layer_widths"):
        LocRefAdapter({}, TEXT_WIDTH)


@pytest.mark.parametrize("composite", ["image", "coordinates", "none"])
def test_save_and_load(tmp_path, composite):
    adapter = tiny_adapter(composite=composite, gamma=0.25, shared_projection=False, null_references=False)
    adapter.save_pretrained(tmp_path)
    loaded = LocRefAdapter.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in adapter.config if name[0] != "_"} == {
        name: value for name, value in adapter.config.items() if name[0] != "_"
    }
    state = loaded.state_dict()
    assert state.keys() == adapter.state_dict().keys()
    assert all(torch.equal(weight, state[name]) for name, weight in adapter.state_dict().items())
    assert loaded.made_for == adapter.made_for and "LocRefAdapter" in adapter.default_card("owner/repo")


def test_it_knows_its_base():
    adapter = tiny_adapter()
    adapter.check_base(tiny_unet())
    torch.manual_seed(99)
    with pytest.raises(CheckpointError, match="tester/base"):
        adapter.check_base(UNet2DConditionModel.from_config(tiny_unet().config))
    with pytest.raises(CheckpointError, match="width"):
        adapter.check_base(tiny_unet("sdxl"))


# ---- IP-Adapter files


def ip_adapter_file(path, unet, plus=False, width=CLIP_WIDTH):
    """What IP-Adapter's authors publish, built from diffusers' own IP-Adapter classes on a UNet; and these classes."""
    add_ip_adapter(unet)
    processors = [
        (name.removesuffix(".processor"), processor)
        for name, processor in unet.attn_processors.items()
        if hasattr(processor, "to_k_ip")
    ]
    tensors = {}
    for place, (_, processor) in enumerate(processors):
        tensors[f"ip_adapter.{2 * place + 1}.to_k_ip.weight"] = processor.to_k_ip[0].weight.clone()
        tensors[f"ip_adapter.{2 * place + 1}.to_v_ip.weight"] = processor.to_v_ip[0].weight.clone()
    if plus:
        tensors["image_proj.latents"] = torch.randn(1, 5, 8)
        tensors["image_proj.proj_in.weight"] = torch.randn(8, IMAGE_WIDTH)
    else:
        projection = ImageProjection(width, TEXT_WIDTH, num_image_text_embeds=4)
        tensors["image_proj.proj.weight"] = projection.image_embeds.weight.detach().clone()
        tensors["image_proj.proj.bias"] = projection.image_embeds.bias.detach().clone()
        tensors["image_proj.norm.weight"] = projection.norm.weight.detach().clone()
        tensors["image_proj.norm.bias"] = projection.norm.bias.detach().clone()
    save_file(tensors, path)
    return dict(processors), None if plus else projection


def check_layers(adapter, processors):
    tokens = torch.randn(1, 4, TEXT_WIDTH)
    for maps in (adapter.reference_maps, adapter.composite_maps):
        found = maps(tokens, tokens)
        assert set(found) == set(processors)
        for name, (key, value) in found.items():
            assert torch.equal(key, processors[name].to_k_ip[0](tokens)), name
            assert torch.equal(value, processors[name].to_v_ip[0](tokens)), name


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_ip_adapters_maps_land_in_the_layers_that_they_were_trained_for(tmp_path, kind):
    """Two layers of the tiny UNet have the same shape in the encoder and the decoder, so shapes cannot tell."""
    path = tmp_path / "ip.safetensors"
    processors, projection = ip_adapter_file(path, tiny_unet(kind))
    adapter = LocRefAdapter.from_ip_adapter(path, tiny_unet(kind), "tester/base")
    check_layers(adapter, processors)
    vectors = references(rows=1, count=1, width=CLIP_WIDTH)
    torch.testing.assert_close(adapter.reference_projection(vectors[0]), projection(vectors[0]))
    config = adapter.config
    assert (config.feature, config.projection, config.num_tokens) == ("embeds", "linear", 4)
    assert (config.gamma, config.ci_scale, config.ri_scale, config.null_references) == (1.0, 0.3, 0.7, False)
    adapter.check_base(tiny_unet(kind))


def test_numbers_follow_the_processors_and_not_the_calls():
    """The order that the files are numbered by is down, up, middle; layers run down, middle, up."""
    names = [name.partition(".")[0] for name in tiny_unet().attn_processors]
    assert list(dict.fromkeys(names)) == ["down_blocks", "up_blocks", "mid_block"]


def test_ip_adapter_plus_gives_its_maps_and_token_count(tmp_path):
    path = tmp_path / "plus.safetensors"
    processors, _ = ip_adapter_file(path, tiny_unet(), plus=True)
    adapter = LocRefAdapter.from_ip_adapter(path, tiny_unet())
    check_layers(adapter, processors)
    config = adapter.config
    assert (config.feature, config.projection, config.num_tokens) == ("pooled", "mlp", 5)
    assert config.image_width == IMAGE_WIDTH


def test_files_that_are_no_ip_adapter_for_this_base_are_refused(tmp_path):
    path = tmp_path / "ip.safetensors"
    ip_adapter_file(path, tiny_unet())
    torch.manual_seed(0)
    wider = UNet2DConditionModel.from_config({**tiny_unet().config, "cross_attention_dim": TEXT_WIDTH + 1})
    with pytest.raises(CheckpointError, match=r"ip_adapter\.1\.to_k_ip.*\(12, 23\), got \(12, 22\)"):
        LocRefAdapter.from_ip_adapter(path, wider)
    more_layers = UNet2DConditionModel.from_config({**tiny_unet().config, "layers_per_block": 2})
    with pytest.raises(CheckpointError, match=r"ip_adapter\.\d+\.to_k_ip"):
        LocRefAdapter.from_ip_adapter(path, more_layers)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="must be an IP-Adapter.*'weight'"):
        LocRefAdapter.from_ip_adapter(tmp_path / "other.safetensors", tiny_unet())
    processors, _ = ip_adapter_file(path, tiny_unet(), plus=True)
    faces = {"image_proj.0.weight": torch.zeros(4, 4)}
    for place, processor in enumerate(processors.values()):
        faces[f"ip_adapter.{2 * place + 1}.to_k_ip.weight"] = processor.to_k_ip[0].weight.clone()
        faces[f"ip_adapter.{2 * place + 1}.to_v_ip.weight"] = processor.to_v_ip[0].weight.clone()
    save_file(faces, tmp_path / "faces.safetensors")
    with pytest.raises(CheckpointError, match="another image projection"):
        LocRefAdapter.from_ip_adapter(tmp_path / "faces.safetensors", tiny_unet())


def test_pickled_missing_and_damaged_files_are_refused(tmp_path):
    torch.save({"image_proj": {}, "ip_adapter": {}}, tmp_path / "ip.bin")
    with pytest.raises(CheckpointFileError, match="unpickling can run code"):
        LocRefAdapter.from_ip_adapter(tmp_path / "ip.bin", tiny_unet())
    with pytest.raises(CheckpointFileError, match="nowhere"):
        LocRefAdapter.from_ip_adapter(tmp_path / "nowhere.safetensors", tiny_unet())
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00\x00\x00")
    with pytest.raises(CheckpointFileError, match="half"):
        LocRefAdapter.from_ip_adapter(tmp_path / "half.safetensors", tiny_unet())
