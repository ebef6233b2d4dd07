"""Frechet distances against closed forms, another algorithm and repeated draws; the features behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from objectcompose.errors import CheckpointError, ImageInputError, NonFiniteError, ObjectComposeError
from objectcompose.evaluation.frechet import frechet_distance, frechet_metrics, gaussian_of
from objectcompose.evaluation.frechet_features import file_source, find_picture_files, load_features, source_features
from objectcompose.processes import process_state


def random_gaussian(rng, width, rank):
    factor = rng.normal(size=(width, rank))
    return rng.normal(size=width), factor @ factor.T


def test_diagonal_gaussians_have_a_closed_form():
    rng = np.random.default_rng(0)
    means, deviations = rng.normal(size=(2, 7)), rng.uniform(0, 3, (2, 7))
    deviations[0, 2] = deviations[1, 2] = deviations[1, 5] = 0.0
    expected = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()
    covariances = [np.diag(row**2) for row in deviations]
    assert frechet_distance(means[0], covariances[0], means[1], covariances[1]) == pytest.approx(expected, rel=1e-12)


def test_two_by_two_by_hand():
    first, second = np.eye(2), np.array([[2.0, 1.5], [1.5, 4.0]])
    # the product has trace 6 and determinant 5.75, so its root has trace sqrt(6 + 2 sqrt(5.75))
    expected = 1 + 4 + 2 + 6 - 2 * np.sqrt(6 + 2 * np.sqrt(5.75))
    assert frechet_distance(np.array([0.0, 3.0]), first, np.array([1.0, 1.0]), second) == pytest.approx(expected)


@pytest.mark.parametrize("rank", [9, 4])
def test_agrees_with_the_root_of_the_product(rank):
    rng = np.random.default_rng(rank)
    (mean_1, first), (mean_2, second) = random_gaussian(rng, 6, rank), random_gaussian(rng, 6, rank)
    root = sqrtm(first @ second)
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(first + second - 2 * root.real)
    assert frechet_distance(mean_1, first, mean_2, second) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(mean_2, second, mean_1, first) == pytest.approx(expected, rel=1e-5)


def test_fewer_pictures_than_features():
    features = np.random.default_rng(0).normal(size=(5, 40))
    assert frechet_distance(*gaussian_of(features), *gaussian_of(features)) == pytest.approx(0.0, abs=1e-9)
    moved = frechet_metrics("fd", features, features + 2.0)
    assert moved == {"fd": pytest.approx(160.0)}  # too few for bounds


def test_bounds_are_as_wide_as_the_spread():
    rng = np.random.default_rng(1)
    values, reaches = [], []
    for _ in range(60):
        metrics = frechet_metrics("fd", rng.normal(size=(300, 3)), 0.5 + 1.5 * rng.normal(size=(400, 3)))
        values.append(metrics["fd"])
        reaches.append(metrics["fd.hi"] - metrics["fd"])
        assert 0 <= metrics["fd.lo"] <= metrics["fd"]
    assert 0.75 < np.mean(reaches) / 1.96 / np.std(values) < 1.35
    expected = 3 * 0.5**2 + 3 * 0.5**2
    assert np.mean(values) == pytest.approx(expected, rel=0.05)


def test_bad_features():
    with pytest.raises(ObjectComposeError, match="N at least 2"):
        gaussian_of(np.zeros((1, 4)))
    with pytest.raises(NonFiniteError, match="finite"):
        gaussian_of(np.array([[0.0, np.nan], [1.0, 2.0]]))


def test_files_are_cropped_in_the_middle(tmp_path):
    wide = Image.new("RGB", (60, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 40, 20))
    wide.save(tmp_path / "b.png")
    Image.new("RGB", (10, 10), (0, 255, 0)).save(tmp_path / "a.png")
    paths = find_picture_files(tmp_path)
    source = file_source(paths)
    assert source.size == (10, 10) and len(source) == 2
    cropped = np.asarray(source.read(1))
    assert cropped.shape == (10, 10, 3) and (cropped[:, 2:8] == (0, 0, 255)).all()
    paths[0].unlink()
    with pytest.raises(ImageInputError, match="at least 2 pictures, got 1"):
        find_picture_files(tmp_path)


def test_inception_needs_weights(tmp_path):
    with pytest.raises(ObjectComposeError, match="weights are not downloaded"):
        load_features("inception", None, "cpu")
    with pytest.raises(ObjectComposeError, match="only then"):
        load_features("judge", tmp_path / "weights.pth", "cpu")
    with pytest.raises(ObjectComposeError, match="`features` must be one of"):
        load_features("vgg", None, "cpu")
    with pytest.raises(CheckpointError, match=r"weights\.pth"):
        load_features("inception", tmp_path / "weights.pth", "cpu")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="another network"):
        load_features("inception", tmp_path / "weights.pth", "cpu")


@pytest.mark.slow
def test_inception_with_random_weights(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        """Keeps its random weights, whatever the file says."""

        def load_state_dict(self, state):
            return state

    path = tmp_path / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Untrained("inception-v3-compat", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    features = load_features("inception", path, "cpu")
    levels = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    found = features.describe(levels.float() / 255)
    assert features.metric == "fid" and found.shape == (3, 2048)
    assert torch.equal(found, network(levels)[0])


@pytest.mark.slow
def test_judge_features_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    features = load_features("judge", None, "cpu")
    source = file_source(find_picture_files(tmp_path))
    together, alone = (source_features(features, source, size, process_state("cpu")) for size in (5, 2))
    assert features.metric == "fd_judge" and together.shape == (5, 64)
    assert np.abs(together - alone).max() < 1e-4 and np.ptp(together, axis=0).max() > 0.01
