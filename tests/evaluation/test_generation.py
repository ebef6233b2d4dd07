"""Painting a list of prompts: noise from prompt and round alone, resume, what a folder refuses, identity."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import CheckpointError, ImageInputError, LayoutError, ObjectComposeError
from objectcompose.evaluation.compbench import compbench_names
from objectcompose.evaluation.generation import (
    MANIFEST_FILE,
    list_pictures,
    paint_records,
    picture_seed,
    read_manifest,
    require_pictures,
)
from objectcompose.evaluation.pipeline_identity import pipeline_identity
from objectcompose.evaluation.prompts import PromptRecord
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from objectcompose.processes import groups_of_process
from tests.pipelines.helpers import compose_pipeline


RECORDS = [
    PromptRecord(str(number), text) for number, text in enumerate(("a dog", "a cup", "a cat", "a red car", "two"))
]
SETTINGS = {"steps": 2, "guidance_scale": 3.0, "batch_size": 2}


@pytest.fixture(scope="module")
def pipeline():
    return compose_pipeline()


@pytest.fixture(scope="module")
def painted(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("painted")
    paint_records(pipeline, RECORDS, folder, rounds=2, **SETTINGS)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def levels(path):
    return np.asarray(Image.open(path), int)


def test_noise_follows_from_prompt_and_round(pipeline, painted):
    names = {f"{record.id}_{number}.png" for record in RECORDS for number in (0, 1)}
    assert set(contents(painted)) == names and len(set(contents(painted).values())) == 10
    generator = torch.Generator().manual_seed(picture_seed("3", 1))
    alone = pipeline("a red car", num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]
    assert abs(np.asarray(alone, int) - levels(painted / "3_1.png")).max() <= 1  # a batch's sums round otherwise
    seeds = {picture_seed(record.id, number) for record in RECORDS for number in range(20)}
    assert len(seeds) == 100 and picture_seed("0", 0) == 9_086_503_028_357_548_139


def test_an_interruption_changes_nothing(pipeline, painted, tmp_path):
    paint_records(pipeline, RECORDS, tmp_path, rounds=2, **SETTINGS)
    whole = contents(tmp_path)
    assert whole == contents(painted)
    for name in ("0_0.png", "3_0.png", "4_1.png"):
        (tmp_path / name).unlink()
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    paint_records(pipeline, RECORDS, tmp_path, rounds=2, **SETTINGS)
    assert contents(tmp_path) == whole
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}.items()


def test_rounds_may_be_added_and_batches_may_differ(pipeline, painted, tmp_path):
    for rounds, batch_size in ((1, 2), (2, 5)):
        paint_records(pipeline, RECORDS, tmp_path, rounds=rounds, **{**SETTINGS, "batch_size": batch_size})
    found, expected = contents(tmp_path), contents(painted)
    assert all(found[name] == expected[name] for name in expected if name.endswith("_0.png"))
    assert max(abs(levels(tmp_path / name) - levels(painted / name)).max() for name in expected) <= 1


def test_processes_cut_a_list_in_the_same_places():
    items = list(range(11))
    alone = list(groups_of_process(items, 2, SimpleNamespace(process_index=0, num_processes=1)))
    for count in (2, 3, 7):
        shares = [
            list(groups_of_process(items, 2, SimpleNamespace(process_index=index, num_processes=count)))
            for index in range(count)
        ]
        assert sorted(group for share in shares for group in share) == alone
    with pytest.raises(ObjectComposeError, match="batch_size"):
        next(groups_of_process(items, 0, SimpleNamespace(process_index=0, num_processes=1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "num_inference_steps is 2 there and 3 here"),
        ({"guidance_scale": 4.0}, "guidance_scale"),
        ({"negative_prompt": "a cat"}, "negative_prompt"),
        ({"height": 64}, "height"),
        ({"records": RECORDS[:3]}, "prompts"),
        ({"call_arguments": lambda records: {}, "call_identity": "nothing"}, "call"),
    ],
)
def test_a_folder_of_other_settings_is_refused(pipeline, painted, change, message):
    before = contents(painted)
    arguments = {"records": RECORDS, "rounds": 2, **SETTINGS, **change}
    with pytest.raises(CheckpointError, match=message):
        paint_records(pipeline, folder=painted, **arguments)
    assert contents(painted) == before


def test_other_weights_are_refused(painted):
    other = compose_pipeline()
    with torch.no_grad():
        other.unet.conv_out.bias[0] += 1e-3
    with pytest.raises(CheckpointError, match=r"model\.unet is"):
        paint_records(other, RECORDS, painted, rounds=2, **SETTINGS)


def test_foreign_pictures_and_broken_manifests_are_refused(pipeline, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "0_0.png")
    with pytest.raises(CheckpointError, match=f"without {MANIFEST_FILE}"):
        paint_records(pipeline, RECORDS, tmp_path, **SETTINGS)
    assert read_manifest(tmp_path) is None
    for text in ("{", "[]"):
        (tmp_path / MANIFEST_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=f"unreadable {MANIFEST_FILE}"):
            paint_records(pipeline, RECORDS, tmp_path, **SETTINGS)


def test_further_arguments_come_by_batch(pipeline, painted, tmp_path):
    batches = []

    def arguments(records):
        batches.append([record.id for record in records])
        return {"objects": [[{"phrase": record.text}] for record in records]}

    paint_records(
        pipeline, RECORDS, tmp_path, call_arguments=arguments, call_identity="the whole prompt as phrase", **SETTINGS
    )
    assert batches == [["0", "1"], ["2", "3"], ["4"]]
    assert contents(tmp_path).items() <= contents(painted).items()  # phrases alone change no picture
    assert read_manifest(tmp_path)["settings"]["call"] == "the whole prompt as phrase"


def test_negative_prompts_reach_the_pipeline(pipeline, painted, tmp_path):
    paint_records(pipeline, RECORDS[:1], tmp_path, negative_prompt="a dog", **SETTINGS)
    assert (tmp_path / "0_0.png").read_bytes() != (painted / "0_0.png").read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"records": []}, LayoutError, "at least one prompt"),
        ({"records": [RECORDS[0], RECORDS[0]]}, LayoutError, "twice"),
        ({"rounds": 0}, ObjectComposeError, "`rounds`"),
        ({"steps": 0}, ObjectComposeError, "`steps`"),
        ({"batch_size": 0}, ObjectComposeError, "`batch_size`"),
        ({"call_arguments": lambda records: {}}, ObjectComposeError, "`call_identity`"),
    ],
)
def test_bad_numbers(pipeline, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        paint_records(pipeline, folder=tmp_path / "none", **{"records": RECORDS, **SETTINGS, **change})
    assert not list(tmp_path.rglob("*.png"))


def test_missing_pictures_are_counted(painted):
    require_pictures(list_pictures(RECORDS, 2, painted))
    with pytest.raises(ImageInputError, match="10 of 20 are missing"):
        require_pictures(list_pictures(RECORDS, 4, painted))


def test_compbench_names():
    name = compbench_names(RECORDS, rounds=3)
    names = [name(record, number) for number in range(3) for record in RECORDS]
    assert names[0] == "a dog_000000" and names[8] == "a red car_000008" and len(set(names)) == 15
    for text in ("and/or", "a" * 250):
        with pytest.raises(LayoutError, match="file's name"):
            compbench_names([PromptRecord("0", text)], 1)
    with pytest.raises(LayoutError, match="1000000"):
        compbench_names(RECORDS, 200_001)


def test_identity_is_of_the_content(pipeline, tmp_path):
    identity = pipeline_identity(pipeline)
    assert set(identity) == {"class", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    pipeline.save_pretrained(tmp_path)
    assert pipeline_identity(TokenComposePipeline.from_pretrained(tmp_path)) == identity


def test_identity_sees_every_change():
    pipeline = compose_pipeline()
    before = pipeline_identity(pipeline)
    pipeline.tokenizer.add_tokens("<mine>")
    pipeline.scheduler.register_to_config(eta_name="other")
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias[0] += 1e-3
    pipeline.text_encoder.to(torch.bfloat16)
    after = pipeline_identity(pipeline)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"tokenizer", "scheduler", "vae", "text_encoder"}


def test_identity_sees_lora_and_its_scale():
    from peft import LoraConfig

    pipeline = compose_pipeline()
    plain = pipeline_identity(pipeline)["unet"]
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"), "small")
    full = pipeline_identity(pipeline)["unet"]
    pipeline.unet.set_adapters(["small"], [0.5])
    half = pipeline_identity(pipeline)["unet"]
    pipeline.unet.disable_adapters()
    assert len({plain, full, half, pipeline_identity(pipeline)["unet"]}) == 4
