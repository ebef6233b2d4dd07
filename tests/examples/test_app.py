"""What is behind the page, on a toybox of tiny models: no browser, and gradio only where a test says so."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor

from objectcompose.adapters.base_identity import identify_base
from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.errors import (
    CheckpointError,
    LayoutError,
    MissingFieldError,
    MissingPackageError,
    ObjectComposeError,
    PhraseNotFoundError,
)
from objectcompose.examples import app
from objectcompose.examples.app_canvas import CANVAS_SIDE, read_drawing
from objectcompose.examples.app_methods import METHODS, PaintRequest, Workshop, offered_methods
from objectcompose.examples.app_page import (
    answer,
    build_page,
    layout_pasted,
    load_gradio,
    paint_scene_of_page,
    scene_values,
)
from objectcompose.examples.app_scene import (
    TABLE_HEADERS,
    read_scene,
    show_scene,
)
from objectcompose.layout import Layout, SceneObject, load_layout
from objectcompose.toybox import weights
from tests.pipelines.helpers import compose_pipeline
from tests.pipelines.object_prompt_helpers import object_picture, prompt_adapter
from tests.tiny import TEXT_WIDTH, tiny_image_encoder, tiny_unet


PROMPT = "a photo of a dog and a corgi"
LEFT, RIGHT = (0.0, 0.1, 0.5, 0.9), (0.5, 0.1, 1.0, 0.9)


@pytest.fixture(scope="module")
def tiny_toybox(tmp_path_factory):
    """A folder like examples/toybox, with every method's weights: random ones that change what is painted."""
    root = tmp_path_factory.mktemp("toybox")
    (root / "toybox.json").write_text('{"version": "tiny", "preset": "cpu"}')
    compose_pipeline().save_pretrained(root / "base")
    tiny_image_encoder().save_pretrained(root / "image_encoder")
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24).save_pretrained(root / "image_encoder")
    unet = tiny_unet()
    locref = LocRefAdapter.from_unet(unet, "tiny", image_encoder=tiny_image_encoder(), num_tokens=3)
    for parameter in locref.parameters():
        torch.nn.init.normal_(parameter)
    locref.save_pretrained(root / "locref")
    prompt_adapter(unet).save_pretrained(root / "object_prompt")
    before = {name: value for name, value in unet.named_parameters() if name.endswith("attn2.to_k.weight")}
    after = {name: value + torch.randn_like(value) for name, value in before.items()}
    (root / "tokencompose").mkdir()
    (root / "mifo" / "embeddings").mkdir(parents=True)
    save_file({"<asset0>": 3 * torch.randn(1, TEXT_WIDTH)}, root / "mifo" / "embeddings" / "asset0.safetensors")
    UNetDelta.between(before, after, identify_base(unet, "tiny")).save(root / "tokencompose" / DELTA_NAME)
    return root


@pytest.fixture
def toybox(tiny_toybox, monkeypatch):
    monkeypatch.setenv(weights.ENVIRONMENT_VARIABLE, str(tiny_toybox))
    monkeypatch.setattr(weights, "FOLDERS", tuple({*weights.FOLDERS, "locref", "object_prompt", "mifo"}))
    return tiny_toybox


@pytest.fixture
def paint(toybox, tmp_path):
    """`paint(method, layout, ...)`: what the page answers to its button, with the layout on it."""
    workshop = Workshop("cpu")

    def paint(method, layout, steps=2, seed=0, guidance=3, on_step=None):
        prompt, table, drawing, *references = scene_values(show_scene(layout))
        values = (workshop, tmp_path / "out", method, prompt, table, drawing, steps, guidance, seed, *references)
        return paint_scene_of_page(*values, on_step=on_step)

    return paint


def layout_for(method, **changes):
    """`two_objects`, the first of them as a learned word where the method knows one."""
    if METHODS[method].kind != "instances":
        return two_objects(**changes)
    first, second = two_objects(**changes).objects
    return Layout("a photo of <asset0> and a corgi", (replace(first, phrase=None, token="<asset0>"), second))


def two_objects(**changes):
    mask = torch.zeros(32, 32)
    mask[4:28, 2:14] = 1
    return Layout(
        PROMPT,
        (
            SceneObject(phrase="dog", box=LEFT, mask=mask, image=object_picture(1), **changes),
            SceneObject(phrase="corgi", box=RIGHT, image=object_picture(2)),
        ),
    )


def run_lines(code, folder, monkeypatch):
    """What the lines leave when they are run as they stand there: their names, and the file that they write."""
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, "lines.py", "exec"), names)
    return names, Image.open(folder / "picture.png")


# ---- painting


@pytest.mark.parametrize("method", METHODS)
def test_the_lines_repeat_the_picture_bit_for_bit(paint, method, tmp_path, monkeypatch):
    steps = []
    picture, overlay, maps, note, layout_json, code = paint(
        method, layout_for(method, scale=0.5), seed=7, on_step=lambda done, total: steps.append((done, total))
    )
    names, saved = run_lines(code, tmp_path, monkeypatch)
    assert np.array_equal(np.asarray(saved), np.asarray(picture))
    assert np.array_equal(np.asarray(names["output"].images[0]), np.asarray(picture))
    assert steps == [(1, 2), (2, 2)]
    phrases = [item.phrase or item.token for item in layout_for(method).objects]
    assert [phrase for _, phrase in maps] == phrases and set(names["output"].attention[0]) == set(phrases)
    assert not np.array_equal(np.asarray(overlay), np.asarray(picture.resize(overlay.size, Image.Resampling.BICUBIC)))
    assert METHODS[method].title in note
    assert json.loads(layout_json)["prompt"] == layout_for(method).prompt


def test_every_method_paints_another_picture(paint):
    pictures = [np.asarray(paint(method, layout_for(method))[0]) for method in METHODS]
    for second in range(len(pictures)):
        for first in range(second):
            assert not np.array_equal(pictures[first], pictures[second])


def test_a_prompt_alone_is_painted_and_repeated(paint, tmp_path, monkeypatch):
    picture, _, maps, _, _, code = paint("plain", Layout(PROMPT))
    assert maps == [] and "objects" not in code
    assert np.array_equal(np.asarray(run_lines(code, tmp_path, monkeypatch)[1]), np.asarray(picture))


def test_the_note_names_what_goes_unused(paint):
    assert paint("plain", two_objects())[3].endswith("It does not use: box, image, mask.")
    assert "not use" not in paint("locref", Layout(PROMPT, two_objects().objects[1:]))[3]


def test_the_layout_is_that_of_the_page(paint, tmp_path):
    layout_json = paint("mifo", two_objects(order=3))[4]
    (tmp_path / "out" / "copied.json").write_text(layout_json)
    found = load_layout(tmp_path / "out" / "copied.json")
    first, second = two_objects(order=3).objects
    assert found.objects[1] == second
    assert (found.objects[0].phrase, found.objects[0].box, found.objects[0].order) == ("dog", LEFT, 3)
    repeats = CANVAS_SIDE // 32  # masks have the canvas' size
    enlarged = first.mask.repeat_interleave(repeats, 0).repeat_interleave(repeats, 1)
    assert torch.equal(found.objects[0].mask, enlarged)


def test_layouts_of_equal_content_share_a_file(paint, tmp_path):
    for seed, layout in enumerate((two_objects(), two_objects(), Layout(PROMPT))):
        paint("plain", layout, seed=seed)
    assert len(list((tmp_path / "out").glob("layout-*.json"))) == 2


def test_methods_without_weights_are_not_offered(toybox, tmp_path, monkeypatch):
    assert list(offered_methods()) == list(METHODS)
    for name in ("toybox.json", "base", "tokencompose"):
        (tmp_path / name).symlink_to(toybox / name)
    (tmp_path / "locref").mkdir()  # with nothing in it
    monkeypatch.setenv(weights.ENVIRONMENT_VARIABLE, str(tmp_path))
    assert list(offered_methods()) == ["plain", "tokencompose", "mifo"]


@pytest.mark.parametrize(
    ("method", "layout", "changes", "error", "message"),
    [
        ("mifo", Layout(PROMPT, ({"phrase": "dog"},)), {}, MissingFieldError, "`box` or `mask`"),
        ("object-prompt", Layout(PROMPT, ({"phrase": "dog"},)), {}, MissingFieldError, "`image`"),
        ("plain", Layout(PROMPT, ({"phrase": "cat"},)), {}, PhraseNotFoundError, "cat"),
        ("plain", Layout(" "), {}, LayoutError, "`prompt`"),
        ("no method", Layout(PROMPT), {}, ObjectComposeError, "`method` must be one of plain"),
        ("plain", Layout(PROMPT), {"steps": 101}, ObjectComposeError, "`steps` must be a whole number from 1 to 100"),
        ("plain", Layout(PROMPT), {"steps": None}, ObjectComposeError, "`steps`"),
        ("plain", Layout(PROMPT), {"seed": -1}, ObjectComposeError, "`seed`"),
        ("plain", Layout(PROMPT), {"seed": 0.5}, ObjectComposeError, "`seed`"),
        ("plain", Layout(PROMPT), {"guidance": None}, ObjectComposeError, "`guidance`"),
        ("plain", Layout(PROMPT), {"guidance": float("nan")}, ObjectComposeError, "`guidance`"),
    ],
)
def test_what_cannot_be_painted_is_refused_in_words(paint, method, layout, changes, error, message):
    with pytest.raises(error, match=message):
        paint(method, layout, **changes)


def test_a_copied_layout_can_be_pasted(paint, tmp_path):
    layout_json = paint("mifo", two_objects(scale=2.0))[4]
    prompt, table, drawing, *references = layout_pasted(layout_json, tmp_path / "out")
    again = read_scene(prompt, table, read_drawing(drawing), references)
    (tmp_path / "out" / "copied.json").write_text(layout_json)
    assert again == load_layout(tmp_path / "out" / "copied.json")
    assert not list((tmp_path / "out").glob("pasted*"))


# ---- the page


def test_without_gradio_the_line_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingPackageError, match=r'pip install "objectcompose\[app\]"'):
        load_gradio()


def test_the_page_is_for_this_machine_unless_asked_otherwise():
    assert app.create_parser().parse_args([]).host == "127.0.0.1"


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--device", "no-device"]])
def test_start_that_cannot_be_is_refused_in_one_line(arguments, capsys, toybox):
    pytest.importorskip("gradio")
    assert app.main(arguments) == 2
    assert capsys.readouterr().err.startswith("app: `--")


def test_errors_become_messages():
    gradio = pytest.importorskip("gradio")
    handler = answer(gradio, partial(layout_pasted, folder=None))
    with pytest.raises(gradio.Error) as caught:
        handler("")
    assert caught.value.message == "paste a layout first: there is no text."
    assert not caught.value.print_exception and caught.value.__suppress_context__


def test_the_page_offers_what_is_there_and_tells_nobody(toybox, tmp_path):
    pytest.importorskip("gradio")
    page = build_page(Workshop("cpu"), tmp_path)
    config = page.get_config_file()
    assert config["analytics_enabled"] is False
    assert all(event["api_visibility"] != "public" for event in config["dependencies"])
    (radio,) = (part for part in config["components"] if part["type"] == "radio")
    assert [key for _, key in radio["props"]["choices"]] == list(METHODS)
    (table,) = (part for part in config["components"] if part["type"] == "dataframe")
    assert table["props"]["value"]["headers"] == list(TABLE_HEADERS)


def test_a_request_checks_its_values(tmp_path):
    PaintRequest("plain", tmp_path / "layout.json", 100, 0.0, 2**63 - 1)
    with pytest.raises(ObjectComposeError, match="`seed`"):
        PaintRequest("plain", tmp_path / "layout.json", seed=2**63)


def test_a_missing_toybox_is_said(monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    monkeypatch.setenv(weights.ENVIRONMENT_VARIABLE, str(tmp_path))
    assert list(offered_methods()) == ["plain", "mifo"]
    with pytest.raises(CheckpointError, match=r"toybox\.json"):
        build_page(Workshop("cpu"), tmp_path)
