"""Push, load, push again, in fresh processes against a Hub stand-in, with and without the package: see `hub_child`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.hub_server import HubServer, Repository
from tests.package.hub_child import CASES


ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Path(__file__).with_name("pipeline_layer_branch.py")
REFERENCE = str(ROOT / "toybox" / "pictures" / "fluent" / "apple.png")
# Each pipeline adds one row; `LayerBranchPipeline` stands for those with an adapter.
ROWS = {
    "token_compose": {
        "module": "objectcompose.pipelines.pipeline_token_compose",
        "class_name": "TokenComposePipeline",
        "arguments": {"prompt": "a cat and a dog", "objects": [{"phrase": "cat"}]},
        "adapter": None,
    },
    "locref": {
        "module": "objectcompose.pipelines.pipeline_locref",
        "class_name": "LocRefPipeline",
        "arguments": {"prompt": "a cat and a dog"},
        "adapter": "objectcompose.adapters.locref_adapter:LocRefAdapter",
        "adapter_arguments": {"objects": [{"phrase": "cat", "image": REFERENCE, "box": [0.1, 0.2, 0.6, 0.9]}]},
        "image_encoder": True,
    },
    "mifo": {
        "module": "objectcompose.pipelines.pipeline_mifo",
        "class_name": "MIFOPipeline",
        "arguments": {
            "prompt": "a cat and a dog",
            "objects": [
                {"phrase": "cat", "box": [0.1, 0.2, 0.5, 0.9]},
                {"phrase": "dog", "box": [0.5, 0.1, 0.9, 0.9]},
            ],
        },
        "adapter": None,
    },
    "object_prompt": {
        "module": "objectcompose.pipelines.pipeline_object_prompt",
        "class_name": "ObjectPromptPipeline",
        "arguments": {"prompt": "a cat and a dog"},
        "adapter": "objectcompose.adapters.object_prompt_adapter:ObjectPromptAdapter",
        "adapter_arguments": {"objects": [{"phrase": "cat", "image": REFERENCE}]},
        "image_encoder": True,
    },
    "layer_branch": {
        "module": "objectcompose.pipelines.pipeline_layer_branch",
        "class_name": "LayerBranchPipeline",
        "arguments": {"prompt": "a cat and a dog"},
        "adapter": "objectcompose.adapters.layer_adapter:LayerAdapter",
        "adapter_arguments": {"image_tokens": [1, 3, 22]},
    },
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def package_copy(tmp_path_factory) -> Path:
    """A folder with a copy of the package that has one pipeline more, its hub file built as `make hub-files` does."""
    folder = tmp_path_factory.mktemp("copy")
    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for name, room in rooms.items():
        target = folder / name.replace(".", "/")
        target.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / room).glob("*.py"):
            shutil.copy(path, target)
    shutil.copy(SAMPLE, folder / "objectcompose" / "pipelines")
    build = [sys.executable, "-P", "-m", "objectcompose.pipelines.hub"]
    done = subprocess.run(build, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module", params=ROWS)
def outcomes(request, package_copy, tmp_path_factory) -> dict[str, str]:
    """Case -> "" or a traceback, of all three stages of one pipeline."""
    work = tmp_path_factory.mktemp(request.param)
    (work / "package").symlink_to(package_copy)
    said: dict[str, str] = {}
    with HubServer() as hub:
        hub.repositories["stabilityai/stable-diffusion-2-1"] = Repository(is_gated=True)
        for stage in CASES:
            path = os.pathsep.join([str(package_copy), str(ROOT)])
            environment = {
                **os.environ,
                **hub.environment(work / "home"),
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1" if stage == "offline" else "0",
                # nothing but the stand-in may be reached
                "HTTPS_PROXY": "http://127.0.0.1:9",
                "https_proxy": "http://127.0.0.1:9",
            }
            done = subprocess.run(
                [sys.executable, "-P", str(Path(__file__).with_name("hub_child.py")), stage, str(work)],
                env=environment, cwd=work, input=json.dumps(ROWS[request.param]), capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            said |= json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize("name", [name for stage in CASES.values() for name in stage])
def test_case(outcomes, name):
    assert not outcomes[name], outcomes[name]
