"""Fine-tune a UNet's cross-attention keys so that objects do not share attention (arXiv 2312.06712).

    accelerate launch -m objectcompose.training.train_separate_enhance \\
        --pretrained_model stable-diffusion-v1-5/stable-diffusion-v1-5 --concepts cat dog --output_dir outputs/cat_dog
    ... --concepts_file concepts.txt --max_train_steps 10000 --learning_rate 4e-6 --norm_weight 0.5    # many concepts

No pictures are needed; the losses are in `separate_enhance_losses`. Only `attn2.to_k` is trained and exported, as a
`UNetDelta` in the output folder's `weights`. Run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from objectcompose.command_help import attributes_help, script_parser
from objectcompose.errors import LayoutError
from objectcompose.training.caption_encoding import encode_caption
from objectcompose.training.common import run_script
from objectcompose.training.fine_tuning import add_fine_tuning_arguments, finish_fine_tuning, start_fine_tuning
from objectcompose.training.loop import loop_options
from objectcompose.training.runs import digest_of
from objectcompose.training.separate_enhance_losses import SeparateEnhanceLosses, SeparateEnhanceOptions


def create_parser() -> argparse.ArgumentParser:
    """All options; the defaults are those of the paper's pair mode."""
    parser = script_parser(__doc__)
    concepts = parser.add_mutually_exclusive_group(required=True)
    concepts.add_argument("--concepts", nargs="+", help="nouns")
    concepts.add_argument("--concepts_file", type=Path, help="one noun per line")
    parser.add_argument(
        "--attention_grid", type=int, nargs=2, default=None, help="of the maps; none: a quarter of the latent's sides"
    )
    defaults = SeparateEnhanceOptions()
    losses, texts = parser.add_argument_group("losses"), attributes_help(SeparateEnhanceOptions)
    for name in ("sep_weight", "enhance_weight", "norm_weight", "sigma"):
        losses.add_argument(f"--{name}", type=float, default=getattr(defaults, name), help=texts[name])
    for name, choices in (
        ("head_mode", ("per_head", "mean")),
        ("sep_reduce", ("pairwise", "joint")),
        ("sep_pixel", ("max", "soft_iou")),
        ("latent_source", ("gaussian_scaled", "gaussian_unit")),
    ):
        losses.add_argument(f"--{name}", choices=choices, default=getattr(defaults, name), help=texts[name])
    losses.add_argument("--objects", type=int, default=2, help=texts["objects"])
    losses.add_argument("--min_timestep", type=int, default=0, help="first timestep")
    losses.add_argument("--max_timestep", type=int, default=None, help="last timestep, exclusive; none: all")
    add_fine_tuning_arguments(
        parser, "to_k", max_train_steps=200, train_batch_size=4, learning_rate=5e-6, checkpointing_steps=100
    )
    return parser


def read_concepts(args: argparse.Namespace) -> list[str]:
    """The nouns, from the command line or the file.

    Raises:
        LayoutError: the file cannot be read.
    """
    if args.concepts is not None:
        return list(args.concepts)
    try:
        lines = args.concepts_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(f"`concepts_file` {str(args.concepts_file)!r} cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = create_parser().parse_args(argv)
    loop_options(args)  # refuses bad numbers before anything is loaded
    loss_options = SeparateEnhanceOptions(
        **{name: getattr(args, name) for name in SeparateEnhanceOptions.__dataclass_fields__}
    )
    concepts = read_concepts(args)
    run = start_fine_tuning(args, "train_separate_enhance", argv)
    tokenizer, text_encoder, unet = run.pipeline.tokenizer, run.pipeline.text_encoder, run.pipeline.unet
    latent_size = run.pipeline.latent_size(*run.pipeline.default_size())
    rows, columns = args.attention_grid or (side // 4 for side in latent_size)
    losses = SeparateEnhanceLosses(
        unet,
        run.parameters,
        run.scheduler,
        tokenizer,
        lambda prompt: encode_caption(tokenizer, text_encoder, prompt),
        concepts,
        (unet.config.in_channels, *latent_size),
        (rows, columns),
        loss_options,
        run.accelerator.autocast,
    )
    if run.accelerator.is_main_process:
        for concept, tokens in losses.supervised_tokens().items():
            print(f"supervised: {concept!r} as {' '.join(tokens)}")
    finish_fine_tuning(
        run,
        losses,
        len(concepts),
        title="Separate-and-Enhance keys",
        summary="Cross-attention keys that were fine-tuned with Separate-and-Enhance (arXiv 2312.06712).",
        data=f"no pictures; prompts of {len(concepts)} concepts",
        data_digest=digest_of(concept.encode() for concept in concepts),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_script(main))
