"""All methods in one call: each contributes, any subset leaves the pipeline as it was, conflicts are refused."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from itertools import combinations

import pytest
import torch

from objectcompose.adapters.base_identity import identify_base
from objectcompose.adapters.unet_delta import UNetDelta
from objectcompose.attention_processors.branch import Branch
from objectcompose.attention_processors.install import match_layers
from objectcompose.attention_processors.probe import TokenMapProbe
from objectcompose.errors import CheckpointError, PartConflictError, PhraseNotFoundError
from objectcompose.layout import SceneObject
from objectcompose.pipelines.mifo_control import MIFOBoxControl
from tests.attention_processors.helpers import random_keys_values
from tests.pipelines.conformance.rows import BOX_CONTROL, picture
from tests.pipelines.helpers import processor_ids, sample, seeded
from tests.pipelines.locref_helpers import locref
from tests.pipelines.refusals import refused, watched_models
from tests.tiny import TEXT_WIDTH


PROMPT = "a dog and a <pet>"
LEFT, RIGHT = (0.0, 0.1, 0.5, 0.9), (0.5, 0.2, 1.0, 1.0)
REFERENCES = [SceneObject(phrase="dog", image=picture("red"), box=LEFT)]
LAYOUT = [{"phrase": "dog", "box": LEFT}, {"token": "<pet>", "box": RIGHT}]
CONTRIBUTIONS = ("delta", "lora", "references", "control")


@pytest.fixture(scope="module")
def pipeline():
    pytest.importorskip("peft")
    pipeline = locref()
    pipeline.load_textual_inversion(2 * torch.randn(2, TEXT_WIDTH, generator=seeded(8)), token="<pet>")
    return pipeline


@pytest.fixture(scope="module")
def delta(pipeline):
    """New values of the keys that text becomes, as Separate-and-Enhance leaves them."""
    parameters = pipeline.unet.named_parameters()
    before = {name: one.detach().clone() for name, one in parameters if name.endswith(".attn2.to_k.weight")}
    after = {name: value + 0.3 * torch.randn(value.shape, generator=seeded(3)) for name, value in before.items()}
    return UNetDelta.between(before, after, identify_base(pipeline.unet))


@contextmanager
def lora(pipeline):
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(4)
        pipeline.unet.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        )
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


@contextmanager
def attached(delta, unet):
    delta.attach(unet)
    try:
        yield
    finally:
        delta.detach(unet)


def compose(pipeline, delta, chosen, **arguments):
    """The picture with some of the contributions, and attention maps always."""
    with ExitStack() as stack:
        if "delta" in chosen:
            stack.enter_context(attached(delta, pipeline.unet))
        if "lora" in chosen:
            stack.enter_context(lora(pipeline))
        if "references" in chosen:
            arguments |= {"objects": REFERENCES, "return_attention": True}
        if "control" in chosen:
            arguments["parts"] = [MIFOBoxControl(LAYOUT, BOX_CONTROL)]
        return sample(pipeline, PROMPT, **arguments)


def test_each_contributes_and_any_subset_leaves_no_trace(pipeline, delta):
    plain = sample(pipeline, PROMPT).images
    processors = processor_ids(pipeline.unet)
    state = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    found = {}
    for count in range(1, 1 + len(CONTRIBUTIONS)):
        for chosen in combinations(CONTRIBUTIONS, count):
            output = compose(pipeline, delta, chosen)
            assert torch.isfinite(output.images).all()
            assert ("references" in chosen) == (output.attention is not None)
            found[chosen] = output.images
    for chosen, picture_of_chosen in found.items():
        for left_out in chosen:
            rest = tuple(name for name in chosen if name != left_out)
            without = found.get(rest, plain)
            assert not torch.allclose(picture_of_chosen, without, atol=1e-5), f"{left_out} adds nothing to {rest}"
    assert processor_ids(pipeline.unet) == processors
    assert all(torch.equal(value, state[name]) for name, value in pipeline.unet.state_dict().items())
    assert torch.equal(sample(pipeline, PROMPT).images, plain)


def test_delta_and_lora_on_the_same_keys_stack_in_either_order(pipeline, delta):
    plain = sample(pipeline, PROMPT).images
    with attached(delta, pipeline.unet), lora(pipeline):
        delta_first = sample(pipeline, PROMPT).images
    with lora(pipeline):
        lora_alone = sample(pipeline, PROMPT).images
        with attached(delta, pipeline.unet):
            assert torch.equal(sample(pipeline, PROMPT).images, delta_first)
        assert torch.equal(sample(pipeline, PROMPT).images, lora_alone)
    assert not torch.allclose(delta_first, lora_alone, atol=1e-5)
    assert torch.equal(sample(pipeline, PROMPT).images, plain)


def test_attention_maps_are_of_all_phrases(pipeline, delta):
    objects = [*REFERENCES, SceneObject(phrase="<pet>")]
    output = compose(pipeline, delta, CONTRIBUTIONS[:2], objects=objects, return_attention=True)
    assert list(output.attention[0]) == ["dog", "<pet>"]
    assert len(output.objects[0][1].token_indices) == 2


@pytest.mark.parametrize("chosen", [(), CONTRIBUTIONS])
def test_an_exception_in_the_middle_leaves_no_trace(pipeline, delta, chosen):
    plain = sample(pipeline, PROMPT).images
    processors = processor_ids(pipeline.unet)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compose(pipeline, delta, chosen, callback_on_step_end=fail)
    assert processor_ids(pipeline.unet) == processors
    assert torch.equal(sample(pipeline, PROMPT).images, plain)


def test_conflicts_are_refused(pipeline, delta):
    cross = match_layers(pipeline.unet, "mid_block", kind="cross")
    replacing = Branch(random_keys_values(pipeline.unet, cross, 1, 2), mode="replace")
    with watched_models(pipeline) as ran, pytest.raises(PartConflictError, match="one cell"):
        compose(pipeline, delta, CONTRIBUTIONS[:3], parts=[replacing, TokenMapProbe([1])])
    assert "unet" not in ran
    control = MIFOBoxControl([{"token": "<other>", "box": LEFT}])
    refused(sample, pipeline, PhraseNotFoundError, "<other>", prompt=PROMPT, objects=REFERENCES, parts=[control])
    with attached(delta, pipeline.unet), pytest.raises(CheckpointError, match="already attached"):
        delta.attach(pipeline.unet)
