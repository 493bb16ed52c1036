"""What tests share. The environment comes first: TensorFlow and Flower read it when they are
imported.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.data import Dataset


def pytest_configure() -> None:
    """Ctrl-C as on a terminal, also where a shell's "&" has us ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the checkout that is under test."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def make_data() -> Callable[..., Dataset]:
    """A table of random examples; `num_classes` 0: regression."""

    def make(
        num_examples: int,
        num_features: int = 4,
        num_classes: int = 3,
        weighted: bool = False,
        seed: int = 0,
    ) -> Dataset:
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(num_examples, num_features)).astype(np.float32)
        y = (
            rng.integers(num_classes, size=num_examples)
            if num_classes
            else rng.normal(size=num_examples)
        )
        weight = rng.uniform(0.25, 2.0, size=num_examples).astype(np.float32) if weighted else None
        return Dataset(x, y.astype(np.int32 if num_classes else np.float32), num_classes, weight)

    return make


@pytest.fixture(scope="session")
def numbered() -> Callable[..., Dataset]:
    """Examples that tell which one they are: x, y and the weight of example i are all i."""

    def make(num_examples: int, weighted: bool = False) -> Dataset:
        numbers = np.arange(num_examples, dtype=np.float32)
        return Dataset(
            numbers[:, None], numbers, num_classes=0, sample_weight=numbers if weighted else None
        )

    return make
