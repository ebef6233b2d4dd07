"""The Python lines that repeat what the page painted: everything in the open, no helper of the page."""

from __future__ import annotations

import json

from objectcompose.adapters.unet_delta import DELTA_NAME
from objectcompose.examples.app_methods import METHODS, PageMethod, PaintRequest
from objectcompose.layout import load_layout


def python_lines(request: PaintRequest, device: str) -> str:
    """A program that paints the very picture of a request and saves it as `picture.png`.

    Args:
        request: what was painted; its layout file must still be there when the program runs.
        device: where the page painted; on another one the last bits may differ.

    Returns:
        Python source. `output` is what the pipeline returns.

    Raises:
        LayoutError: the layout file is gone.
    """
    method = METHODS[request.method]
    layout = load_layout(request.layout_file)
    arguments = {name: repr(value) for name, value in request.call_arguments(layout).items()}
    if layout.objects:
        arguments = {"objects": "layout.objects", **arguments}
    arguments["generator"] = f'torch.Generator("cpu").manual_seed({request.seed})'
    return "\n".join(
        [
            *_imports(method),
            "",
            f"layout = load_layout({json.dumps(request.layout_file.as_posix(), ensure_ascii=False)})",
            *_loading(method, device),
            "output = pipe(",
            "    layout.prompt,",
            *(f"    {name}={value}," for name, value in arguments.items()),
            ")",
            'output.images[0].save("picture.png")',
            "",
        ]
    )


def _imports(method: PageMethod) -> list[str]:
    public = {"delta": ["UNetDelta"], "instances": ["load_instances"]}.get(method.kind or "", [])
    names = [
        f"from objectcompose import {', '.join(sorted(['load_layout', *public]))}",
        "from objectcompose.pipelines.checkpoints import load_checkpoint",
    ]
    if method.weights is not None:
        names.append("from objectcompose.toybox.weights import toybox_path")
    return ["import torch", "", *names]


def _loading(method: PageMethod, device: str) -> list[str]:
    """As `load_method` does it."""
    options = [f'device="{device}"']
    if method.pipeline != "token-compose":
        options.append(f'pipeline="{method.pipeline}"')
    if method.kind == "adapter":
        options.append(f'adapter=str(toybox_path("{method.weights}"))')
    lines = [f"pipe = load_checkpoint({', '.join(options)})"]
    if method.kind == "delta":
        lines += [
            f'tuning = UNetDelta.load(toybox_path("{method.weights}") / "{DELTA_NAME}")',
            "tuning.attach(pipe.unet)",
        ]
    if method.kind == "instances":
        lines.append(f'load_instances(pipe, toybox_path("{method.weights}"))')
    return lines
