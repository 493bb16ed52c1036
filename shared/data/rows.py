"""An array in a file, of which only what is asked for is read."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of an array in a file: `rows[indices]` reads some into memory. `sha256` is the whole array's."""

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
        found: np.ndarray = np.asarray(self.stored[self.indices[key]])
        return found

    def take(self, indices: np.ndarray) -> Self:
        """These rows, still in the file."""
        return type(self)(self.stored, self.indices[indices], self.sha256)
