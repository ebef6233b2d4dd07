"""What the pipeline adds to sampling: phrases, attention maps, parts, and errors before any model runs."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.attention_processors.regions import token_grid
from objectcompose.errors import (
    LayerNotFoundError,
    LayoutError,
    MissingFieldError,
    NonFiniteError,
    ObjectComposeError,
    PartConflictError,
    PhraseNotFoundError,
    PromptTooLongError,
)
from objectcompose.layout import SceneObject
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from tests.pipelines.helpers import (
    add_ip_adapter,
    compose_pipeline,
    ip_embeds,
    processor_ids,
    sample,
    seeded,
)
from tests.tiny import TEXT_WIDTH, tiny_components, tiny_text_encoder, tiny_tokenizer


DOG_AND_CORGI = [{"phrase": "a dog"}, {"phrase": "corgi"}]


class ExplicitMaps:
    """Softmax probabilities of every cross-attention call, computed the plain way by a hook on each layer."""

    def __init__(self, unet):
        self.calls = []  # one dict per forward: layer -> (B, HW, 77), mean over heads
        self.handles = [unet.register_forward_pre_hook(lambda *_: self.calls.append({}))]
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                self.handles.append(module.register_forward_pre_hook(self.hook(name), with_kwargs=True))

    def hook(self, name):
        def measure(attn, args, kwargs):
            text = kwargs["encoder_hidden_states"]
            query, key = attn.head_to_batch_dim(attn.to_q(args[0])), attn.head_to_batch_dim(attn.to_k(text))
            probs = attn.get_attention_scores(query, key)
            self.calls[-1][name] = probs.unflatten(0, (-1, attn.heads)).mean(1)

        return measure

    def remove(self):
        for handle in self.handles:
            handle.remove()


def expected_map(calls, steps, layers, row, tokens, latent_size, grid):
    """Mean over layers and steps of one phrase's map."""
    maps = []
    for step in steps:
        for layer in layers:
            cells = calls[step][layer][row][:, list(tokens)].sum(-1)
            cells = cells.reshape(1, 1, *token_grid(len(cells), *latent_size))
            maps.append(F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)[0, 0])
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_attention_equals_explicit_softmax(kind, guidance_scale):
    pipeline = compose_pipeline(kind)
    explicit = ExplicitMaps(pipeline.unet)
    prompts = ["a dog and a corgi", "a cat with a teddy bear"]
    objects = [DOG_AND_CORGI, [{"phrase": "a teddy bear"}]]
    arguments = {"guidance_scale": guidance_scale, "num_images_per_prompt": 2, "height": 32, "width": 24}
    plain = sample(pipeline, prompts, **arguments).images
    explicit.calls.clear()
    output = sample(pipeline, prompts, objects=objects, return_attention=True, **arguments)
    explicit.remove()
    assert torch.equal(output.images, plain)  # looking changes nothing
    layers = [name for name in explicit.calls[0] if not name.startswith("down")]
    assert len(explicit.calls) == 2 and len(output.attention) == 4
    for picture, maps in enumerate(output.attention):
        placed = output.objects[picture]
        assert list(maps) == [item.label for item in placed]
        for item in placed:
            row = picture + (4 if guidance_scale > 1 else 0)  # the conditional half comes second
            wanted = expected_map(explicit.calls, [0, 1], layers, row, item.token_indices, (16, 12), (16, 12))
            assert maps[item.label].shape == (16, 12) and maps[item.label].dtype == torch.float32
            torch.testing.assert_close(maps[item.label], wanted, atol=1e-5, rtol=0)


def test_attention_of_chosen_layers_and_steps():
    pipeline = compose_pipeline()
    explicit = ExplicitMaps(pipeline.unet)
    output = sample(
        pipeline,
        objects=DOG_AND_CORGI,
        return_attention=True,
        attention_layers=r"mid_block|down_blocks\.1",
        attention_steps=[1, 2],
        num_inference_steps=4,
    )
    explicit.remove()
    layers = [name for name in explicit.calls[0] if name.startswith(("mid_block", "down_blocks.1"))]
    assert len(layers) == 2
    wanted = expected_map(explicit.calls, [1, 2], layers, 1, output.objects[0][0].token_indices, (16, 16), (8, 8))
    torch.testing.assert_close(output.attention[0]["a dog"], wanted, atol=1e-5, rtol=0)


def test_attention_follows_a_cut_off_guidance():
    from diffusers.callbacks import SDCFGCutoffCallback

    pipeline = compose_pipeline()
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    output = sample(pipeline, objects=DOG_AND_CORGI, return_attention=True, callback_on_step_end=cutoff)
    assert all(torch.isfinite(one).all() and one.max() > 0 for one in output.attention[0].values())


def test_repeated_phrases_get_their_own_places_and_labels():
    output = sample(compose_pipeline(), "a dog and a dog", objects=[{"phrase": "a dog"}] * 2, return_attention=True)
    first, second = output.objects[0]
    assert (first.token_indices, second.token_indices) == ((1, 2), (4, 5))
    assert list(output.attention[0]) == ["a dog", "a dog #2"]


def test_objects_alone_change_nothing_and_list_what_is_unused(caplog):
    pipeline = compose_pipeline()
    objects = [
        SceneObject(phrase="a dog", box=(0, 0, 0.5, 0.5), image=PIL.Image.new("RGB", (4, 4)), scale=0.5),
        {"phrase": "corgi", "mask": np.ones((7, 7)), "order": 2},
    ]
    plain, output = sample(pipeline), sample(pipeline, objects=objects)
    assert torch.equal(plain.images, output.images) and output.attention is None
    assert [set(item.unused) for item in output.objects[0]] == [{"box", "image", "scale"}, {"mask", "order"}]
    assert output.objects[0][0].box == (0, 0, 0.5, 0.5)
    assert pipeline._warned_unused == {"box", "image", "scale", "mask", "order"}


def test_unused_fields_are_warned_about_once(monkeypatch):
    from objectcompose.pipelines import placement

    messages = []
    monkeypatch.setattr(placement.placement_logger, "warning", messages.append)
    pipeline = compose_pipeline()
    for _ in range(2):
        sample(pipeline, objects=[{"phrase": "dog", "box": [0, 0, 1, 1]}])
    assert len(messages) == 1 and "box" in messages[0]


def test_same_seed_gives_the_same_picture():
    pipeline = compose_pipeline()
    assert torch.equal(sample(pipeline).images, sample(pipeline).images)
    assert not torch.equal(sample(pipeline).images, sample(pipeline, seed=1).images)


def test_encode_prompt_needs_only_the_text_encoder():
    parts = {
        name: None for name in ("vae", "unet", "scheduler", "safety_checker", "feature_extractor", "image_encoder")
    }
    text_only = TokenComposePipeline(**parts, text_encoder=tiny_text_encoder(), tokenizer=tiny_tokenizer())
    prompt_embeds, negative_prompt_embeds = text_only.encode_prompt(["a dog", "a cat"], "cpu", 1, True)
    assert prompt_embeds.shape == negative_prompt_embeds.shape == (2, 77, TEXT_WIDTH)
    embeds_only = compose_pipeline(tokenizer=None, text_encoder=None)
    images = sample(
        embeds_only, None, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds
    ).images
    assert torch.equal(images, sample(compose_pipeline(), ["a dog", "a cat"]).images)


def test_parts_are_installed_for_the_loop_and_restored():
    pipeline = compose_pipeline()
    before, plain = processor_ids(pipeline.unet), sample(pipeline).images
    probe = TokenMapProbe([1, 2], layers="mid_block")
    during = []

    def look(pipe, step, timestep, tensors):
        during.append(processor_ids(pipe.unet) != before)
        return tensors

    output = sample(pipeline, parts=[probe], callback_on_step_end=look)
    assert during == [True, True] and processor_ids(pipeline.unet) == before
    assert torch.equal(output.images, plain)
    assert [name for name in probe.maps if not name.startswith("mid_block")] == []
    assert next(iter(probe.maps.values())).shape == (2, 16, 2)  # both halves: this probe was not told otherwise


@pytest.mark.parametrize("step", [0, 1])
def test_parts_are_restored_after_an_exception(step):
    pipeline = compose_pipeline()
    before, plain = processor_ids(pipeline.unet), sample(pipeline).images

    def fail(pipe, index, timestep, tensors):
        if index == step:
            raise RuntimeError("on purpose")
        return tensors

    arguments = {"objects": DOG_AND_CORGI, "return_attention": True, "parts": [TokenMapProbe([1])]}
    with pytest.raises(RuntimeError, match="on purpose"):
        sample(pipeline, callback_on_step_end=fail, **arguments)
    assert processor_ids(pipeline.unet) == before
    assert torch.equal(sample(pipeline).images, plain)


def test_without_parts_no_processor_is_touched(monkeypatch):
    pipeline = compose_pipeline()
    touched = []
    attention = type(pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2)
    monkeypatch.setattr(attention, "set_processor", lambda *arguments: touched.append(arguments))
    sample(pipeline, objects=DOG_AND_CORGI)
    assert touched == []


def test_attention_beside_an_ip_adapter():
    pipeline = compose_pipeline()
    add_ip_adapter(pipeline.unet)
    before = processor_ids(pipeline.unet)
    arguments = {"ip_adapter_image_embeds": ip_embeds()}
    plain = sample(pipeline, **arguments).images
    output = sample(pipeline, objects=DOG_AND_CORGI, return_attention=True, **arguments)
    torch.testing.assert_close(output.images, plain, atol=1e-5, rtol=0)
    assert processor_ids(pipeline.unet) == before and output.attention[0]["corgi"].max() > 0


def test_a_prompt_without_objects_among_others():
    output = sample(compose_pipeline(), ["a dog", "a cat"], objects=[[{"phrase": "dog"}], []], return_attention=True)
    assert [list(maps) for maps in output.attention] == [["dog"], []]


def test_token_stands_in_for_a_missing_phrase():
    item = sample(compose_pipeline(), objects=[{"token": "corgi"}]).objects[0][0]
    assert (item.phrase, item.unused) == ("corgi", ())


@pytest.mark.parametrize(
    ("latents", "tokens", "grid"),
    [((16, 16), 64, (8, 8)), ((9, 14), 35, (5, 7)), ((9, 14), 12, (3, 4)), ((3, 5), 15, (3, 5))],
)
def test_token_grid(latents, tokens, grid):
    assert token_grid(tokens, *latents) == grid


def embeds(rows=1, width=TEXT_WIDTH):
    return torch.zeros(rows, 77, width)


BAD_CALLS = {
    "no prompt": ({"prompt": None}, ObjectComposeError, "prompt"),
    "prompt and embeddings": ({"prompt_embeds": embeds()}, ObjectComposeError, "prompt_embeds"),
    "prompt of a wrong type": ({"prompt": 3}, ObjectComposeError, "prompt"),
    "empty list of prompts": ({"prompt": []}, ObjectComposeError, "prompt"),
    "odd height": ({"height": 33}, ObjectComposeError, "height"),
    "negative width": ({"width": -8}, ObjectComposeError, "width"),
    "no steps": ({"num_inference_steps": 0}, ObjectComposeError, "num_inference_steps"),
    "timesteps and sigmas": ({"timesteps": [1], "sigmas": [1.0]}, ObjectComposeError, "sigmas"),
    "timesteps unsupported": ({"timesteps": [1]}, ObjectComposeError, "timesteps"),
    "guidance not a number": ({"guidance_scale": float("nan")}, NonFiniteError, "guidance_scale"),
    "no pictures": ({"num_images_per_prompt": 0}, ObjectComposeError, "num_images_per_prompt"),
    "negative prompts too many": ({"negative_prompt": ["a", "b"]}, ObjectComposeError, "negative_prompt"),
    "two negatives": ({"negative_prompt": "a", "negative_prompt_embeds": embeds()}, ObjectComposeError, "negative"),
    "embeddings too wide": ({"prompt": None, "prompt_embeds": embeds(1, 5)}, ObjectComposeError, "width"),
    "embeddings NaN": ({"prompt": None, "prompt_embeds": embeds() * torch.nan}, NonFiniteError, "prompt_embeds"),
    "generators too few": ({"generator": [seeded()] * 2}, ObjectComposeError, "generator"),
    "generator a number": ({"generator": 3}, ObjectComposeError, "generator"),
    "latents too small": ({"latents": torch.zeros(1, 4, 8, 8), "height": 32}, ObjectComposeError, "latents"),
    "latents infinite": ({"latents": torch.full((1, 4, 16, 16), torch.inf)}, NonFiniteError, "latents"),
    "clip skip too deep": ({"clip_skip": 9}, ObjectComposeError, "clip_skip"),
    "negative eta": ({"eta": -1.0}, ObjectComposeError, "eta"),
    "unknown output type": ({"output_type": "jpeg"}, ObjectComposeError, "output_type"),
    "unknown callback tensor": (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        ObjectComposeError,
        "callback_on_step_end_tensor_inputs",
    ),
    "callback not callable": ({"callback_on_step_end": 3}, ObjectComposeError, "callback_on_step_end"),
    "cross attention kwargs": ({"cross_attention_kwargs": 0.5}, ObjectComposeError, "cross_attention_kwargs"),
    "no ip adapter": ({"ip_adapter_image": PIL.Image.new("RGB", (4, 4))}, ObjectComposeError, "load_ip_adapter"),
    "phrase not found": ({"objects": [{"phrase": "a zebra"}]}, PhraseNotFoundError, "zebra"),
    "phrase twice in prompt once": ({"objects": [{"phrase": "dog"}] * 2}, PhraseNotFoundError, "dog"),
    "too long prompt": (
        {"prompt": "a dog and a cat " * 30 + "corgi", "objects": [{"phrase": "corgi"}]},
        PromptTooLongError,
        "77",
    ),
    "no phrase": ({"objects": [{"box": [0, 0, 1, 1]}]}, MissingFieldError, "phrase"),
    "box outside": ({"objects": [{"phrase": "dog", "box": [0, 0, 1, 1.5]}]}, LayoutError, "box"),
    "box inside out": ({"objects": [{"phrase": "dog", "box": [0.5, 0, 0.5, 1]}]}, LayoutError, "box"),
    "unknown field": ({"objects": [{"phrase": "dog", "colour": "red"}]}, LayoutError, "colour"),
    "lists of objects too many": ({"objects": [[], []]}, LayoutError, "objects"),
    "objects without prompt": (
        {"prompt": None, "prompt_embeds": embeds(), "objects": [{"phrase": "dog"}]},
        ObjectComposeError,
        "prompt",
    ),
    "attention of nothing": ({"return_attention": True}, MissingFieldError, "objects"),
    "attention layers alone": ({"attention_layers": "mid"}, ObjectComposeError, "return_attention"),
    "unknown layers": (
        {"objects": DOG_AND_CORGI, "return_attention": True, "attention_layers": "middle"},
        LayerNotFoundError,
        "middle",
    ),
    "self-attention layers": (
        {"objects": DOG_AND_CORGI, "return_attention": True, "attention_layers": "attn1"},
        LayerNotFoundError,
        "attn1",
    ),
    "attention step too late": (
        {"objects": DOG_AND_CORGI, "return_attention": True, "attention_steps": [2]},
        ObjectComposeError,
        "attention_steps",
    ),
    "no part": ({"parts": ["mask"]}, ObjectComposeError, "parts"),
    "part of unknown layers": ({"parts": [TokenMapProbe([1], layers="nowhere")]}, LayerNotFoundError, "nowhere"),
}


@pytest.fixture(scope="module")
def idle_pipeline():
    """A pipeline whose models must not run."""
    pipeline = compose_pipeline()

    def refuse(*_):
        raise AssertionError("a model ran before the input was checked")

    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        model.register_forward_pre_hook(refuse)
    return pipeline


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_refused_before_any_model_runs(idle_pipeline, case):
    arguments, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message) as caught:
        sample(idle_pipeline, **{"prompt": "a dog and a corgi", **arguments})
    assert isinstance(caught.value, ValueError)


def test_processors_that_cannot_be_kept_are_refused_first(idle_pipeline):
    class ForeignProcessor:
        def __call__(self, attn, hidden_states, **_):
            return hidden_states

    layer = idle_pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    original, foreign = layer.processor, ForeignProcessor()
    layer.set_processor(foreign)
    try:
        with pytest.raises(PartConflictError, match="ForeignProcessor"):
            sample(idle_pipeline, objects=DOG_AND_CORGI, return_attention=True)
        assert layer.processor is foreign
    finally:
        layer.set_processor(original)


def test_missing_text_encoder_and_image_prompt_are_refused():
    with pytest.raises(ObjectComposeError, match="prompt_embeds"):
        sample(compose_pipeline(tokenizer=None, text_encoder=None))
    pipeline = compose_pipeline()
    add_ip_adapter(pipeline.unet)
    with pytest.raises(ObjectComposeError, match="ip_adapter_image"):
        sample(pipeline)
    with pytest.raises(ObjectComposeError, match="image_encoder"):
        sample(pipeline, ip_adapter_image=PIL.Image.new("RGB", (4, 4)))


def test_safety_checker_needs_a_feature_extractor():
    with pytest.raises(ObjectComposeError, match="feature_extractor"):
        TokenComposePipeline(**{**tiny_components(), "safety_checker": torch.nn.Identity()})
