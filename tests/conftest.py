"""Fixtures shared by all tests: one thread, a fixed seed, and the tiny components of `tests/tiny.py`."""

from __future__ import annotations

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import tiny


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Each test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture
def tiny_text_encoder():
    return tiny.tiny_text_encoder()


@pytest.fixture
def tiny_unet():
    """`tiny_unet(kind)` builds a UNet of the kind "sd1", "sd2" or "sdxl"."""
    return tiny.tiny_unet


@pytest.fixture
def tiny_vae():
    return tiny.tiny_vae()


@pytest.fixture
def tiny_components():
    """`tiny_components(kind)` builds the components of a whole pipeline."""
    return tiny.tiny_components
