"""MIFOPipeline on tiny components: what it finds in prompts, what it refuses, how it stacks with others."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler

from benchmarks.naive_box_control import NaiveBoxControl, naive_sampling
from objectcompose.__main__ import main
from objectcompose.attention_processors.box_layers import control_layers
from objectcompose.errors import (
    LayerNotFoundError,
    LayoutError,
    MissingFieldError,
    ObjectComposeError,
    PhraseNotFoundError,
    PromptTooLongError,
    RegionError,
)
from objectcompose.layout import Layout, SceneObject, save_layout
from objectcompose.pipelines import mifo_control
from objectcompose.pipelines.mifo_control import BoundBoxControl, MIFOBoxControl, box_control_options
from objectcompose.pipelines.pipeline_locref import LocRefPipeline
from objectcompose.pipelines.pipeline_mifo import MIFOPipeline
from objectcompose.pipelines.placement import place_phrases
from objectcompose.pipelines.subject_tokens import function_word_positions, prompt_subjects
from tests.pipelines.conformance.rows import ROWS, generators, quiet
from tests.pipelines.helpers import both_pipelines, compose_pipeline, sample
from tests.pipelines.refusals import refused
from tests.tiny import TEXT_WIDTH, tiny_components, tiny_tokenizer


LEFT, RIGHT = (0.0, 0.1, 0.5, 0.9), (0.5, 0.1, 1.0, 0.9)
PROMPT = "a photo of a dog and a corgi"
DOG_AND_CORGI = [{"phrase": "dog", "box": LEFT}, {"phrase": "corgi", "box": RIGHT}]
BRIEF = {"guided_steps": 1, "iterations": 1, "refine": False}


def mifo_pipeline(**changes):
    return quiet(MIFOPipeline(**{**tiny_components(), **changes}))


def paint(pipeline, prompt=PROMPT, objects=DOG_AND_CORGI, **arguments):
    defaults = {"num_inference_steps": 2, "output_type": "pt", "box_control": BRIEF, "generator": generators(1)[0]}
    return pipeline(prompt, objects=objects, **{**defaults, **arguments}).images


def learn(pipeline, **vectors):
    """Enter placeholders as diffusers' `load_textual_inversion` does; `asset0=2` is one of two vectors."""
    for name, count in vectors.items():
        embedding = torch.randn(count, TEXT_WIDTH, generator=torch.Generator().manual_seed(count))
        pipeline.load_textual_inversion({f"<{name}>": embedding}, token=f"<{name}>")
    return pipeline


def subjects_of(tokenizer, prompt, objects, filtered_words=None):
    items = [SceneObject(**item) for item in objects]
    placed = place_phrases(tokenizer, prompt, items, (32, 32), ("phrase",), "test")[0]
    return prompt_subjects(tokenizer, prompt, items, placed, filtered_words)


# ---- what is found in a prompt


def test_function_words_and_digits_are_found_as_whole_words():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<two>", "<two>_1"])
    #         1 2     3  4     5       6   7   8  9   10  11 12 13 14 (corgi and cupboard are of two pieces)
    prompt = "a photo of <two> and two corgi to 13 dogs on"
    assert function_word_positions(tokenizer, prompt) == [1, 3, 6, 7, 10, 11, 12, 14]
    assert function_word_positions(tokenizer, "carton of dogs") == [2]  # "to" inside of a word is none


def test_subjects_are_their_words_without_function_words():
    found = subjects_of(tiny_tokenizer(), PROMPT, [{"phrase": "a dog"}, {"phrase": "a corgi"}])
    #                    0=start 1=a 2=photo 3=of 4=a 5=dog 6=and 7=a 8,9=corgi 10=end
    assert found.token_indices == ((5,), (8, 9)) and found.leading_indices == (5, 9)
    assert found.end_index == 10 and found.filtered_indices == (1, 3, 4, 6, 7)


def test_a_phrase_of_function_words_keeps_them():
    found = subjects_of(tiny_tokenizer(), "two and a dog", [{"phrase": "two"}, {"phrase": "dog"}])
    assert found.token_indices == ((1,), (4,)) and found.filtered_indices == (2, 3)


def test_placeholders_of_several_vectors_and_ordinary_words_mix():
    pipeline = learn(mifo_pipeline(), asset0=2, asset1=1)
    prompt = "a photo of <asset0> and a red <asset1> with a cup"
    objects = [{"token": "<asset0>"}, {"phrase": "a red <asset1>", "token": "<asset1>"}, {"phrase": "cup"}]
    found = subjects_of(pipeline.tokenizer, prompt, objects)
    #         1=a 2=photo 3=of 4,5=asset0 6=and 7=a 8=red 9=asset1 10=with 11=a 12=cup 13=end
    assert found.token_indices == ((4, 5), (8, 9), (12,)) and found.leading_indices == (4, 9, 12)
    assert found.end_index == 13
    boxes = (LEFT, RIGHT, (0.3, 0.0, 0.7, 0.3))
    boxed = [{**item, "box": box} for item, box in zip(objects, boxes, strict=True)]
    output = pipeline(prompt, objects=boxed, num_inference_steps=2, output_type="pt", box_control=BRIEF)
    assert torch.isfinite(output.images).all()
    assert [item.label for item in output.objects[0]] == ["<asset0>", "a red <asset1>", "cup"]
    assert all(item.unused == () for item in output.objects[0])


@pytest.mark.parametrize(
    ("words", "hidden", "tokens"),
    [
        ([], (), (4, 5)),
        (["Photo of", "a", "cat"], (1, 2, 3, 4, 7), (5,)),
        (("corgi", "dog", "<asset0>"), (5, 8, 9), (4,)),
        ({"a dog"}, (), (4, 5)),
    ],
)
def test_words_that_no_cell_sees_can_be_named(words, hidden, tokens):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens("<asset0>")
    #                    0=start 1=a 2=photo 3=of 4=a 5=dog 6=and 7=a 8,9=corgi 10=end
    found = subjects_of(tokenizer, PROMPT, [{"phrase": "a dog"}], words)
    assert found.filtered_indices == hidden and found.token_indices == (tokens,)


@pytest.mark.parametrize("prompt", [PROMPT, "two dogs on the table"])
def test_the_built_in_words_are_the_default(prompt):
    pipeline, dog = mifo_pipeline(), [{"phrase": "dog", "box": LEFT}]
    images = [
        paint(pipeline, prompt, dog, box_control={**BRIEF, "filtered_words": words})
        for words in (None, ["a", "of", "and", "two", "on", "the"], [])
    ]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


# ---- several subjects of one word

PAIR = [{"phrase": "dogs", "box": LEFT}, {"phrase": "dogs", "box": RIGHT}]
TWO_DOGS = "a photo of two dogs"


def test_objects_of_one_phrase_share_its_last_place():
    objects = [{"phrase": "dog"}, {"phrase": "cup"}, {"phrase": "dog"}, {"phrase": "dog"}]
    items = [SceneObject(**item) for item in objects]
    prompt = "a dog and a cup and the dogs"
    placed = place_phrases(tiny_tokenizer(), prompt, items, (32, 32), ("phrase",), "test", may_share=True)[0]
    assert [item.label for item in placed] == ["dog", "cup", "dog #2", "dog #3"]
    found = prompt_subjects(tiny_tokenizer(), prompt, items, placed)
    assert found.token_indices == ((2,), (5,), (8,), (8,)) and found.leading_indices == (2, 5, 8, 8)
    assert found.filtered_indices == (1, 3, 4, 6, 7)


def test_each_box_of_a_shared_word_acts():
    pipeline, arguments = mifo_pipeline(), {"box_control": {**BRIEF, "refine": True, "refine_start": 1, "restarts": 2}}
    expected = paint(pipeline, TWO_DOGS, PAIR, **arguments)
    assert torch.isfinite(expected).all()
    for moved in range(2):
        objects = [dict(item) for item in PAIR]
        objects[moved]["box"] = (0.25 + 0.25 * moved, 0.5, 0.5 + 0.25 * moved, 0.9)
        assert not torch.equal(paint(pipeline, TWO_DOGS, objects, **arguments), expected)
    assert not torch.equal(paint(pipeline, TWO_DOGS, PAIR[:1], **arguments), expected)


def test_a_shared_word_in_a_batch_is_as_alone():
    pipeline = mifo_pipeline()
    arguments = {"box_control": {**BRIEF, "refine": True, "refine_start": 1, "restarts": 2}}
    prompts, objects = [PROMPT, TWO_DOGS], [DOG_AND_CORGI, PAIR]
    both = paint(pipeline, prompts, objects, generator=generators(2), **arguments)
    for row in range(2):
        alone = paint(pipeline, prompts[row], objects[row], generator=generators(1, row + 1)[0], **arguments)
        torch.testing.assert_close(both[row], alone[0], atol=1e-4, rtol=0)


def test_maps_and_labels_of_a_shared_word():
    output = mifo_pipeline()(
        TWO_DOGS, objects=PAIR, num_inference_steps=2, output_type="latent", box_control=BRIEF, return_attention=True
    )
    first, second = output.objects[0]
    assert (first.label, second.label) == ("dogs", "dogs #2")
    assert first.token_indices == second.token_indices == (5,) and (first.box, second.box) == (LEFT, RIGHT)


def test_other_pipelines_want_a_place_for_each():
    for pipeline in (compose_pipeline(), quiet(LocRefPipeline(**ROWS["locref"].components()))):
        with pytest.raises(PhraseNotFoundError, match="2 time"):
            pipeline(TWO_DOGS, objects=PAIR, num_inference_steps=1)


# ---- what it does


def test_control_changes_the_picture_and_can_be_left_out():
    plain, _ = both_pipelines()
    ours = mifo_pipeline()
    expected = plain(PROMPT, num_inference_steps=2, output_type="pt", generator=generators(1)[0]).images
    assert torch.equal(paint(ours, use_box_control=False), expected)
    assert torch.equal(paint(ours, objects=[]), expected)
    assert not torch.equal(paint(ours), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"penalty": "none"},
        {"penalty": "constant", "guided_steps": 2},
        {"attention": "self"},
        {"attention": "cross"},
        {"guided_steps": 0},
        {"refine": True, "refine_start": 1, "restarts": 2},
        {"padding": "like_end"},
        {"iterations": 3},
        {"subjects_in_reward": True},
    ],
)
def test_every_option_changes_the_picture(change):
    pipeline = mifo_pipeline()
    base = {**BRIEF, "guided_steps": change.get("guided_steps", 1) or 1}
    assert not torch.equal(paint(pipeline, box_control=base), paint(pipeline, box_control={**base, **change}))


def test_a_mask_of_the_same_cells_acts_as_the_box():
    pipeline = mifo_pipeline()
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    full_left = {"phrase": "dog", "box": (0.0, 0.0, 0.5, 1.0)}
    by_box = paint(pipeline, objects=[full_left, DOG_AND_CORGI[1]])
    by_mask = paint(pipeline, objects=[{"phrase": "dog", "mask": mask}, DOG_AND_CORGI[1]])
    assert torch.equal(by_box, by_mask)


def test_a_prompt_without_objects_in_a_batch_is_the_plain_one():
    plain, _ = both_pipelines()
    ours = mifo_pipeline()
    images = ours(
        [PROMPT, "a dog"], objects=[DOG_AND_CORGI, []], num_inference_steps=2, output_type="pt", box_control=BRIEF,
        generator=generators(2),
    ).images  # fmt: skip
    expected = plain("a dog", num_inference_steps=2, output_type="pt", generator=generators(1, 2)[0]).images
    torch.testing.assert_close(images[1], expected[0], atol=1e-4, rtol=0)


def test_guidance_leaves_the_unet_early_and_runs_one_half():
    pipeline, runs = mifo_pipeline(), []
    handles = [
        pipeline.unet.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: runs.append((name, len(args[0])))
        )
        for name in ("conv_in", "conv_out")
    ]
    paint(pipeline, box_control={**BRIEF, "iterations": 3, "stop_below": 0.0})
    for handle in handles:
        handle.remove()
    one_guided_step = [("conv_in", 1)] * 3 + [("conv_in", 2), ("conv_out", 2)]
    assert runs == [*one_guided_step, ("conv_in", 2), ("conv_out", 2)]


def test_steps_from_stored_latents_are_not_guided():
    """Of a scheduler of second order: every other iteration starts from latents that it kept."""
    scheduler = HeunDiscreteScheduler.from_config(tiny_components()["scheduler"].config)
    pipeline, sizes = mifo_pipeline(scheduler=scheduler), []
    handle = pipeline.unet.conv_in.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    control = {**BRIEF, "guided_steps": 4, "iterations": 2, "stop_below": 0.0}
    paint(pipeline, num_inference_steps=3, box_control=control)
    handle.remove()
    assert sizes == [1, 1, 2, 2] * 2 + [2]


@pytest.mark.parametrize("is_part", [True, False])
def test_boxes_without_a_background_are_warned_of(monkeypatch, is_part):
    messages = []
    monkeypatch.setattr(mifo_control.box_control_logger, "warning", messages.append)
    halves = [{"phrase": "dog", "box": (0, 0, 0.5, 1)}, {"phrase": "corgi", "box": (0.5, 0, 1, 1)}]

    def painted(objects, **control):
        control = {**BRIEF, **control}
        if is_part:
            part = MIFOBoxControl(objects, control)
            return sample(compose_pipeline(), PROMPT, output_type="latent", parts=[part]).images
        return paint(mifo_pipeline(), objects=objects, box_control=control, output_type="latent")

    masked = painted(halves, guided_steps=0)
    painted(DOG_AND_CORGI)
    assert not messages
    assert torch.equal(painted(halves), masked), "there is nothing to compare with"
    assert len(messages) == 1 and "'dog', 'corgi'" in messages[0]


def test_a_velocity_model_is_handled():
    scheduler = DDIMScheduler.from_config(tiny_components()["scheduler"].config, prediction_type="v_prediction")
    pipeline = mifo_pipeline(scheduler=scheduler)
    images = paint(pipeline)
    assert torch.isfinite(images).all() and not torch.equal(images, paint(mifo_pipeline()))


def test_weights_that_are_being_trained_get_no_gradients():
    pipeline = mifo_pipeline()
    pipeline.unet.requires_grad_(True)
    paint(pipeline)
    assert all(weight.requires_grad and weight.grad is None for weight in pipeline.unet.parameters())


def test_objects_are_found_once_in_a_call_and_not_kept(monkeypatch):
    found = []
    find = MIFOBoxControl._find_prompts
    monkeypatch.setattr(MIFOBoxControl, "_find_prompts", lambda self, *rest: found.append(1) or find(self, *rest))
    pipeline, part = compose_pipeline(), MIFOBoxControl(DOG_AND_CORGI, BRIEF)
    for prompt in (PROMPT, f"{PROMPT} on a table"):
        pipeline(prompt, num_inference_steps=1, output_type="latent", parts=[part])
    assert len(found) == 2 and len(part._found) == 0


# ---- as a part of other pipelines


def test_as_a_part_it_does_what_the_pipeline_does():
    expected = paint(mifo_pipeline())
    part = MIFOBoxControl(DOG_AND_CORGI, BRIEF)
    pipeline = compose_pipeline()
    for _ in range(2):  # nothing of one call is left for the next
        found = pipeline(
            PROMPT, num_inference_steps=2, output_type="pt", generator=generators(1)[0], parts=[part]
        ).images
        assert torch.equal(found, expected)


def test_beside_a_branch_of_another_method_both_halves_run():
    row = ROWS["locref"]
    pipeline = quiet(LocRefPipeline(**row.components()))
    scene = row.scenes[0]
    arguments = {"prompt": scene.prompt, "objects": list(scene.objects), "num_inference_steps": 2, "output_type": "pt"}
    part = MIFOBoxControl([{"phrase": "dog", "box": LEFT}, {"phrase": "corgi", "box": RIGHT}], BRIEF)
    sizes = []
    handle = pipeline.unet.conv_in.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    both = pipeline(generator=generators(1)[0], parts=[part], **arguments).images
    handle.remove()
    alone = pipeline(generator=generators(1)[0], **arguments).images
    assert torch.isfinite(both).all() and not torch.equal(both, alone)
    assert sizes == [2, 2, 2]  # one guidance pass of both halves, which the branch is made for, and two steps


def test_foreign_parts_do_not_change_what_guidance_reads(monkeypatch):
    """Running both halves moves the latents as running the conditional one does."""
    expected = paint(mifo_pipeline())
    monkeypatch.setattr(BoundBoxControl, "_has_foreign_parts", lambda self: True)
    torch.testing.assert_close(paint(mifo_pipeline()), expected, atol=1e-4, rtol=0)


# ---- what it refuses


@pytest.mark.parametrize(
    ("objects", "error", "message"),
    [
        ([{"phrase": "dog"}], MissingFieldError, "`box` or `mask`"),
        ([{"box": LEFT}], MissingFieldError, "`phrase` or `token`"),
        ([{"phrase": "cat", "box": LEFT}], PhraseNotFoundError, "cat"),
        ([{"token": "<asset9>", "box": LEFT}], PhraseNotFoundError, "<asset9>.*it has none"),
        (
            [{"phrase": "dog", "box": LEFT}, {"phrase": "corgi", "box": LEFT}],
            RegionError,
            "'dog' and 'corgi'.*overlap",
        ),
        ([{"phrase": "dog", "box": (0, 0, 2, 1)}], LayoutError, r"\[0, 1\]"),
        ([{"phrase": "dog", "box": LEFT}] * 2, RegionError, "'dog' and 'dog #2'.*overlap"),
        ([{"phrase": "cat", "box": LEFT}, {"phrase": "cat", "box": RIGHT}], PhraseNotFoundError, "1 time.*found 0"),
        ([{"phrase": "dog", "mask": torch.ones(4, 8)}], RegionError, "proportions"),
        ("dog", LayoutError, "list of objects"),
    ],
)
def test_objects_that_cannot_be_controlled_are_refused(objects, error, message):
    refused(paint, mifo_pipeline(), error, message, objects=objects)
    refused(sample, compose_pipeline(), error, message, prompt=PROMPT, parts=[MIFOBoxControl(objects)])


def test_known_placeholders_are_named():
    pipeline = learn(mifo_pipeline(), asset0=1)
    for token, message in (("<asset1>", "it has <asset0>"), ("<asset0>", "must occur in the prompt")):
        refused(paint, pipeline, PhraseNotFoundError, message, objects=[{"token": token, "box": LEFT}])


def test_a_prompt_that_does_not_fit_is_refused():
    refused(paint, mifo_pipeline(), PromptTooLongError, "77", prompt="a dog and " * 40)


def test_more_objects_than_the_grid_tells_apart_are_refused():
    pipeline = mifo_pipeline()
    words = ("dog", "cat", "cup", "car", "bird", "table")
    corners = [(i % 4 / 4, i // 4 / 4) for i in range(6)]
    objects = [
        {"phrase": word, "box": (x, y, x + 0.25, y + 0.25)} for word, (x, y) in zip(words, corners, strict=True)
    ]
    small = {"height": 8, "width": 8, "box_control": {**BRIEF, "refine": True}}
    refused(paint, pipeline, RegionError, "at most 5", prompt=" and ".join(words), objects=objects, **small)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"box_control": {"steps": 3}}, ObjectComposeError, "steps.*guided_steps"),
        ({"box_control": {"iterations": 0}}, ObjectComposeError, "iterations"),
        ({"box_control": {"restarts": 0}}, ObjectComposeError, "restarts"),
        ({"box_control": 3}, ObjectComposeError, "options"),
        ({"box_control": {"filtered_words": "of"}}, ObjectComposeError, "filtered_words.*'of'"),
        ({"loss_layers": "attn7"}, LayerNotFoundError, "attn7"),
        ({"map_layers": r"up_blocks\.[12].*"}, RegionError, "one grid"),
        ({"map_layers": r"up_blocks\.2.*", "height": 80, "width": 80, "box_control": None}, RegionError, "1024"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 77, TEXT_WIDTH)}, ObjectComposeError, "needs `prompt`"),
    ],
)
def test_bad_options_are_refused(arguments, error, message):
    refused(paint, mifo_pipeline(), error, message, **arguments)


def test_options_are_taken_in_every_form():
    given = box_control_options({"iterations": 2, "seed": 7})
    assert given.iterations == 2 and given.refinement.seed == 7
    assert box_control_options(given) is given
    assert box_control_options(None).iterations == 5


def test_layers_can_be_chosen():
    pipeline = mifo_pipeline()
    chosen = paint(pipeline, loss_layers=r"up_blocks\.1.*", map_layers=r"down_blocks\.0.*")
    assert torch.isfinite(chosen).all() and not torch.equal(chosen, paint(pipeline))


def test_the_plain_way_paints_the_same_picture():
    """What the benchmark compares with: whole tables, both halves, all of the UNet."""
    pipeline = mifo_pipeline()
    placed = place_phrases(pipeline.tokenizer, PROMPT, DOG_AND_CORGI, (32, 32), ("phrase",), "test")[0]
    items = [SceneObject(**item) for item in DOG_AND_CORGI]
    subjects = prompt_subjects(pipeline.tokenizer, PROMPT, items, placed)
    control = NaiveBoxControl(subjects, (LEFT, RIGHT), control_layers(pipeline.unet, (16, 16)).loss)
    noise = torch.randn(1, 4, 16, 16, generator=generators(1)[0])
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt(PROMPT, "cpu", 1, True)
        text = torch.cat([negative, embeds])
        expected = naive_sampling(pipeline.unet, pipeline.scheduler, noise, text, control, 2, 1)
    options = {"guided_steps": 1, "refine": False, "stop_below": 0.0}
    found = paint(pipeline, latents=noise, num_inference_steps=2, output_type="latent", box_control=options)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_the_command_paints_a_layout(tmp_path, capsys):
    mifo_pipeline().save_pretrained(tmp_path / "base")
    items = tuple(SceneObject(**item) for item in DOG_AND_CORGI)
    save_layout(Layout(PROMPT, items), tmp_path / "scene.json")
    common = ["generate", "--pipeline", "mifo", "--model", str(tmp_path / "base"), "--device", "cpu", "--steps", "2"]
    out = tmp_path / "out.png"
    assert main([*common, "--layout", str(tmp_path / "scene.json"), "--out", str(out)]) == 0 and out.is_file()
    save_layout(Layout(PROMPT, (items[0], SceneObject(phrase="corgi"))), tmp_path / "no_box.json")
    assert main([*common, "--layout", str(tmp_path / "no_box.json"), "--out", str(tmp_path / "none.png")]) == 2
    assert "`box` or `mask`" in capsys.readouterr().err and not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("objects", "kept"),
    [
        (DOG_AND_CORGI, [False, False, True, True]),
        ([{"phrase": "dog", "box": (0, 0, 1, 1)}], [False, True, True, True]),
    ],
)
def test_a_corrector_does_not_take_guidance_back(objects, kept):
    """UniPC does its last step anew from older latents, unless these were moved."""
    pipeline = mifo_pipeline(scheduler=UniPCMultistepScheduler.from_config(tiny_components()["scheduler"].config))
    seen, predict = [], pipeline.predict_noise

    def watched(state, timestep):
        seen.append(pipeline.scheduler.last_sample is not None)
        return predict(state, timestep)

    pipeline.predict_noise = watched
    control = {"guided_steps": 2, "iterations": 1, "refine": False, "stop_below": 0.0}
    paint(pipeline, objects=objects, num_inference_steps=4, box_control=control)
    assert seen == kept
