"""Aggregation rules: many updates to one, on plain arrays. Silos are folded in the order of their names."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared.weights import Weights


@dataclass(frozen=True)
class Contribution:
    """One silo's update (local weights - global weights) and the number of examples it rests on."""

    update: Weights
    num_examples: int


def weighted_mean(contributions: Mapping[str, Contribution]) -> Weights:
    """FedAvg: the mean update, weighted by examples (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1).

        mean = sum_k n_k update_k / sum_k n_k

    Summed in float64 in the order of the silos' names, so that the result is bit-equal for every order of arrival; in
    the updates' dtype. One contribution comes back unchanged. Raises ValueError if there is nothing to average, or if
    an update is not finite (a silo that diverged must not be averaged in).

    >>> one, three = Contribution([np.float32([1.0])], 3), Contribution([np.float32([5.0])], 1)
    >>> weighted_mean({"a": one, "b": three})
    [array([2.], dtype=float32)]
    """
    total = sum(c.num_examples for c in contributions.values())
    if total <= 0:
        raise ValueError(f"An average needs examples; received {total} from {len(contributions)} silos.")
    for silo, contribution in sorted(contributions.items()):
        if not all(np.isfinite(array).all() for array in contribution.update):
            raise ValueError(
                f"Silo {silo!r} sent an update that is not finite: its training diverged. Lower "
                "optimizer.learning_rate or set optimizer.global_clip_norm."
            )
    sums: list[np.ndarray] | None = None
    for _, contribution in sorted(contributions.items()):
        terms = [np.asarray(array, dtype=np.float64) * contribution.num_examples for array in contribution.update]
        sums = terms if sums is None else [a + b for a, b in zip(sums, terms, strict=True)]
    assert sums is not None
    dtypes = [array.dtype for array in next(iter(contributions.values())).update]
    return [np.asarray(a / total, dtype=dtype) for a, dtype in zip(sums, dtypes, strict=True)]
