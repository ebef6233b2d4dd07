"""One row of `test_hub_roundtrip.py`, as its child processes see it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


PACKAGE = "objectcompose"


class Row:
    """One pipeline: where its class is, its adapter's class, and what a call is given.

    With an adapter the call is also given `adapter_arguments`; `image_tokens` among them is a shape. `image_encoder`
    says whether the pipeline has one.
    """

    def __init__(
        self,
        work: Path,
        module: str,
        class_name: str,
        arguments: dict[str, Any],
        adapter: str | None = None,
        adapter_arguments: dict[str, Any] | None = None,
        image_encoder: bool = False,
    ):
        self.work, self.module, self.class_name, self.arguments = work, module, class_name, arguments
        self.adapter, self.adapter_arguments, self.image_encoder = adapter, adapter_arguments or {}, image_encoder
        self.repo = f"tester/{class_name.lower()}"
        self.code_folder = Path(work) / "package" / PACKAGE / "pipelines" / "hub_files" / module.rpartition(".")[2]
        self.notes: dict[str, Any] = {}  # what one case leaves for a later one of the same stage

    @property
    def pipeline_class(self) -> Any:
        return getattr(importlib.import_module(self.module), self.class_name)

    @property
    def adapter_class(self) -> Any:
        module, _, name = str(self.adapter).partition(":")
        return getattr(importlib.import_module(module), name)

    def picture(self, pipeline: Any) -> Any:
        import torch

        pipeline.set_progress_bar_config(disable=True)
        arguments = dict(self.arguments)
        if self.adapter and pipeline.adapter is not None:
            arguments |= self.adapter_arguments
        if "image_tokens" in arguments:
            arguments["image_tokens"] = torch.randn(
                *arguments["image_tokens"], generator=torch.Generator().manual_seed(9)
            )
        generator = torch.Generator().manual_seed(3)
        return pipeline(**arguments, generator=generator, num_inference_steps=2, output_type="np").images

    def expect(self, pipeline: Any, name: str = "main") -> None:
        """The pipeline paints what the one that was pushed under this name painted."""
        import numpy as np

        found, wanted = self.picture(pipeline), np.load(self.work / f"{name}.npy")
        np.testing.assert_allclose(found, wanted, atol=2e-2 if name == "fp16" else 1e-5)
