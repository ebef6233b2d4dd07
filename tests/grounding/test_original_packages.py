"""`groundingdino-py` and `segment-anything`: their own classes, their own way of loading, with random weights."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from objectcompose.errors import CheckpointError, ImageInputError, MissingPackageError, ObjectComposeError
from objectcompose.grounding.grounder import Grounder, load_grounder
from objectcompose.grounding.grounding_dino import text_of_phrases
from objectcompose.grounding.loading import optional_package
from objectcompose.grounding.original_grounding_dino import (
    OriginalGroundingDino,
    PhraseTextEncoder,
    build_original_grounding_dino,
)
from objectcompose.grounding.original_sam import OriginalSam
from tests.grounding import helpers


BOXES = [[(0.1, 0.2, 0.6, 0.7), (0.3, 0.3, 1.0, 1.0)], [], [(0.0, 0.0, 0.5, 0.5)]]
ANY_MASK = {"points_per_side": 3, "min_quality": -10.0, "min_stability": 0.0}


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return BertModel(config).eval()


@torch.no_grad()
def test_text_encoder_is_bert():
    bert = tiny_bert()
    encoder = PhraseTextEncoder(bert)
    assert encoder.state_dict().keys() == bert.state_dict().keys()
    ids, mask = torch.randint(50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(ids, mask)["last_hidden_state"], expected)
    torch.testing.assert_close(
        encoder(ids)["last_hidden_state"], bert(input_ids=ids, attention_mask=torch.ones_like(mask)).last_hidden_state
    )


@torch.no_grad()
def test_phrases_do_not_see_one_another():
    encoder = PhraseTextEncoder(tiny_bert())
    ids, positions = torch.randint(50, (1, 6)), torch.tensor([[0, 1, 2, 0, 1, 2]])
    apart = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))[None]
    first = encoder(ids, apart, position_ids=positions)["last_hidden_state"]
    ids[0, 4] = (ids[0, 4] + 1) % 50
    second = encoder(ids, apart, position_ids=positions)["last_hidden_state"]
    torch.testing.assert_close(first[:, :3], second[:, :3])
    assert (first[:, 3:] - second[:, 3:]).abs().min() > 0
    alone = encoder(ids[:, :3], torch.ones(1, 3, 3))["last_hidden_state"]
    torch.testing.assert_close(alone, first[:, :3])


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    return helpers.bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def swin_t(bert_folder):
    torch.manual_seed(0)
    return build_original_grounding_dino("swint", bert_folder)


@pytest.mark.slow
def test_grounding_dino_as_the_package_predicts(swin_t):
    """SwinT at 224x224: our boxes are those of the package's own `predict`, which works with the repaired encoder."""
    from groundingdino.util.inference import annotate, predict

    phrases = ["a dog", "teddy bear"]
    detector = OriginalGroundingDino(swin_t, 0.25, 0.25, short_side=224)
    found = Grounder(detector).ground(helpers.picture(), phrases, "skip")
    pixels = detector._transform(helpers.picture(), None)[0]
    assert pixels.shape == (3, 224, 224)
    boxes, scores, words = predict(swin_t, pixels, text_of_phrases(phrases), 0.25, 0.25, device="cpu")
    assert len(boxes) == len(scores) == len(words) > 100
    inside = {tuple(round(float(x), 4) for x in box[:2]) for box in boxes}
    assert (
        found
        and {
            (round((one.box[0] + one.box[2]) / 2, 4), round((one.box[1] + one.box[3]) / 2, 4))
            for one in found
            if 0 < min(one.box) and max(one.box) < 1
        }
        <= inside
    )
    assert max(one.score for one in found) == pytest.approx(float(scores.max()), abs=1e-5)
    drawn = annotate(np.array(helpers.picture()), boxes[:3], scores[:3], words[:3])
    assert drawn.shape == (48, 48, 3)


@pytest.mark.slow
def test_grounding_dino_from_its_checkpoint(swin_t, bert_folder, tmp_path):
    """The layout of the official file: under "model", with two keys that no model has; corrupt ones are refused."""
    path = tmp_path / "groundingdino_swint_ogc.pth"
    state = dict(swin_t.state_dict())
    extra = {"label_enc.weight": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(512)[None]}
    torch.save({"model": {f"module.{key}": value for key, value in {**state, **extra}.items()}}, path)
    options = {"text_encoder": bert_folder, "short_side": 224}
    grounder = load_grounder("groundingdino-py", path, device="cpu", detector_options=options)
    assert grounder.identity() == OriginalGroundingDino(swin_t, short_side=224).identity()
    both = Grounder(grounder.detector).ground_batch(
        [helpers.picture(1), helpers.picture()], [["a dog"], ["a cup"]], "skip"
    )
    one = OriginalGroundingDino(swin_t, short_side=224).detect([helpers.picture()], [["a cup"]])[0]
    assert sorted(x.score for x in both[1]) == pytest.approx(sorted(x.score for x in one), abs=1e-4)

    del state["feat_map.bias"]
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError, match=r"1 weights.*'feat_map\.bias'"):
        load_grounder("groundingdino-py", path, device="cpu", detector_options=options)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="cannot be read|corrupt"):
        load_grounder("groundingdino-py", path, device="cpu", detector_options=options)
    with pytest.raises(CheckpointError, match="BERT's config and tokenizer.*bert-base-uncased"):
        build_original_grounding_dino("swint", tmp_path / "nothing")


def test_repair_leaves_the_package_as_it_was(bert_folder, swin_t):
    module = importlib.import_module("groundingdino.models.GroundingDINO.groundingdino")
    assert module.BertModelWarper.__module__.startswith("groundingdino")
    assert module.get_tokenlizer.get_pretrained_language_model.__module__.startswith("groundingdino")
    assert isinstance(swin_t.bert, PhraseTextEncoder) and not any(
        part.use_checkpoint for part in swin_t.modules() if hasattr(part, "use_checkpoint")
    )


def test_elongated_pictures(swin_t):
    strip = Image.new("RGB", (320, 16))
    with pytest.raises(ImageInputError, match="elongated.*900 queries"):
        Grounder(OriginalGroundingDino(swin_t, short_side=224)).ground(strip, ["a dog"])


@torch.no_grad()
def test_masks_as_the_predictor_makes_them():
    from segment_anything import SamPredictor

    model = helpers.original_sam()
    pictures = [helpers.picture(seed, 90, 40) for seed in range(3)]
    masks = OriginalSam(model).masks_in_boxes(pictures, BOXES)
    assert [tuple(rows.shape) for rows in masks] == [(2, 40, 90), (0, 40, 90), (1, 40, 90)]
    predictor = SamPredictor(model)
    predictor.set_image(np.array(pictures[2]))
    expected, _, _ = predictor.predict(box=np.array([0.0, 0.0, 45.0, 20.0]), multimask_output=False)
    assert np.array_equal(masks[2][0].numpy() > 0, expected[0]) and 0 < expected.mean() < 1


def test_all_parts_as_the_generator_makes_them():
    from segment_anything import SamAutomaticMaskGenerator

    model = helpers.original_sam()
    parts = Grounder(segmenter=OriginalSam(model, **ANY_MASK)).segment(helpers.picture())
    generator = SamAutomaticMaskGenerator(model, points_per_side=3, pred_iou_thresh=-10.0, stability_score_thresh=0.0)
    expected = generator.generate(np.array(helpers.picture()))
    assert len(parts) == len(expected) >= 1
    masks = {part["segmentation"].tobytes() for part in expected}
    assert {(one.mask.numpy() > 0).tobytes() for one in parts} == masks
    for picture in (helpers.picture(), helpers.picture(1)):
        again = OriginalSam(model, **ANY_MASK).segment([picture])[0]
        assert all(one.mask.shape == (48, 48) and one.mask.any() for one in again)


def test_sam_from_its_checkpoint(tmp_path, monkeypatch):
    """The loader around a small model that stands in the package's own registry: vit_b itself is 375 MB."""
    import segment_anything

    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", helpers.original_sam)
    model = helpers.original_sam()
    with torch.no_grad():
        model.mask_decoder.iou_token.weight.add_(0.5)
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save(model.state_dict(), path)
    loaded = load_grounder(segmenter="segment-anything", segmenter_model=path, device="cpu")
    assert loaded.identity() == OriginalSam(model).identity() != OriginalSam(helpers.original_sam()).identity()

    state = model.state_dict()
    for name, content, words in (
        ("lacking", {key: state[key] for key in list(state)[1:]}, "another model: 1 weights"),
        ("unknown", {**state, "extra": torch.zeros(1)}, "another model: 1 weights.*'extra'"),
        ("sizes", {**state, "mask_decoder.iou_token.weight": torch.zeros(2, 32)}, "another model"),
        ("list", [1, 2], "dict of tensors, got list"),
        ("values", {"a": "text"}, "dict of tensors"),
    ):
        torch.save(content, tmp_path / "vit_b.pth")
        with pytest.raises(CheckpointError, match=words):
            load_grounder(segmenter="segment-anything", segmenter_model=tmp_path / "vit_b.pth", device="cpu")
            pytest.fail(name)


class Harmful:
    """What an attacker puts into a pickle."""

    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


def test_checkpoints_run_no_code(tmp_path, capsys):
    torch.save({"model": Harmful()}, tmp_path / "sam_vit_b.pth")
    (tmp_path / "sam_vit_b.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (tmp_path / "sam_vit_l.pth").write_bytes(b"no checkpoint")
    for name in ("sam_vit_b.pth", "sam_vit_b.safetensors", "sam_vit_l.pth"):
        with pytest.raises(CheckpointError, match="sam_vit"):
            load_grounder(segmenter="segment-anything", segmenter_model=tmp_path / name, device="cpu")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "published"),
    [
        ({"detector": "groundingdino-py"}, "groundingdino_swint_ogc.pth (about 694 MB)"),
        ({"detector": "groundingdino-py", "model": "my/swinb.pth"}, "groundingdino_swinb_cogcoor.pth (about 938 MB)"),
        ({"segmenter": "segment-anything"}, "sam_vit_h_4b8939.pth (about 2564 MB)"),
        ({"segmenter": "segment-anything", "segmenter_model": "my_vit_b.pth"}, "sam_vit_b_01ec64.pth (about 375 MB)"),
    ],
)  # fmt: skip
def test_missing_checkpoint_says_where_it_is(arguments, published, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="published at https://") as raised:
        load_grounder(**arguments, device="cpu")
    assert published in str(raised.value)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("groundingdino", {"detector": "groundingdino-py", "model": "x.pth"}),
        ("segment_anything", {"segmenter": "segment-anything", "segmenter_model": "x.pth"}),
        ("torchvision", {"segmenter": "sam2", "segmenter_model": "folder"}),
    ],
)
def test_missing_package_says_how_to_install_it(module, arguments, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)  # what an import of it then raises is an ImportError
    with pytest.raises(MissingPackageError, match=r'pip install "objectcompose\[grounding\]"'):
        load_grounder(**arguments, device="cpu")


def test_machine_without_a_display(tmp_path, monkeypatch):
    (tmp_path / "package_without_display.py").write_text("raise ImportError('libGL.so.1: cannot open shared object')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match="opencv-python-headless"):
        optional_package("package_without_display", "groundingdino-py")


def test_other_options():
    for arguments, words in (
        ({"detector": "groundingdino-py", "dtype": torch.float16}, "`dtype` must be float32"),
        ({"segmenter": "segment-anything", "dtype": torch.bfloat16}, "`dtype` must be float32"),
        ({"detector": "groundingdino-py", "detector_options": {"short_side": 128}}, "`short_side`.*224"),
        ({"detector": "groundingdino-py", "detector_options": {"text_threshold": 2}}, "`text_threshold`"),
        ({"segmenter": "segment-anything", "segmenter_options": {"variant": "vit_x"}}, "`variant`.*'vit_x'"),
        ({"segmenter": "segment-anything", "segmenter_options": {"points_per_side": 1.5}}, "`points_per_side`"),
    ):
        with pytest.raises(ObjectComposeError, match=words):
            load_grounder(**arguments, device="cpu")
    with pytest.raises(ObjectComposeError, match="`variant`"):
        build_original_grounding_dino("swinx")
