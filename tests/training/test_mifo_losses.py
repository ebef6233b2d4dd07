"""MIFO's learning losses: against loops, the gate and the switch, and what a step may move."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image

from objectcompose.attention_processors.install import match_layers, use_parts
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.errors import ObjectComposeError, PromptTooLongError
from objectcompose.training.loop import Draw
from objectcompose.training.mifo_losses import MIFOLosses, MIFOLossOptions, SceneLatents, learning_layers
from objectcompose.training.mifo_scene import make_scene
from objectcompose.training.mifo_watch import WATCHED_DRAWS, AttentionWatch
from objectcompose.training.placeholders import Placeholders
from tests.tiny import tiny_components


SIZE = 32


def scene(count=2):
    values = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    masks = torch.zeros(count, SIZE, SIZE)
    for index, mask in enumerate(masks):
        mask[4:20, index * SIZE // count : (index + 1) * SIZE // count - 3] = 1
    return make_scene(Image.fromarray(values), list(masks), SIZE)


class Setup:
    """All that the losses need, on tiny components with frozen weights."""

    def __init__(self, stage=1, prior=None, vectors=1, count=2, prediction="epsilon", **options):
        parts = tiny_components()
        self.unet, self.encoder, self.vae = parts["unet"], parts["text_encoder"], parts["vae"]
        for model in (self.unet, self.encoder, self.vae):
            model.requires_grad_(False)
        names = [f"<asset{index}>" for index in range(count)]
        self.placeholders = Placeholders(parts["tokenizer"], self.encoder, names, vectors)
        self.scene = scene(count)
        self.scheduler = DDPMScheduler.from_config(parts["scheduler"].config, prediction_type=prediction)
        chosen = MIFOLossOptions(**options)
        self.losses = MIFOLosses(
            self.unet,
            self.encoder,
            self.scheduler,
            self.scene,
            SceneLatents(self.scene, self.vae, chosen.sampling),
            self.placeholders,
            learning_layers(self.unet, (16, 16), stage),
            chosen,
            prior,
        )

    def __call__(self, *draws, backward=False):
        with self.placeholders.in_place(), self.losses(draws) as found:
            if backward:
                found["loss"].backward()
            return {name: value.detach() for name, value in found.items()}


def draw(seed=0, step=0):
    return Draw(0, torch.Generator().manual_seed(seed), step)


def drawn(setup, seed):
    """What a draw decides: chosen instances, mirrored, timestep, posterior and noise."""
    generator = torch.Generator().manual_seed(seed)
    sample = setup.losses.sample(Draw(0, generator))
    posterior, noise = torch.randn(2, 4, 16, 16, generator=generator)
    return sample, int(torch.randint(0, 1000, (), generator=generator)), posterior, noise


def seed_where(setup, wanted):
    return next(seed for seed in range(500) if wanted(*drawn(setup, seed)[:2]))


@pytest.mark.parametrize("is_flipped", [False, True])
@pytest.mark.parametrize(("step", "kind"), [(0, "reward"), (200, "penalty")])
def test_a_step_against_loops(step, kind, is_flipped):
    setup = Setup(latent_mask="nearest")
    seed = seed_where(setup, lambda sample, t: t < 500 and len(sample.chosen) == 2 and sample.is_flipped == is_flipped)
    found = setup(draw(seed, step))
    sample, timestep, posterior, noise = drawn(setup, seed)

    view = setup.scene.flipped() if is_flipped else setup.scene
    with torch.no_grad(), setup.placeholders.in_place():
        encoded = setup.vae.encode(view.pixels[None]).latent_dist
        clean = (encoded.mean + encoded.std * posterior) * setup.vae.config.scaling_factor
        noisy = setup.scheduler.add_noise(clean, noise[None], torch.tensor([timestep]))
        prompt = "a photo of " + " and ".join(f"<asset{index}>" for index in sample.chosen)
        ids = setup.placeholders.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        positions = [ids[0].tolist().index(setup.placeholders.ids[index][0]) for index in sample.chosen]
        probe = TokenMapProbe(positions, setup.losses.layers)
        with use_parts(setup.unet, [probe]):
            predicted = setup.unet(noisy, torch.tensor([timestep]), setup.encoder(ids)[0]).sample
    union = view.masks[list(sample.chosen)].amax(0)[::2, ::2]  # 32 pixels to 16 cells, the first of each
    reconstruction = ((predicted - noise) ** 2 * union).mean()
    assert found["reconstruction"].item() == pytest.approx(reconstruction.item(), rel=1e-4)

    total, shares = 0.0, []
    for maps in probe.maps.values():
        side = int(maps.shape[1] ** 0.5)
        for column, index in enumerate(sample.chosen):
            mask = F.adaptive_avg_pool2d(view.masks[index][None], side).flatten()
            attention = maps[0, :, column]
            shares.append(float((attention * mask).sum() / mask.sum()))
            error = 0.5 * mask - attention if kind == "reward" else (1 - mask) * attention
            total += float((error**2).mean())
    weight = {"reward": 1e-2, "penalty": 2e-2}[kind]
    assert found["attention"].item() == pytest.approx(weight * total, rel=1e-4)
    assert found["inside"].item() == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    assert found["loss"].item() == pytest.approx(reconstruction.item() + weight * total, rel=1e-4)


def test_no_attention_loss_at_high_noise():
    setup = Setup()
    late, early = (seed_where(setup, lambda sample, t, low=low: (t < 500) == low) for low in (False, True))
    assert setup(draw(late))["attention"] == 0 < setup(draw(early))["attention"]
    assert setup(draw(late))["reconstruction"] > 0


def test_the_reward_gives_way_to_the_penalty():
    setup, always = Setup(reward_steps=10), {kind: Setup(attention_loss=kind) for kind in ("reward", "penalty")}
    seed = seed_where(setup, lambda sample, t: t < 500)
    for step, kind in ((9, "reward"), (10, "penalty")):
        assert setup(draw(seed, step))["attention"] == always[kind](draw(seed, step))["attention"]
    assert "attention" not in Setup(attention_loss="none")(draw(seed))


def test_only_the_placeholders_that_are_named_get_gradients():
    setup = Setup(attention_loss="both")
    seed = seed_where(setup, lambda sample, t: t < 500 and sample.chosen == (1,))
    setup(draw(seed), backward=True)
    gradient = setup.placeholders.vectors.grad
    assert gradient[1].abs().sum() > 0 and gradient[0].abs().sum() == 0
    for model in (setup.unet, setup.encoder, setup.vae):
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("prior", [False, True])
def test_a_batch_is_the_mean_of_its_rows(prior):
    given = (torch.randn(5, 8, 16, 16, generator=torch.Generator().manual_seed(1)), "a dog") if prior else None
    setup = Setup(stage=2, prior=given, prior_weight=float(prior), vectors=2, reward_steps=5)
    rows = [(3, 0), (4, 9), (8, 0)]
    together = setup(*(draw(*row) for row in rows))
    singles = [setup(draw(*row)) for row in rows]
    for name in set(together) - {"inside"}:
        assert together[name].item() == pytest.approx(sum(single[name].item() for single in singles) / 3, rel=1e-4)


def test_the_prior_weighs_the_class_pictures():
    given = (torch.randn(5, 8, 16, 16, generator=torch.Generator().manual_seed(1)), "a dog")
    with_prior = Setup(stage=2, prior=given, prior_weight=0.5)(draw(3))
    rest = with_prior["reconstruction"] + with_prior["attention"]
    assert with_prior["loss"].item() == pytest.approx((rest + 0.5 * with_prior["prior"]).item(), rel=1e-5)
    assert "prior" not in Setup(stage=2, prior=given, prior_weight=0.0)(draw(3))


def test_joint_sampling_draws_every_number_and_order():
    setup = Setup(count=3)
    chosen = [setup.losses.sample(draw(seed)) for seed in range(600)]
    counts = torch.tensor([len(sample.chosen) for sample in chosen])
    assert all(abs((counts == number).float().mean() - 1 / 3) < 0.08 for number in (1, 2, 3))
    assert len({sample.chosen for sample in chosen}) == 3 + 6 + 6
    assert abs(sum(sample.is_flipped for sample in chosen) / 600 - 0.5) < 0.08
    never = Setup(flip_probability=0.0)
    assert not any(never.losses.sample(draw(seed)).is_flipped for seed in range(20))


def test_separate_sampling_shows_one_instance_on_grey():
    setup = Setup(sampling="separate", flip_probability=0.0)
    assert {setup.losses.sample(draw(seed)).chosen for seed in range(20)} == {(0,), (1,)}
    with torch.no_grad():
        alone = setup.vae.encode(setup.scene.alone(1).pixels[None]).latent_dist.parameters[0]
    assert torch.equal(setup.losses.latents((1,), False), alone)


def test_velocity_and_area_mean():
    epsilon, velocity = Setup()(draw(2)), Setup(prediction="v_prediction")(draw(2))
    assert epsilon["reconstruction"] != velocity["reconstruction"]
    setup = Setup()
    sample = drawn(setup, 2)[0]
    share = setup.losses._union(sample, (16, 16)).mean()
    area = Setup(reconstruction_mean="area")(draw(2))["reconstruction"]
    assert area.item() == pytest.approx((epsilon["reconstruction"] / share).item(), rel=1e-4)


def test_bilinear_masks_are_those_of_the_authors():
    setup = Setup(mask_resize="bilinear")
    expected = F.interpolate(setup.scene.masks[:1, None], size=(8, 8), mode="bilinear", align_corners=False)[0, 0]
    assert torch.equal(setup.losses._grid_mask(0, 64, False), expected)
    share = F.adaptive_avg_pool2d(setup.scene.masks[:1], 8)[0]
    assert torch.allclose(Setup().losses._grid_mask(0, 64, False), share) and not torch.allclose(share, expected)


def test_layers_of_the_stages():
    unet = tiny_components()["unet"]
    decoder = match_layers(unet, r"up_blocks.*attn2$")
    assert set(learning_layers(unet, (32, 32), 1)) == set(decoder)  # 16 and 32 cells
    level = {name for name in match_layers(unet, r"(down_blocks|up_blocks)\.1\..*attn2$")}
    named = learning_layers(unet, (32, 32), 2)
    assert set(named) == level and len(named) == len(level)  # each once
    assert set(learning_layers(unet, (16, 16), 2)) == set(
        match_layers(unet, r"(down_blocks\.0|up_blocks\.2)\..*attn2$")
    )


def test_bad_setups_are_refused():
    with pytest.raises(ObjectComposeError, match="one per mask"):
        broken = Setup()
        MIFOLosses(
            broken.unet, broken.encoder, broken.scheduler, scene(3), broken.losses.latents, broken.placeholders,
            broken.losses.layers, MIFOLossOptions(),
        )  # fmt: skip
    with pytest.raises(ObjectComposeError, match="class pictures"):
        Setup(prior_weight=1.0)
    with pytest.raises(ObjectComposeError, match="prediction_type"):
        Setup(prediction="sample")
    with pytest.raises(PromptTooLongError, match="2 instances of 40 vectors"):
        Setup(vectors=40)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_loss", "all"),
        ("mask_resize", "nearest"),
        ("reward_weight", -1.0),
        ("gate", float("nan")),
        ("flip_probability", 1.5),
        ("reward_target", -0.1),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ObjectComposeError, match=name):
        MIFOLossOptions(**{name: value})


# ---- the warning where attention is lost


def test_attention_that_goes_to_0_is_warned_of_once_for_each_instance(caplog):
    watch = AttentionWatch(["<cup>", "<mug>"], even_share=1 / 77)
    for _ in range(2 * WATCHED_DRAWS):
        watch.add(0, 0.1)
        watch.add(1, 0.1)
    for _ in range(2 * WATCHED_DRAWS):  # the cup keeps more than its even share, and no less than it has at random
        watch.add(0, 0.02)
        watch.add(1, 0.001)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert message.startswith("Attention of <mug> inside of its mask goes to 0: ") and "0.1 at best" in message
    assert all(word in message for word in ("learning rate", "`reward_weight`", "`initial`"))
    for _ in range(2 * WATCHED_DRAWS):
        watch.add(0, 0.0)
        watch.add(1, 0.0)
    assert len(caplog.records) == 2 and "<cup>" in caplog.text


def test_attention_that_was_never_high_or_dips_for_a_moment_is_no_loss(caplog):
    watch = AttentionWatch(["<a>", "<b>"], even_share=1 / 77)
    for draw_number in range(4 * WATCHED_DRAWS):
        watch.add(0, 0.004)  # a model that reads its start token most
        watch.add(1, 0.0 if draw_number % 4 == 3 else 0.03)
    assert not caplog.records


@pytest.mark.parametrize(("kind", "lost"), [("penalty", ["<asset0>", "<asset1>"]), ("reward", [])])
def test_the_penalty_alone_is_least_without_any_attention(caplog, kind, lost):
    """The trap itself: keys and queries of a real UNet learn from the attention loss and nothing else."""
    setup = Setup(gate=1000, attention_loss=kind, penalty_weight=1e3, reward_weight=1e3, reconstruction_weight=0.0)
    layers = [setup.unet.get_submodule(name) for name in setup.losses.layers]
    weights = [weight.requires_grad_() for layer in layers for weight in (layer.to_q.weight, layer.to_k.weight)]
    optimizer = torch.optim.Adam(weights, lr=0.05)
    inside = []
    for step in range(12):
        optimizer.zero_grad()
        inside.append(setup(*(draw(4 * step + row) for row in range(4)), backward=True)["inside"])
        optimizer.step()
    assert (inside[-1] < 0.01 * inside[0]) == (kind == "penalty")
    assert sorted(record.getMessage().split()[2] for record in caplog.records) == lost


def test_attention_at_high_noise_where_no_loss_acts_is_not_watched():
    setup, seen = Setup(gate=500), []
    setup.losses.watch.add = lambda instance, inside: seen.append((instance, inside))
    late, early = (seed_where(setup, lambda sample, t, low=low: (t < 500) == low) for low in (False, True))
    setup(draw(late))
    assert not seen
    found = setup(draw(early))
    assert [instance for instance, _ in seen] == list(drawn(setup, early)[0].chosen)
    assert sum(inside for _, inside in seen) / len(seen) == pytest.approx(found["inside"].item(), rel=1e-5)
