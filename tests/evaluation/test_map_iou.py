"""Attention maps against masks: scores by hand, maps of a tiny UNet against its own softmax, splits and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from objectcompose.__main__ import main
from objectcompose.attention_processors.install import use_parts
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.errors import LayerNotFoundError, ObjectComposeError
from objectcompose.evaluation.attention_iou import (
    THRESHOLDS,
    AttentionMaps,
    best_threshold,
    map_metrics,
    map_scores,
)
from objectcompose.evaluation.map_iou import measure_maps
from objectcompose.evaluation.prompt_lists import stable_number
from objectcompose.processes import process_state
from objectcompose.training.grounded_captions import CaptionSample
from tests.grounding import helpers
from tests.pipelines.helpers import compose_pipeline
from tests.training.captions_data import write_records


LAYERS = r"^(mid_block|up_blocks)\..*attn2$"


def test_a_map_that_is_its_mask():
    mask = torch.zeros(1, 4, 5)
    mask[0, 1:3, 2:] = 1
    [same], [other] = map_scores(0.3 * mask, mask), map_scores(1 - mask, mask)
    assert same == {"ious": [1.0] * 19, "inside": 1.0}
    assert other == {"ious": [0.0] * 19, "inside": 0.0}


def test_scores_by_hand():
    # stretched: 0, 0.25, 0.75, 1; object: the last two cells
    scores = map_scores(torch.tensor([[[1.0, 2.0, 4.0, 5.0]]]), torch.tensor([[[0.0, 0.2, 1.0, 0.9]]]))[0]
    by_threshold = dict(zip(THRESHOLDS, scores["ious"], strict=True))
    assert by_threshold[0.2] == pytest.approx(2 / 3, abs=1e-6)
    assert by_threshold[0.25] == by_threshold[0.7] == 1.0  # the map must be above the threshold
    assert by_threshold[0.75] == by_threshold[0.95] == 0.5
    assert scores["inside"] == pytest.approx(9 / 12)


def test_a_map_without_contrast_finds_nothing():
    [scores] = map_scores(torch.full((1, 2, 4), 0.1), torch.eye(4)[None, :2])
    assert scores == {"ious": [0.0] * 19, "inside": 0.25}


def row(sample, t, ious, inside=0.5):
    return {"split": "test", "sample": sample, "t": t, "phrase": "dog", "ious": ious, "inside": inside}


def test_threshold_and_figures_by_hand():
    low, high = [0.5] * 9 + [0.1] * 10, [0.2] * 9 + [0.9] * 10
    rows = [row(0, 200, low), row(0, 400, high), row(1, 200, low), row(1, 400, low)]
    assert (
        best_threshold(rows) == THRESHOLDS[0]
    )  # (3 * 0.5 + 0.2) / 4 against (3 * 0.1 + 0.9) / 4; the first of equals
    assert best_threshold(rows[:2]) == THRESHOLDS[9] == 0.5
    metrics = map_metrics(rows, 0.5)
    assert metrics["map_iou"] == pytest.approx(0.3) and metrics["map_iou.t400"] == pytest.approx(0.5)
    assert (metrics["map_iou.lo"], metrics["map_iou.hi"]) == pytest.approx((0.1, 0.5))  # the means of the two samples
    assert metrics["map_inside.t200"] == 0.5 and metrics["threshold"] == 0.5
    for bad in (lambda: best_threshold([]), lambda: map_metrics([], 0.5), lambda: map_metrics(rows, 0.42)):
        with pytest.raises(ObjectComposeError):
            bad()


class Captions:
    """Three noise pictures with captions and masks, in memory."""

    rows = (
        ("a dog and a corgi", ("dog", "corgi")),
        ("a teddy bear", ("teddy bear",)),
        ("a cup with a wine glass", ("wine glass", "zebra", "cup")),
    )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        caption, phrases = self.rows[index]
        generator = torch.Generator().manual_seed(index)
        masks = torch.zeros(len(phrases), 32, 32)
        for place in range(len(phrases)):
            masks[place, 8 * place : 8 * place + 20, 4:20] = 1
        if index == 2:
            masks[2] = 0  # a cup of which nothing is seen
        return CaptionSample(torch.rand(3, 32, 32, generator=generator) * 2 - 1, caption, phrases, masks)

    def key(self, index):
        return f"{index:064d}"


@pytest.fixture(scope="module")
def attention():
    return AttentionMaps(compose_pipeline(), LAYERS)


def test_nouns_without_mask_or_place_are_left_out(attention):
    captions = attention.masked_captions(Captions(), [0, 2], "test")
    assert [one.sample.phrases for one in captions] == [("dog", "corgi"), ("wine glass",)]
    assert captions[0].tokens == ((2,), (5, 6)) and captions[1].sample.masks.shape == (1, 32, 32)


def test_batches_equal_singles(attention):
    captions = attention.masked_captions(Captions(), range(3), "test")
    together = attention.maps(captions, 400)
    assert [maps.shape for maps in together] == [(2, 32, 32), (1, 32, 32), (1, 32, 32)]
    for maps, caption in zip(together, captions, strict=True):
        assert (maps - attention.maps([caption], 400)[0]).abs().max() < 1e-6
        assert maps.min() >= 0 and maps.amax() > maps.amin()
    assert not torch.equal(attention.maps(captions[:1], 200)[0], together[0])


@torch.no_grad()
def test_a_map_is_the_mean_over_layers_heads_and_tokens(attention):
    pipeline = attention.pipeline
    [caption] = attention.masked_captions(Captions(), [0], "test")
    clean = pipeline.vae.encode(caption.sample.pixels[None]).latent_dist.mode() * pipeline.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(stable_number("map-iou", "test-0", 300))
    noise = torch.randn(clean.shape, generator=generator)
    ids = pipeline.tokenizer(
        caption.sample.caption, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    text = pipeline.text_encoder(ids).last_hidden_state
    probe = TokenMapProbe([5, 6], LAYERS, head_mean=False)  # "corgi" is two tokens
    step = torch.tensor([300])
    with use_parts(pipeline.unet, [probe]):
        pipeline.unet(attention.scheduler.add_noise(clean, noise, step), step, text)
    layers = []
    for maps in probe.maps.values():  # (1, heads, HW, 2)
        side = int(maps.shape[2] ** 0.5)
        mean = maps.mean(1).transpose(1, 2).reshape(1, 2, side, side)
        layers.append(mean if side == 16 else F.interpolate(mean, (16, 16), mode="bicubic").clamp(min=0))
    assert {maps.shape[2] for maps in probe.maps.values()} == {256, 64, 16}
    word = torch.stack(layers).mean(0).mean(1, keepdim=True)
    expected = F.interpolate(word, (32, 32), mode="bicubic").clamp(min=0)[0, 0]
    assert (attention.maps([caption], 300)[0][1] - expected).abs().max() < 1e-6


def test_rows_are_kept_and_made_once(attention, tmp_path):
    def measure(numbers, batch_size):
        return measure_maps(
            attention, Captions(), numbers, "test", [200, 600], tmp_path, batch_size, process_state("cpu")
        )

    rows = measure([0, 1, 2], 2)
    assert [(one["sample"], one["t"], one["phrase"]) for one in rows] == [
        (sample, t, phrase)
        for sample, phrases in ((0, ("corgi", "dog")), (1, ("teddy bear",)), (2, ("wine glass",)))
        for t in (200, 600)
        for phrase in phrases
    ]
    [log] = (tmp_path / "maps").rglob("*.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    log.write_text("".join(lines[:3]) + lines[3][:40])
    assert measure([0, 1, 2], 2) == rows
    assert len(log.read_text().splitlines()) == 7  # the torn line and three that were made again


def test_bad_layers_and_timesteps(attention):
    with pytest.raises(LayerNotFoundError):
        AttentionMaps(attention.pipeline, "no_such_block")
    for timestep in (-1, 1000):
        with pytest.raises(ObjectComposeError, match=r"\[0, 999\]"):
            attention.check_timestep(timestep)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    compose_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """Six pictures of a dog and a cup, with masks."""
    samples = []
    for number in range(6):
        helpers.picture(number, 40, 32).save(tmp_path / f"{number}.png")
        mask = torch.zeros(32, 40)
        mask[4 : 20 + number, 10:30] = 1
        nouns = [("dog", mask), ("cup", None)]
        samples.append((f"{number:03d}", tmp_path / f"{number}.png", "a dog and a cup", nouns))
    write_records(tmp_path / "data", samples)
    return tmp_path / "data"


def evaluate(checkpoint, out, *arguments):
    common = ["--model", str(checkpoint), "--device", "cpu", "--out", str(out)]
    return main(["evaluate", "map-iou", *common, *arguments])


def test_command_on_grounded_captions(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(checkpoint, out, "--data", str(data), "--timesteps", "100", "300") == 0
    report = json.loads((out / "report.json").read_text())
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {(one["split"], one["sample"]) for one in rows} == {
        ("dev", 0), ("test", 1), ("test", 2), ("dev", 3), ("test", 4), ("test", 5)
    }  # fmt: skip
    dev, test = ([one for one in rows if one["split"] == split] for split in ("dev", "test"))
    threshold = THRESHOLDS[int(np.argmax(np.mean([one["ious"] for one in dev], axis=0)))]
    assert report["metrics"] == {**map_metrics(test, threshold)}
    assert set(report["metrics"]) >= {"map_iou", "map_iou.lo", "map_iou.t100", "map_inside.t300.hi", "threshold"}
    assert "map_iou" in capsys.readouterr().out
    assert evaluate(checkpoint, tmp_path / "given", "--data", str(data), "--threshold", "0.4") == 0
    given = (tmp_path / "given" / "rows.jsonl").read_text().splitlines()
    assert {json.loads(line)["split"] for line in given} == {"test"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "0.42"], "--threshold"),
        (["--scenes", "0"], "--scenes"),
        (["--resolution", "32"], "--resolution"),
        (["--data", "nowhere"], "nowhere"),
        (["--layers", "attn9"], "attn9"),
        (["--timesteps", "2000"], "timesteps"),
    ],
)
def test_bad_input(checkpoint, tmp_path, capsys, arguments, message):
    assert evaluate(checkpoint, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("objectcompose evaluate map-iou: ")
    assert not (tmp_path / "out" / "report.json").exists()
