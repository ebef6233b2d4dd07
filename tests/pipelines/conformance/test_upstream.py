"""Diffusers' own pipeline tests on our pipelines, where a checkout of diffusers is at hand.

    OBJECTCOMPOSE_DIFFUSERS_CHECKOUT=../diffusers pytest tests/pipelines/conformance/test_upstream.py

The tests folder of that checkout is imported under another name, so that it cannot clash with ours. Three
concessions: pickled weights load without being asked for, `encode_prompt`'s test finds our class among diffusers'
pipelines, and its arguments are completed as diffusers does for Stable Diffusion.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import diffusers.pipelines
import pytest

from tests.pipelines.conformance.rows import ROWS, Row, generators


CHECKOUT = os.environ.get("OBJECTCOMPOSE_DIFFUSERS_CHECKOUT")
if not CHECKOUT:
    pytest.skip("OBJECTCOMPOSE_DIFFUSERS_CHECKOUT names no checkout of diffusers", allow_module_level=True)


def import_upstream() -> ModuleType:
    """The checkout's `tests` as the package `upstream_tests`."""
    root = Path(str(CHECKOUT)) / "tests"
    name, start = "upstream_tests", root / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, start, submodule_search_locations=[str(root)])
    if spec is None or spec.loader is None or not start.is_file():
        raise FileNotFoundError(f"OBJECTCOMPOSE_DIFFUSERS_CHECKOUT {CHECKOUT!r} has no tests/__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


import_upstream()
upstream = importlib.import_module("upstream_tests.pipelines.testing_utils")
upstream_params = importlib.import_module("upstream_tests.pipelines.pipeline_params")
MIXINS = [getattr(upstream, name) for name in ("PipelineTesterMixin", "MemoryTesterMixin") if hasattr(upstream, name)]


class RowConfig(upstream.BasePipelineTesterConfig):
    """What diffusers' mixins ask of a test class, answered by a row."""

    row: Row
    output_shape = (3, 32, 32)
    # by the names of newer and of older checkouts
    required_input_params_in_call_signature = params = upstream_params.TEXT_TO_IMAGE_PARAMS
    batch_input_params = batch_params = upstream_params.TEXT_TO_IMAGE_BATCH_PARAMS

    def get_dummy_components(self):
        return self.row.components()

    def get_dummy_inputs(self, device="cpu", seed=1):
        return {
            "prompt": self.row.scenes[0].prompt,
            "generator": generators(1, seed)[0],
            "num_inference_steps": 2,
            "guidance_scale": 6.0,
            "output_type": "pt",
        }

    @pytest.fixture(autouse=True)
    def pickles_are_loaded(self, monkeypatch):
        strict = self.pipeline_class.from_pretrained

        @functools.wraps(strict)
        def lenient(cls, source, **options):
            return strict(source, **{"use_safetensors": None, **options})

        monkeypatch.setattr(self.pipeline_class, "from_pretrained", classmethod(lenient))

    @pytest.fixture(autouse=True)
    def class_is_found_by_its_name(self, monkeypatch):
        monkeypatch.setattr(diffusers.pipelines, self.pipeline_class.__name__, self.pipeline_class, raising=False)

    def test_encode_prompt_works_in_isolation(self):
        arguments = {"device": "cpu", "do_classifier_free_guidance": True}
        super().test_encode_prompt_works_in_isolation(arguments)


for row in ROWS.values():
    class_name = f"TestUpstream{row.pipeline_class.__name__}"
    members = {"row": row, "pipeline_class": row.pipeline_class, "__module__": __name__}
    globals()[class_name] = type(class_name, (RowConfig, *MIXINS), members)
