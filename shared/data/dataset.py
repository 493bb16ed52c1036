"""The data set as a value: arrays and their schema."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from shared.data.rows import Rows
from shared.data.schema import Schema


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in memory, but for x where that is in a file.

    x: float32, or int32 ids if there is a vocabulary, shape (n, *input_shape). y: int32 class ids or float32 numbers,
    shape (n, *target_shape). sample_weight: float32 of shape (n,), or None for equal weights. groups: int, shape (n,):
    examples of one group belong together.
    """

    x: np.ndarray  # or Rows, which can be indexed like it
    y: np.ndarray
    num_classes: int
    sample_weight: np.ndarray | None = None
    vocabulary_size: int = 0
    groups: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    @property
    def schema(self) -> Schema:
        return Schema(self.x.shape[1:], self.num_classes, self.vocabulary_size, self.y.shape[1:], self.classes)

    @property
    def labels(self) -> np.ndarray | None:
        """A number for each example's class; None for a regression, and where an example has many targets."""
        return self.y if self.num_classes and self.y.ndim == 1 else None

    def sha256(self) -> str:
        """Of the examples in their order: equal for equal data."""
        digest = hashlib.sha256(repr(self.x.shape).encode())
        for array in (self.x, self.y, self.sample_weight):
            if isinstance(array, Rows):
                digest.update(array.sha256.encode() + array.indices.tobytes())
            elif array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def take(self, indices: np.ndarray) -> Self:
        weight = None if self.sample_weight is None else self.sample_weight[indices]
        groups = None if self.groups is None else self.groups[indices]
        x: Any = self.x.take(indices) if isinstance(self.x, Rows) else self.x[indices]
        return replace(self, x=x, y=self.y[indices], sample_weight=weight, groups=groups)


def shard(dataset: Dataset, rank: int, world_size: int) -> Dataset:
    """The rank's part of an evaluation set. With fewer examples than ranks every rank takes all of them.

    (Sums over ranks are then world_size times too large in numerator and denominator alike, so means stay right.)
    """
    if len(dataset) < world_size:
        return dataset
    return dataset.take(np.array_split(np.arange(len(dataset)), world_size)[rank])
