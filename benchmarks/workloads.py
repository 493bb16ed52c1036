"""The workloads of the distributed benchmark's contenders: models, data, clock, cores.

The processes of PyTorch read this file too, in an environment without Keras: only `keras_model`
imports it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from benchmarks.turns import Turns
from shared.seeding import rng_for

if TYPE_CHECKING:
    import keras

SEED = 0
NUM_RANKS = 2
NUM_CLASSES = 10
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 8  # of a plain training loop: the first are slower

PIXELS = 784
IMAGE_SHAPE = (32, 32, 3)
NUM_TOKENS, TOKENS_PER_TEXT = 5000, 128
WIDTH, NUM_HEADS, NUM_BLOCKS = 128, 4, 2

# Set for each rank by horovodrun, by mpirun, and by the orchestrator as torchrun does.
LOCAL_RANK_VARIABLES = ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK")


@dataclass(frozen=True)
class Workload:
    """A model, its batches and its slices.

    batch_size: per rank. num_steps: of a slice, which is one pass over a rank's examples; they take
    0.6 to 2 s, of which the start of an epoch is about 1 %. num_parameters: in every framework.
    """

    name: str
    kind: Literal["vectors", "images", "texts"]
    batch_size: int
    num_steps: int
    num_parameters: int

    @property
    def global_batch_size(self) -> int:
        return NUM_RANKS * self.batch_size

    @property
    def num_examples(self) -> int:
        """The examples of each rank."""
        return self.num_steps * self.batch_size


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("mlp", "vectors", batch_size=64, num_steps=160, num_parameters=669_706),
        Workload("cnn", "images", batch_size=32, num_steps=48, num_parameters=582_026),
        Workload("transformer", "texts", batch_size=16, num_steps=16, num_parameters=1_037_834),
        Workload("dense", "vectors", batch_size=32, num_steps=10, num_parameters=14_217_226),
    )
}


def examples(workload: Workload, num_examples: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Random examples of a rank, determined by (SEED, rank).

    Returns x (float32, or int32 tokens) and class ids (int32).
    """
    rng = rng_for(SEED, "benchmark", workload.name, rank)
    y = rng.integers(NUM_CLASSES, size=num_examples, dtype=np.int32)
    if workload.kind == "texts":
        return rng.integers(NUM_TOKENS, size=(num_examples, TOKENS_PER_TEXT), dtype=np.int32), y
    shape = (PIXELS,) if workload.kind == "vectors" else IMAGE_SHAPE
    return rng.random((num_examples, *shape), dtype=np.float32), y


def keras_model(workload: Workload) -> keras.Model:
    """The model with the weights that SEED gives, the same on all ranks; its outputs are logits."""
    import keras

    keras.utils.set_random_seed(SEED)
    build = {"mlp": _mlp, "cnn": _cnn, "transformer": _transformer, "dense": _dense}[workload.name]
    model = build()
    check_size(workload, model.count_params())
    return model


def check_size(workload: Workload, num_parameters: int) -> None:
    """Raises RuntimeError if a framework's model is not the one that the others train."""
    if num_parameters != workload.num_parameters:
        raise RuntimeError(
            f"{workload.name} has {workload.num_parameters} parameters; received {num_parameters}."
        )


def _mlp() -> keras.Model:
    from keras import Sequential, layers

    hidden = [layers.Dense(512, "relu") for _ in range(2)]
    return Sequential([layers.Input((PIXELS,)), *hidden, layers.Dense(NUM_CLASSES)])


def _dense() -> keras.Model:
    from keras import Sequential, layers

    hidden = [layers.Dense(2048, "relu") for _ in range(4)]
    return Sequential([layers.Input((PIXELS,)), *hidden, layers.Dense(NUM_CLASSES)])


def _cnn() -> keras.Model:
    from keras import Sequential, layers

    def convolution(num_filters: int) -> keras.layers.Layer:
        return layers.Conv2D(num_filters, 3, activation="relu", padding="same")

    features = [
        convolution(32),
        layers.MaxPool2D(),
        convolution(64),
        layers.MaxPool2D(),
        convolution(64),
    ]
    head = [layers.Flatten(), layers.Dense(128, "relu"), layers.Dense(NUM_CLASSES)]
    return Sequential([layers.Input(IMAGE_SHAPE), *features, *head])


def _transformer() -> keras.Model:
    from keras import Model, layers

    tokens = layers.Input((TOKENS_PER_TEXT,), dtype="int32")
    x = layers.Embedding(NUM_TOKENS, WIDTH)(tokens)
    for _ in range(NUM_BLOCKS):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(NUM_HEADS, WIDTH // NUM_HEADS)(y, y)
        y = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(y)
    return Model(tokens, layers.Dense(NUM_CLASSES)(layers.GlobalAveragePooling1D()(x)))


def measure_slices(run: Callable[[int], object], workload: Workload, turns: Turns) -> None:
    """Reports the examples per second of a plain training loop in each slice, after a warm-up.

    `run(n)` trains n steps to their end.
    """
    run(WARM_UP_STEPS)
    for _ in range(turns.num_slices):
        turns.begin()
        started = time.perf_counter()
        run(workload.num_steps)
        seconds = time.perf_counter() - started
        num_samples = workload.global_batch_size * workload.num_steps
        turns.report(workload.name, num_samples / seconds)


def check_equal_weights(weights: Sequence[np.ndarray], mean: Callable[[float], float]) -> None:
    """Raises RuntimeError unless all ranks hold the same weights, to 1e-4.

    They trained on different examples, so only gradients that were exchanged leave them equal.
    Compares the projection of the weights on random signs.
    """
    rng = np.random.default_rng(SEED)
    signs = np.array([-1, 1], np.float32)
    projections = [float(np.dot(w.ravel(), rng.choice(signs, w.size))) for w in weights]
    own = math.fsum(projections)
    average = mean(own)
    if not math.isclose(own, average, rel_tol=1e-4, abs_tol=1e-4):
        raise RuntimeError(
            f"The ranks hold different weights after training: {own} here, {average} on average."
        )


def local_rank() -> int:
    """The number of this process among the ranks of the host, from its launcher; 0 without one."""
    return next((int(os.environ[name]) for name in LOCAL_RANK_VARIABLES if name in os.environ), 0)


def pin_to_core(rank: int) -> None:
    """Keeps this process on the rank-th of its cores, with the threads it has and those to come."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= rank:
        raise ValueError(
            f"Each rank needs a core of its own; received {len(cores)} for rank {rank}."
        )
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {cores[rank]})
