"""Cost of one way beside another: paired time, deterministic FLOPs, peak memory, and the UNets to measure on.

Times on a shared machine drift, so the two sides alternate (A B, B A, A B, ...) and what counts is the median of the
pairwise ratios. A ratio whose interquartile range exceeds 5 % of it is reported as invalid, never quietly averaged.
"""

import argparse
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


MAX_RELATIVE_IQR = 0.05
MIN_PAIRS = 7
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class PairedRatio:
    """Time of side A over time of side B.

    Attributes:
        ratio: median of the pairwise ratios; above 1: A is slower.
        iqr: their interquartile range, in the same unit.
        valid: whether `iqr` is at most 5 % of `ratio`.
        seconds_a: each run of side A, in the order of the pairs.
        seconds_b: each run of side B.
    """

    ratio: float
    iqr: float
    valid: bool
    seconds_a: tuple[float, ...]
    seconds_b: tuple[float, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One raw row per pair, for a result file."""
        pairs = zip(self.seconds_a, self.seconds_b, strict=True)
        return [{"pair": index, "seconds_a": a, "seconds_b": b} for index, (a, b) in enumerate(pairs)]


def paired_ratio(
    run_a: Callable[[], Any], run_b: Callable[[], Any], pairs: int = MIN_PAIRS, warmup: int = 1
) -> PairedRatio:
    """Time two callables alternately and return the median ratio of A to B.

    Args:
        run_a: the side under test; called without arguments.
        run_b: the baseline.
        pairs: timed runs of each side, at least 7.
        warmup: untimed runs of each side first, at least 1.

    Raises:
        ValueError: too few pairs or warm-up runs.
    """
    if pairs < MIN_PAIRS or warmup < 1:
        raise ValueError(f"`pairs` must be at least {MIN_PAIRS} and `warmup` at least 1, got {pairs} and {warmup}.")
    for _ in range(warmup):
        run_a()
        run_b()
    seconds_a, seconds_b = [], []
    for pair in range(pairs):
        if pair % 2 == 0:
            seconds_a.append(_seconds_of(run_a))
            seconds_b.append(_seconds_of(run_b))
        else:
            seconds_b.append(_seconds_of(run_b))
            seconds_a.append(_seconds_of(run_a))
    return ratio_of_pairs(seconds_a, seconds_b)


def ratio_of_pairs(seconds_a: Sequence[float], seconds_b: Sequence[float]) -> PairedRatio:
    """The ratio that paired times give: what `paired_ratio` reports, and what recomputes it from raw rows."""
    ratios = [a / b for a, b in zip(seconds_a, seconds_b, strict=True)]
    lower, ratio, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    iqr = upper - lower
    return PairedRatio(ratio, iqr, iqr <= MAX_RELATIVE_IQR * ratio, tuple(seconds_a), tuple(seconds_b))


def ratio_metrics(name: str, found: PairedRatio) -> dict[str, float | bool]:
    """What a result file says of a ratio: the median, `.iqr`, and whether it is `.valid`."""
    return {name: found.ratio, f"{name}.iqr": found.iqr, f"{name}.valid": found.valid}


def _seconds_of(run: Callable[[], Any]) -> float:
    _synchronize()
    started = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of one call, counted by torch for matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory of one call in a fresh process.

    Attributes:
        loaded_bytes: the process's peak when everything was built, on CUDA what was allocated then.
        extra_bytes: how far the call itself went above that, at least 0.
        device: "cpu" or "cuda".
    """

    loaded_bytes: int
    extra_bytes: int
    device: str


def peak_memory(prepare: str, **arguments: Any) -> PeakMemory:
    """Peak memory that a call needs above what was loaded for it, measured in a fresh process.

    On a CPU this is the process's peak resident size during the call less its size before it. Where the kernel cannot
    reset the peak (anything but Linux) it is less the peak after preparing: a lower bound, so prepare lean.

    Args:
        prepare: `module:function`, importable from the current folder; called with `arguments`, it builds everything
            and returns the callable to measure.
        arguments: JSON-serialisable keyword arguments of `prepare`.

    Raises:
        RuntimeError: the process failed; its error output is in the message.
    """
    command = [sys.executable, "-m", "benchmarks.measure", "--prepare", prepare, "--arguments", json.dumps(arguments)]
    root = Path(__file__).resolve().parents[1]
    # glibc gives every larger block back at once then, so that the resident size is what is really held
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {prepare} failed:\n{done.stderr[-2000:]}")
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))


def _measure_here(prepare: str, arguments: Mapping[str, Any]) -> PeakMemory:
    module, _, function = prepare.partition(":")
    run = getattr(import_module(module), function)(**arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return PeakMemory(loaded, torch.cuda.max_memory_allocated() - loaded, "cuda")
    _forget_peak()
    loaded = _peak_resident_bytes()
    run()
    return PeakMemory(loaded, _peak_resident_bytes() - loaded, "cpu")


def _forget_peak() -> None:
    gc.collect()
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident size to the current one


def _peak_resident_bytes() -> int:
    if CLEAR_REFS.exists():
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert peak is not None
        return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# What differs between the two families, at a quarter-width or less of the channels: the heads of SD 2 grow with the
# level and its projections are linear; SD 1 has 8 heads everywhere.
_UNET_KINDS: dict[str, dict[str, Any]] = {
    "sd1": {"attention_head_dim": 8, "use_linear_projection": False},
    "sd2": {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}


def measuring_unet(kind: str = "sd1", width: int = 40, cross_attention_dim: int = 96) -> UNet2DConditionModel:
    """UNet with the blocks, layers and heads of Stable Diffusion, but few channels; random weights, seeded, eval mode.

    Args:
        kind: "sd1" or "sd2".
        width: channels of the first level (320 in the real models), a multiple of 40; the levels have 1, 2, 4, 4 times
            as many.
        cross_attention_dim: width of the text (768 and 1024 in the real models).

    Returns:
        The model; made for latents of shape `(B, 4, 64, 64)` and text of shape `(B, 77, cross_attention_dim)`.

    Raises:
        ValueError: unknown kind or wrong width.
    """
    if kind not in _UNET_KINDS:
        raise ValueError(f"`kind` must be one of {sorted(_UNET_KINDS)}, got {kind!r}.")
    if width < 40 or width % 40:
        raise ValueError(f"`width` must be a multiple of 40, got {width}.")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            layers_per_block=2,
            cross_attention_dim=cross_attention_dim,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            **_UNET_KINDS[kind],
        )
    finally:
        torch.set_rng_state(state)
    return unet.eval()


def measuring_encoder(
    hidden: int = 96, layers: int = 5, heads: int = 8, projection_dim: int = 64
) -> CLIPVisionModelWithProjection:
    """Image encoder with the patches of CLIP ViT-H (1280, 32, 16 and 1024), random weights, seeded, eval mode."""
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=224,
        patch_size=14,
        projection_dim=projection_dim,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPVisionModelWithProjection(config).eval()


def measuring_inputs(
    unet: UNet2DConditionModel, batch_size: int = 2, side: int = 64, num_tokens: int = 77
) -> dict[str, torch.Tensor]:
    """Keyword arguments of one forward of `measuring_unet`, seeded, on its device and in its dtype.

    Args:
        unet: the model.
        batch_size: 2 is one guided picture.
        side: height and width of the latents.
        num_tokens: length of the text.
    """
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch_size, unet.config.in_channels, side, side, generator=generator)
    text = torch.randn(batch_size, num_tokens, unet.config.cross_attention_dim, generator=generator)
    return {
        "sample": sample.to(unet.device, unet.dtype),
        "timestep": torch.tensor(500, device=unet.device),
        "encoder_hidden_states": text.to(unet.device, unet.dtype),
    }


def prepare_plain_forward(kind: str = "sd1", batch_size: int = 2, side: int = 64) -> Callable[[], Any]:
    """For `peak_memory`: one forward of the plain UNet without gradients."""
    unet = measuring_unet(kind)
    inputs = measuring_inputs(unet, batch_size, side)

    def run() -> Any:
        with torch.no_grad():
            return unet(**inputs).sample

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """The fresh process of `peak_memory`: prints one JSON object."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--prepare", required=True, help="module:function that returns the callable to measure")
    parser.add_argument("--arguments", default="{}", help="its keyword arguments, as JSON")
    args = parser.parse_args(argv)
    print(json.dumps(asdict(_measure_here(args.prepare, json.loads(args.arguments)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
