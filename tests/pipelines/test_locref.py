"""LocRefPipeline: who is shown where, what runs how often, and what it returns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from transformers import CLIPImageProcessor

from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.install import match_layers
from objectcompose.attention_processors.reference_fusion import FusionSettings
from objectcompose.errors import PartConflictError
from objectcompose.layout import SceneObject
from objectcompose.pipelines import placement
from objectcompose.pipelines.mifo_control import MIFOBoxControl
from objectcompose.pipelines.pipeline_locref import LocRefPipeline
from objectcompose.pipelines.reference_scenes import SceneVectors, reference_scene, scene_parts
from objectcompose.toybox.weights import toybox_path
from tests.attention_processors.helpers import random_keys_values
from tests.pipelines.conformance.rows import generators, picture
from tests.pipelines.helpers import quiet, sample, seeded
from tests.pipelines.locref_helpers import CORGI, DOG, PROMPT, images, locref
from tests.tiny import tiny_components


@pytest.fixture(scope="module")
def shared():
    """For tests that change nothing in the pipeline."""
    return locref()


def call_counts(pipeline):
    """How often each model is called from now on."""
    counts = dict.fromkeys(("image_encoder", "adapter", "unet"), 0)

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    for name in counts:
        getattr(pipeline, name).register_forward_pre_hook(count(name))
    return counts


# ---- what it paints


def test_references_boxes_order_and_scale_all_matter(shared):
    base = images(shared, [DOG, CORGI])
    moved = SceneObject(phrase="dog", image=DOG.image, box=(0.1, 0.1, 0.7, 0.8))
    other = SceneObject(phrase="dog", image=picture("green"), box=DOG.box)
    weaker = SceneObject(phrase="dog", image=DOG.image, box=DOG.box, scale=0.3)
    in_front = SceneObject(phrase="dog", image=DOG.image, box=DOG.box, order=2)
    for changed in (moved, other, weaker, in_front):
        assert not torch.allclose(images(shared, [changed, CORGI]), base, atol=1e-4), changed
    assert torch.allclose(images(shared, [CORGI, DOG]), base, atol=1e-5)


@pytest.mark.parametrize("composite", ["image", "coordinates", "none"])
def test_scale_0_is_an_object_without_a_picture(composite):
    pipeline = locref({"composite": composite})
    off = replace(CORGI, scale=0.0)
    for objects, expected in (([DOG, off], [DOG]), ([off, DOG], [{"phrase": "corgi"}, DOG])):
        assert torch.equal(images(pipeline, objects), images(pipeline, expected))
    both = sample(pipeline, [PROMPT] * 2, objects=[[DOG, off], [off]], generator=generators(2)).images
    assert torch.equal(both, images(pipeline, [[DOG], []], prompt=[PROMPT] * 2, generator=generators(2)))
    weak = images(pipeline, [DOG, replace(CORGI, scale=0.01)])
    assert not torch.allclose(weak, images(pipeline, [DOG]), atol=1e-4)  # the text still gives way in its box


def test_scale_0_everywhere_is_the_plain_pipeline():
    pipeline = locref()
    counts = call_counts(pipeline)
    off = [replace(DOG, scale=0.0), replace(CORGI, scale=0.0)]
    output = sample(pipeline, PROMPT, objects=off, return_composite=True)
    assert torch.equal(output.images, sample(pipeline, PROMPT).images)
    assert counts["image_encoder"] == counts["adapter"] == 0
    assert len(output.composite[0].getcolors()) == 1 and [item.unused for item in output.objects[0]] == [(), ()]
    alone = locref(adapter=None, image_encoder=None)
    assert torch.equal(images(alone, off), output.images)


def test_alpha_is_a_cut_out():
    pipeline = locref()
    opaque = DOG.image.copy()
    opaque.putalpha(255)
    hidden = DOG.image.copy()
    hidden.paste((9, 99, 199, 0), (0, 0, 2, 12))  # colour that nobody sees
    base = images(pipeline, [DOG])
    assert torch.equal(images(pipeline, [SceneObject(image=hidden, box=DOG.box)]), base)
    assert not torch.allclose(images(pipeline, [SceneObject(image=opaque, box=DOG.box)]), base, atol=1e-4)


def test_outside_the_boxes_the_first_layer_is_the_bases():
    """Cells without a box keep the text's attention exactly; measured where nothing has spread yet."""
    pipeline, seen = locref(), []
    name = match_layers(pipeline.unet, r"down_blocks\.0", kind="cross")[0]
    pipeline.unet.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2].clone()))
    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0}
    images(pipeline, None, **arguments)
    images(pipeline, [DOG], **arguments)
    changed = (seen[0] != seen[1]).any(-1)[0].reshape(16, 16)
    inside = reference_scene([DOG], (16, 16)).regions.at((16, 16))[0] > 0
    assert torch.equal(changed, inside)


def test_gamma_one_without_images_is_the_plain_pipeline(shared):
    plain = sample(shared, PROMPT).images
    off = images(shared, [DOG, CORGI], gamma=1.0, ci_scale=0.0, ri_scale=0.0)
    torch.testing.assert_close(off, plain, atol=1e-4, rtol=0)
    assert not torch.allclose(images(shared, [DOG, CORGI], ci_scale=0.0, ri_scale=0.0), plain, atol=1e-4)


def test_strengths_default_to_the_adapters():
    pipeline = locref({"gamma": 0.5, "ci_scale": 0.4, "ri_scale": 0.6, "null_references": False})
    found = images(pipeline, [DOG])
    given = {"gamma": 0.5, "ci_scale": 0.4, "ri_scale": 0.6, "null_references": False, "region_mask": True}
    assert torch.equal(found, images(locref(), [DOG], **given))
    assert not torch.equal(found, images(locref(), [DOG]))


@pytest.mark.parametrize(
    "options",
    [
        {"composite": "coordinates"},
        {"composite": "none"},
        {"projection": "linear"},
        {"shared_projection": False},
        {"feature": "embeds"},
        {"region_mask": False},
        {"layers": "mid_block"},
    ],
)
def test_every_choice_paints_and_differs(shared, options):
    found = images(locref(options), [DOG, CORGI])
    assert torch.isfinite(found).all() and not torch.equal(found, images(shared, [DOG, CORGI]))


@pytest.mark.parametrize("composite", ["image", "coordinates", "none"])
def test_batches_of_different_layouts_equal_singles(composite):
    pipeline = locref({"composite": composite})
    layouts = [[DOG, CORGI], [], [SceneObject(image=picture("green"), box=(0.3, 0.3, 0.9, 0.7), scale=0.5)]]
    together = images(pipeline, layouts, prompt=[PROMPT] * 3, generator=generators(3))
    for row, layout in enumerate(layouts):
        alone = images(pipeline, layout, generator=generators(1, 1 + row))
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [1, 20])
def test_one_to_twenty_objects(shared, count):
    boxes = [(column / 5, row / 4, (column + 1) / 5, (row + 1) / 4) for row in range(4) for column in range(5)]
    objects = [SceneObject(image=DOG.image, box=box) for box in boxes[:count]]
    assert torch.isfinite(images(shared, objects)).all()


def test_non_square_pictures_and_prompt_embeds(shared):
    objects = [SceneObject(image=DOG.image, box=DOG.box)]
    arguments = {"height": 40, "width": 24}
    by_text = images(shared, objects, **arguments)
    assert by_text.shape == (1, 3, 40, 24)
    embeds, negative = shared.encode_prompt(PROMPT, "cpu", 1, True)
    arguments |= {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(images(shared, objects, prompt=None, **arguments), by_text)


def test_feature_extractor_says_how_pixels_are_normalised():
    half = CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    clip = CLIPImageProcessor()
    base = images(locref(), [DOG])
    assert torch.equal(images(locref(feature_extractor=clip), [DOG]), base)
    assert not torch.equal(images(locref(feature_extractor=half), [DOG]), base)


# ---- the unconditional half


def first_predictions(pipeline, objects, **arguments):
    """The UNet's two halves [uncond, cond] in the first step."""
    seen = []
    handle = pipeline.unet.register_forward_hook(lambda *call: seen.append(call[2][0].clone()))
    images(pipeline, objects, num_inference_steps=1, **arguments)
    handle.remove()
    return seen[0].chunk(2)


def test_bypass_leaves_the_unconditional_half_to_the_base(shared):
    plain = first_predictions(shared, None)
    bypassed = first_predictions(shared, [DOG], null_references=False)
    with_nulls = first_predictions(shared, [DOG], null_references=True)
    torch.testing.assert_close(bypassed[0], plain[0], atol=1e-6, rtol=0)
    assert not torch.allclose(with_nulls[0], plain[0], atol=1e-4)
    torch.testing.assert_close(bypassed[1], with_nulls[1], atol=1e-5, rtol=0)


def test_nulls_are_zero_vectors_in_the_same_regions(shared):
    scene = reference_scene([DOG, CORGI], (16, 16))
    vectors = SceneVectors(torch.randn(1, 2, 10), torch.randn(1, 1, 10))
    zeros = SceneVectors(torch.zeros(1, 2, 10), torch.zeros(1, 1, 10))
    both = scene_parts(shared.adapter, [scene], vectors, FusionSettings(), with_nulls=True)
    null, shown = (scene_parts(shared.adapter, [scene], one, FusionSettings()) for one in (zeros, vectors))
    for part, first, second in zip(both, null, shown, strict=True):
        for name, (key, value) in part.keys_values.items():
            torch.testing.assert_close(key[:1], first.keys_values[name][0])
            torch.testing.assert_close(value[1:], second.keys_values[name][1])
        assert torch.equal(part.coverage(64, "cpu")[:1], first.coverage(64, "cpu"))
        assert torch.equal(part.coverage(64, "cpu")[1:], second.coverage(64, "cpu"))


def test_one_null_picture_is_kept_for_all_objects_and_rows(shared):
    scenes = [reference_scene([DOG, CORGI], (16, 16)), reference_scene([DOG], (16, 16))]
    vectors = SceneVectors(torch.randn(2, 2, 10), torch.randn(2, 1, 10))
    for part in scene_parts(shared.adapter, scenes, vectors, FusionSettings(), repeats=3, with_nulls=True):
        kept = part.keys_values
        for name, (key, value) in kept.items():
            assert key.shape == value.shape and key.shape[0] == 12
            assert torch.equal(key[:1].expand(6, -1, -1), key[:6])
            held = [one for pairs in (kept.nulls, kept.shown) for one in pairs[name]]
            tokens = kept.nulls[name][0].shape[1]
            assert sum(one.untyped_storage().nbytes() for one in held) == 2 * 4 * key.shape[2] * (
                tokens + 6 * key.shape[1]
            )


@pytest.mark.parametrize("null_references", [True, False])
def test_guidance_that_is_cut_off_in_the_middle(shared, null_references):
    """From the cut on, the UNet sees the conditional half alone."""
    arguments = {"num_inference_steps": 4, "null_references": null_references}
    cut = images(shared, [DOG], callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5), **arguments)
    assert torch.isfinite(cut).all() and not torch.equal(cut, images(shared, [DOG], **arguments))


# ---- what runs how often


def test_encoder_and_adapter_run_once_per_call():
    pipeline = locref()
    counts = call_counts(pipeline)
    images(pipeline, [[DOG, CORGI], [DOG]], prompt=[PROMPT] * 2, num_images_per_prompt=2, num_inference_steps=3)
    assert counts == {"image_encoder": 1, "adapter": 1, "unet": 3}


def test_without_references_nothing_of_the_method_runs(shared):
    pipeline = locref()
    counts = call_counts(pipeline)
    text_only = [{"phrase": "dog", "box": (0.1, 0.1, 0.5, 0.5)}, {"phrase": "corgi"}]
    found = images(pipeline, text_only, num_images_per_prompt=2, generator=generators(2))
    assert counts["image_encoder"] == counts["adapter"] == 0
    plain = quiet(StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False))
    expected = sample(plain, PROMPT, num_images_per_prompt=2, generator=generators(2)).images
    assert torch.equal(found, expected)


def test_text_only_objects_need_no_adapter_and_say_what_goes_unused(monkeypatch):
    messages = []
    monkeypatch.setattr(placement.placement_logger, "warning", messages.append)
    pipeline = locref(adapter=None, image_encoder=None)
    output = sample(pipeline, PROMPT, objects=[{"phrase": "dog", "box": (0, 0, 1, 1), "order": 2}])
    assert torch.equal(output.images, sample(pipeline, PROMPT).images)
    assert output.objects[0][0].unused == ("box", "order") and output.objects[0][0].box == (0.0, 0.0, 1.0, 1.0)
    assert messages == ["LocRefPipeline cannot use these fields of `objects`, which change nothing: box, order."]


def test_unused_fields_of_references(shared):
    item = {"phrase": "dog", "image": DOG.image, "box": DOG.box, "mask": torch.ones(8, 8), "scale": 0.5, "order": 1}
    output = sample(shared, PROMPT, objects=[item, CORGI])
    assert [one.unused for one in output.objects[0]] == [("mask",), ()]
    assert [one.label for one in output.objects[0]] == ["dog", "corgi"]


# ---- what it returns


def test_composite_images_can_be_looked_at(shared):
    output = sample(shared, [PROMPT, PROMPT], objects=[[DOG], []], return_composite=True, num_images_per_prompt=2)
    assert len(output.composite) == 4 and output.composite[0].size == (512, 512)
    grey = tuple(round(255 * value) for value in (0.48145466, 0.4578275, 0.40821073))
    assert output.composite[0].getpixel((500, 500)) == grey == output.composite[2].getpixel((150, 230))
    assert output.composite[1].getpixel((150, 230)) == (255, 0, 0)
    assert sample(shared, PROMPT, objects=[DOG]).composite is None
    as_tuple = sample(shared, PROMPT, objects=[DOG], return_composite=True, return_dict=False)
    assert len(as_tuple) == 5 and as_tuple[4][0].size == (512, 512)


def test_attention_of_phrases_and_objects_without_one(shared):
    unnamed = SceneObject(image=picture("green"), box=(0.0, 0.0, 0.3, 0.3))
    output = sample(shared, PROMPT, objects=[unnamed, CORGI], return_attention=True)
    assert list(output.attention[0]) == ["corgi"] and output.objects[0][0].phrase is None


def test_parts_of_other_methods_stack(shared):
    layers = match_layers(shared.unet, "mid_block", kind="cross")
    base = images(shared, [DOG])
    for rows in (None, slice(-1, None)):
        branch = Branch(random_keys_values(shared.unet, layers, 1, 2), rows=rows)
        both = images(shared, [DOG], parts=[branch])
        assert torch.isfinite(both).all() and not torch.equal(both, base)
    everywhere = Branch(random_keys_values(shared.unet, layers, 1, 2), mode="replace")
    with pytest.raises(PartConflictError, match="replace"):
        images(shared, [DOG], parts=[everywhere])
    assert torch.equal(images(shared, [DOG]), base)


def test_box_control_stacks_and_its_guidance_sees_the_references(shared):
    """MIFO's guidance runs the conditional half alone, with these parts installed."""
    layout = [{"phrase": item.phrase, "box": item.box} for item in (DOG, CORGI)]
    for options in ({}, {"null_references": False}):
        base = images(shared, [DOG, CORGI], **options)
        both = images(shared, [DOG, CORGI], parts=[MIFOBoxControl(layout)], **options)
        assert torch.isfinite(both).all() and not torch.allclose(both, base, atol=1e-4)


# ---- the real thing, small


@pytest.mark.slow
def test_toybox_with_a_fresh_adapter(tmp_path):
    from transformers import CLIPVisionModelWithProjection

    folder = toybox_path("image_encoder")
    components = {
        "image_encoder": CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32),
        "feature_extractor": CLIPImageProcessor.from_pretrained(folder),
    }
    pipeline = quiet(LocRefPipeline.from_pretrained(toybox_path("base"), **components))
    adapter = LocRefAdapter.from_unet(pipeline.unet, "toybox", components["image_encoder"])
    adapter.save_pretrained(tmp_path)
    pipeline.load_adapter(tmp_path)
    prompt, call = "a photo of a dog and a cup", {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "np"}
    objects = [SceneObject(phrase="dog", image=picture("red"), box=(0.0, 0.2, 0.5, 0.8))]
    shown = pipeline(prompt, objects=objects, generator=seeded(), return_composite=True, **call)
    assert shown.images.shape == (1, 64, 64, 3) and shown.images.std() > 0.01
    assert shown.composite[0].getpixel((128, 256)) == (255, 0, 0)
    pipeline.unload_adapter()
    plain = quiet(StableDiffusionPipeline.from_pretrained(toybox_path("base"), dtype=torch.float32))
    expected = plain(prompt, generator=seeded(), **call).images
    assert (pipeline(prompt, generator=seeded(), **call).images == expected).all()
    assert not (shown.images == expected).all()
