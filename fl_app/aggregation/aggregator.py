"""The interface of aggregation rules: many silos' updates become one, on plain arrays."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np

from shared.weights import Weights


@dataclass(frozen=True)
class Contribution:
    """One silo's update (local weights - global weights) and the number of examples it rests on."""

    update: Weights
    num_examples: int


class Aggregator(Protocol):
    """Folds a round's updates into one.

    `needs`: "sum" if every update is forgotten once it is added, "all" if the rule compares them,
    so that the memory grows with the cohort and no protocol that hides single updates will do.
    Laws: the result is bit-equal for every order of `add` and every split over `merge`.
    """

    needs: Literal["sum", "all"]

    def add(self, silo: str, contribution: Contribution) -> None:
        """Takes an update in. Raises ValueError, and stays as it was, if it cannot be used."""

    def merge(self, other: Self) -> None:
        """Takes in what another aggregator of the same round has been given."""

    def result(self) -> Iterator[np.ndarray]:
        """The aggregated update, array by array. Raises ValueError if nothing was added."""
