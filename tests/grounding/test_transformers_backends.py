"""The transformers backends on the real classes at tiny size: against the libraries' own way, batched, from disk."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from objectcompose.errors import CheckpointError, LayoutError, ObjectComposeError, PromptTooLongError
from objectcompose.grounding.clipseg import ClipSegDetector
from objectcompose.grounding.detection import box_within_picture
from objectcompose.grounding.grounder import Grounder, load_grounder
from objectcompose.grounding.grounding_dino import GroundingDinoDetector, boxes_of_phrases, phrase_tokens
from objectcompose.grounding.owlv2 import Owlv2Detector, OwlViTDetector
from objectcompose.grounding.sam import SamSegmenter
from tests.grounding import helpers


DETECTORS = {
    "grounding-dino": (GroundingDinoDetector, helpers.grounding_dino, {"threshold": 0.3, "text_threshold": 0.3}),
    "owlv2": (Owlv2Detector, helpers.owlv2, {"threshold": 0.0}),
    "owlvit": (OwlViTDetector, helpers.owlvit, {"threshold": 0.0}),
    "clipseg": (ClipSegDetector, helpers.clipseg, {"threshold": 0.45}),
}
SEGMENTERS = {"sam": helpers.sam, "sam2": helpers.sam2, "sam-hq": helpers.sam_hq}
ANY_MASK = {"points_per_side": 3, "min_quality": -10.0, "min_stability": 0.0}
PHRASES = [["a dog", "a cup"], ["teddy bear", "wine glass"], ["the red car", "a corgi"]]
BOXES = [[(0.1, 0.2, 0.6, 0.7), (0.3, 0.3, 1.0, 1.0)], [], [(0.0, 0.0, 0.5, 0.5)]]


def detector(name):
    detector_class, build, settings = DETECTORS[name]
    return detector_class(*build(), **settings)


def pictures(width=48, height=48):
    return [helpers.picture(seed, width, height) for seed in range(3)]


def assert_alike(first, second, tolerance=1e-4):
    assert [one.phrase for one in first] == [one.phrase for one in second]
    for one, other in zip(first, second, strict=True):
        assert one.box == pytest.approx(other.box, abs=tolerance) and one.score == pytest.approx(other.score, abs=1e-4)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("size", [(48, 48), (90, 40)])
def test_batches_equal_singles(name, size):
    """Each picture has phrases of its own, and of other lengths."""
    grounder = Grounder(detector(name))
    together = grounder.ground_batch(pictures(*size), PHRASES, "skip")
    alone = [grounder.ground(*pair, "skip") for pair in zip(pictures(*size), PHRASES, strict=True)]
    assert sum(map(len, together)) > 3
    for first, second in zip(together, alone, strict=True):
        assert_alike(first, second)
        assert all(one.mask is None or one.mask.shape == size[::-1] for one in first)


@pytest.mark.parametrize("name", DETECTORS)
def test_repeats_exactly_and_in_batches_of_any_size(name):
    mixed = [helpers.picture(0), helpers.picture(1, 64, 48), helpers.picture(2)]
    results = []
    for size in (1, 2, 2):
        torch.manual_seed(size)  # nothing may depend on the global generator
        results.append(Grounder(detector(name), batch_size=size).ground_batch(mixed, PHRASES, "skip"))
    for first, second, third in zip(*results, strict=True):
        assert_alike(first, second)
        assert [(one.box, one.score) for one in second] == [(one.box, one.score) for one in third]


@pytest.mark.parametrize("name", DETECTORS)
def test_bfloat16(name):
    model = detector(name)
    model.model.to(torch.bfloat16)
    found = Grounder(model).ground(helpers.picture(), PHRASES[0], "skip")
    assert all(one.mask is None or one.mask.dtype == torch.float32 for one in found)
    assert model.identity() != detector(name).identity()


@pytest.mark.parametrize("name", DETECTORS)
def test_from_a_folder(name, tmp_path):
    built = detector(name)
    built.model.save_pretrained(tmp_path)
    built.processor.save_pretrained(tmp_path)
    grounder = load_grounder(name, tmp_path, device="cpu", detector_options=DETECTORS[name][2])
    assert grounder.identity() == built.identity()
    ask = (helpers.picture(), PHRASES[1], "skip")
    assert_alike(grounder.ground(*ask), Grounder(built).ground(*ask))
    half = load_grounder(name, tmp_path, device="cpu", dtype=torch.bfloat16)
    assert next(half.detector.model.parameters()).dtype == torch.bfloat16


@torch.no_grad()
def test_grounding_dino_finds_the_processors_boxes():
    model, processor = helpers.grounding_dino()
    inputs = processor(images=helpers.picture(), text=[PHRASES[0]], return_tensors="pt")
    output = model(**inputs)
    [expected] = processor.post_process_grounded_object_detection(output, threshold=0.3, text_threshold=0.3)
    boxes = {box_within_picture(box.tolist()) for box in expected["boxes"]}
    found = GroundingDinoDetector(model, processor, 0.3, 0.0).detect([helpers.picture()], PHRASES[:1])[0]
    assert {tuple(round(x, 4) for x in one.box) for one in found} == {
        tuple(round(x, 4) for x in box) for box in boxes if box is not None
    }
    assert len(boxes) > 2


def test_phrases_know_their_tokens():
    tokenizer = helpers.bert_tokenizer()
    phrases = ["Car", "a  carton", "teddy bear"]  # [CLS] car . a car ##ton . teddy bear . [SEP]
    assert phrase_tokens(tokenizer, phrases, 256) == [[1], [3, 4, 5], [7, 8]]
    for bad in ("st. dog", "dog?"):
        with pytest.raises(LayoutError, match=r"neither '\.' nor"):
            phrase_tokens(tokenizer, ["a cup", bad], 256)
    with pytest.raises(PromptTooLongError, match="at most 11 tokens.*12"):
        phrase_tokens(tokenizer, [*phrases[:2], "teddy bear dog"], 11)
    with pytest.raises(LayoutError, match="tokenizer knows"):
        phrase_tokens(tokenizer, ["a cup", "\u200b"], 256)


def test_boxes_go_to_every_phrase_above_the_threshold():
    """Three boxes over the tokens of "car . a carton .": one for both, one for the second, one below the threshold."""
    probabilities = torch.tensor(
        [
            [0.0, 0.4, 0.0, 0.1, 0.1, 0.9, 0.0],
            [0.9, 0.2, 0.9, 0.0, 0.3, 0.0, 0.0],
            [0.0, 0.2, 0.0, 0.25, 0.0, 0.0, 0.0],
        ]
    )
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])
    found = boxes_of_phrases(probabilities, boxes, ["car", "a carton"], [[1], [3, 4, 5]], 0.25, 0.25)
    assert [(one.phrase, one.box, round(one.score, 3)) for one in found] == [
        ("car", (0.25, 0.375, 0.75, 0.625), 0.4),
        ("a carton", (0.25, 0.375, 0.75, 0.625), 0.9),
        ("a carton", (0.0, 0.0, 0.25, 1.0), 0.3),
    ]


@torch.no_grad()
def test_owlv2_boxes_are_fractions_of_the_picture():
    """OWLv2 pads to a square: on a wide picture, y counts from the padded height."""
    model, processor = helpers.owlv2()
    wide = [helpers.picture(seed, 96, 48) for seed in range(6)]
    found = Owlv2Detector(model, processor, 0.0).detect(wide, PHRASES[:1] * 6)
    assert sum(map(len, found)) > 5
    for picture, detections in zip(wide, found, strict=True):
        output = model(**processor(images=picture, text=[PHRASES[0]], max_length=16, return_tensors="pt"))
        best, labels = output.logits[0].sigmoid().max(-1)
        x, y, width, height = output.pred_boxes[0].unbind(-1)
        corners = torch.stack([x - width / 2, 2 * (y - height / 2), x + width / 2, 2 * (y + height / 2)], -1)
        rows = zip(best.tolist(), labels.tolist(), map(box_within_picture, corners.tolist()), strict=True)
        expected = sorted((box, score, PHRASES[0][label]) for score, label, box in rows if box is not None)
        assert len(detections) == len(expected)
        for one, (box, score, phrase) in zip(sorted(detections, key=lambda one: one.box), expected, strict=True):
            assert one.phrase == phrase
            assert [*one.box, one.score] == pytest.approx([*box, score], abs=1e-4)


@torch.no_grad()
def test_clipseg_is_the_models_own_forward():
    model, processor = helpers.clipseg()
    words = PHRASES[0]
    inputs = processor(text=words, images=[helpers.picture()] * 2, padding=True, return_tensors="pt")
    logits = model(**inputs).logits
    expected = torch.nn.functional.interpolate(logits[:, None], (48, 48), mode="bilinear")[:, 0].sigmoid()
    [maps, one] = ClipSegDetector(model, processor).probabilities([helpers.picture()] * 2, [words, words[:1]])
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(one, expected[:1])


def test_clipseg_drops_specks_and_splits_pieces():
    detector = ClipSegDetector(*helpers.clipseg(), threshold=0.5, min_area=0.01)
    probability = torch.zeros(20, 20)
    probability[:5, :10], probability[10:, 10:], probability[0, 19] = 0.9, 0.6, 1.0
    probability[7, 7] = 0.5  # not above the threshold
    one, other = sorted(detector._pieces("a dog", probability), key=lambda piece: -piece.score)
    assert (one.score, one.box) == (pytest.approx(0.9), (0, 0, 0.5, 0.25))
    assert other.score == pytest.approx(0.6) and other.mask.sum() == 100


@pytest.mark.parametrize(("name", "longest"), [("owlv2", 16), ("clipseg", 20)])
def test_long_phrases(name, longest):
    with pytest.raises(PromptTooLongError, match=f"at most {longest} tokens"):
        Grounder(detector(name)).ground(helpers.picture(), ["a " * longest])


@torch.no_grad()
@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("size", [(48, 48), (90, 40)])
def test_masks_are_the_models_own(name, size):
    model, processor = SEGMENTERS[name]()
    segmenter = SamSegmenter(model, processor)
    assert segmenter.name == name
    masks = segmenter.masks_in_boxes(pictures(*size), BOXES)
    assert [tuple(rows.shape) for rows in masks] == [(len(boxes), *size[::-1]) for boxes in BOXES]
    pixels = [[[x0 * size[0], y0 * size[1], x1 * size[0], y1 * size[1]] for x0, y0, x1, y1 in BOXES[0]]]
    inputs = processor(images=pictures(*size)[0], input_boxes=pixels, return_tensors="pt")
    inputs = {key: value.float() if key == "input_boxes" else value for key, value in inputs.items()}
    scaling = [inputs.pop("original_sizes"), *([inputs.pop("reshaped_input_sizes")] if name != "sam2" else [])]
    output = model(**inputs, multimask_output=False)
    expected = processor.post_process_masks(output.pred_masks, *scaling)[0][:, 0].float()
    assert (masks[0] != expected).float().mean() < 1e-3 and 0 < expected.mean() < 1
    assert set(masks[0].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_all_parts_without_text(name):
    parts = Grounder(segmenter=SamSegmenter(*SEGMENTERS[name](), **ANY_MASK)).segment_batch(pictures(64, 40))
    assert [len(one) > 0 for one in parts] == [True] * 3
    assert all(one.phrase is None and one.mask.shape == (40, 64) and one.mask.any() for row in parts for one in row)
    assert Grounder(segmenter=SamSegmenter(*SEGMENTERS[name](), points_per_side=2)).segment(helpers.picture()) == []
    model, processor = SEGMENTERS[name]()
    half = SamSegmenter(model.to(torch.bfloat16), processor, **ANY_MASK)
    assert all(one.mask.dtype == torch.float32 for one in Grounder(segmenter=half).segment(helpers.picture()))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_detector_and_segmenter_together(name, tmp_path):
    model, processor = SEGMENTERS[name]()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    built = Grounder(detector("grounding-dino"), SamSegmenter(model, processor))
    loaded = load_grounder(segmenter=name, segmenter_model=tmp_path, device="cpu", dtype=torch.bfloat16)
    assert loaded.identity() == built.segmenter.identity()
    boxes = Grounder(built.detector).ground_batch(pictures(), PHRASES, "skip")
    found = built.ground_batch(pictures(), PHRASES, "skip")
    for plain, outlined in zip(boxes, found, strict=True):
        assert_alike(plain, outlined)
        assert all(one.mask is not None and one.mask.shape == (48, 48) for one in outlined)


def saved_clipseg(folder):
    model, processor = helpers.clipseg()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_corrupt_and_foreign_checkpoints(tmp_path):
    whole = saved_clipseg(tmp_path / "whole")

    def damaged(name, change):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        change(folder)
        return folder

    def drop_a_weight(folder):
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        del state["decoder.film_add.bias"]
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    def widen(folder):
        config = json.loads((folder / "config.json").read_text())
        config["reduce_dim"] = 12
        (folder / "config.json").write_text(json.dumps(config))

    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:5000])

    cases = {
        "cut": (cut, "cannot be loaded"),
        "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        "pickle": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "cannot be"),
        "lacking": (drop_a_weight, "lacks 1 weights.*film_add"),
        "other sizes": (widen, "lacks|cannot be loaded"),
        "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
        "broken config": (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "cannot be loaded"),
        "nowhere": (shutil.rmtree, "config.json"),
    }
    for name, (change, words) in cases.items():
        folder = damaged(name, change)
        with pytest.raises(CheckpointError, match=words):
            load_grounder("clipseg", folder, device="cpu")
            pytest.fail(name)
    with pytest.raises(CheckpointError, match="must be of type 'owlv2', got 'clipseg'"):
        load_grounder("owlv2", whole, device="cpu")
    with pytest.raises(CheckpointError, match="must be of type 'sam2', got 'clipseg'"):
        load_grounder(segmenter="sam2", segmenter_model=whole, device="cpu")


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("grounding-dino", "https://huggingface.co/IDEA-Research/grounding-dino-tiny (about 689 MB)"),
        ("owlv2", "https://huggingface.co/google/owlv2-base-patch16-ensemble (about 620 MB)"),
        ("clipseg", "https://huggingface.co/CIDAS/clipseg-rd64-refined (about 603 MB)"),
    ],
)
def test_missing_checkpoint_says_where_it_is(name, published, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as raised:
        load_grounder(name, device="cpu")
    assert published in str(raised.value)


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", None, True])
def test_thresholds(value):
    for name in DETECTORS:
        with pytest.raises(ObjectComposeError, match="`threshold`"):
            load_grounder(name, device="cpu", detector_options={"threshold": value})
    with pytest.raises(ObjectComposeError, match="`points_per_side`"):
        load_grounder(segmenter="sam", device="cpu", segmenter_options={"points_per_side": 0})
