"""The methods that the page offers: what each reads, its weights in toybox, and one call of it.

What a call is made of stands here once: the page paints with it and `app_code` writes it out, so that the lines which
a user copies do what the page did.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from objectcompose.adapters.unet_delta import DELTA_NAME, UNetDelta
from objectcompose.errors import CheckpointError, LayoutError, ObjectComposeError
from objectcompose.files import write_atomically
from objectcompose.grounding.grounder import usable_device
from objectcompose.layout import Layout, load_layout, save_layout
from objectcompose.layout_fields import shown_value
from objectcompose.pipelines.call_checks import check_number
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.pipelines.learned_instances import load_instances
from objectcompose.pipelines.pipeline_output import ComposeOutput
from objectcompose.pipelines.plot import draw_layout, overlay_map
from objectcompose.toybox.weights import toybox_path


MAX_STEPS = 100  # a page that others use must not be kept busy by one of them
_SHOWN_SIDE = 256  # of overlays in pixels: lines and names cannot be read on toybox's own 64


@dataclass(frozen=True)
class PageMethod:
    """One method of the page.

    Attributes:
        title: as it is called.
        note: what it does with the objects, in one sentence.
        pipeline: its name in `objectcompose.pipelines.checkpoints.PIPELINES`.
        weights: its folder of toybox; None: it needs none beside the base.
        kind: of these weights: an adapter of the pipeline, a delta of the UNet, or instances that MIFO learned.
        reads_pictures: whether reference pictures change anything.
        options: further arguments of its calls.
    """

    title: str
    note: str
    pipeline: str
    weights: str | None = None
    kind: Literal["adapter", "delta", "instances"] | None = None
    reads_pictures: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, PageMethod] = {
    "plain": PageMethod("Plain", "The prompt alone, as Stable Diffusion does it.", "token-compose"),
    "tokencompose": PageMethod(
        "TokenCompose",
        "The prompt alone, with a UNet tuned so that each noun looks at its own object.",
        "token-compose",
        "tokencompose",
        "delta",
    ),
    "locref": PageMethod(
        "LocRef",
        "Objects with a box and a reference picture appear there and look so; others are left to the prompt.",
        "locref",
        "locref",
        "adapter",
        True,
    ),
    "object-prompt": PageMethod(
        "ObjectPrompt",
        "Every object has a reference picture; where it goes is left to the model.",
        "object-prompt",
        "object_prompt",
        "adapter",
        True,
    ),
    "mifo": PageMethod(
        "MIFO", "Every object has a phrase and a box or mask, and is kept inside it by box control.", "mifo"
    ),
    "mifo-learned": PageMethod(
        "MIFO, learned",
        "The same, with the words <asset0>, <asset1>, ... for what was learned from one picture.",
        "mifo",
        "mifo",
        "instances",
    ),
}


def offered_methods() -> dict[str, PageMethod]:
    """Those of `METHODS` whose weights toybox has."""
    return {key: method for key, method in METHODS.items() if method.weights is None or _is_there(method.weights)}


def _is_there(name: str) -> bool:
    try:
        return any(toybox_path(name).rglob("*.safetensors"))
    except CheckpointError:
        return False


def load_method(method: PageMethod, device: str | None = None) -> Any:
    """The method's pipeline with toybox's base and the method's weights.

    Raises:
        CheckpointError: weights are missing or broken.
    """
    adapter = str(toybox_path(method.weights)) if method.weights and method.kind == "adapter" else None
    pipeline = load_checkpoint(device=device, pipeline=method.pipeline, adapter=adapter)
    if method.weights and method.kind == "delta":
        UNetDelta.load(toybox_path(method.weights) / DELTA_NAME).attach(pipeline.unet)
    if method.weights and method.kind == "instances":
        load_instances(pipeline, toybox_path(method.weights))
    return pipeline


@dataclass(frozen=True)
class PaintRequest:
    """One press of the button.

    Args:
        method: key of `METHODS`.
        layout_file: what to paint, as `keep_layout` wrote it.
        steps: of denoising, 1 to `MAX_STEPS`.
        guidance: guidance scale, at least 0.
        seed: at least 0, below 2**63.

    Raises:
        ObjectComposeError: a value out of range.
    """

    method: str
    layout_file: Path
    steps: int = 20
    guidance: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ObjectComposeError(f"`method` must be one of {', '.join(METHODS)}, got {shown_value(self.method)}.")
        for name, low, high in (("steps", 1, MAX_STEPS), ("seed", 0, 2**63 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ObjectComposeError(f"`{name}` must be a whole number from {low} to {high}, got {value!r}.")
        check_number("guidance", self.guidance, minimum=0.0)

    def call_arguments(self, layout: Layout) -> dict[str, Any]:
        """Arguments of the pipeline's call beside prompt, objects and generator; plain values."""
        has_phrases = any(item.phrase or item.token for item in layout.objects)
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": float(self.guidance),
            **({"return_attention": True} if has_phrases else {}),
            **(METHODS[self.method].options if layout.objects else {}),
        }


@dataclass(frozen=True)
class Painting:
    """What a request gave.

    Attributes:
        picture: as the pipeline returned it.
        overlay: the picture, enlarged, with the layout on it.
        maps: per object with a phrase the enlarged picture with its attention, and the phrase.
        unused: fields of objects that the method could not use.
        seconds: that painting took, without loading.
    """

    picture: Image.Image
    overlay: Image.Image
    maps: list[tuple[Image.Image, str]]
    unused: tuple[str, ...]
    seconds: float


class Workshop:
    """Paints for the page, one picture at a time; pipelines are loaded when first used, and stay.

    Args:
        device: where they run; None: "cuda" where there is one, else "cpu".

    Raises:
        ObjectComposeError: the device cannot be used.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = str(usable_device(device, "--device"))
        self._pipelines: dict[str, Any] = {}
        self._lock = threading.Lock()  # a call changes the pipeline's attention while it runs

    def paint(self, request: PaintRequest, on_step: Callable[[int, int], Any] | None = None) -> Painting:
        """Paint one request.

        Args:
            request: what.
            on_step: called after each step with the number of steps done and of all steps.

        Raises:
            ObjectComposeError: the method cannot use the layout, or its weights are missing.
        """
        layout = load_layout(request.layout_file)
        arguments = request.call_arguments(layout)

        def count_step(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step + 1, request.steps)
            return tensors

        with self._lock:
            if request.method not in self._pipelines:
                self._pipelines[request.method] = load_method(METHODS[request.method], self.device)
                self._pipelines[request.method].set_progress_bar_config(disable=True)
            started = time.perf_counter()
            output = self._pipelines[request.method](
                layout.prompt,
                objects=layout.objects or None,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                callback_on_step_end=count_step,
                **arguments,
            )
            seconds = time.perf_counter() - started
        return _painting(output, layout, seconds)


def _painting(output: ComposeOutput, layout: Layout, seconds: float) -> Painting:
    picture = output.images[0]
    large = picture.resize((_SHOWN_SIDE, _SHOWN_SIDE * picture.height // picture.width), Image.Resampling.BICUBIC)
    placed = output.objects[0] if output.objects else []
    maps = output.attention[0] if output.attention else {}
    return Painting(
        picture,
        draw_layout(large, layout.objects),
        [(overlay_map(large, maps[item.label], item.box), item.label) for item in placed if item.label in maps],
        tuple(sorted({name for item in placed for name in item.unused})),
        seconds,
    )


def keep_layout(layout: Layout, folder: Path) -> Path:
    """Write a layout under a name made of its content; equal layouts share a file, and all share their pictures.

    Raises:
        LayoutError: the folder cannot be written.
    """
    last = folder / "layout.json"
    save_layout(layout, last)
    try:
        content = last.read_bytes()
        kept = folder / f"layout-{hashlib.sha256(content).hexdigest()[:12]}.json"
        write_atomically(kept, content)
    except OSError as error:
        raise LayoutError(
            f"`--out` must be a folder that can be written, got {shown_value(folder)}: {error}."
        ) from None
    return kept
