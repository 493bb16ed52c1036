"""Aggregation rules: many updates to one, on plain arrays."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.weights import Weights, blocks

FRACTION_BITS = 44  # the sums are multiples of 2^-44 = 5.7e-14, far below what a float32 weight resolves
LARGEST = 2.0**17  # of an update's entries; so no sum can leave the 64 bits


@dataclass(frozen=True)
class Contribution:
    """One silo's update (local weights - global weights) and the number of examples it rests on."""

    update: Weights
    num_examples: int


class RunningMean:
    """FedAvg: the mean update, weighted by examples (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1).

        mean = sum_k n_k update_k / sum_k n_k

    Folds one update at a time, in the memory of one sum, and is bit-equal for every order of arrival: the terms
    n_k / N update_k, with N = `expected_examples`, are rounded to multiples of 2^-44 and added as integers. So the mean
    is within (number of silos) 2^-45 N / sum_k n_k + 2^-51 sum_k n_k |update_k| / sum_k n_k of the exact one, before
    it is rounded to the updates' dtype.
    """

    def __init__(self, like: Sequence[np.ndarray], expected_examples: int) -> None:
        """`like` has the shapes and dtypes of the updates. N: what all that may contribute hold together."""
        if expected_examples <= 0:
            raise ValueError(f"An average needs examples; received {expected_examples} in all.")
        self._forms = [(array.shape, array.dtype) for array in like]
        self._expected = expected_examples
        self._sums = [np.zeros(array.size, np.int64) for array in like]
        self.num_examples = 0

    def add(self, contribution: Contribution) -> None:
        """Folds an update in. Raises ValueError, and leaves the sum as it was, if it cannot be averaged."""
        self._check(contribution)
        self.num_examples += contribution.num_examples
        factor = contribution.num_examples / self._expected * 2.0**FRACTION_BITS
        for total, array in zip(self._sums, contribution.update, strict=True):
            flat = array.reshape(-1)
            for block in blocks(flat.size):
                terms = np.multiply(flat[block], factor, dtype=np.float64)
                total[block] += np.rint(terms, out=terms).astype(np.int64)

    def mean(self) -> Iterator[np.ndarray]:
        """The mean of what was added, array by array. Raises ValueError if that is nothing."""
        if self.num_examples == 0:
            raise ValueError("An average needs examples; received no update.")
        factor = self._expected / self.num_examples * 2.0**-FRACTION_BITS
        return (self._scaled(index, factor) for index in range(len(self._sums)))

    def _scaled(self, index: int, factor: float) -> np.ndarray:
        total, (shape, dtype) = self._sums[index], self._forms[index]
        scaled = np.empty(total.size, dtype)
        for block in blocks(total.size):
            scaled[block] = total[block] * factor
        return scaled.reshape(shape)

    def _check(self, contribution: Contribution) -> None:
        forms = [(array.shape, array.dtype) for array in contribution.update]
        if forms != self._forms:
            differing = next(i for i in range(len(forms) + 1) if forms[i : i + 1] != self._forms[i : i + 1])
            raise ValueError(
                f"an update must have the model's {len(self._forms)} arrays; received {len(forms)}, of which array "
                f"{differing} is {_describe(forms, differing)} and should be {_describe(self._forms, differing)}"
            )
        left = 2 * self._expected - self.num_examples  # so the sums stay below 2^(1 + 17 + 44)
        if not 0 < contribution.num_examples <= left:  # so NaN is caught as well
            raise ValueError(
                f"an update must rest on examples, and on no more than the roll call lets expect ({self._expected} in "
                f"all); received {contribution.num_examples}"
            )
        for largest in map(_largest, contribution.update):
            if not largest <= LARGEST:  # so NaN is caught as well
                raise ValueError(
                    f"an update must be finite, and no entry larger than {LARGEST:.0f}; received {largest:g}: the "
                    "training diverged. Lower optimizer.learning_rate or set optimizer.global_clip_norm"
                )


def weighted_mean(contributions: Mapping[str, Contribution]) -> Weights:
    """The mean of the silos' updates, weighted by examples, as `RunningMean` computes it.

    >>> one, three = Contribution([np.float32([1.0])], 3), Contribution([np.float32([5.0])], 1)
    >>> weighted_mean({"a": one, "b": three})
    [array([2.], dtype=float32)]
    """
    if not contributions:
        raise ValueError("An average needs examples; received no update.")
    like = next(iter(contributions.values())).update
    mean = RunningMean(like, sum(c.num_examples for c in contributions.values()))
    for silo, contribution in contributions.items():
        try:
            mean.add(contribution)
        except ValueError as error:
            raise ValueError(f"silo {silo!r}: {error}.") from None
    return [*mean.mean()]


def _largest(array: np.ndarray) -> float:
    """The largest absolute value; NaN if there is one."""
    return max(abs(float(array.min())), abs(float(array.max()))) if array.size else 0.0


def _describe(forms: Sequence[tuple[tuple[int, ...], np.dtype]], index: int) -> str:
    return f"{forms[index][1]} of shape {forms[index][0]}" if index < len(forms) else "none"
