"""The drawing surface of the page: a box or a painted mask per object, and the text in which they travel.

One layer per object on a square canvas. The browser's side is plain JavaScript on a 2D canvas (no WebGL, so that it
works in any browser, headless ones too); it hands over JSON, which `read_drawing` checks like everything that comes
from outside.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from objectcompose.errors import LayoutError, ObjectComposeError, RegionError
from objectcompose.layout_fields import check_box, shown_value


#: Objects that the page has room for.
MAX_OBJECTS = 5
#: One colour per object, for its layer, its box and its number.
OBJECT_COLOURS = ("#e4572e", "#2e86ab", "#3a9d5d", "#c58b10", "#8b5fbf")
#: Sides of the canvas, and of the masks painted on it, in pixels.
CANVAS_SIDE = 256
_MAX_TEXT = 400_000  # five masks of random noise are shorter
_PNG_START = "data:image/png;base64,"

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Drawing:
    """Where the objects are.

    Attributes:
        boxes: `MAX_OBJECTS` boxes, xyxy in fractions of the canvas, or None.
        masks: as many masks `(H, W)`, float {0, 1}, or None; where there is one, there is a box too.
    """

    boxes: tuple[Box | None, ...] = (None,) * MAX_OBJECTS
    masks: tuple[torch.Tensor | None, ...] = (None,) * MAX_OBJECTS


def mask_box(mask: torch.Tensor) -> Box:
    """The box around a mask, with corners at whole hundredths of the canvas, as the browser makes it."""
    height, width = mask.shape
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    x0, y0 = (math.floor(first / side * 100) / 100 for first, side in ((columns[0], width), (rows[0], height)))
    x1, y1 = (math.ceil((last + 1) / side * 100) / 100 for last, side in ((columns[-1], width), (rows[-1], height)))
    return x0, y0, x1, y1


def read_drawing(text: Any) -> Drawing:
    """What the browser sent.

    Args:
        text: JSON with `boxes` and `masks`, `MAX_OBJECTS` entries each; masks are PNG data URLs whose alpha counts
            from one half on. None or "": nothing is drawn.

    Raises:
        LayoutError: no such JSON, or a box out of range.
        RegionError: a mask that is no picture of the canvas' size.
    """
    if not text:
        return Drawing()
    if not isinstance(text, str) or len(text) > _MAX_TEXT:
        raise LayoutError(f"`drawing` must be text of at most {_MAX_TEXT} characters, got {shown_value(text)}.")
    try:
        data = json.loads(text)
        boxes, masks = data["boxes"], data["masks"]
        complete = len(boxes) == len(masks) == MAX_OBJECTS
    except (ValueError, TypeError, KeyError, RecursionError):
        complete = False
    if not complete:
        raise LayoutError(f"`drawing` must be what the canvas writes, got {shown_value(text)}.")
    found = [None if mask is None else _decode_mask(mask, index) for index, mask in enumerate(masks)]
    places = [
        check_box(box, f"box of object {index + 1}") if box is not None else None if mask is None else mask_box(mask)
        for index, (mask, box) in enumerate(zip(found, boxes, strict=True))
    ]
    return Drawing(tuple(places), tuple(found))


def write_drawing(drawing: Drawing, phrases: list[str]) -> str:
    """The JSON that the browser draws: boxes and masks, and the phrases that stand beside them."""
    masks = [None if mask is None else _encode_mask(mask) for mask in drawing.masks]
    return json.dumps({"boxes": list(drawing.boxes), "masks": masks, "phrases": phrases})


def _decode_mask(text: Any, index: int) -> torch.Tensor | None:
    """A mask, or None where nothing is painted."""
    name = f"mask of object {index + 1}"
    if not isinstance(text, str) or not text.startswith(_PNG_START):
        raise RegionError(f"`{name}` must be a PNG, got {shown_value(text)}.")
    try:
        content = base64.b64decode(text.removeprefix(_PNG_START), validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            if picture.size != (CANVAS_SIDE, CANVAS_SIDE):
                raise RegionError(f"`{name}` must have sides of {CANVAS_SIDE} pixels, got {picture.size}.")
            alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
    except ObjectComposeError:
        raise
    except (binascii.Error, OSError, ValueError, SyntaxError) as error:
        raise RegionError(f"`{name}` must be a readable PNG: {error}.") from None
    return torch.from_numpy((alpha >= 128).astype(np.float32)) if (alpha >= 128).any() else None


def _encode_mask(mask: torch.Tensor) -> str:
    """A mask of any size as a PNG of the canvas' size: white, with the mask as alpha."""
    alpha = Image.fromarray((np.asarray(mask) * 255).astype(np.uint8))
    alpha = alpha.resize((CANVAS_SIDE, CANVAS_SIDE), Image.Resampling.NEAREST)
    picture = Image.new("RGBA", alpha.size, "white")
    picture.putalpha(alpha)
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return _PNG_START + base64.b64encode(content.getvalue()).decode()


def canvas_component(gradio: Any, value: str) -> Any:
    """The component; its value is the JSON of `write_drawing`, its event `input` says that the user drew.

    Args:
        gradio: the module.
        value: what is drawn at first.
    """
    chips = "".join(
        f'<button type="button" data-object="{index}" style="--own: {colour}">{index + 1}</button>'
        for index, colour in enumerate(OBJECT_COLOURS)
    )
    return gradio.HTML(
        value=value,
        html_template=_TEMPLATE.replace("CHIPS", chips).replace("SIDE", str(CANVAS_SIDE)),
        css_template=_STYLE,
        js_on_load=_SCRIPT.replace("COLOURS", json.dumps(OBJECT_COLOURS)).replace("SIDE", str(CANVAS_SIDE)),
        apply_default_css=False,
        elem_id="drawing",
    )


_TEMPLATE = """
<div class="tools">CHIPS
<span class="gap"></span>
<button type="button" data-tool="box">box</button><button type="button" data-tool="brush">mask</button>
<button type="button" data-tool="clear">clear</button></div>
<canvas width="SIDE" height="SIDE"></canvas>
"""

_STYLE = """
.tools { display: flex; flex-wrap: wrap; gap: 3px; align-items: center; margin-bottom: 6px; }
.tools .gap { flex: 1; }
.tools button { padding: 1px 6px; font-size: 12px; border: 1px solid var(--border-color-primary); border-radius: 5px;
  background: var(--background-fill-primary); cursor: pointer; }
.tools button[data-object] { border-color: var(--own); color: var(--own); font-weight: 600; }
.tools button[data-object].chosen { background: var(--own); color: white; }
.tools button[data-tool].chosen { background: var(--neutral-700); color: white; }
canvas { width: 100%; aspect-ratio: 1; border-radius: 5px; border: 1px solid var(--border-color-primary);
  touch-action: none; cursor: crosshair; background: white; display: block; }
"""

# Only `element`, `props`, `trigger` and `watch` come from gradio.
_SCRIPT = """
const colours = COLOURS, side = SIDE, brushWidth = side / 10;
const layers = colours.map(() => Object.assign(document.createElement("canvas"), {width: side, height: side}));
let state = {boxes: colours.map(() => null), masks: colours.map(() => null), phrases: colours.map(() => "")};
let chosen = 0, tool = "box", start = null, last = null, draft = null, written = null;

const surface = () => element.querySelector("canvas");
const wipe = (index) => layers[index].getContext("2d").clearRect(0, 0, side, side);

function point(event) {
  const frame = surface().getBoundingClientRect();
  const inside = (value) => Math.min(Math.max(value, 0), 1);
  return [inside((event.clientX - frame.left) / frame.width), inside((event.clientY - frame.top) / frame.height)];
}

function redraw() {
  const pen = surface().getContext("2d");
  pen.clearRect(0, 0, side, side);
  pen.strokeStyle = "#eeeeee";
  pen.lineWidth = 1;
  for (let place = side / 8; place < side; place += side / 8) {
    pen.beginPath();
    pen.moveTo(place, 0); pen.lineTo(place, side); pen.moveTo(0, place); pen.lineTo(side, place);
    pen.stroke();
  }
  colours.forEach((colour, index) => {
    const box = index === chosen && draft ? draft : state.boxes[index];
    pen.globalAlpha = 0.45;
    pen.drawImage(layers[index], 0, 0);
    pen.fillStyle = colour;
    if (!box) { pen.globalAlpha = 1; return; }
    const [x, y, width, height] = [box[0], box[1], box[2] - box[0], box[3] - box[1]].map((value) => value * side);
    pen.globalAlpha = 0.14;
    if (!state.masks[index]) pen.fillRect(x, y, width, height);
    pen.globalAlpha = 1;
    pen.strokeStyle = colour;
    pen.lineWidth = index === chosen ? 2.5 : 1.5;
    pen.strokeRect(x, y, width, height);
    pen.font = "600 12px sans-serif";
    pen.fillText((index + 1) + " " + (state.phrases[index] || ""), x + 5, y + 15);
  });
  element.querySelectorAll("[data-object]").forEach((button) =>
    button.classList.toggle("chosen", Number(button.dataset.object) === chosen));
  element.querySelectorAll("[data-tool]").forEach((button) =>
    button.classList.toggle("chosen", button.dataset.tool === tool));
}

function paint(from, to) {
  const pen = layers[chosen].getContext("2d");
  pen.strokeStyle = colours[chosen];
  pen.lineWidth = brushWidth;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(from[0] * side, from[1] * side);
  pen.lineTo(to[0] * side + 0.01, to[1] * side);
  pen.stroke();
}

function paintedBox(index) {
  const alpha = layers[index].getContext("2d").getImageData(0, 0, side, side).data;
  let box = null;
  for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) {
    if (alpha[4 * (y * side + x) + 3] < 128) continue;
    box = box || [x, y, x + 1, y + 1];
    box = [Math.min(box[0], x), Math.min(box[1], y), Math.max(box[2], x + 1), Math.max(box[3], y + 1)];
  }
  return box && [...box.slice(0, 2).map((value) => Math.floor(value / side * 100) / 100),
    ...box.slice(2).map((value) => Math.ceil(value / side * 100) / 100)];
}

function handOver() {
  written = JSON.stringify(state);
  props.value = written;
  redraw();
  trigger("input");
}

function read() {
  if (!props.value || props.value === written) { redraw(); return; }
  state = JSON.parse(props.value);
  written = props.value;
  state.masks.forEach((mask, index) => {
    wipe(index);
    if (!mask) return;
    const picture = new Image();
    picture.onload = () => {
      const pen = layers[index].getContext("2d");
      pen.drawImage(picture, 0, 0);
      pen.globalCompositeOperation = "source-in";  // the mask's shape in the object's colour
      pen.fillStyle = colours[index];
      pen.fillRect(0, 0, side, side);
      pen.globalCompositeOperation = "source-over";
      redraw();
    };
    picture.src = mask;
  });
  redraw();
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.object) chosen = Number(button.dataset.object);
  else if (button.dataset.tool === "clear") {
    state.boxes[chosen] = state.masks[chosen] = null;
    wipe(chosen);
    handOver();
  } else tool = button.dataset.tool;
  redraw();
});

element.addEventListener("pointerdown", (event) => {
  if (event.target !== surface()) return;
  event.preventDefault();
  surface().setPointerCapture(event.pointerId);
  start = last = point(event);
  if (tool === "brush") { if (!state.masks[chosen]) state.boxes[chosen] = null; paint(start, start); redraw(); }
});

element.addEventListener("pointermove", (event) => {
  if (!start) return;
  const here = point(event);
  if (tool === "brush") paint(last, here);
  else {
    const around = [Math.min(start[0], here[0]), Math.min(start[1], here[1]),
      Math.max(start[0], here[0]), Math.max(start[1], here[1])];
    draft = around.map((value) => Math.round(value * 100) / 100);
  }
  last = here;
  redraw();
});

element.addEventListener("pointerup", () => {
  if (!start) return;
  start = null;
  if (tool === "brush") {
    state.masks[chosen] = layers[chosen].toDataURL("image/png");
    state.boxes[chosen] = paintedBox(chosen);
  } else {
    const box = draft;
    draft = null;
    if (!box || box[2] - box[0] < 0.02 || box[3] - box[1] < 0.02) { redraw(); return; }  // a click, not a box
    state.masks[chosen] = null;
    wipe(chosen);
    state.boxes[chosen] = box;
  }
  handOver();
});

watch("value", read);
read();
"""
