"""The generated card says everything and is read back by the Hub's own class."""

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from objectcompose.adapters.model_card import ModelCardFacts, figures_from_result, plain_card_text, write_model_card
from objectcompose.errors import ObjectComposeError


FACTS = {
    "title": "tiny adapter",
    "summary": "Only for tests.",
    "base_model": "toybox-1",
    "base_license": "Apache-2.0",
    "code_license": "Apache-2.0",
    "weights_license": "apache-2.0",
    "data": "made-up scenes",
    "data_license": "CC-BY-4.0",
    "command": "python -m made_up --seed 0",
    "commit": "0123abc",
}
RESULT = {
    "name": "tiny",
    "command": "python -m measure",
    "device": "cpu: 1 threads",
    "protocol": "10 prompts | 2 seeds",
    "metrics": {"mg3": 0.51234, "mg3.lo": 0.4, "mg3.hi": 0.6, "count": 20},
}


def test_card_says_everything(tmp_path):
    path = write_model_card(
        tmp_path / "weights", ModelCardFacts(**FACTS, figures=figures_from_result(RESULT, ["mg3"]))
    )
    text = path.read_text()
    assert all(value in text for value in FACTS.values())
    assert "0.512 [0.4, 0.6]" in text and "`python -m measure`: 10 prompts | 2 seeds (cpu: 1 threads)" in text
    card = ModelCard.load(path)
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"


def test_a_protocol_is_said_once(tmp_path):
    other = {**RESULT, "protocol": "another one"}
    figures = [*figures_from_result(RESULT, ["mg3", "count"]), *figures_from_result(other, ["count"])]
    text = write_model_card(tmp_path, ModelCardFacts(**FACTS, figures=figures)).read_text()
    assert text.count("10 prompts | 2 seeds") == text.count("another one") == 1
    assert text.count("| count | 20 |") == 2


def test_card_without_figures_says_so(tmp_path):
    assert "Nothing yet." in write_model_card(tmp_path, ModelCardFacts(**FACTS)).read_text()


def test_silent_cards_and_unknown_metrics_are_refused():
    with pytest.raises(ObjectComposeError, match="data_license"):
        ModelCardFacts(**{**FACTS, "data_license": " "})
    with pytest.raises(ObjectComposeError, match="no_such"):
        figures_from_result(RESULT, ["no_such"])


def test_card_with_a_sample(tmp_path):
    picture = Image.new("RGB", (6, 4), (10, 20, 30))
    facts = ModelCardFacts(**FACTS, sample=picture, sample_caption="a dog on the left, seed 3")
    text = write_model_card(tmp_path, facts).read_text()
    assert "![a dog on the left, seed 3](sample.png)" in text
    assert Image.open(tmp_path / "sample.png").getpixel((0, 0)) == (10, 20, 30)
    with pytest.raises(ObjectComposeError, match="sample_caption"):
        ModelCardFacts(**FACTS, sample=picture)


def test_card_without_facts_says_what_is_not_stated(tmp_path):
    path = write_model_card(tmp_path, plain_card_text("SomePipeline", "owner/base", "pipe = ..."))
    card = ModelCard.load(path)
    assert card.data.base_model == "owner/base" and card.data.license is None
    assert "pipe = ..." in card.text and "not stated" in card.text
    assert "Base model: not stated" in plain_card_text("SomePipeline", None, "pipe = ...")
