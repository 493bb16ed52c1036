"""The data set as a value: arrays, their schema, and deterministic splits."""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from shared.seeding import rng_for


@dataclass(frozen=True)
class Schema:
    """What a model must know of the data: the shape of one example and the kind of target.

    `num_classes` is 0 for regression. `vocabulary_size`: examples are ids below it; 0: they are numbers.
    `target_shape`: () for one class or number per example, (T,) for one at each of T places, and so on.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    vocabulary_size: int = 0
    target_shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        ids = f", ids below {self.vocabulary_size}," if self.vocabulary_size else ""
        targets = f" with targets of {self.target_shape}" if self.target_shape else ""
        return f"{self.task} on examples of {self.input_shape}{ids}{targets}".rstrip(",")

    @property
    def input_dtype(self) -> Literal["int32", "float32"]:
        return "int32" if self.vocabulary_size else "float32"

    @property
    def task(self) -> Literal["classification", "regression"]:
        return "classification" if self.num_classes else "regression"

    @property
    def num_outputs(self) -> int:
        return self.num_classes or 1


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in memory.

    x: float32, or int32 ids if there is a vocabulary, shape (n, *input_shape). y: int32 class ids or float32 numbers,
    shape (n, *target_shape). sample_weight: float32 of shape (n,), or None for equal weights.
    """

    x: np.ndarray
    y: np.ndarray
    num_classes: int
    sample_weight: np.ndarray | None = None
    vocabulary_size: int = 0

    def __len__(self) -> int:
        return len(self.x)

    @property
    def schema(self) -> Schema:
        return Schema(self.x.shape[1:], self.num_classes, self.vocabulary_size, self.y.shape[1:])

    def sha256(self) -> str:
        """Of the examples in their order: equal for equal data."""
        digest = hashlib.sha256(repr(self.x.shape).encode())
        for array in (self.x, self.y, self.sample_weight):
            digest.update(b"" if array is None else np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def take(self, indices: np.ndarray) -> Self:
        weight = None if self.sample_weight is None else self.sample_weight[indices]
        return replace(self, x=self.x[indices], y=self.y[indices], sample_weight=weight)


@dataclass(frozen=True)
class Splits:
    train: Dataset
    validation: Dataset
    test: Dataset


def split_pool(dataset: Dataset, seed: int, test_fraction: float) -> tuple[Dataset, Dataset]:
    """Cuts off the test examples at random: (pool, test). The same for every runtime of an experiment."""
    order = rng_for(seed, "test split").permutation(len(dataset))
    num_test = round(test_fraction * len(dataset))
    return dataset.take(order[num_test:]), dataset.take(order[:num_test])


def split_validation(pool: Dataset, seed: int, validation_fraction: float, owner: str = "") -> tuple[Dataset, Dataset]:
    """Cuts off the validation examples of an owner (a silo's name; empty: the central pool): (train, validation)."""
    order = rng_for(seed, "validation split", owner).permutation(len(pool))
    num_validation = round(validation_fraction * len(pool))
    return pool.take(order[num_validation:]), pool.take(order[:num_validation])


def split(dataset: Dataset, seed: int, test_fraction: float, validation_fraction: float) -> Splits:
    """Train, validation and test examples: a disjoint cover of the data set, determined by the seed.

    `validation_fraction` is of the pool that the test split leaves.
    """
    pool, test = split_pool(dataset, seed, test_fraction)
    train, validation = split_validation(pool, seed, validation_fraction)
    return Splits(train, validation, test)


def shard(dataset: Dataset, rank: int, world_size: int) -> Dataset:
    """The rank's part of an evaluation set. With fewer examples than ranks every rank takes all of them.

    (Sums over ranks are then world_size times too large in numerator and denominator alike, so means stay right.)
    """
    if len(dataset) < world_size:
        return dataset
    return dataset.take(np.array_split(np.arange(len(dataset)), world_size)[rank])
