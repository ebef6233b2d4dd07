"""Hub files load with `custom_pipeline=` where the package cannot be imported, and compute the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from objectcompose.pipelines import hub
from objectcompose.pipelines.pipeline_token_compose import TokenComposePipeline
from tests.tiny import tiny_components


ALONE = """
import importlib.abc, json, sys, warnings
import numpy as np, torch

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "objectcompose":
            raise ModuleNotFoundError(f"no {name} here")

sys.meta_path.insert(0, Blocked())
base, code, saved = sys.argv[1:4]
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=code, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
options = dict(num_inference_steps=2, output_type="np", height=32, width=48, return_attention=True)
output = pipe("a cat and a dog", objects=[{"phrase": "cat"}, {"phrase": "dog"}],
              generator=torch.Generator().manual_seed(3), **options)
maps = {f"map-{phrase}": value.numpy() for phrase, value in output.attention[0].items()}
np.savez(saved, images=output.images, **maps)
try:
    pipe("a cat", objects=[{"phrase": "dog"}], **options)
except ValueError as error:
    refused = type(error).__name__
print(json.dumps({
    "class": type(pipe).__name__, "module": type(pipe).__module__, "refused": refused,
    "package": [name for name in sys.modules if name.partition(".")[0] == "objectcompose"],
}))
"""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    StableDiffusionPipeline(**tiny_components("sd1"), requires_safety_checker=False).save_pretrained(folder)
    return folder


def test_committed_hub_files_are_current():
    for path, source in hub.hub_sources().items():
        committed = hub.HUB_FOLDER / path
        assert committed.is_file() and committed.read_text(encoding="utf-8") == source, "run `make hub-files`"


def test_token_compose_loads_and_runs_without_the_package(base_folder, tmp_path):
    code = hub.HUB_FOLDER / "pipeline_token_compose"
    saved = tmp_path / "alone.npz"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(base_folder), str(code), str(saved)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["class"] == "TokenComposePipeline" and said["module"].startswith("diffusers_modules")
    assert said["package"] == [] and said["refused"] == "PhraseNotFoundError"
    assert "Expected types" not in done.stderr, done.stderr

    pipe = TokenComposePipeline.from_pretrained(base_folder)
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    expected = pipe(
        "a cat and a dog", objects=[{"phrase": "cat"}, {"phrase": "dog"}], num_inference_steps=2, output_type="np",
        height=32, width=48, return_attention=True, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    with np.load(saved) as alone:
        np.testing.assert_allclose(alone["images"], expected.images, atol=1e-6)
        for phrase, value in expected.attention[0].items():
            np.testing.assert_allclose(alone[f"map-{phrase}"], value.numpy(), atol=1e-6)


def test_custom_pipeline_needs_the_trust_flag(base_folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(
            base_folder, custom_pipeline=str(Path(hub.HUB_FOLDER) / "pipeline_token_compose")
        )
