"""One null object is kept for the unconditional half: beside writing it out for every row, slot and layer."""

from __future__ import annotations

import pytest
import torch

from objectcompose.attention_processors.guided_keys_values import GuidedKeysValues
from objectcompose.pipelines.object_prompts import ObjectPromptBranch
from tests.pipelines.object_prompt_helpers import (
    PROMPT,
    guided,
    object_picture,
    prompt_pipeline,
    sample,
    two_objects,
)


class WrittenOutBranch(ObjectPromptBranch):
    """Holds all rows of `[uncond, cond]` as they are."""

    def __init__(self, adapter, tokens, caches):
        super().__init__(adapter, tokens, caches)
        rows, slots = tokens.present.shape
        keys, values = [], []
        for tokens_of, null_tokens, own_tokens, found in (
            (adapter.keys_of, tokens.null_keys, tokens.keys, keys),
            (adapter.values_of, tokens.null_values, tokens.values, values),
        ):
            found += [tokens_of(torch.cat([null_tokens] * slots, dim=1)) for _ in range(rows)]
            found += [tokens_of(own_tokens[row : row + 1]) for row in range(rows)]
        self.part.keys_values = {
            layer: (torch.cat([one[layer] for one in keys]), torch.cat([one[layer] for one in values]))
            for layer in keys[0]
        }

    @property
    def values(self):
        count = len(self.tokens.values)
        return {layer: value[count:] for layer, (_, value) in self.part.keys_values.items()}

    @values.setter
    def values(self, values):
        count = len(self.tokens.values)
        self.part.keys_values = {
            layer: (key, torch.cat([value[:count], values[layer]]))
            for layer, (key, value) in self.part.keys_values.items()
        }


def written_out(pipeline):
    """The pipeline with that branch."""
    ours = pipeline.prompt_branch
    pipeline.prompt_branch = lambda *args: WrittenOutBranch(pipeline.adapter, ours(*args).tokens, {})
    return pipeline


OTHER_LAYOUTS = {
    "prompt": [PROMPT] * 3,
    "objects": [two_objects(), [{"image": object_picture(5), "scale": 0.7}], two_objects(scale=0.4)],
    "background": [None, None, object_picture(8)],
    "num_images_per_prompt": 2,
}


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("batch", [{}, OTHER_LAYOUTS], ids=["one", "other layouts"])
def test_pictures_are_those_of_written_out_rows(batch, guidance_scale):
    settings = {**batch, "guidance_scale": guidance_scale}
    found, expected = (
        sample(change(prompt_pipeline()), **settings).images for change in (lambda pipeline: pipeline, written_out)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    plain = sample(prompt_pipeline(), **{**settings, "objects": None, "background": None}).images
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_compositional_guidance_is_that_of_written_out_rows(guidance_scale):
    arguments = {
        **{name: OTHER_LAYOUTS[name][:2] for name in ("prompt", "objects")},
        "guidance_scale": guidance_scale,
        "refinement_steps": 2,
    }
    found, expected = (
        guided(
            change(prompt_pipeline()),
            generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
            **arguments,
        )
        for change in (lambda pipeline: pipeline, written_out)
    )
    torch.testing.assert_close(found.images, expected.images, atol=1e-5, rtol=0)
    losses = [[item.refinement_losses for item in row] for row in found.objects]
    assert losses[0][0] and losses == [
        [pytest.approx(item.refinement_losses, abs=1e-5) for item in row] for row in expected.objects
    ]


def test_asking_for_a_layer_puts_nothing_together():
    one, other = torch.zeros(1, 2, 4), torch.zeros(1, 2, 5)
    kept = GuidedKeysValues({"layer": (one, one)}, {"layer": (other, other)})
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        kept["layer"]
    assert "layer" in kept and "another" not in kept


def test_one_null_object_is_held():
    pipeline = prompt_pipeline()
    branches = []
    ours = pipeline.prompt_branch
    pipeline.prompt_branch = lambda *args: branches.append(ours(*args)) or branches[-1]
    sample(pipeline, **OTHER_LAYOUTS)
    [branch] = branches
    kept = branch.part.keys_values
    num_tokens = branch.tokens.null_keys.shape[1]
    for layer, (key, value) in kept.items():
        assert key.shape == value.shape == (12, 3 * num_tokens, key.shape[2])
        held = {id(one): one for pairs in (kept.nulls, kept.shown) for one in pairs[layer]}
        floats = sum(one.untyped_storage().nbytes() for one in held.values()) // 4
        assert floats == 2 * key.shape[2] * (num_tokens + 6 * 3 * num_tokens)
    everything = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for cache in (pipeline._caches[name]["keys_values"] for name in ("keys", "values", "null_keys", "null_values"))
        for one in cache.values()
    }
    assert sum(everything.values()) == sum(
        one.untyped_storage().nbytes() for pairs in (kept.nulls, kept.shown) for pair in pairs.values() for one in pair
    ), "the caches hold the same tensors, no others"
