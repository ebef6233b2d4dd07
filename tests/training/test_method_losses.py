"""The losses of TokenCompose and Separate-and-Enhance on tiny UNets."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from objectcompose.attention_processors.install import attention_layers
from objectcompose.errors import LayerNotFoundError, LayoutError, ObjectComposeError
from objectcompose.training.caption_encoding import CaptionEncoder, encode_caption
from objectcompose.training.grounded_captions import CaptionSample
from objectcompose.training.loop import Draw
from objectcompose.training.separate_enhance_losses import (
    SeparateEnhanceLosses,
    SeparateEnhanceOptions,
    draw_prompt,
    layers_of_grid,
)
from objectcompose.training.token_compose_losses import TokenComposeLosses, TokenComposeLossOptions
from objectcompose.training.trainable import select_trainable
from tests.tiny import tiny_scheduler, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae


NOUNS = (("dog", "cup"), ("corgi",), (), ("cup", "dog", "carton"))


class Pictures:
    """Random pictures with square masks; samples have 2, 1, 0 and 3 nouns."""

    def __len__(self) -> int:
        return len(NOUNS)

    def __getitem__(self, index: int) -> CaptionSample:
        generator = torch.Generator().manual_seed(index)
        masks = torch.zeros(len(NOUNS[index]), 32, 32)
        for number, mask in enumerate(masks):
            mask[8 * number : 8 * number + 12, 4:20] = 1
        caption = "a photo of " + " and ".join(f"a {noun}" for noun in NOUNS[index])
        return CaptionSample(torch.rand(3, 32, 32, generator=generator) * 2 - 1, caption, NOUNS[index], masks)

    def key(self, index: int) -> str:
        return str(index)


def draws(*indices: int) -> list[Draw]:
    return [Draw(index, torch.Generator().manual_seed(index)) for index in indices]


def noise_scheduler(**changes) -> DDPMScheduler:
    return DDPMScheduler.from_config(tiny_scheduler().config, **changes)


def token_compose(unet, scheduler=None, dataset=None, **changes) -> TokenComposeLosses:
    tokenizer = tiny_tokenizer()
    encoder = CaptionEncoder(dataset or Pictures(), tokenizer, tiny_text_encoder(tokenizer), tiny_vae(), levels=3)
    return TokenComposeLosses(unet, scheduler or noise_scheduler(), encoder, 0.5, TokenComposeLossOptions(**changes))


def loss_and_gradients(losses, unet, batches) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Means over batches of equal size, as the loop accumulates them."""
    unet.zero_grad(set_to_none=True)
    sums: dict[str, float] = {}
    for batch in batches:
        with losses(batch) as found:
            (found["loss"] / len(batches)).backward()
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(batches)
    return sums, {name: one.grad for name, one in unet.named_parameters() if one.grad is not None}


def assert_same_step(first, second, **tolerance):
    assert first[0] == pytest.approx(second[0], rel=1e-5, abs=1e-7)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(
            gradient, second[1][name], **tolerance, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_batch_equals_its_singles(kind):
    """Ragged rows, also one without nouns, whose grounding losses are 0 and count in the mean."""
    unet = tiny_unet(kind).train()
    losses = token_compose(unet, token_weight=1.0, pixel_weight=0.5)
    whole = loss_and_gradients(losses, unet, [draws(0, 1, 2, 3)])
    singles = loss_and_gradients(losses, unet, [draws(index) for index in range(4)])
    for result in (whole, singles):  # a share of nouns, not of rows
        for name in [name for name in result[0] if name.startswith("empty_masks")]:
            result[0].pop(name)
    assert_same_step(whole, singles, rtol=1e-4, atol=1e-6)
    assert whole[0]["loss"] == pytest.approx(whole[0]["ldm"] + whole[0]["token"] + 0.5 * whole[0]["pixel"], rel=1e-5)


class Bears(Pictures):
    """One picture, whose caption names one bear in two ways; samples supervise both nouns, and each alone."""

    def __getitem__(self, index: int) -> CaptionSample:
        nouns, chosen = ("teddy bear", "bear"), ([0, 1], [0], [1])[index]
        masks = torch.zeros(2, 32, 32)
        masks[0, 4:20, 4:20] = masks[1, 10:28, 8:30] = 1
        pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
        return CaptionSample(pixels, "a teddy bear", tuple(nouns[one] for one in chosen), masks[chosen])


def test_nouns_that_share_a_token_have_the_mean_of_their_losses():
    unet = tiny_unet().train()
    losses = token_compose(unet, dataset=Bears(), token_weight=1.0, pixel_weight=1.0)
    found = []
    for index in range(3):
        with losses([Draw(index, torch.Generator().manual_seed(7))]) as one:
            found.append({name: float(one[name].detach()) for name in ("token", "pixel")})
    assert losses.encoder[0].tokens == ((2, 3), (3,))
    both, *alone = found
    assert both["token"] == pytest.approx((alone[0]["token"] + alone[1]["token"]) / 2, rel=1e-5)
    assert both["pixel"] == pytest.approx((alone[0]["pixel"] + alone[1]["pixel"]) / 2, rel=1e-5)


class Specks(Pictures):
    """A large object, one that the coarsest grid loses, and one that is nowhere."""

    def __getitem__(self, index: int) -> CaptionSample:
        masks = torch.zeros(3, 32, 32)
        masks[0, 4:28, 4:28] = masks[1, 8:10, 8:10] = 1
        return CaptionSample(torch.zeros(3, 32, 32), "a dog and a cup and a carton", ("dog", "cup", "carton"), masks)


def test_empty_masks_are_told_for_each_grid():
    unet = tiny_unet().train()
    with token_compose(unet, dataset=Specks())(draws(0, 1)) as found:
        shares = {name: float(share) for name, share in found.items() if name.startswith("empty_masks")}
    assert shares == pytest.approx({"empty_masks_16x16": 1 / 3, "empty_masks_8x8": 1 / 3, "empty_masks_4x4": 2 / 3})
    with token_compose(unet)(draws(2)) as found:  # no nouns
        assert [float(found[name]) for name in shares] == [0, 0, 0]


def test_gradient_checkpointing_changes_nothing():
    unet = tiny_unet().train()
    losses = token_compose(unet, token_weight=1.0, pixel_weight=1.0)
    plain = loss_and_gradients(losses, unet, [draws(0, 3)])
    unet.enable_gradient_checkpointing()
    assert_same_step(loss_and_gradients(losses, unet, [draws(0, 3)]), plain, rtol=0, atol=0)


def test_losses_stay_in_float32_under_bf16():
    """Autocast runs the UNet in bf16; maps and losses are float32, and close to those of a float32 run."""
    unet = tiny_unet().train()
    plain, _ = loss_and_gradients(token_compose(unet, token_weight=1.0, pixel_weight=1.0), unet, [draws(0, 3)])
    losses = token_compose(unet, token_weight=1.0, pixel_weight=1.0)
    losses.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    with losses(draws(0, 3)) as found:
        assert {value.dtype for value in found.values()} == {torch.float32}
        found["loss"].backward()
    rounded = {name: float(value.detach()) for name, value in found.items()}
    assert rounded["ldm"] != plain["ldm"]  # it did run in bf16
    assert rounded == pytest.approx(plain, rel=0.05)
    assert all(one.grad.dtype == torch.float32 for one in unet.parameters() if one.grad is not None)


def test_grounding_alone_reaches_the_keys():
    """No silent zero: without the denoising loss the gradient comes through the maps alone."""
    unet = tiny_unet().train()
    _, gradients = loss_and_gradients(
        token_compose(unet, ldm_weight=0.0, token_weight=1.0, pixel_weight=0.0), unet, [draws(0)]
    )
    keys = [name for name in gradients if "up_blocks" in name and name.endswith("attn2.to_k.weight")]
    assert keys and all(gradients[name].abs().max() > 0 for name in keys)


def test_ldm_alone_installs_nothing_and_is_the_plain_loss():
    unet = tiny_unet().train()
    losses = token_compose(unet, token_weight=0.0, pixel_weight=0.0)
    before = {name: type(module.processor) for name, module in attention_layers(unet).items()}
    with losses(draws(0, 1)) as found:
        assert {name: type(module.processor) for name, module in attention_layers(unet).items()} == before
        assert found["loss"].item() == found["ldm"].item() and found["token"].item() == 0


def test_velocity_and_unknown_targets():
    unet = tiny_unet().train()
    with token_compose(unet, noise_scheduler(prediction_type="v_prediction"))(draws(0)) as velocity:
        with token_compose(unet)(draws(0)) as noise:
            assert velocity["ldm"].item() != noise["ldm"].item()
    with pytest.raises(ObjectComposeError, match="prediction_type"):
        token_compose(unet, noise_scheduler(prediction_type="sample"))


def test_bad_options():
    for changes, message in (
        ({"token_weight": -1.0}, "token_weight"), ({"pixel_weight": float("nan")}, "pixel_weight"),
        ({"token_weight": 0.0, "pixel_weight": 0.0, "ldm_weight": 0.0}, "above 0"),
    ):  # fmt: skip
        with pytest.raises(ObjectComposeError, match=message):
            TokenComposeLossOptions(**changes)
    with pytest.raises(LayerNotFoundError):
        token_compose(tiny_unet(), layers=r"no_such_block")
    for changes, message in (
        ({"objects": 1}, "objects"), ({"sep_weight": -1.0}, "sep_weight"), ({"head_mode": "max"}, "head_mode"),
        ({"latent_source": "pictures"}, "latent_source"), ({"sigma": 0.0}, "sigma"),
        ({"min_timestep": -1}, "-1 and None"), ({"min_timestep": 5, "max_timestep": 5}, "5 and 5"),
        ({"max_timestep": 0}, "0 and 0"),
        ({"sep_weight": 0.0, "enhance_weight": 0.0, "norm_weight": 0.0}, "above 0"),
    ):  # fmt: skip
        with pytest.raises(ObjectComposeError, match=message):
            SeparateEnhanceOptions(**changes)


def separate_enhance(unet, concepts=("dog", "cup", "corgi"), grid=(8, 8), **changes) -> SeparateEnhanceLosses:
    tokenizer = tiny_tokenizer()
    text_encoder = tiny_text_encoder(tokenizer)
    return SeparateEnhanceLosses(
        unet,
        select_trainable(unet, "to_k"),
        noise_scheduler(),
        tokenizer,
        lambda prompt: encode_caption(tokenizer, text_encoder, prompt),
        concepts,
        (4, 16, 16),
        grid,
        SeparateEnhanceOptions(**changes),
    )


def test_only_the_keys_up_to_the_last_layer_get_gradients():
    unet = tiny_unet().train()
    losses = separate_enhance(unet)
    assert losses.layers == layers_of_grid(unet, (4, 16, 16), 77, 64)
    found, gradients = loss_and_gradients(losses, unet, [draws(0, 1)])
    assert 0 <= found["separate"] <= 0.25 and 0 < found["enhance"] < 1 and "norm" not in found
    assert all(name.endswith("attn2.to_k.weight") for name in gradients)
    finest_of_decoder = [name for name, one in unet.named_parameters() if one.requires_grad and "up_blocks.2" in name]
    assert finest_of_decoder and not set(finest_of_decoder) & set(gradients)


def test_norm_is_zero_before_training_and_holds_after(monkeypatch):
    unet = tiny_unet().train()
    losses = separate_enhance(unet, norm_weight=0.5)
    found, gradients = loss_and_gradients(losses, unet, [draws(0)])
    assert found["norm"] == 0
    before = {name: parameter.detach().clone() for name, parameter in losses.trained.items()}
    with torch.no_grad():
        for parameter in losses.trained.values():
            parameter.add_(0.1)
    found, gradients = loss_and_gradients(losses, unet, [draws(0)])
    assert found["norm"] > 0 and set(gradients) == set(losses.trained)
    for name, parameter in losses.trained.items():  # the frozen values were in place only for one forward
        torch.testing.assert_close(parameter.detach(), before[name] + 0.1)


def test_separate_enhance_with_checkpointing_and_norm():
    unet = tiny_unet().train()
    losses = separate_enhance(unet, norm_weight=0.5)
    with torch.no_grad():
        for parameter in losses.trained.values():
            parameter.mul_(1.1)
    plain = loss_and_gradients(losses, unet, [draws(0, 2)])
    unet.enable_gradient_checkpointing()
    assert_same_step(loss_and_gradients(losses, unet, [draws(0, 2)]), plain, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("separate", {"enhance_weight": 0.0}), ("enhance", {"sep_weight": 0.0}), ("loss", {}),
        ("loss", {"objects": 3, "head_mode": "mean"}),
    ],
)  # fmt: skip
def test_losses_fall(name, weights):
    unet = tiny_unet().train()
    losses = separate_enhance(unet, **weights)
    optimizer = torch.optim.Adam(losses.trained.values(), lr=5e-2)
    history = []
    for _ in range(15):
        found, _ = loss_and_gradients(losses, unet, [draws(0, 1)])
        optimizer.step()
        history.append(found[name])
    # together they pull against one another: a stronger map overlaps more
    assert history[-1] < history[0] * (0.95 if weights.keys() & {"sep_weight", "enhance_weight"} else 1)


def test_prompts_are_drawn_from_the_generator_alone():
    names = ["dog", "cup", "apple", "car"]
    drawn = [draw_prompt(names, 2, 3, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert drawn == [draw_prompt(names, 2, 3, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(one.concepts[0] == "apple" and len(set(one.concepts)) == 3 for one in drawn)
    assert {" with " in one.text for one in drawn} == {True, False} and len({one.concepts for one in drawn}) > 3
    assert drawn[0].single == "a photo of an apple"


def test_each_of_just_enough_concepts_is_held_to_the_frozen_model():
    """A pair has one prompt, and takes turns in the normalisation term."""
    generator = torch.Generator().manual_seed(0)
    pair = [draw_prompt(["dog", "cup"], first, 2, generator) for first in (0, 1)]
    assert [one.text for one in pair] == ["a photo of a dog and a cup"] * 2
    assert [one.single for one in pair] == ["a photo of a dog", "a photo of a cup"]
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())  # nothing was drawn
    losses = separate_enhance(tiny_unet().train(), concepts=("dog", "cup"), norm_weight=0.5)
    encoded, encode = [], losses._encode
    losses._encode = lambda prompt: encoded.append(prompt) or encode(prompt)
    with losses(draws(0, 1)):
        pass
    assert set(encoded) == {"a photo of a dog and a cup", "a photo of a dog", "a photo of a cup"}


def test_supervised_tokens_are_the_concepts_pieces():
    losses = separate_enhance(tiny_unet(), concepts=("dog", "carton"))
    pieces = losses.supervised_tokens()
    assert list(pieces) == ["dog", "carton"]
    for concept, tokens in pieces.items():
        assert "".join(tokens).replace("</w>", "") == concept


def test_timesteps_lie_between_their_bounds():
    losses = separate_enhance(tiny_unet(), min_timestep=3, max_timestep=5)
    drawn = {int(step) for seed in range(20) for step in losses._noisy_latents(draws(seed), torch.device("cpu"))[1]}
    assert drawn == {3, 4}
    last = noise_scheduler().config.num_train_timesteps
    for bounds in ({"min_timestep": last}, {"max_timestep": last + 1}):
        with pytest.raises(ObjectComposeError, match=f"scheduler's {last} timesteps"):
            separate_enhance(tiny_unet(), **bounds)


def test_bad_concepts_and_grids():
    with pytest.raises(LayoutError, match="2 different nouns"):
        separate_enhance(tiny_unet(), concepts=("dog",))
    with pytest.raises(LayoutError, match="different"):
        separate_enhance(tiny_unet(), concepts=("dog", "dog"))
    with pytest.raises(ObjectComposeError, match="attention_grid.*16, 64, 256"):
        separate_enhance(tiny_unet(), grid=(5, 5))
