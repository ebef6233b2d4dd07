"""The data set's layout, its alignment, and the encoding of samples."""

from __future__ import annotations

import json
from dataclasses import astuple

import numpy as np
import pytest
import torch
from PIL import Image

from objectcompose.errors import (
    ImageInputError,
    LayoutError,
    ObjectComposeError,
    PhraseNotFoundError,
    PromptTooLongError,
    RegionError,
)
from objectcompose.layout_fields import shown_value
from objectcompose.toybox.categories import PRESETS
from objectcompose.training.caption_encoding import (
    CaptionEncoder,
    check_caption_lengths,
    draw_latent,
    masks_on_grid,
    stack_targets,
)
from objectcompose.training.grounded_captions import (
    CaptionSample,
    GroundedCaptions,
    ToyboxCaptions,
    read_records,
)
from tests.tiny import tiny_text_encoder, tiny_tokenizer, tiny_vae
from tests.training.captions_data import write_records


SIZE = (48, 32)  # width, height


def picture(folder, name: str = "one.png", seed: int = 0):
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / name)
    return folder / name


def box_mask(x0: int, x1: int) -> torch.Tensor:
    mask = torch.zeros(SIZE[1], SIZE[0])
    mask[:, x0:x1] = 1
    return mask


@pytest.fixture
def root(tmp_path):
    """Two pictures: one with a full mask, a half one and a noun without; one without nouns."""
    source = tmp_path / "source"
    nouns = [("dog", box_mask(0, 24)), ("cup", torch.ones(SIZE[1], SIZE[0])), ("day", None)]
    write_records(
        tmp_path / "data",
        [
            ("000001", picture(source), "A dog and a cup on a sunny day", nouns),
            ("000002", picture(source, "two.png", 1), "nothing at all", []),
        ],
    )
    return tmp_path / "data"


def test_layout_round_trip(root):
    first, second = read_records(root)
    assert [astuple(one) for one in read_records(root / "coco_gsam_img")] == [astuple(first), astuple(second)]
    assert first.caption == "A dog and a cup on a sunny day" and second.nouns == ()
    assert [(noun, path and path.name) for noun, path in first.nouns] == [
        ("dog", "mask_000001_dog.png"), ("cup", "mask_000001_cup.png"), ("day", None),
    ]  # fmt: skip
    line = json.loads((root / "coco_gsam_img" / "train" / "metadata.jsonl").read_text().splitlines()[0])
    assert line["attn_list"] == [
        ["dog", "seg/000001/mask_000001_dog.png"], ["cup", "seg/000001/mask_000001_cup.png"], ["day", None],
    ]  # fmt: skip


def test_mask_that_is_true_everywhere_stays_so(root):
    sample = GroundedCaptions(read_records(root), 32)[0]
    assert sample.phrases == ("dog", "cup") and sample.masks.shape == (2, 32, 32)
    assert sample.masks[1].min() == 1
    # the centre crop of 48 x 32 starts at column 8, so the left half ends at column 16
    assert sample.masks[0, :, :16].min() == 1 and sample.masks[0, :, 16:].max() == 0


def test_two_phrases_never_share_a_file(tmp_path):
    nouns = [("hot dog", box_mask(0, 8)), ("hot_dog", box_mask(8, 20)), ("Hot Dog", box_mask(0, 40))]
    write_records(tmp_path / "data", [("1", picture(tmp_path), "hot dog", nouns)])
    paths = [path for _, path in read_records(tmp_path / "data")[0].nouns]
    assert len({str(path).lower() for path in paths}) == 3
    for (_, mask), path in zip(nouns, paths, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)) > 0, mask.numpy() > 0)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16"])
def test_masks_of_every_mode(root, mode):
    path = root / "coco_gsam_seg" / "000001" / "mask_000001_dog.png"
    expected = GroundedCaptions(read_records(root), 32)[0].masks
    mask = Image.open(path)
    if mode == "I;16":
        Image.fromarray((np.asarray(mask) > 0).astype(np.uint16) * 65535).save(path)
    elif mode == "RGBA":  # as matplotlib writes it: opaque everywhere
        mask.convert("RGB").convert("RGBA").save(path)
    else:
        mask.convert(mode).save(path)
    assert torch.equal(GroundedCaptions(read_records(root), 32)[0].masks, expected)


def test_keys_follow_content(root):
    dataset = GroundedCaptions(read_records(root), 32)
    key = dataset.key(0)
    assert key == GroundedCaptions(read_records(root), 32).key(0) != dataset.key(1)
    assert key != GroundedCaptions(read_records(root), 16).key(0)
    Image.fromarray(np.zeros((SIZE[1], SIZE[0]), np.uint8)).save(
        root / "coco_gsam_seg" / "000001" / "mask_000001_dog.png"
    )
    assert key != GroundedCaptions(read_records(root), 32).key(0)


def test_bad_data_is_refused_with_its_line(root):
    metadata = root / "coco_gsam_img" / "train" / "metadata.jsonl"
    good = metadata.read_text().splitlines()
    for line, message in (
        ("{", "line 3"), (json.dumps({"file_name": "x.png", "text": "a"}), "attn_list"),
        (json.dumps({"file_name": "none.png", "text": "a", "attn_list": []}), "none.png"),
        (json.dumps({"file_name": "000002.png", "text": "a", "attn_list": [["dog", "seg/gone.png"]]}), "gone.png"),
        (json.dumps({"file_name": "000002.png", "text": " ", "attn_list": []}), "must have text"),
    ):  # fmt: skip
        metadata.write_text("\n".join([*good, line]))
        with pytest.raises((LayoutError, ImageInputError), match=message):
            read_records(root)
    metadata.write_text("")
    with pytest.raises(LayoutError, match="at least one line"):
        read_records(root)
    metadata.write_bytes(b"\xff\xfe")
    with pytest.raises(LayoutError, match="UTF-8"):
        read_records(root)
    with pytest.raises(LayoutError, match="metadata.jsonl"):
        read_records(root / "coco_gsam_seg")


def test_metadata_as_others_write_it(root):
    """With a byte order mark, and with a line break inside of a caption that only JSON knows to be none."""
    metadata = root / "coco_gsam_img" / "train" / "metadata.jsonl"
    entries = [json.loads(line) for line in metadata.read_text().splitlines()]
    entries[0]["text"] = "a dog\u2028and a cup"
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    metadata.write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    assert [record.caption for record in read_records(root)] == ["a dog\u2028and a cup", "nothing at all"]


def test_bad_files_are_refused_before_any_is_used(root):
    """Of the heads: nothing is decoded, so that a set of thousands is quick."""
    mask = root / "coco_gsam_seg" / "000001" / "mask_000001_dog.png"
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(mask)  # turned by 90 degrees: known when the picture is read
    read_records(root)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(mask)
    with pytest.raises(RegionError, match=r"line 1: the mask of 'dog' must have the size .* \(9, 9\)"):
        read_records(root)
    mask.write_bytes(b"no picture")
    with pytest.raises(ImageInputError, match="line 1 names .*mask_000001_dog.png"):
        read_records(root)
    (root / "coco_gsam_img" / "train" / "000002.png").write_bytes(b"")
    mask.unlink()
    with pytest.raises(ImageInputError, match="mask_000001_dog.png"):
        read_records(root)


def test_bad_files_are_refused(root, tmp_path):
    mask = root / "coco_gsam_seg" / "000001" / "mask_000001_dog.png"
    dataset = GroundedCaptions(read_records(root), 32)
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(mask)
    with pytest.raises(RegionError, match="'dog' must have the size"):
        dataset[0]
    Image.fromarray(np.random.default_rng(0).integers(0, 2, SIZE[::-1], dtype=np.uint8) * 255).save(mask)
    for broken in (b"no picture", mask.read_bytes()[:90]):  # whose head is sound
        mask.write_bytes(broken)
        with pytest.raises(ImageInputError, match="mask_000001_dog"):
            dataset[0]
    (root / "coco_gsam_img" / "train" / "000001.png").write_bytes(b"no picture")
    with pytest.raises(ImageInputError, match="000001.png"):
        dataset[0]
    with pytest.raises(RegionError, match="shape"):
        write_records(tmp_path / "bad", [("1", picture(tmp_path), "dog", [("dog", torch.ones(3, 3))])])


def encoder(dataset, **changes) -> CaptionEncoder:
    tokenizer = tiny_tokenizer()
    parts = {"vae": tiny_vae(), "levels": 3, **changes}
    return CaptionEncoder(dataset, tokenizer, tiny_text_encoder(tokenizer), **parts)


def assert_same(first, second):
    assert torch.equal(first.moments, second.moments) and torch.equal(first.text, second.text)
    assert first.tokens == second.tokens and first.masks.keys() == second.masks.keys()
    assert all(torch.equal(first.masks[cells], second.masks[cells]) for cells in first.masks)


def test_cached_equals_computed(root, tmp_path):
    dataset = GroundedCaptions(read_records(root), 32)
    cached = encoder(dataset, cache=tmp_path / "cache")
    for index in (0, 1):
        fresh = encoder(dataset)[index]
        assert_same(cached[index], fresh)
        assert_same(cached[index], fresh)  # from the file now
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 2
    for path in files:
        path.write_bytes(path.read_bytes()[:100])  # a torn file is made anew
    assert_same(cached[0], encoder(dataset)[0])
    encoder(dataset, cache=tmp_path / "cache", mask_mode="maxpool")[0]
    encoder(dataset, cache=tmp_path / "cache", identity="another base")[0]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4
    other = encoder(dataset, cache=tmp_path / "cache", vae=tiny_vae().requires_grad_(False))
    other.vae.quant_conv.weight.mul_(2)  # after it was counted, so what is there is found
    assert_same(other[0], cached[0])
    changed = encoder(dataset, cache=tmp_path / "cache", vae=other.vae)
    assert not torch.equal(changed[0].moments, cached[0].moments)  # another autoencoder never reads the old one's


def test_encoded_sample(root):
    encoded = encoder(GroundedCaptions(read_records(root), 32))[0]
    assert encoded.moments.shape == (8, 16, 16) and encoded.text.shape == (77, 22)
    assert encoded.tokens == ((2,), (5,))  # BOS a dog and a cup
    assert {cells: tuple(mask.shape) for cells, mask in encoded.masks.items()} == {
        256: (2, 16, 16), 64: (2, 8, 8), 16: (2, 4, 4),
    }  # fmt: skip


def test_latent_draw_is_the_posteriors():
    vae, generator = tiny_vae(), torch.Generator().manual_seed(0)
    posterior = vae.encode(torch.rand(1, 3, 32, 32)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    expected = posterior.sample(torch.Generator().manual_seed(0)) * 0.5
    torch.testing.assert_close(draw_latent(posterior.parameters[0], noise[0], 0.5)[None], expected)


def test_nouns_that_are_not_in_the_caption(root):
    metadata = root / "coco_gsam_img" / "train" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"dog"', '"wolf"'))
    dataset = GroundedCaptions(read_records(root), 32)
    with pytest.raises(PhraseNotFoundError, match="wolf"):
        encoder(dataset)[0]
    encoded = encoder(dataset, on_missing="skip")[0]
    assert encoded.tokens == ((5,),) and encoded.masks[16].shape == (1, 4, 4)
    with pytest.raises(ObjectComposeError, match="on_missing"):
        encoder(dataset, on_missing="guess")
    with pytest.raises(ObjectComposeError, match="mask_mode"):
        encoder(dataset, mask_mode="nearest")


def test_nouns_that_claim_one_token():
    """Each has a place of its own where there is one, and else shares its first one."""

    def found(caption, *phrases, **changes):
        masks = torch.ones(len(phrases), 32, 32)
        return encoder([], **changes).find_tokens(CaptionSample(torch.zeros(3, 32, 32), caption, phrases, masks))

    shared, apart = "a photo of a teddy bear on a table", "a teddy bear with a bear"
    assert found(shared, "teddy bear", "bear") == ([0, 1], ((5, 6), (6,)))
    assert found(shared, "bear", "teddy bear") == ([0, 1], ((6,), (5, 6)))
    assert found(shared, "bears", "table", "teddy bear") == ([0, 1, 2], ((6,), (9,), (5, 6)))
    assert found(apart, "bear", "teddy bear") == ([0, 1], ((6,), (2, 3)))
    assert found(apart, "bear", "wolf", "teddy bear", on_missing="skip") == ([0, 2], ((6,), (2, 3)))
    with pytest.raises(PhraseNotFoundError, match="wolf"):
        found(shared, "teddy bear", "bear", "wolf")


def test_captions_that_are_cut_are_told_once(caplog):
    short, longer = "a dog " * 37 + "a", "a dog " * 38  # 77 and 78 tokens
    assert check_caption_lengths(tiny_tokenizer(), [short] * 3) == 0 and not caplog.records
    captions = [short, *["a cup"] * 1200, longer, longer]
    assert check_caption_lengths(tiny_tokenizer(), captions) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 1203 captions have more than the 77 tokens that the text encoder reads (start and end included), the"
        f" first one is {shown_value(longer)}. Training goes on without what lies beyond."
    ]
    assert check_caption_lengths(tiny_tokenizer(), captions, is_shown=False) == 2 and len(caplog.records) == 1
    with pytest.raises(PromptTooLongError, match="2 of 1203"):
        check_caption_lengths(tiny_tokenizer(), captions, "error")


def test_small_masks_on_coarse_grids():
    """The numbers of cells that TokenCompose's resize leaves of a 40 x 40 square on a grid of 512."""
    mask = torch.zeros(1, 512, 512)
    mask[:, 200:240, 300:340] = 1
    counts = {
        mode: [int(masks_on_grid(mask, (side, side), mode).sum()) for side in (64, 32, 16, 8)]
        for mode in ("bilinear", "bilinear_aa", "maxpool")
    }
    assert counts["bilinear"][-1] == 0 < counts["maxpool"][-1]
    assert all(plain <= pooled for plain, pooled in zip(counts["bilinear"], counts["maxpool"], strict=True))
    assert all(plain < soft for plain, soft in zip(counts["bilinear"], counts["bilinear_aa"], strict=True))
    assert masks_on_grid(mask[:0], (8, 8)).shape == (0, 8, 8)


def test_ragged_rows_are_padded(root):
    dataset = GroundedCaptions(read_records(root), 32)
    targets = stack_targets([encoder(dataset)[0], encoder(dataset)[1]])
    assert targets.token_indices == [[2, 5], []]
    assert torch.equal(targets.owners, torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]))
    assert targets.masks[64].shape == (2, 2, 8, 8) and targets.masks[64][1].sum() == 0


def test_toybox_scenes(tmp_path):
    dataset = ToyboxCaptions(PRESETS["cpu"], 6, tmp_path)
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.pixels.shape == (3, 64, 64) and sample.masks.shape == (len(sample.phrases), 64, 64)
        assert all(phrase in sample.caption for phrase in sample.phrases) and sample.phrases
        assert sample.masks.sum(0).max() == 1 and sample.masks.flatten(1).any(1).all()
    assert len({dataset.key(index) for index in range(6)}) == 6
