"""The LocRef recipe: its figures by hand, its rival beside diffusers' own code, and the whole at its smallest size."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.recipes import locref
from benchmarks.recipes.locref_metrics import metrics_of_rows, slim_rows, unique_rows
from benchmarks.recipes.locref_rival import IP_ADAPTER_OPTIONS, write_ip_adapter
from objectcompose.__main__ import main as objectcompose_main
from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.evaluation.layout_painting import ip_adapter_arguments
from objectcompose.layout import SceneObject
from objectcompose.toybox.weights import toybox_path
from tests.pipelines.conformance.rows import picture as tiny_picture
from tests.pipelines.helpers import quiet, sample
from tests.pipelines.locref_helpers import locref as locref_pipeline
from tests.tiny import tiny_components, tiny_image_encoder


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def evaluated(layout, kind, own, places=(LEFT, RIGHT), others=0.1):
    """A row of `objectcompose evaluate layout`: two objects, `own` their cosines, `places` where they are found."""

    def seen(places, own, others):
        found = [
            {"category": name, "score": 0.9, "box": box} for name, box in zip(("dog", "cup"), places, strict=False)
        ]
        table = [[own, others], [others, own]]
        noise = {"category": "car", "score": 0.99, "box": LEFT}
        cosines = {"identity": table, "clip_i": table, "dino": table}
        return {"found": [*found, noise], "cosines": cosines, "outside": {"identity": [others + 0.05, others - 0.05]}}

    return {
        "layout": layout, "round": 0, "kind": kind, "categories": ["dog", "cup"], "boxes": [LEFT, RIGHT],
        **seen(places, own, others), "truth": seen((LEFT, RIGHT), 0.9, 0.0), "rivals": seen((LEFT, RIGHT), 0.4, 0.0),
    }  # fmt: skip


def test_figures_of_rows_and_their_differences():
    full = [evaluated("a", "seen", 0.8), evaluated("b", "unseen", 0.6)]
    text = [evaluated("a", "seen", 0.2, (RIGHT, LEFT), 0.3), evaluated("b", "unseen", 0.2, (), 0.3)]
    rows = slim_rows("full", "test", full) + slim_rows("text", "test", text) + slim_rows("full", "n2", full)
    assert len(rows) == 18 and len(unique_rows(rows)) == 14  # the true scenes of equal layouts are the same
    metrics = metrics_of_rows(unique_rows(rows))
    expected = {
        "ap50.full": 100, "ap50.text": 0, "ap.full": 100, "ap50.ceiling": 100, "ap50.full_n2": 100,
        "ap50.ceiling_n2": 100, "identity_seen.full": 80, "identity_unseen.full": 60, "identity.full": 70,
        "identity_seen.ceiling": 90, "identity_unseen.floor": 40, "clip_i.text": 20, "leakage.text": 30,
        "leakage.ceiling": 0, "identity_way.full": 40, "identity_way_seen.full": 80,
        "ap50_diff.full_text": 100, "identity_diff.full_text": 50,
        "leakage_diff.full_text": -20, "leakage_outside.full": 10, "leakage_outside.text": 30,
        "leakage_outside.ceiling": 0, "leakage_outside.full_n2": 10, "leakage_outside_diff.full_text": -20,
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name
    assert metrics["ap50.floor"] == 100  # both layouts have the same boxes
    assert {"ap50.full.lo", "identity.full.hi", "ap50_diff.full_text.lo", "leakage_outside_diff.full_text.hi"} <= set(
        metrics
    )
    assert not any("no_mask" in name for name in metrics)
    assert all(one["category"] != "car" for row in rows for one in row["found"])


def test_rows_that_say_nothing_of_the_outside_count_for_the_rest():
    full, text = ([evaluated(layout, "seen", own) for layout in "ab"] for own in (0.8, 0.2))
    rows = slim_rows("full", "test", full) + slim_rows("text", "test", text)
    whole = metrics_of_rows(unique_rows(rows))
    for row in rows:
        if row["arm"] == "text":
            del row["outside"]
    metrics = metrics_of_rows(unique_rows(rows))
    gone = {name for name in whole if name.startswith(("leakage_outside.text", "leakage_outside_diff"))}
    assert "leakage_outside_diff.full_text" in gone
    assert metrics == {name: value for name, value in whole.items() if name not in gone}
    for row in full:
        for seen in (row, row["truth"], row["rivals"]):
            del seen["outside"]
    assert metrics_of_rows(slim_rows("full", "test", full))["leakage.full"] == pytest.approx(10)


def test_places_have_a_floor_of_their_own():
    moved = evaluated("b", "seen", 0.8)
    moved["boxes"] = [(0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)]
    for one, box in zip(moved["truth"]["found"], moved["boxes"], strict=False):
        one["box"] = box
    metrics = metrics_of_rows(slim_rows("full", "test", [evaluated("a", "seen", 0.8), moved]))
    # each scene shows its objects, but not where the other layout has them
    assert metrics["ap50.ceiling"] == 100 and metrics["ap50.floor"] == metrics["ap.floor"] == 0


def test_arms_of_other_layouts_are_not_compared():
    rows = slim_rows("full", "test", [evaluated("a", "seen", 0.8), evaluated("b", "seen", 0.8)])
    rows += slim_rows("text", "test", [evaluated("a", "seen", 0.8), evaluated("c", "seen", 0.8)])
    with pytest.raises(AssertionError, match="other rows"):
        metrics_of_rows(unique_rows(rows))


def test_all_arms_have_the_same_budget():
    for size in locref.SIZES.values():
        arms = locref.build_arms(size)
        assert len({len(arm.candidates) for arm in arms.values()}) == 1
        for name in ("train_batch_size", "toybox_scenes", "variants", "lr_scheduler"):
            assert len({arm.options[name] for arm in arms.values()}) == 1
        assert set(arms) | {"text", "no_mask_switch"} == set(locref.ALL_ARMS)


def test_ablations_stand_beside_the_adapter_of_the_repository(tmp_path):
    recipe = locref.Recipe(locref.ABLATIONS, tmp_path)
    assert recipe.weights("full") == toybox_path("locref")
    trained = locref.SIZES["cpu"]
    size = recipe.size
    assert (size.scenes, size.steps, size.batch_size) == (trained.scenes, trained.steps, trained.batch_size)
    assert set(recipe.cases("full")) == {"test"} and not set(recipe.arm_names[1:]) & set(trained.arms)


# ---- the rival


@pytest.fixture
def rival(tmp_path):
    """Our pipeline and diffusers', with the same IP-Adapter."""
    ours = locref_pipeline(dict(IP_ADAPTER_OPTIONS))
    ours.adapter.save_pretrained(tmp_path)
    path = write_ip_adapter(tmp_path, ours.unet)
    theirs = StableDiffusionPipeline(
        **{**tiny_components(), "image_encoder": tiny_image_encoder()}, requires_safety_checker=False
    )
    theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)
    return ours, quiet(theirs)


def objects_of(*colours):
    return [SceneObject(image=tiny_picture(one), box=box) for one, box in zip(colours, (LEFT, RIGHT), strict=True)]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_rival_is_what_our_script_trained(rival, guidance_scale):
    ours, theirs = rival
    objects = objects_of("red", "blue")
    settings = {"guidance_scale": guidance_scale, "output_type": "latent", "height": 32, "width": 32}
    # masks four times as fine as the latents, so that diffusers' bicubic resizing keeps their edges
    extra = ip_adapter_arguments(theirs, objects, (128, 128), 2 if guidance_scale > 1 else 1)
    trained, plain = (sample(ours, "a dog", objects=given, **settings).images for given in (objects, None))
    torch.testing.assert_close(sample(theirs, "a dog", **extra, **settings).images, trained, rtol=1e-3, atol=1e-4)
    assert (trained - plain).abs().max() > 0.1


def test_other_adapters_are_no_rivals(tmp_path):
    pipeline = locref_pipeline()
    pipeline.adapter.save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="no IP-Adapter"):
        write_ip_adapter(tmp_path, pipeline.unet)


def test_rival_weights_start_a_locref_adapter_again(rival, tmp_path):
    ours, _ = rival
    path = write_ip_adapter(tmp_path, ours.unet)
    again = LocRefAdapter.from_ip_adapter(path, ours.unet)
    for name in ("reference_projection", "reference_maps"):
        first, second = (getattr(one, name).state_dict() for one in (ours.adapter, again))
        assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_rival_that_is_not_there(tmp_path, capsys):
    arguments = ["evaluate", "layout", "--out", str(tmp_path / "out"), "--max-prompts", "1", "--only", "generate"]
    assert objectcompose_main([*arguments, "--ip-adapter", str(tmp_path / "missing.safetensors")]) == 2
    assert "`--ip-adapter` must be a safetensors file" in capsys.readouterr().err


# ---- the whole


@pytest.mark.slow
def test_smoke_objects_move_with_their_boxes(tmp_path):
    assert toybox_path("locref").is_dir()
    assert locref.main(["--preset", "smoke", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
    # the same noise and prompt with the box on the left and on the right
    assert metrics["shift.full.lo"] > 25 and metrics["shift.text"] == 0
    assert metrics["ap50.full"] > metrics["ap50.text"]
    assert metrics["identity.full"] > metrics["identity.text"]
    assert {"ap50.ip_adapter_masks", "ap50.no_mask_switch", "ap50.full_n10", "ap50.full_jitter10"} <= set(metrics)
    assert (tmp_path / "sheet.png").is_file()
