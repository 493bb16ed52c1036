"""The workload of the federated benchmark's contenders: the silos' data, the models, the marks.

Flower's stock app and NVFlare read this file too, the latter in an environment of its own, and only
with numpy and Keras; everything else is imported where it is needed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

SEED = 0
NUM_PIXELS, NUM_CLASSES = 64, 10
EXAMPLES_PER_SILO = 200
EVALUATED_SHARE = 0.1  # of a silo's examples; the weights that arrive are evaluated on them
BATCH_SIZE = 32
LEARNING_RATE = 1e-3

# Hidden layers by the size of the model in float32.
SIZES: dict[str, tuple[int, ...]] = {"20kB": (64,), "5MB": (1081, 1081), "100MB": (4962, 4962)}

Examples = tuple[np.ndarray, np.ndarray]


def write_silos(
    folder: Path, num_silos: int, examples_per_silo: int = EXAMPLES_PER_SILO
) -> list[Path]:
    """Writes the data of silo 0, 1, ... as .npz files of x and y.

    They are disjoint parts of scikit-learn's digits.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    if num_silos * examples_per_silo > len(x):
        raise ValueError(
            f"digits has {len(x)} examples; received {num_silos} silos of {examples_per_silo}."
        )
    order = np.random.default_rng(SEED).permutation(len(x))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [silo_path(folder, i) for i in range(num_silos)]
    for i, path in enumerate(paths):
        own = order[i * examples_per_silo : (i + 1) * examples_per_silo]
        pixels = (x[own] / 16).astype(np.float32)
        np.savez(path, x=pixels, y=y[own].astype(np.int32), num_classes=NUM_CLASSES)
    return paths


def silo_path(folder: Path, number: int) -> Path:
    return folder / f"silo-{number}.npz"


def read_silo(path: Path) -> tuple[Examples, Examples]:
    """A silo's examples: (to train on, to evaluate on)."""
    with np.load(path) as file:
        x, y = file["x"], file["y"]
    num_evaluated = round(EVALUATED_SHARE * len(x))
    return (x[num_evaluated:], y[num_evaluated:]), (x[:num_evaluated], y[:num_evaluated])


def compiled_model(size: str) -> keras.Model:
    """The multilayer perceptron of that size, with the weights that SEED gives.

    Its outputs are logits.
    """
    import keras

    keras.utils.set_random_seed(SEED)
    hidden = [
        keras.layers.Dense(width, activation="relu", name=f"dense{i}")
        for i, width in enumerate(SIZES[size])
    ]
    outputs = keras.layers.Dense(NUM_CLASSES, name="output")
    model = keras.Sequential([keras.layers.Input((NUM_PIXELS,)), *hidden, outputs])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LEARNING_RATE), loss, metrics=["accuracy"])
    return model


def write_mark(path: Path) -> None:
    """Records that a round ends, and the next one begins, now."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{time.monotonic()}\n")


def read_marks(path: Path) -> list[float]:
    """The times in seconds at which rounds ended; those that are written whole."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [float(line) for line in lines]


def seconds_per_round(marks: Sequence[float]) -> list[float]:
    """The seconds between marks, without the first round: there models are built and traced.

    >>> seconds_per_round([0.0, 9.0, 11.0, 14.0])
    [2.0, 3.0]
    """
    return [after - before for before, after in pairwise(marks)][1:]
