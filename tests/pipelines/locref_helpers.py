"""A LocRefPipeline on tiny components, and objects for it."""

from __future__ import annotations

import torch

from objectcompose.adapters.locref_adapter import LocRefAdapter
from objectcompose.layout import SceneObject
from objectcompose.pipelines.pipeline_locref import LocRefPipeline
from tests.pipelines.conformance.rows import picture
from tests.pipelines.helpers import quiet, sample
from tests.tiny import tiny_components, tiny_image_encoder


PROMPT = "a dog and a corgi"
DOG = SceneObject(phrase="dog", image=picture("red"), box=(0.0, 0.1, 0.6, 0.8))
CORGI = SceneObject(phrase="corgi", image=picture("blue", 9, 17), box=(0.4, 0.2, 1.0, 1.0), order=1)


def locref(adapter_options=None, **changes):
    """A pipeline on tiny components with an adapter whose streams differ from one another and from the text's."""
    components = {**tiny_components(), "image_encoder": tiny_image_encoder(), **changes}
    if "adapter" not in components:
        torch.manual_seed(11)
        options = {"image_encoder": tiny_image_encoder(), "num_tokens": 3, **(adapter_options or {})}
        adapter = LocRefAdapter.from_unet(components["unet"], "tester/base", **options)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        components["adapter"] = adapter
    return quiet(LocRefPipeline(**components))


def images(pipeline, objects, **arguments):
    return sample(pipeline, arguments.pop("prompt", PROMPT), objects=objects, **arguments).images
