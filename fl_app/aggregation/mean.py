"""FedAvg's rule: the mean of the updates, weighted by examples, the same in every order."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Literal, Self, TypeAlias

import numpy as np

from fl_app.aggregation.aggregator import Contribution
from shared.weights import Weights, blocks

# The sums are multiples of 2^-44 = 5.7e-14, far below what a float32 weight resolves.
FRACTION_BITS = 44
LARGEST = 2.0**17  # of an update's entries; so no sum can leave the 64 bits

Form: TypeAlias = tuple[tuple[int, ...], np.dtype]  # of an array


class RunningMean:
    """The mean update, weighted by examples: an `Aggregator` (McMahan et al. 2017,
    arXiv:1602.05629, Algorithm 1).

        mean = sum_k n_k update_k / sum_k n_k

    Folds one update at a time, in the memory of one sum, and is bit-equal for every order of
    arrival: the terms n_k / N update_k, with N = `expected_examples`, are rounded to multiples of
    2^-44 and added as integers. So the mean is within (number of silos) 2^-45 N / sum_k n_k + 2^-51
    sum_k n_k |update_k| / sum_k n_k of the exact one, before it is rounded to the updates' dtype.
    """

    needs: Literal["sum", "all"] = "sum"

    def __init__(self, like: Sequence[np.ndarray], expected_examples: int) -> None:
        """Starts at zero. `like` has the shapes and dtypes of the updates; `expected_examples` is
        what all that may contribute hold together.
        """
        if expected_examples <= 0:
            raise ValueError(f"An average needs examples; received {expected_examples} in all.")
        self._forms = [(array.shape, array.dtype) for array in like]
        self._expected = expected_examples
        self._sums = [np.zeros(array.size, np.int64) for array in like]
        self.num_examples = 0

    def add(self, silo: str, contribution: Contribution) -> None:
        """Folds an update in. Raises ValueError, and leaves the sum as it was, if it cannot be
        averaged.
        """
        self._check(contribution)
        self.num_examples += contribution.num_examples

        factor = contribution.num_examples / self._expected * 2.0**FRACTION_BITS
        for total, array in zip(self._sums, contribution.update, strict=True):
            flat = array.reshape(-1)
            for block in blocks(flat.size):
                terms = np.multiply(flat[block], factor, dtype=np.float64)
                total[block] += np.rint(terms, out=terms).astype(np.int64)

    def merge(self, other: Self) -> None:
        """Adds the sum of another mean with the same arrays and expected examples: exact."""
        if (self._forms, self._expected) != (other._forms, other._expected):
            raise ValueError(
                "Means are merged if they average the same arrays over the same expected examples;"
                f" received {self._expected} and {other._expected} examples. Begin both alike."
            )
        if other.num_examples == 0:
            return
        self._check_num_examples(other.num_examples)
        self.num_examples += other.num_examples
        for total, others_total in zip(self._sums, other._sums, strict=True):
            total += others_total

    def result(self) -> Iterator[np.ndarray]:
        """The mean of what was added, array by array. Raises ValueError if that is nothing."""
        if self.num_examples == 0:
            raise ValueError("An average needs examples; received no update.")
        factor = self._expected / self.num_examples * 2.0**-FRACTION_BITS
        return (self._scaled(index, factor) for index in range(len(self._sums)))

    def _scaled(self, index: int, factor: float) -> np.ndarray:
        total = self._sums[index]
        shape, dtype = self._forms[index]
        scaled = np.empty(total.size, dtype)
        for block in blocks(total.size):
            scaled[block] = total[block] * factor
        return scaled.reshape(shape)

    def _check(self, contribution: Contribution) -> None:
        _check_forms(contribution.update, self._forms)
        self._check_num_examples(contribution.num_examples)
        _check_finite(contribution.update)

    def _check_num_examples(self, num_examples: int) -> None:
        left = 2 * self._expected - self.num_examples  # so the sums stay below 2^(1 + 17 + 44)
        if not 0 < num_examples <= left:  # so NaN is caught as well
            raise ValueError(
                "an update must rest on examples, and on no more than the roll call lets expect"
                f" ({self._expected} in all); received {num_examples}"
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
            mean.add(silo, contribution)
        except ValueError as error:
            raise ValueError(f"silo {silo!r}: {error}.") from None
    return [*mean.result()]


def check_update(update: Weights, like: Sequence[np.ndarray]) -> None:
    """Raises ValueError for an update that has other arrays than `like`, or absurd entries."""
    _check_forms(update, [(array.shape, array.dtype) for array in like])
    _check_finite(update)


def _check_finite(update: Weights) -> None:
    for largest in map(_largest, update):
        if not largest <= LARGEST:  # so NaN is caught as well
            raise ValueError(
                f"an update must be finite, and no entry larger than {LARGEST:.0f}; received"
                f" {largest:g}: the training diverged. Lower optimizer.learning_rate or set"
                " optimizer.global_clip_norm"
            )


def _check_forms(update: Weights, expected: Sequence[Form]) -> None:
    forms = [(array.shape, array.dtype) for array in update]
    if forms == expected:
        return
    pairs = enumerate(zip_longest(forms, expected))
    differing = next(i for i, (mine, wanted) in pairs if mine != wanted)
    raise ValueError(
        f"an update must have the model's {len(expected)} arrays; received {len(forms)}, of which"
        f" array {differing} is {_describe(forms, differing)} and should be"
        f" {_describe(expected, differing)}"
    )


def _largest(array: np.ndarray) -> float:
    """The largest absolute value; NaN if there is one."""
    return max(abs(float(array.min())), abs(float(array.max()))) if array.size else 0.0


def _describe(forms: Sequence[Form], index: int) -> str:
    return f"{forms[index][1]} of shape {forms[index][0]}" if index < len(forms) else "none"
