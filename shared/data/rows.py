"""Rows of an array that stays in its file: an index reads into memory what it asks for."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows `indices` of the array `stored`; `rows[i]`, i an index, slice or array, reads some.

    `stored`: a float32 array mapped into memory, of which `sha256` is the hash.
    """

    stored: np.ndarray
    indices: np.ndarray
    sha256: str

    dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.indices), *self.stored.shape[1:])

    def __getitem__(self, key: Any) -> np.ndarray:
        values: np.ndarray = np.asarray(self.stored[self.indices[key]])
        return values

    def take(self, indices: np.ndarray) -> Self:
        """Returns these of the rows, without reading them."""
        return type(self)(self.stored, self.indices[indices], self.sha256)
