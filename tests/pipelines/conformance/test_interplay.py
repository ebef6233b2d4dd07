"""What users of diffusers put beside a pipeline: LoRA files, learned tokens, checkpointing, compilation."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.pipelines.conformance.rows import ROWS, generators, picture
from tests.pipelines.conformance.test_calls import plain_call
from tests.pipelines.conformance.test_swaps import assert_same_method
from tests.pipelines.helpers import seeded
from tests.tiny import TEXT_WIDTH


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def lora_files(row, tmp_path):
    """Folders of two LoRAs of the row's UNet, as diffusers saves them."""
    peft = pytest.importorskip("peft")
    folders = []
    for seed in (1, 2):
        unet = row.build().unet
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
        folders.append(tmp_path / f"lora-{seed}")
        layers = peft.get_peft_model_state_dict(unet)
        StableDiffusionPipeline.save_lora_weights(folders[-1], unet_lora_layers=layers)
    return folders


def test_lora_files_loaded_scaled_two_at_once_and_fused(row, lora_files):
    plain, pipeline = row.build_both()
    expected = row.call(pipeline)
    for name, folder in zip("ab", lora_files, strict=True):
        pipeline.load_lora_weights(folder, adapter_name=name)

    pipeline.set_adapters(["a", "b"], [0.7, 0.3])
    both = row.call(pipeline)
    pipeline.set_adapters("a", 0.7)
    one = row.call(pipeline)
    assert not torch.equal(both.images, one.images) and not torch.equal(one.images, expected.images)
    assert torch.equal(plain_call(plain), plain_call(pipeline))  # one UNet, so both have it
    pipeline.set_adapters(["a", "b"], [0.0, 0.0])
    assert_same_method(row.call(pipeline), expected)

    pipeline.set_adapters(["a", "b"], [0.7, 0.3])
    pipeline.fuse_lora(components=["unet"], adapter_names=["a", "b"])
    pipeline.unload_lora_weights()
    assert_same_method(row.call(pipeline), both)


def test_learned_tokens_of_several_vectors(row):
    """A placeholder that stands for two embeddings is an object like any other."""
    pipeline = row.build()
    pipeline.load_textual_inversion(2 * torch.randn(2, TEXT_WIDTH, generator=seeded(8)), token="<pet>")
    scene = row.scenes[0]
    objects = [{**entry, "phrase": "<pet>"} if entry.get("phrase") == "dog" else entry for entry in scene.objects]
    output = row.call(pipeline, prompt=[scene.prompt.replace("dog", "<pet>")], objects=[objects])
    assert torch.isfinite(output.images).all()
    placed = output.objects[0][0]
    assert placed.label == "<pet>" and len(placed.token_indices) == 2
    if output.attention is not None:
        assert float(output.attention[0]["<pet>"].sum()) > 0
    assert not torch.equal(output.images, row.call(pipeline).images)


def test_gradient_checkpointing_changes_nothing(row):
    pipeline = row.build()
    expected = row.call(pipeline)
    pipeline.unet.enable_gradient_checkpointing()
    assert_same_method(row.call(pipeline), expected)


@pytest.mark.slow
def test_compiled_unet(row):
    """Whole graphs, and none that a second call, with other pictures of its objects, needs anew."""
    torch._dynamo.reset()
    pipeline = row.build()
    expected = row.call(pipeline)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    pipeline.unet.compile(backend=count, fullgraph=True)
    assert_same_method(row.call(pipeline), expected)
    built = len(graphs)
    assert built > 0
    assert_same_method(row.call(pipeline), expected)
    if row is not ROWS["mifo"]:  # whose refined masks are others in each picture, and so are the graph's sizes
        objects = row.scenes[0].objects
        other = [{**entry, "image": picture("white")} if "image" in entry else entry for entry in objects]
        row.call(pipeline, objects=[other], generator=generators(1, first=5))
    assert len(graphs) == built, "something was compiled again"
    torch._dynamo.reset()
