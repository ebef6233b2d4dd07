"""Training LocRef's adapter: the loss by hand, what is drawn, what is cached, and the script end to end."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.errors import CheckpointError, ImageInputError, LayoutError, ObjectComposeError
from objectcompose.layout import SceneObject
from objectcompose.pipelines.pipeline_locref import LocRefPipeline
from objectcompose.pipelines.reference_layout import reference_regions
from objectcompose.pipelines.reference_scenes import ReferenceScene, encode_scenes
from objectcompose.toybox.categories import PRESETS
from objectcompose.training import train_locref
from objectcompose.training.boxed_pictures import BoxedPictures, read_coco
from objectcompose.training.common import Checkpointer, read_log
from objectcompose.training.locref_losses import (
    Dropped,
    LocRefLosses,
    LocRefLossOptions,
    cell_weights,
    draw_dropped,
    foreground_of,
    weighted_loss,
)
from objectcompose.training.loop import Draw
from objectcompose.training.reference_augmentation import ReferenceAugmentation
from objectcompose.training.reference_encoding import ReferenceEncoder, stack_references
from objectcompose.training.reference_samples import ToyboxReferences
from tests.adapters.test_locref_adapter import ip_adapter_file
from tests.pipelines.conformance.rows import picture
from tests.pipelines.locref_helpers import locref
from tests.tiny import IMAGE_PROJECTION_WIDTH, tiny_components, tiny_unet
from tests.training.locref_data import write_base, write_coco, write_openimages
from tests.training.test_trainers import run_until_step, state


NOTHING_DROPPED = LocRefLossOptions(drop_text=0, drop_images=0, drop_both=0, drop_composite=0)
AS_IT_IS = ReferenceAugmentation(flip=0, colour=0, crop=1, rotation=0, box=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder)
    return BoxedPictures(read_coco(folder / "instances.json", folder / "captions.json", folder / "images"), 32)


def set_up(dataset, options=NOTHING_DROPPED, augmentation=AS_IT_IS, adapter=None, **encoder):
    """Losses on a tiny pipeline whose adapter is in training."""
    pipeline = locref(adapter)
    for frozen in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.image_encoder):
        frozen.requires_grad_(False)
    encoder = ReferenceEncoder(dataset, pipeline, augmentation, **{"variants": 2, "drop_object": 0, **encoder})
    return LocRefLosses(pipeline, pipeline.scheduler, encoder, options)


def draw(index, seed=0):
    return Draw(index, torch.Generator().manual_seed(seed))


def losses_and_gradients(losses, draws):
    adapter = losses.pipeline.adapter
    adapter.zero_grad(set_to_none=True)
    with losses(draws) as found:
        found["loss"].backward()
    gradients = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    return {name: float(value.detach()) for name, value in found.items()}, gradients


# ---- the loss


def test_loss_by_hand():
    foreground = torch.zeros(1, 1, 4, 4)
    foreground[..., :2, :3] = 1  # six of sixteen cells
    difference = torch.zeros(1, 2, 4, 4)
    difference[0, 0, 0, 0] = 2.0  # inside: 2.3 * 4
    difference[0, 1, 3, 3] = 3.0  # outside: 0.3 * 9
    weights = cell_weights(foreground, 2.3, 0.3)
    assert float(weighted_loss(difference, torch.zeros(1, 2, 4, 4), weights)) == pytest.approx((9.2 + 2.7) / 32)
    assert float(weights.mean()) == pytest.approx(0.3 + 2.0 * 6 / 16)


def test_mean_weight_follows_the_share_of_all_boxes():
    boxes = [[(0, 0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.5)], [(0, 0, 1, 1)]]
    scenes = []
    for row in boxes:
        objects = [SceneObject(box=box) for box in row]
        scenes.append(ReferenceScene(objects, reference_regions(objects, (16, 16))))
    foreground = foreground_of(scenes)
    assert foreground.shape == (2, 1, 16, 16)
    assert foreground.mean((1, 2, 3)).tolist() == [0.25 + 0.0625, 1.0]  # what both boxes cover counts once
    weights = cell_weights(foreground, 2.3, 0.3)
    torch.testing.assert_close(weights.mean((1, 2, 3)), 0.3 + 2.0 * foreground.mean((1, 2, 3)))


def test_loss_uses_weights_of_the_options(dataset):
    parts, _ = losses_and_gradients(set_up(dataset), [draw(0)])
    share = parts["share"]
    expected = 2.3 * share * parts["foreground"] + 0.3 * (1 - share) * parts["background"]
    assert parts["loss"] == pytest.approx(expected, rel=1e-4)
    equal, _ = losses_and_gradients(
        set_up(dataset, dataclasses.replace(NOTHING_DROPPED, foreground_weight=1.0, background_weight=1.0)), [draw(0)]
    )
    assert equal["loss"] == pytest.approx(share * parts["foreground"] + (1 - share) * parts["background"], rel=1e-4)


@pytest.mark.parametrize("adapter", [{}, {"composite": "coordinates"}, {"composite": "none"}], ids=str)
def test_batch_equals_singles_with_ragged_objects(dataset, adapter):
    losses = set_up(dataset, adapter=adapter)
    samples = [losses.encoder[index, 0] for index in range(3)]
    assert len({len(sample.boxes) for sample in samples}) > 1
    together, gradients = losses_and_gradients(losses, [draw(index, index) for index in range(3)])
    singles = [losses_and_gradients(losses, [draw(index, index)]) for index in range(3)]
    assert together["loss"] == pytest.approx(sum(one["loss"] for one, _ in singles) / 3, rel=1e-4)
    for name, gradient in gradients.items():
        mean = sum(single[name] for _, single in singles) / 3
        torch.testing.assert_close(gradient, mean, rtol=1e-3, atol=1e-5)


def test_only_the_adapter_gets_gradients(dataset):
    losses = set_up(dataset)
    _, gradients = losses_and_gradients(losses, [draw(0), draw(1)])
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    pipeline = losses.pipeline
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.image_encoder):
        assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_checkpointing_changes_nothing(dataset):
    losses = set_up(dataset)
    plain = losses_and_gradients(losses, [draw(0), draw(2)])
    losses.pipeline.unet.enable_gradient_checkpointing()
    again = losses_and_gradients(losses, [draw(0), draw(2)])
    assert again[0] == plain[0]
    for name, gradient in plain[1].items():
        torch.testing.assert_close(again[1][name], gradient, rtol=1e-5, atol=1e-8)


# ---- what is dropped


def test_parts_are_dropped_at_their_rates():
    options = LocRefLossOptions(drop_text=0.1, drop_images=0.2, drop_both=0.15, drop_composite=0.05)
    found = [draw_dropped(options, torch.Generator().manual_seed(seed)) for seed in range(6000)]
    rates = {
        Dropped(text=True): 0.1,
        Dropped(references=True, composite=True): 0.2,
        Dropped(True, True, True): 0.15,
        Dropped(composite=True): 0.05,
        Dropped(): 0.5,
    }
    assert set(found) == set(rates)
    for kind, rate in rates.items():
        assert found.count(kind) / 6000 == pytest.approx(rate, abs=0.02)
    assert found[:50] == [draw_dropped(options, torch.Generator().manual_seed(seed)) for seed in range(50)]


@pytest.mark.parametrize("name", ["drop_text", "drop_images", "drop_both", "drop_composite"])
def test_what_is_dropped_has_no_influence_and_regions_stay(dataset, name):
    losses = set_up(dataset, LocRefLossOptions(**{**dataclasses.asdict(NOTHING_DROPPED), name: 1.0}))
    before, _ = losses_and_gradients(losses, [draw(0)])
    encode = losses.encoder.encode
    changes = {
        "drop_text": ("text",), "drop_images": ("references", "composite"),
        "drop_both": ("text", "references", "composite"), "drop_composite": ("composite",),
    }  # fmt: skip

    def changed(names):
        losses.encoder.encode = lambda *place: dataclasses.replace(
            encode(*place), **{name: getattr(encode(*place), name) + 1.0 for name in names}
        )
        return losses_and_gradients(losses, [draw(0)])[0]

    assert changed(changes[name]) == before
    others = {"text", "references", "composite"} - set(changes[name])
    assert not others or changed(others)["loss"] != before["loss"]
    assert before["share"] > 0


def test_one_of_several_objects_is_dropped_at_its_rate(dataset):
    encoder = set_up(dataset, drop_object=0.3).encoder
    kept = [len(encoder.draw_sample(2, variant).objects) for variant in range(100)]
    plain = set_up(dataset, drop_object=0.0).encoder
    all_of_them = [len(plain.draw_sample(2, variant).objects) for variant in range(100)]
    fewer = [before - after for before, after in zip(all_of_them, kept, strict=True)]
    assert set(fewer) == {0, 1} and sum(fewer) / 100 == pytest.approx(0.3, abs=0.1)
    alone = set_up(dataset, drop_object=1.0).encoder
    assert len(alone.draw_sample(1, 0).objects) == 1  # the only one stays


# ---- what is encoded


def test_encoded_is_what_sampling_would_build(dataset):
    losses = set_up(dataset)
    sample, encoded = losses.encoder.draw_sample(0, 1), losses.encoder[0, 1]
    pipeline = losses.pipeline
    scene = ReferenceScene(list(sample.objects), reference_regions(sample.objects, (16, 16)))
    vectors = encode_scenes([scene], (32, 32), pipeline.image_encoder, None, pipeline.adapter, "cpu")
    torch.testing.assert_close(encoded.references, vectors.references[0])
    torch.testing.assert_close(encoded.composite, vectors.composite[0])
    scenes, stacked = stack_references([encoded, losses.encoder[1, 0]], "cpu")
    assert torch.equal(scenes[0].regions.at((8, 8)), scene.regions.at((8, 8)))
    assert torch.equal(stacked.references[0, : len(sample.objects)], encoded.references)


def test_caching_changes_nothing(dataset, tmp_path):
    augmentation = ReferenceAugmentation()
    plain = set_up(dataset, augmentation=augmentation)
    cached = set_up(dataset, augmentation=augmentation, cache=tmp_path)
    for _ in range(2):  # written, then read
        for place in ((0, 0), (0, 1), (2, 0)):
            first, second = vars(plain.encoder[place]), vars(cached.encoder[place])
            assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    other = set_up(dataset, augmentation=AS_IT_IS, cache=tmp_path)
    assert not torch.equal(other.encoder[0, 0].references, plain.encoder[0, 0].references)
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"torn")
    again = cached.encoder[0, 0], cached.encoder[0, 1], cached.encoder[2, 0]
    assert torch.equal(again[0].references, plain.encoder[0, 0].references)


def test_references_are_varied_alike_for_both_streams(dataset):
    sample = set_up(dataset, augmentation=ReferenceAugmentation()).encoder.draw_sample(1, 0)
    plain = set_up(dataset).encoder.draw_sample(1, 0)
    assert sample.objects[0].image.tobytes() != plain.objects[0].image.tobytes()  # one picture for both streams
    assert torch.equal(sample.pixels, plain.pixels)
    moved = torch.tensor(sample.objects[0].box) - torch.tensor(plain.objects[0].box)
    assert 0 < moved.abs().max() <= 0.03


def test_boxes_vary_within_their_share_and_stay_boxes():
    augmentation = ReferenceAugmentation(box=0.1)
    rng = np.random.default_rng(0)
    moves = torch.tensor([augmentation.vary_box((0.2, 0.4, 0.6, 1.0), rng) for _ in range(200)]).double()
    shifts = (moves - torch.tensor([0.2, 0.4, 0.6, 1.0])).abs().amax(0)
    assert 0.03 < shifts[0] <= 0.0401 and 0.04 < shifts[1] <= 0.0601 and moves.max() <= 1
    assert ReferenceAugmentation(box=0.0).vary_box((0.2, 0.4, 0.6, 1.0), rng) == (0.2, 0.4, 0.6, 1.0)
    thin = [ReferenceAugmentation(box=0.49).vary_box((0.0, 0.0, 0.001, 1.0), rng) for _ in range(50)]
    assert all(SceneObject(box=box).box == box for box in thin)


def test_toybox_references_show_the_identity_in_another_pose():
    data = ToyboxReferences(PRESETS["cpu"], 3)
    encoder = set_up(data).encoder
    first, second = encoder.draw_sample(1, 0), encoder.draw_sample(1, 1)
    assert torch.equal(first.pixels, second.pixels) and first.caption == second.caption
    assert [item.box for item in first.objects] == [item.box for item in second.objects]
    assert first.objects[0].image.tobytes() != second.objects[0].image.tobytes()
    modes = {encoder.draw_sample(index, variant).objects[0].image.mode for index in range(3) for variant in range(6)}
    assert modes == {"RGB", "RGBA"}


# ---- the script


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def arguments(base, data, out, *more):
    return [
        *data, "--pretrained_model", str(base), "--output_dir", str(out), "--resolution", "32", "--variants", "2",
        "--train_batch_size", "2", "--max_train_steps", "4", "--checkpointing_steps", "2", "--num_tokens", "3",
        "--learning_rate", "1e-3", *more,
    ]  # fmt: skip


def test_script_leaves_an_adapter_that_loads(base, tmp_path):
    more = ["--validation_scenes", "2", "--validation_steps", "4", "--cache_dir", str(tmp_path / "cache")]
    assert train_locref.main(arguments(base, write_coco(tmp_path), tmp_path / "out", *more)) == 0
    assert {"loss", "foreground", "background", "share"} <= read_log(tmp_path / "out" / "log.jsonl")[0].keys()
    assert (tmp_path / "out/validation/step-000004.png").is_file() and list(
        (tmp_path / "cache").rglob("*.safetensors")
    )
    card = (tmp_path / "out/weights/README.md").read_text(encoding="utf-8")
    assert "2411.15252" in card and str(base) in card
    adapter = LocRefAdapter.from_pretrained(tmp_path / "out/weights")
    trained = state(tmp_path / "out")
    assert all(torch.equal(value, trained[name]) for name, value in adapter.state_dict().items())
    pipeline = LocRefPipeline.from_pretrained(base, adapter=adapter)
    objects = [{"image": picture("red"), "box": (0.1, 0.1, 0.6, 0.6)}]
    images = pipeline("a dog", objects=objects, num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)


def test_a_folder_with_another_runs_checkpoints_is_refused(base, tmp_path):
    data, out = write_coco(tmp_path), tmp_path / "out"
    assert train_locref.main(arguments(base, data, out, "--max_train_steps", "2")) == 0
    before = state(out)
    for more in (["--learning_rate", "2e-3"], ["--foreground_weight", "1.0"], ["--no_region_mask"], ["--seed", "1"]):
        with pytest.raises(CheckpointError, match=f"another run.*{more[0].removeprefix('--')}"):
            train_locref.main(arguments(base, data, out, *more))
    assert all(torch.equal(value, before[name]) for name, value in state(out).items())
    # how long it is and what it leaves beside a step may change
    assert train_locref.main(arguments(base, data, out, "--cache_dir", str(tmp_path / "cache"))) == 0
    assert [line["step"] for line in read_log(out / "log.jsonl")] == [1, 2, 3, 4]


def test_a_warm_start_is_trained_and_used_with_null_pictures_at_full_strength(base, tmp_path):
    """IP-Adapter's own defaults (0.3, 0.7, no null pictures) are for weights that are used as they come."""
    path, out = tmp_path / "ip.safetensors", tmp_path / "out"
    ip_adapter_file(path, tiny_unet(), width=IMAGE_PROJECTION_WIDTH)
    wanted = [one for one in arguments(base, write_coco(tmp_path), out) if one not in ("--num_tokens", "3")]
    assert train_locref.main([*wanted, "--ip_adapter", str(path), "--max_train_steps", "1"]) == 0
    adapter = LocRefAdapter.from_pretrained(out / "weights")
    config = adapter.config
    assert (config.projection, config.num_tokens, config.gamma) == ("linear", 4, 1.0)
    assert (config.null_references, config.ci_scale, config.ri_scale) == (True, 1.0, 1.0)
    pipeline = LocRefPipeline.from_pretrained(base)
    args = train_locref.create_parser().parse_args(["--toybox_scenes", "1", "--ip_adapter", str(path)])
    pipeline.register_modules(adapter=train_locref.make_adapter(args, pipeline))
    losses = LocRefLosses(pipeline, pipeline.scheduler, ReferenceEncoder([], pipeline, AS_IT_IS), NOTHING_DROPPED)
    assert (losses.settings.ci_scale, losses.settings.ri_scale, losses.settings.gamma) == (1.0, 1.0, 1.0)
    objects = [{"image": picture("red"), "box": (0.1, 0.1, 0.6, 0.6)}]

    def paint(**more):
        generator = torch.Generator().manual_seed(0)
        return pipeline("a dog", objects=objects, num_inference_steps=2, output_type="pt", generator=generator, **more)

    plain = paint().images
    assert torch.equal(plain, paint(null_references=True, ci_scale=1.0, ri_scale=1.0).images)
    assert not torch.equal(plain, paint(null_references=False).images)


def test_captions_that_are_cut_are_told_once(base, tmp_path, caplog):
    data = write_coco(tmp_path)
    captions = [{"image_id": number, "caption": "a dog " * (10 + 30 * (number > 0))} for number in range(3)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": captions}), encoding="utf-8")
    assert train_locref.main(arguments(base, data, tmp_path / "out", "--max_train_steps", "1")) == 0
    [record] = [one for one in caplog.records if "captions" in one.getMessage()]
    assert record.getMessage().startswith("2 of 3 captions have more than the 77 tokens")


@pytest.mark.slow
def test_openimages_trains(base, tmp_path):
    more = ["--max_train_steps", "1", "--composite", "coordinates", "--no_region_mask", "--projection", "linear"]
    assert train_locref.main(arguments(base, write_openimages(tmp_path), tmp_path / "out", *more)) == 0
    config = LocRefAdapter.from_pretrained(tmp_path / "out/weights").config
    assert (config.composite, config.region_mask, config.projection) == ("coordinates", False, "linear")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--foreground_weight", "-1"], ObjectComposeError, "foreground_weight"),
        (["--drop_text", "0.9", "--drop_both", "0.2"], ObjectComposeError, "sum to at most 1"),
        (["--drop_object", "2"], ObjectComposeError, "drop_object"),
        (["--variants", "0"], ObjectComposeError, "variants"),
        (["--box_jitter", "0.7"], ObjectComposeError, "box"),
        (["--scene_flip", "1.5"], ObjectComposeError, "scene_flip"),
        (["--validation_scenes", "99"], ObjectComposeError, "validation_scenes"),
        (["--max_train_steps", "0"], ObjectComposeError, "max_train_steps"),
        (["--openimages_captions", "none.jsonl"], LayoutError, "openimages_captions"),
        (["--images", "nowhere"], ImageInputError, "missing"),
        (["--coco_captions", "nowhere.json"], LayoutError, "cannot be read"),
        (["--pretrained_model", "/nowhere/base"], CheckpointError, "model_index"),
        (["--ip_adapter", "/nowhere/ip.safetensors"], ObjectComposeError, "num_tokens"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_before_any_step(base, tmp_path, more, error, message):
    with pytest.raises(error, match=message):
        train_locref.main(arguments(base, write_coco(tmp_path), tmp_path / "out", *more))
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_base_without_image_encoder_and_damaged_warm_start(base, tmp_path):
    StableDiffusionPipeline(**tiny_components(), requires_safety_checker=False).save_pretrained(tmp_path / "plain")
    data = write_coco(tmp_path)
    with pytest.raises(CheckpointError, match="image_encoder"):
        train_locref.main(arguments(tmp_path / "plain", data, tmp_path / "out"))
    (tmp_path / "ip.safetensors").write_bytes(b"no weights")
    wanted = [one for one in arguments(base, data, tmp_path / "out") if one not in ("--num_tokens", "3")]
    with pytest.raises(CheckpointError, match=r"ip\.safetensors"):
        train_locref.main([*wanted, "--ip_adapter", str(tmp_path / "ip.safetensors")])


@pytest.mark.slow
def test_killed_and_resumed_equals_unbroken(base, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    data = write_coco(tmp_path)
    script = [sys.executable, "-P", "-m", "objectcompose.training.train_locref"]
    for out in ("unbroken", "killed"):
        more = ["--max_train_steps", "40", "--ema_decay", "0.9", "--cache_dir", str(tmp_path / f"{out}-cache")]
        command = [*script, *arguments(base, data, tmp_path / out, *more)]
        if out == "killed":
            step = random.randrange(1, 30)
            print(f"killed at step {step}")
            run_until_step(command, tmp_path / out, step, environment)
            assert Checkpointer(tmp_path / out / "checkpoints").steps()[-1:] < [40]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    first, second = state(tmp_path / "unbroken"), state(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = [line["step"] for line in read_log(tmp_path / "killed" / "log.jsonl")]
    assert names == list(range(1, 41))
