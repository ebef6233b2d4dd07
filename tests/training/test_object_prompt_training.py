"""ObjectPrompt's training loss: batches against singles, what is dropped and frozen, views of objects, caches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.toybox.weights import active_preset
from objectcompose.training.caption_encoding import CaptionEncoder
from objectcompose.training.grounded_captions import CaptionSample
from objectcompose.training.loop import Draw
from objectcompose.training.object_prompt_data import (
    CutOutScenes,
    ObjectFeatures,
    ToyboxScenes,
    augment_picture,
    captions_with_objects,
    cut_out,
    usable_objects,
)
from objectcompose.training.object_prompt_losses import (
    KEY_SIDE,
    ConditionOptions,
    ObjectPromptLosses,
    draw_conditions,
)
from tests.pipelines.object_prompt_helpers import object_picture, prompt_adapter
from tests.tiny import tiny_image_encoder, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae


ALWAYS = ConditionOptions(0, 0, 0, 0, 0)


class Captions:
    """Scenes of 1, 2, 3 and 0 objects in memory: noise with square outlines."""

    nouns = (("dog",), ("dog", "cup"), ("dog", "cup", "bird"), ())

    def __len__(self) -> int:
        return len(self.nouns)

    def __getitem__(self, index: int) -> CaptionSample:
        generator = torch.Generator().manual_seed(index)
        masks = torch.zeros(len(self.nouns[index]), 32, 32)
        for number in range(len(masks)):
            masks[number, 4 : 20 + 3 * number, 10 * number : 10 * number + 9] = 1
        pixels = torch.rand(3, 32, 32, generator=generator) * 2 - 1
        return CaptionSample(pixels, " and ".join(self.nouns[index]) or "photo", self.nouns[index], masks)

    def key(self, index: int) -> str:
        return f"{index:064x}"


@pytest.fixture(scope="module")
def encoders():
    return tiny_tokenizer(), tiny_text_encoder(), tiny_vae(), tiny_image_encoder()


def make_losses(encoders, options=ALWAYS, cache=None, views=3, **more):
    tokenizer, text_encoder, vae, image_encoder = encoders
    for model in encoders[1:]:
        model.requires_grad_(False)
    scenes = CutOutScenes(Captions())
    unet = tiny_unet().requires_grad_(False)
    captions = CaptionEncoder(scenes.captions, tokenizer, text_encoder, vae, 3, on_missing="skip", cache=cache)
    features = ObjectFeatures(scenes, image_encoder, None, views, cache)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return ObjectPromptLosses(unet, prompt_adapter(unet), scheduler, captions, features, 0.18, options, **more)


def draws_of(*indices, step=0):
    return [Draw(index, torch.Generator().manual_seed(50 + index), step) for index in indices]


def loss_of(losses, *indices, step=0):
    with losses(draws_of(*indices, step=step)) as found:
        return found["loss"]


def gradients(losses, *indices, step=0):
    losses.adapter.zero_grad(set_to_none=True)
    with losses(draws_of(*indices, step=step)) as found:
        found["loss"].backward()
    return {name: weight.grad for name, weight in losses.adapter.named_parameters() if weight.grad is not None}


# ---- one step


def test_features_do_not_depend_on_the_precision_of_the_run():
    features = ObjectFeatures(CutOutScenes(Captions()), tiny_image_encoder(), None)
    plain = features.of_object(1, 0, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = features.of_object(1, 0, 0)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def test_a_batch_equals_its_samples(encoders):
    """Ragged numbers of objects, and a scene without any: padding is seen by nobody."""
    losses = make_losses(encoders, ConditionOptions(0, 0, 0, 0, background_share=0.5))
    together = loss_of(losses, 0, 1, 2, 3)
    alone = torch.stack([loss_of(losses, index) for index in range(4)])
    assert len(set(alone.tolist())) == 4
    torch.testing.assert_close(together, alone.mean(), rtol=1e-5, atol=0)
    batch = gradients(losses, 0, 1, 2, 3)
    single = [gradients(losses, index) for index in range(4)]
    for name, gradient in batch.items():
        mean = sum(one.get(name, torch.zeros_like(gradient)) for one in single) / 4
        torch.testing.assert_close(gradient, mean, rtol=1e-3, atol=1e-6)


def test_only_the_adapter_learns(encoders):
    losses = make_losses(encoders)
    found = gradients(losses, 1, 2)
    assert set(found) == set(dict(losses.adapter.named_parameters()))
    assert all(gradient.any() for gradient in found.values())
    frozen = [*encoders[1:], losses.unet]
    assert all(weight.grad is None for model in frozen for weight in model.parameters())


def test_the_value_side_waits_after_a_warm_start(encoders):
    losses = make_losses(encoders, key_side_steps=2)
    for step in (0, 1):
        assert set(gradients(losses, 2, step=step)) == {
            name for name, _ in losses.adapter.named_parameters() if name.startswith(KEY_SIDE)
        }
    assert set(gradients(losses, 2, step=2)) == set(dict(losses.adapter.named_parameters()))


def test_null_tokens_follow_the_weights(encoders):
    """Scene 3 has no objects: its loss comes from the null picture's tokens, made anew in every step."""
    losses = make_losses(encoders)
    before = loss_of(losses, 3)
    assert all(gradient.any() for name, gradient in gradients(losses, 3).items() if "value_maps" in name)
    with torch.no_grad():
        for weight in losses.adapter.appearance_adapter.parameters():
            weight.add_(0.5)
    assert not torch.isclose(before, loss_of(losses, 3), rtol=1e-5)
    assert not losses.null[0].any() and losses.null[1].any()


def test_an_image_dropped_is_the_null_picture_and_text_dropped_the_empty_one(encoders):
    plain, no_image = make_losses(encoders), make_losses(encoders, ConditionOptions(1, 0, 0, 0, 0))
    assert not torch.isclose(loss_of(plain, 2), loss_of(no_image, 2), rtol=1e-5)
    for weight in (*plain.adapter.projections.value_maps.parameters(),):
        torch.nn.init.zeros_(weight)
    no_image.adapter.load_state_dict(plain.adapter.state_dict())
    torch.testing.assert_close(loss_of(plain, 2), loss_of(no_image, 2))  # no object says anything now
    no_text = make_losses(encoders, ConditionOptions(0, 1, 0, 0, 0))
    no_text.adapter.load_state_dict(plain.adapter.state_dict())
    before = loss_of(no_text, 2)
    assert not torch.isclose(before, loss_of(plain, 2), rtol=1e-5)
    no_text.empty_text = no_text.encoder[2].text
    torch.testing.assert_close(loss_of(no_text, 2), loss_of(plain, 2))


def test_gradient_checkpointing_changes_nothing(encoders):
    losses = make_losses(encoders)
    plain = gradients(losses, 1, 2)
    losses.unet.enable_gradient_checkpointing()
    again = gradients(losses, 1, 2)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def test_a_cache_changes_nothing(encoders, tmp_path):
    expected = gradients(make_losses(encoders, ConditionOptions(background_share=1)), 1, 2)
    for _ in range(2):  # written, then read
        losses = make_losses(encoders, ConditionOptions(background_share=1), cache=tmp_path)
        found = gradients(losses, 1, 2)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    files = sorted((tmp_path / "objects").rglob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-7])  # torn: made again
    found = gradients(make_losses(encoders, ConditionOptions(background_share=1), cache=tmp_path), 1, 2)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


# ---- what is drawn


def test_dropouts_at_their_rates():
    options = ConditionOptions(0.1, 0.2, 0.3, drop_object=0.25, background_share=0.4)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_conditions(generator, 3, 4, options) for _ in range(4000)]

    def share(condition):
        return sum(map(condition, drawn)) / len(drawn)

    shown = [one for one in drawn if one.objects]
    assert share(lambda one: one.has_text and not one.objects) == pytest.approx(0.1, abs=0.02)
    assert share(lambda one: not one.has_text and bool(one.objects)) == pytest.approx(0.2, abs=0.025)
    assert share(lambda one: not one.has_text and not one.objects) == pytest.approx(0.3, abs=0.03)
    assert sum(one.has_background for one in shown) / len(shown) == pytest.approx(0.4, abs=0.04)
    assert not any(one.has_background for one in drawn if not one.objects)
    # three objects, each kept with 0.75, and one at least
    mean = sum(len(one.objects) for one in shown) / len(shown)
    assert mean == pytest.approx(2.25 + 0.25**3, abs=0.06)
    orders = [tuple(number for number, _ in one.objects) for one in shown if len(one.objects) == 3]
    assert len(set(orders)) == 6 and all(orders.count(order) > len(orders) / 9 for order in set(orders))
    assert {view for one in shown for _, view in one.objects} == {0, 1, 2, 3}


def test_one_object_is_never_dropped_and_none_is_the_null_picture():
    options = ConditionOptions(0, 0, 0, drop_object=1, background_share=0)
    generator = torch.Generator().manual_seed(0)
    assert draw_conditions(generator, 1, 1, options).objects == ((0, 0),)
    assert len(draw_conditions(generator, 4, 1, options).objects) == 1
    empty = draw_conditions(generator, 0, 1, options)
    assert empty.objects == () and empty.has_text


@pytest.mark.parametrize("change", [{"drop_text": 1.1}, {"drop_object": -0.1}, {"drop_image": 0.6, "drop_both": 0.5}])
def test_chances_that_cannot_be(change):
    with pytest.raises(ObjectComposeError, match=next(iter(change))):
        ConditionOptions(**change)


# ---- pictures


def test_which_masks_are_objects():
    masks = torch.zeros(6, 40, 40)
    masks[0, :2, :2] = 1  # a speck
    masks[1, :38, :38] = 1  # a wall
    masks[2, 10:30, 10:30] = 1
    masks[3, 12:22, 12:22] = 1  # a part of it
    masks[4, 30:34, :] = 1  # too long
    masks[5, 8:24, 24:36] = 1  # overlaps, but is one of its own
    assert usable_objects(masks) == [2, 5]
    assert usable_objects(torch.zeros(0, 40, 40)) == []


def test_samples_without_an_object_are_left_out():
    """Numbered anew; a wall as the only mask is no object, either."""

    class Walls(Captions):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return dataclasses.replace(sample, masks=torch.ones_like(sample.masks)) if index == 0 else sample

    captions = Walls()
    chosen = captions_with_objects(captions, is_shown=False)
    assert len(chosen) == 2 and [chosen[index].phrases for index in range(2)] == list(Walls.nouns[1:3])
    assert [chosen.key(index) for index in range(2)] == [captions.key(1), captions.key(2)]
    assert all(CutOutScenes(chosen).count(index) for index in range(2))
    captions.nouns = ((), ())
    with pytest.raises(LayoutError, match="got none in 2 pictures"):
        captions_with_objects(captions, is_shown=False)


def test_a_cut_out_is_the_object_and_nothing_else():
    sample = Captions()[1]
    picture = np.asarray(CutOutScenes(Captions()).picture(1, 1, 0))
    assert ((picture[..., 3] == 255) == (sample.masks[1] > 0).numpy()).all()
    wanted = ((sample.pixels + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(picture[..., :3] - wanted).max() <= 1
    behind = np.asarray(CutOutScenes(Captions()).scene_without_objects(1))[..., 3]
    assert ((behind == 0) == sample.masks.any(0).numpy()).all()


def test_augmentation_is_the_generators_and_never_hides_all():
    image = object_picture(3)
    first, again, other = (augment_picture(image, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first[0], again[0]) and first[1] == again[1] and first[1] != other[1]
    margins = []
    for seed in range(60):
        shown, margin = augment_picture(image, torch.Generator().manual_seed(seed))
        assert shown.mode == "RGBA" and shown.getchannel("A").getbbox() is not None
        margins.append(margin)
    assert 0 <= min(margins) < 0.07 and 0.2 < max(margins) <= 0.25
    tiny = cut_out(torch.zeros(3, 1, 1), torch.ones(1, 1))
    assert all(
        augment_picture(tiny, torch.Generator().manual_seed(seed))[0].getchannel("A").getbbox() for seed in range(20)
    )


def test_both_streams_see_one_view(encoders):
    """Vector and grid of a view come from one pass over one picture; other views differ in both."""
    features = make_losses(encoders).features
    first, again, other = (features.of_object(1, 0, view) for view in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    with pytest.raises(LayoutError, match="no object 2"):
        features.of_object(1, 2, 0)
    with pytest.raises(LayoutError, match="view 3"):
        features.of_object(1, 0, 3)


def test_toybox_prompts_show_the_identity_in_another_pose(tmp_path):
    scenes = ToyboxScenes(active_preset(), 6, tmp_path)
    counts = [scenes.count(index) for index in range(6)]
    assert max(counts) >= 1
    index = counts.index(max(counts))
    first, second = (np.asarray(scenes.picture(index, 0, view)) for view in (0, 1))
    assert not np.array_equal(first[..., 3], second[..., 3]), "another pose"
    colours = [picture[picture[..., 3] > 250][:, :3].mean(0) for picture in (first, second)]
    assert np.abs(colours[0] - colours[1]).max() < 12, "the same identity"
    assert scenes.key(0) != scenes.key(1)
    behind = np.asarray(scenes.scene_without_objects(index))[..., 3]
    assert 0 < (behind == 0).mean() < 0.9
