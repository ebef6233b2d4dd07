"""Feature vectors of pictures for Frechet distances: of toybox's judge, or of the Inception network of FID."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from objectcompose.errors import CheckpointError, ImageInputError, MissingPackageError, ObjectComposeError
from objectcompose.evaluation.detectors import picture_tensor
from objectcompose.evaluation.results import hash_weights
from objectcompose.evaluation.toybox_figures import held_out_scenes
from objectcompose.grounding.loading import fingerprint, load_checkpoint_file
from objectcompose.grounding.toybox_truth import scene_picture
from objectcompose.layout_fields import check_picture
from objectcompose.processes import groups_of_process
from objectcompose.toybox.judge import Judge
from objectcompose.toybox.weights import active_preset


FEATURES = ("judge", "inception")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SCENES_AT_ONCE = 64


@dataclass(frozen=True)
class PictureFeatures:
    """A network that describes pictures.

    Attributes:
        metric: what a distance of its features is called.
        identity: changes with its weights.
        describe: (B, 3, H, W) in [0, 1] to (B, D), float32 on the CPU.
    """

    metric: str
    identity: str
    describe: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PictureSource:
    """A list of pictures that are read when they are needed.

    Attributes:
        read: number to an RGB picture; all of one size.
        count: of pictures.
        size: (width, height).
        captions: of the pictures, where they have any.
    """

    read: Callable[[int], Image.Image]
    count: int
    size: tuple[int, int]
    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count


def load_features(name: str, weights: Path | None, device: str) -> PictureFeatures:
    """A network by name.

    Args:
        name: "judge", the mean of the last stage of the segmenter's encoder, or "inception".
        weights: of Inception, as torch-fidelity publishes them; nothing is downloaded.
        device: where it runs.

    Raises:
        ObjectComposeError: an unknown name, Inception without weights, or weights for the judge.
        CheckpointError: the weights are missing, corrupt or of another network.
        MissingPackageError: torch-fidelity is not installed.
    """
    if name not in FEATURES:
        raise ObjectComposeError(f"`features` must be one of {', '.join(FEATURES)}, got {name!r}.")
    if (name == "inception") != (weights is not None):
        raise ObjectComposeError(
            "`--inception-weights` must be given with `--features inception`, and only then: weights are not"
            " downloaded. torch-fidelity publishes them as weights-inception-2015-12-05-6726825d.pth (about 96 MB)."
        )
    if weights is not None:
        return _load_inception(weights, device)
    judge = Judge.load(device)
    identity = f"judge:{fingerprint(judge.segmenter, judge.segmenter.config)}"
    return PictureFeatures("fd_judge", identity, partial(_describe_by_judge, judge))


@torch.no_grad()
def _describe_by_judge(judge: Judge, images: torch.Tensor) -> torch.Tensor:
    side = judge.preset.image_size
    device = next(judge.segmenter.parameters()).device
    seen = F.interpolate(images.to(device), (side, side), mode="bilinear", antialias=True)
    stages = judge.segmenter.segformer(seen * 2 - 1, output_hidden_states=True).hidden_states
    return stages[-1].mean((2, 3)).float().cpu()


def _load_inception(weights: Path, device: str) -> PictureFeatures:
    state = load_checkpoint_file(weights, weights.name)  # read safely first: the package's own reading would run code
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingPackageError(
            f'`--features inception` needs torch-fidelity: pip install "objectcompose[eval]" ({error}).'
        ) from error
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"`--inception-weights` {weights} is of another network: it has {len(state)} tensors."
        ) from error
    network.to(device)

    @torch.no_grad()
    def describe(images: torch.Tensor) -> torch.Tensor:
        levels = (images * 255).round().to(torch.uint8).to(device)
        return network(levels)[0].float().cpu()

    return PictureFeatures("fid", f"inception:{hash_weights(weights)[:32]}", describe)


def find_picture_files(folder: Path) -> list[Path]:
    """Pictures below a folder, sorted by name.

    Raises:
        ImageInputError: there are fewer than two.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if len(found) < 2:
        raise ImageInputError(f"`{folder}` must hold at least 2 pictures, got {len(found)}.")
    return found


def file_source(paths: Sequence[Path], size: tuple[int, int] | None = None) -> PictureSource:
    """Files as pictures of one size: the short side resized, the middle cut out.

    Args:
        paths: at least one.
        size: (width, height); None: that of the first.
    """
    size = size or check_picture(paths[0], str(paths[0])).size
    return PictureSource(lambda index: _fitted(check_picture(paths[index], str(paths[index])), size), len(paths), size)


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    picture = picture.convert("RGB")
    if picture.size == size:
        return picture
    scale = max(size[0] / picture.width, size[1] / picture.height)
    wide, high = max(size[0], round(picture.width * scale)), max(size[1], round(picture.height * scale))
    left, top = (wide - size[0]) // 2, (high - size[1]) // 2
    resized = picture.resize((wide, high), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size[0], top + size[1]))


def scene_source(count: int) -> PictureSource:
    """The first scenes of toybox's test split, with their captions."""
    preset = active_preset()
    pictures: list[Image.Image] = []
    captions: list[str] = []
    for start in range(0, count, _SCENES_AT_ONCE):
        scenes = held_out_scenes(preset, range(start, min(start + _SCENES_AT_ONCE, count)))
        pictures += [scene_picture(pixels) for pixels in scenes.pixels]
        captions += scenes.captions
    return PictureSource(pictures.__getitem__, count, pictures[0].size, tuple(captions))


def source_features(
    features: PictureFeatures, source: PictureSource, batch_size: int, state: PartialState
) -> np.ndarray:
    """Features (N, D) of all pictures of a source, in its order, in every process."""
    found: list[tuple[int, np.ndarray]] = []
    bar = tqdm(total=len(source), desc="features", unit="picture", disable=not state.is_main_process)
    for group in groups_of_process(range(len(source)), batch_size, state):
        rows = features.describe(picture_tensor([source.read(index) for index in group])).numpy()
        found += list(zip(group, rows, strict=True))
        bar.update(len(group) * state.num_processes)
    bar.close()
    return np.stack([row for _, row in sorted(gather_object(found), key=lambda pair: pair[0])])
