"""Metrics that can be merged: sums and weights travel, means are taken last."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class WeightedMean:
    """A weighted mean kept as its two sums, so that means over parts can be added.

    Laws: zero + a = a; a + b = b + a; the value of a sum = the value of the union.

    >>> (WeightedMean.of(1.0, 3) + WeightedMean.of(5.0, 1)).value
    2.0
    """

    total: float = 0.0
    weight: float = 0.0

    @classmethod
    def of(cls, value: float, weight: float) -> Self:
        return cls(value * weight, weight)

    def __add__(self, other: "WeightedMean") -> "WeightedMean":
        return WeightedMean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        """The mean; NaN over nothing."""
        return self.total / self.weight if self.weight else math.nan


def describe(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics by split as one line.

    >>> describe({"test": {"loss": 0.5, "accuracy": 0.9}})
    'test loss 0.5000, test accuracy 0.9000'
    """
    return ", ".join(
        f"{split} {name} {value:.4f}"
        for split, values in metrics.items()
        for name, value in values.items()
    )


def merge_means(parts: Iterable[tuple[Mapping[str, float], float]]) -> dict[str, float]:
    """The mean of each metric over parts of (values, num_examples), weighted by examples.

    A part that lacks a metric does not take part in that metric's mean.

    >>> merge_means([({"loss": 1.0}, 3), ({"loss": 5.0}, 1)])
    {'loss': 2.0}
    """
    means: dict[str, WeightedMean] = {}
    for values, num_examples in parts:
        for name, value in values.items():
            mean = means.get(name, WeightedMean())
            means[name] = mean + WeightedMean.of(value, num_examples)
    return {name: mean.value for name, mean in means.items()}
