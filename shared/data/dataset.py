"""Examples as arrays: the value that training takes, and its shards over ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from shared.data.rows import Rows
from shared.data.schema import Schema


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in memory; `x` may be in a file (`Rows`, which is indexed like an array).

    | field | dtype | shape |
    |---|---|---|
    | x | float32; int32 ids if there is a vocabulary | (n, *input_shape) |
    | y | int32 numbers of classes; float32 numbers | (n, *target_shape) |
    | sample_weight | float32; None: all weigh the same | (n,) |
    | groups | int; None: no groups. Examples of one group belong together | (n,) |

    `num_classes` is 0 for a regression, `vocabulary_size` 0 for numbers. `classes`: their names,
    where they have any.
    """

    x: np.ndarray  # or Rows
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
        """The schema of these arrays, without class counts and columns."""
        return Schema(
            input_shape=self.x.shape[1:],
            num_classes=self.num_classes,
            vocabulary_size=self.vocabulary_size,
            target_shape=self.y.shape[1:],
            classes=self.classes,
        )

    @property
    def labels(self) -> np.ndarray | None:
        """The class of each example; None for a regression, and for many targets per example."""
        return self.y if self.num_classes and self.y.ndim == 1 else None

    def sha256(self) -> str:
        """The hash of the examples in their order: equal for equal data."""
        digest = hashlib.sha256(repr(self.x.shape).encode())
        for array in (self.x, self.y, self.sample_weight):
            if isinstance(array, Rows):
                digest.update(array.sha256.encode())
                digest.update(array.indices.tobytes())
            elif array is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def take(self, indices: np.ndarray) -> Self:
        """Returns the examples of these indices, in this order; x in a file stays there."""
        x: Any = self.x.take(indices) if isinstance(self.x, Rows) else self.x[indices]
        return replace(
            self,
            x=x,
            y=self.y[indices],
            sample_weight=None if self.sample_weight is None else self.sample_weight[indices],
            groups=None if self.groups is None else self.groups[indices],
        )


def shard(dataset: Dataset, rank: int, world_size: int) -> Dataset:
    """Returns a rank's part of an evaluation set: the rank-th of world_size runs of examples.

    Runs differ by one example at most. With fewer examples than ranks every rank takes all of
    them: numerators and denominators summed over ranks are then both world_size times too large,
    so that means stay right.
    """
    if len(dataset) < world_size:
        return dataset
    runs = np.array_split(np.arange(len(dataset)), world_size)
    return dataset.take(runs[rank])
