"""The parts of the MIFO recipe: one scene under one arm each, so that several may run at once and none runs twice.

A part trains or paints into a folder of its own and leaves its rows in `rows.json`, last. Models that only look are
loaded once per process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from benchmarks.recipes.common import GUIDANCE, STEPS, Options, Row, best_device, command_line, keep_plan
from benchmarks.recipes.mifo_metrics import ATTENTION, LEARNING, PRIOR, STAGE2, SYNTHESIS
from objectcompose.evaluation.attention_iou import AttentionMaps, MaskedCaption, map_scores
from objectcompose.evaluation.disentangle import paint_case, score_pictures
from objectcompose.evaluation.disentangle_cases import TOYBOX_TEMPLATES, editing_prompts, toybox_case
from objectcompose.evaluation.disentangle_scorer import DisentangleScorer
from objectcompose.evaluation.toybox_instance_scenes import ToyboxInstances, toybox_instances
from objectcompose.files import write_atomically
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.pipelines.learned_instances import load_instances
from objectcompose.toybox.weights import active_preset
from objectcompose.training import learn_mifo
from objectcompose.training.grounded_captions import CaptionSample
from objectcompose.training.mifo_losses import learning_layers


#: What the learning arms differ by.
ATTENTION_LOSSES: dict[str, Options] = {
    "none": {"attention_loss": "none"},
    "reward": {"attention_loss": "reward"},
    "penalty": {"attention_loss": "penalty"},
    "reward_penalty": {"attention_loss": "both"},
    "separate": {"attention_loss": "both", "sampling": "separate"},
}
#: What the synthesis arms call the pipeline with; "full" is what the learning arms are painted with, too.
CONTROLS: dict[str, Row] = {
    "no_control": {"use_box_control": False},
    "in_box": {"box_control": {"penalty": "none"}},
    "full": {},
    "no_decay": {"box_control": {"penalty": "constant"}},
    "no_refinement": {"box_control": {"refine": False}},
    "self_only": {"box_control": {"attention": "self"}},
    "cross_only": {"box_control": {"attention": "cross"}},
}
#: Instances that the synthesis arms paint.
SYNTHESISED = f"reward_penalty{STAGE2}"
#: Found on a dev scene. The defaults of the losses' weights are for Stable Diffusion's maps; toybox's are flatter. Its
#: small UNet needs LoRA on all layers to change colours, which its captions never name.
TOYBOX_LEARNING: Options = {
    "learning_rate": 2e-2,
    "reward_weight": 10.0,
    "penalty_weight": 1.0,
    "train_modules": "lora",
    "lora_layers": "all",
    "lora_rank": 8,
    "seed": 0,
}
#: Stage 2 by the ending of an arm's name. With class pictures a step takes twice as long, so there are half as many.
SECOND_STAGES: dict[str, Options] = {
    STAGE2: {"stage2_learning_rate": 1e-3, "prior_weight": 0.0},
    PRIOR: {
        "stage2_learning_rate": 5e-4,
        "prior_weight": 1.0,
        "class_prompt": "a photo of a car and a dog on the grass",
        "class_pictures": 32,
    },
}
LEARNING_ARMS = tuple(
    f"{name}{ending}"
    for name in ATTENTION_LOSSES
    for ending in ("", *SECOND_STAGES)
    if name != "separate" or not ending
)
MAP_TIMESTEPS, MAP_NOISES = (200, 400), 8


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        arms: of learning.
        controls: arms of synthesis.
        alike, unlike: scenes of each kind.
        steps: of stage 1, the first third of it with the reward where both losses are in turn.
        stage2_steps: of stage 2, half of them where it has class pictures.
        prompts: of toybox's ten.
        rounds: pictures of each.
    """

    arms: tuple[str, ...]
    controls: tuple[str, ...]
    alike: int
    unlike: int
    steps: int
    stage2_steps: int
    prompts: int
    rounds: int


@dataclass(frozen=True)
class Part:
    """One piece of work.

    Attributes:
        case: `LEARNING` or `SYNTHESIS`.
        scene: name of the scene.
        arm: of the case.
        size: of the run.
        out: folder of the run.
        threads: of torch, 0: as it is.
    """

    case: str
    scene: str
    arm: str
    size: Size
    out: Path
    threads: int = 0

    @property
    def folder(self) -> Path:
        """Where the part keeps everything."""
        return self.out / self.scene / (self.arm if self.case == LEARNING else f"{SYNTHESIS}-{self.arm}")


def split_arm(arm: str) -> tuple[str, str]:
    """The loss of a learning arm, and its kind of stage 2: "reward_stage2" is "reward" and "_stage2"."""
    ending = next((one for one in SECOND_STAGES if arm.endswith(one)), "")
    return arm.removesuffix(ending), ending


def chosen_scenes(size: Size) -> list[ToyboxInstances]:
    """The test scenes of a run."""
    scenes = toybox_instances(active_preset(), "test")
    counts = {"alike": size.alike, "unlike": size.unlike}
    return [scene for scene in scenes if int(scene.name.rsplit("-", 1)[1]) < counts[scene.kind]]


def run_part(part: Part) -> list[Row]:
    """The rows of a part, from disk where it is done."""
    path, size = part.folder / "rows.json", part.size
    painted = {"prompts": size.prompts, "rounds": size.rounds, "control": _control(part)}
    learned = replace(part, case=LEARNING, arm=SYNTHESISED) if part.case == SYNTHESIS else part
    keep_plan(part.folder, {**learning_options(learned), **painted})
    if not path.is_file():
        if part.threads:
            torch.set_num_threads(part.threads)
        scene = next(one for one in chosen_scenes(part.size) if one.name == part.scene)
        print(f"== {part.scene}: {part.case} {part.arm}", flush=True)
        if part.case == LEARNING:
            learn(part, scene)
        rows = look(part, scene)
        write_atomically(path, (json.dumps(rows) + "\n").encode())
    return json.loads(path.read_text(encoding="utf-8"))


def learn(part: Part, scene: ToyboxInstances) -> None:
    """Learn the scene's instances; an arm with stage 2 goes on from the stage 1 of the arm without."""
    data, (name, ending) = part.out / part.scene / "data", split_arm(part.arm)
    data.mkdir(parents=True, exist_ok=True)
    scene.save(data)
    if ending:
        first, half = part.folder / "stage1", part.folder / ".stage1"
        if not first.is_dir():
            shutil.rmtree(half, ignore_errors=True)  # of a copy that was broken off
            shutil.copytree(part.out / part.scene / name / "stage1", half)
            half.rename(first)
    code = learn_mifo.main(command_line({**learning_options(part), "data": str(data), "output_dir": str(part.folder)}))
    assert code == 0, f"learning {part.scene} with {part.arm} failed"


def learning_options(part: Part) -> Row:
    """What a part's instances are learned with, all but the folders."""
    size, (name, ending) = part.size, split_arm(part.arm)
    return {
        **TOYBOX_LEARNING,
        **ATTENTION_LOSSES[name],
        **SECOND_STAGES.get(ending, {}),
        "max_train_steps": size.steps,
        "reward_steps": size.steps // 3,
        "stage2_steps": size.stage2_steps // (2 if ending == PRIOR else 1) if ending else 0,
        "checkpointing_steps": max(size.steps, 1),
        "validation_steps": max(size.steps, 1),
    }


def _control(part: Part) -> Row:
    """What a part's pictures are painted with."""
    return CONTROLS["full" if part.case == LEARNING else part.arm]


def look(part: Part, scene: ToyboxInstances) -> list[Row]:
    """Paint and score a part's pictures; of learning parts the attention, too."""
    device, state = best_device(), PartialState(cpu=best_device() == "cpu")
    learned = part.folder if part.case == LEARNING else part.out / part.scene / SYNTHESISED
    pipeline = load_checkpoint(None, device, "mifo")
    load_instances(pipeline, learned)
    pipeline.set_progress_bar_config(disable=True)
    case = toybox_case(scene)
    prompts = editing_prompts(case, TOYBOX_TEMPLATES, part.size.prompts)
    paint: Row = {"rounds": part.size.rounds, "steps": STEPS, "guidance_scale": GUIDANCE, "state": state}
    pictures = paint_case(pipeline, case, prompts, part.folder / "pictures", _control(part), batch_size=8, **paint)
    rows = score_pictures(_scorer(device), case, prompts, pictures, part.folder / "scores", state)
    found = [{"case": part.case, "arm": part.arm, **row} for row in rows]
    if part.case == LEARNING:
        found += attention_rows(pipeline, scene, part.arm)
    return found


def attention_rows(pipeline: Any, scene: ToyboxInstances, arm: str) -> list[Row]:
    """How much of each placeholder's attention lies within its mask, on the picture that it was learned from."""
    preset = active_preset()
    canvas = pipeline.latent_size(preset.image_size, preset.image_size)
    attention = AttentionMaps(pipeline, learning_layers(pipeline.unet, canvas, 1))
    names = [f"<asset{number}>" for number in range(len(scene.words))]
    caption = f"a photo of {' and '.join(names)}"
    ids = pipeline.tokenizer(caption).input_ids
    tokens = tuple((ids.index(pipeline.tokenizer.convert_tokens_to_ids(name)),) for name in names)
    pixels = pipeline.image_processor.preprocess(scene.picture)[0]
    sample = CaptionSample(pixels, caption, tuple(names), scene.masks)
    rows = []
    for timestep in MAP_TIMESTEPS:
        captions = [MaskedCaption(f"{scene.name}-{noise}", sample, tokens) for noise in range(MAP_NOISES)]
        for noise, maps in enumerate(attention.maps(captions, timestep)):
            for instance, score in enumerate(map_scores(maps, scene.masks)):
                facts = {"scene": scene.name, "kind": scene.kind, "noise": f"{timestep}-{noise}"}
                rows.append({"case": ATTENTION, "arm": arm, **facts, "instance": instance, "inside": score["inside"]})
    return rows


def parts_of(size: Size, out: Path, arms: Sequence[str], controls: Sequence[str], threads: int) -> list[list[Part]]:
    """All parts in rounds: those of a round need nothing of one another, only of the rounds before."""
    scenes = [scene.name for scene in chosen_scenes(size)]

    def parts(case: str, names: Sequence[str]) -> list[Part]:
        return [Part(case, scene, name, size, out, threads) for scene in scenes for name in names]

    first = [arm for arm in arms if not split_arm(arm)[1]]
    second = [arm for arm in arms if split_arm(arm)[1]]
    painted = [control for control in controls if control != "full"]  # which the learning arms are painted with
    return [parts(LEARNING, first), parts(LEARNING, second), parts(SYNTHESIS, painted)]


@lru_cache(maxsize=1)
def _scorer(device: str) -> DisentangleScorer:
    return DisentangleScorer.of_toybox(device)
