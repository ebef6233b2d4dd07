"""The page itself: what stands where, and what happens when something is touched.

Handlers are plain functions behind `answer`, which turns the package's errors into a message on the page. Nothing is
asked of any other host: fonts are the system's, analytics and sharing are off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from objectcompose.errors import MissingPackageError, ObjectComposeError
from objectcompose.examples.app_canvas import canvas_component, read_drawing, write_drawing
from objectcompose.examples.app_code import python_lines
from objectcompose.examples.app_methods import METHODS, PaintRequest, Workshop, keep_layout, offered_methods
from objectcompose.examples.app_scene import (
    TABLE_HEADERS,
    PageScene,
    Table,
    drawing_after_table,
    first_scene,
    paste_layout,
    read_scene,
    show_scene,
    table_after_drawing,
    table_phrases,
    toybox_references,
)
from objectcompose.toybox.categories import Preset
from objectcompose.toybox.weights import active_preset


PAGE_STYLE = """
.gradio-container { max-width: 1400px !important; margin: 0 auto; }
#picture img, #overlay img { width: 100%; height: 100%; object-fit: contain; }
#table .cell-wrap { font-size: 12px; padding: 4px 2px 4px 5px !important; }
#table .cell-menu-button { display: none; }  /* rows are objects: none to add, to remove or to sort */
#drawing { padding: 0; }
#maps .grid-wrap { padding-top: 28px; }
footer { display: none !important; }
"""
_FIRST_METHOD = "locref"  # where its weights are there: it reads all that the page shows at first
_CACHE_SECONDS = 6 * 3600  # uploads and pictures are kept so long


def load_gradio() -> Any:
    """The module.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise MissingPackageError(f'the page needs gradio: pip install "objectcompose[app]" ({error}).') from error
    return gradio


def page_theme(gradio: Any) -> Any:
    """A theme without fonts from elsewhere."""
    return gradio.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        text_size="sm",
        spacing_size="sm",
        radius_size="sm",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def answer(gradio: Any, handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler`, whose errors for bad input become a message on the page."""

    @functools.wraps(handler)
    def answered(*values: Any, **named: Any) -> Any:
        try:
            return handler(*values, **named)
        except ObjectComposeError as error:
            raise gradio.Error(" ".join(str(error).split()), print_exception=False) from None

    return answered


def method_note(key: str) -> str:
    """What stands under the methods."""
    return offered_methods()[key].note


def drawing_moved(text: str, table: Table) -> Table:
    """The user drew: the table follows."""
    return table_after_drawing(table, read_drawing(text))


def table_edited(table: Table, text: str) -> str:
    """The user wrote into the table: the drawing follows."""
    return write_drawing(drawing_after_table(read_drawing(text), table), table_phrases(table))


def scene_values(scene: PageScene) -> list[Any]:
    """Values of prompt, table, drawing and reference pictures."""
    return [scene.prompt, scene.table, write_drawing(scene.drawing, table_phrases(scene.table)), *scene.references]


def layout_pasted(text: str, folder: Path) -> list[Any]:
    """The values that show a pasted layout."""
    return scene_values(show_scene(paste_layout(text, folder)))


def references_drawn(preset: Preset, table: Table, seed: Any, references: Sequence[Any]) -> list[Any]:
    """Pictures from toybox for the phrases that it knows; the others stay."""
    found = toybox_references(preset, table, whole_number(seed, "seed"))
    return [old if new is None else new for new, old in zip(found, references, strict=True)]


def whole_number(value: Any, name: str) -> int:
    """A number field as an integer of at least 0.

    Raises:
        ObjectComposeError: it is empty, below 0, or has a fraction.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value >= 0 and value // 1 == value):
        raise ObjectComposeError(f"`{name}` must be a whole number of at least 0, got {value!r}.")
    return int(value)


def paint_scene_of_page(
    workshop: Workshop,
    folder: Path,
    method: str,
    prompt: str,
    table: Table,
    text: str,
    steps: Any,
    guidance: Any,
    seed: Any,
    *references: Any,
    on_step: Callable[[int, int], Any] | None = None,
) -> tuple[Image.Image, Image.Image, list[tuple[Image.Image, str]], str, str, str]:
    """Picture, overlay, attention maps, a note, layout JSON, and Python lines of what is on the page.

    Raises:
        ObjectComposeError: something on the page cannot be used; the message says what.
    """
    layout = read_scene(prompt, table, read_drawing(text), references)
    guidance = float(guidance) if isinstance(guidance, (int, float)) else guidance
    numbers = whole_number(steps, "steps"), guidance, whole_number(seed, "seed")
    request = PaintRequest(method, keep_layout(layout, folder), *numbers)
    painting = workshop.paint(request, on_step)
    note = f"{METHODS[method].title}, {request.steps} steps in {painting.seconds:.1f} s."
    if painting.unused:
        note += f" It does not use: {', '.join(painting.unused)}."
    layout_json = request.layout_file.read_text(encoding="utf-8")
    return (
        painting.picture,
        painting.overlay,
        painting.maps,
        note,
        layout_json,
        python_lines(request, workshop.device),
    )


def reference_field(gradio: Any, picture: Image.Image | None, number: int) -> Any:
    """A picture field that hands over the uploaded file as it is: we say readably what is wrong with it."""
    field = gradio.Image(
        picture,
        label=str(number),
        placeholder="drop a picture",
        image_mode="RGBA",
        format="png",
        sources=["upload"],
        height=118,
        min_width=90,
        buttons=[],
        interactive=True,
    )
    field.preprocess = lambda payload: None if payload is None else payload.path
    return field


def build_page(workshop: Workshop, folder: Path) -> Any:
    """The page.

    Args:
        workshop: paints.
        folder: where layouts go.

    Returns:
        `gradio.Blocks`, to be launched.

    Raises:
        MissingPackageError: gradio is not installed.
        CheckpointError: toybox is not there.
    """
    gradio = load_gradio()
    preset, methods = active_preset(), offered_methods()
    scene = first_scene(preset)
    with gradio.Blocks(
        title="objectcompose", analytics_enabled=False, delete_cache=(_CACHE_SECONDS, _CACHE_SECONDS)
    ) as page:
        gradio.Markdown(
            "## objectcompose: who goes where, and looks how\n"
            f"A small model that knows {', '.join(preset.categories)}. "
            "Everything is computed on the machine that serves this page."
        )
        with gradio.Row():
            with gradio.Column(scale=8, min_width=420):
                inputs = _input_fields(gradio, methods, scene)
            with gradio.Column(scale=5, min_width=380):
                outputs = _output_fields(gradio)
        _wire(gradio, inputs, outputs, workshop, folder, preset)
    return page


def _input_fields(gradio: Any, methods: dict[str, Any], scene: PageScene) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    first = _FIRST_METHOD if _FIRST_METHOD in methods else next(iter(methods))
    fields["method"] = gradio.Radio(
        [(method.title, key) for key, method in methods.items()], value=first, label="Method", elem_id="method"
    )
    fields["note"] = gradio.Markdown(method_note(first))
    prompt, table, drawing, *references = scene_values(scene)
    fields["prompt"] = gradio.Textbox(prompt, label="Prompt", max_lines=2, max_length=1000, elem_id="prompt")
    with gradio.Row():
        with gradio.Column(scale=4, min_width=250):
            fields["drawing"] = canvas_component(gradio, drawing)
        with gradio.Column(scale=6, min_width=330):
            fields["table"] = gradio.Dataframe(
                table,
                headers=list(TABLE_HEADERS),
                datatype="str",  # empty cells of numbers would show as 0
                type="array",
                column_widths=["6%", "27%", *(["11%"] * 4), "11%", "12%"],
                static_columns=[0],
                interactive=True,
                label="Objects: phrase, box (fractions), strength, who is in front",
                buttons=[],
                elem_id="table",
            )
            with gradio.Row():
                fields["steps"] = gradio.Number(20, label="Steps", precision=0, min_width=70, elem_id="steps")
                fields["guidance"] = gradio.Number(5.0, label="Guidance", min_width=70)
                fields["seed"] = gradio.Number(0, label="Seed", precision=0, min_width=70, elem_id="seed")
            fields["paint"] = gradio.Button("Paint", variant="primary", elem_id="paint")
    with gradio.Group(visible=methods[first].reads_pictures, elem_id="references") as fields["reference_group"]:
        with gradio.Row():
            fields["references"] = [
                reference_field(gradio, picture, index + 1) for index, picture in enumerate(references)
            ]
        fields["draw"] = gradio.Button("Reference pictures from toybox for these phrases and this seed", size="sm")
    with gradio.Accordion("Load a layout", open=False, elem_id="load_a_layout"):
        fields["pasted"] = gradio.Textbox(
            label="Layout JSON", lines=4, max_lines=8, max_length=100_000, elem_id="pasted"
        )
        fields["load"] = gradio.Button("Load", size="sm", elem_id="load")
    return fields


def _output_fields(gradio: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    with gradio.Row():
        for name, label in (("picture", "Picture"), ("overlay", "Layout on it")):
            fields[name] = gradio.Image(
                label=label,
                format="png",
                height=250,
                min_width=180,
                interactive=False,
                buttons=["download"],
                elem_id=name,
            )
    fields["maps"] = gradio.Gallery(
        label="Where each phrase looked",
        format="png",
        columns=3,
        fit_columns=False,
        height=190,
        object_fit="contain",
        interactive=False,
        buttons=[],
        elem_id="maps",
    )
    fields["message"] = gradio.Markdown("Nothing is painted yet.", elem_id="message")
    with gradio.Tabs():
        with gradio.Tab("Python lines"):
            fields["code"] = gradio.Code(
                language="python",
                show_label=False,
                lines=17,
                max_lines=19,
                wrap_lines=True,
                interactive=False,
                elem_id="code",
            )
        with gradio.Tab("Layout JSON"):
            fields["layout"] = gradio.Code(
                language="json", show_label=False, lines=17, max_lines=19, interactive=False, elem_id="layout"
            )
    return fields


def _wire(
    gradio: Any, fields: dict[str, Any], results: dict[str, Any], workshop: Workshop, folder: Path, preset: Preset
) -> None:
    """What happens on which event."""
    scene_fields = [fields["prompt"], fields["table"], fields["drawing"], *fields["references"]]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    following = {**quiet, "trigger_mode": "always_last"}  # each stroke counts, also while one is on its way

    def choose(key: str) -> tuple[str, Any]:
        return method_note(key), gradio.Group(visible=offered_methods()[key].reads_pictures)

    def paint(*values: Any, progress: Any = gradio.Progress()) -> Any:  # noqa: B008  (how gradio wants it)
        progress(0.0, desc="preparing")
        return paint_scene_of_page(
            workshop, folder, *values, on_step=lambda done, total: progress((done, total), desc="painting")
        )

    fields["method"].change(choose, fields["method"], [fields["note"], fields["reference_group"]], **quiet)
    fields["drawing"].input(
        answer(gradio, drawing_moved), [fields["drawing"], fields["table"]], fields["table"], **following
    )
    fields["table"].input(
        answer(gradio, table_edited), [fields["table"], fields["drawing"]], fields["drawing"], **following
    )
    fields["draw"].click(
        answer(gradio, lambda table, seed, *shown: references_drawn(preset, table, seed, shown)),
        [fields["table"], fields["seed"], *fields["references"]],
        fields["references"],
        **quiet,
    )
    fields["load"].click(
        answer(gradio, lambda text: layout_pasted(text, folder)), fields["pasted"], scene_fields, **quiet
    )
    fields["paint"].click(
        answer(gradio, paint),
        [
            *(fields[name] for name in ("method", "prompt", "table", "drawing", "steps", "guidance", "seed")),
            *fields["references"],
        ],
        [results[name] for name in ("picture", "overlay", "maps", "message", "layout", "code")],
        show_progress_on=[results["picture"]],
        concurrency_limit=1,
        api_visibility="private",
    )
