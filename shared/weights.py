"""Model weights as a vector space: lists of arrays in Keras's order (`model.get_weights()`)."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Weights = list[np.ndarray]

BLOCK = 1 << 16  # entries; with a few temporaries they stay in the cache


def subtract(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Weights:
    """a - b, array by array. An update is `subtract(local_weights, global_weights)`."""
    return [x - y for x, y in zip(a, b, strict=True)]


def add(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Weights:
    """a + b, array by array, in the dtype of a."""
    return [(x + y).astype(x.dtype, copy=False) for x, y in zip(a, b, strict=True)]


def max_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """Largest absolute difference over all entries, max_i |a_i - b_i|; NaN if any entry is NaN.

    >>> max_difference([np.array([1.0, 2.0])], [np.array([1.0, 2.5])])
    0.5
    """
    largest = [
        np.max(np.abs(np.subtract(x, y, dtype=np.float64)), initial=0.0)
        for x, y in zip(a, b, strict=True)
    ]
    return float(np.max(largest, initial=0.0))


def weights_sha256(weights: Iterable[np.ndarray]) -> str:
    """SHA-256 of the weights in order, as little-endian bytes.

    Guarantee: equal exactly when the weights are bit-equal, however they lie in memory.
    """
    digest = hashlib.sha256()
    for array in weights:
        little_endian = array.dtype.newbyteorder("<")
        digest.update(np.ascontiguousarray(array, dtype=little_endian).tobytes())
    return digest.hexdigest()


def blocks(size: int) -> Iterator[slice]:
    """Slices of `BLOCK` entries that cover range(size).

    Working through a large array by blocks needs no temporaries as large as the array.

    >>> [*blocks(100_000)]
    [slice(0, 65536, None), slice(65536, 131072, None)]
    """
    return (slice(start, start + BLOCK) for start in range(0, size, BLOCK))


def num_bytes(weights: Iterable[np.ndarray]) -> int:
    """The bytes of all arrays in memory."""
    return sum(array.nbytes for array in weights)
