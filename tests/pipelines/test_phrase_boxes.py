"""The method that docs/add_a_method.md adds: it is what the page says, does what it says, and stacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from objectcompose.errors import MissingFieldError, PhraseNotFoundError
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from tests.pipelines.conformance.rows import BOXED_SCENES, picture
from tests.pipelines.helpers import quiet, sample
from tests.pipelines.locref_helpers import locref
from tests.pipelines.phrase_boxes import PhraseBoxes, PhraseBoxesPipeline
from tests.tiny import tiny_components


ROOT = Path(__file__).parents[2]
PROMPT, OBJECTS = BOXED_SCENES[0].prompt, BOXED_SCENES[0].objects


def test_the_page_has_the_code_word_for_word():
    page = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    code = (ROOT / "tests" / "pipelines" / "phrase_boxes.py").read_text(encoding="utf-8")
    rows = (ROOT / "tests" / "pipelines" / "conformance" / "rows.py").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)\n```", page, re.S)
    assert len(blocks) == 5 and all(block in code for block in blocks[:4]) and blocks[4] in rows
    assert "".join("".join(blocks[:4]).split()) == "".join(code[code.index("from __future__") :].split())


def test_a_phrase_is_read_only_inside_its_box():
    pipeline = quiet(PhraseBoxesPipeline(**tiny_components()))
    looked_at = {}
    for name, objects in (("boxes", OBJECTS), ("none", None)):
        parts = [] if objects is None else [PhraseBoxes(objects)]
        phrases = [{"phrase": item["phrase"]} for item in OBJECTS]
        plain = quiet(TokenComposePipeline(**pipeline.components))
        looked_at[name] = sample(plain, PROMPT, objects=phrases, parts=parts, return_attention=True).attention[0][
            "dog"
        ]
    boxes, none = looked_at["boxes"], looked_at["none"]  # (h, w); the box ends at 0.6 of the width
    assert float(boxes[:, -1].max()) == 0 < float(none[:, -1].min())
    assert float(boxes[1:-1, 0].min()) > 0
    ours = sample(pipeline, PROMPT, objects=OBJECTS, return_attention=True)
    assert torch.equal(ours.attention[0]["dog"], boxes) and ours.objects[0][0].unused == ()


def test_bad_input_and_stacking():
    pipeline = locref()
    plain = sample(pipeline, PROMPT).images
    boxed = sample(pipeline, PROMPT, parts=[PhraseBoxes(OBJECTS)]).images
    reference = [{"phrase": "dog", "image": picture("red"), "box": (0.0, 0.1, 0.6, 0.8)}]
    both = sample(pipeline, PROMPT, objects=reference, parts=[PhraseBoxes(OBJECTS)]).images
    alone = sample(pipeline, PROMPT, objects=reference).images
    assert len({float(images.double().sum()) for images in (plain, boxed, both, alone)}) == 4
    assert torch.equal(sample(pipeline, PROMPT).images, plain)
    with pytest.raises(MissingFieldError, match="box"):
        sample(pipeline, PROMPT, parts=[PhraseBoxes([{"phrase": "dog"}])])
    with pytest.raises(PhraseNotFoundError, match="zebra"):
        sample(pipeline, PROMPT, parts=[PhraseBoxes([{"phrase": "zebra", "box": (0, 0, 1, 1)}])])
