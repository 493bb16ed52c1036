"""The interface of round protocols, and what a round's cohort reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fl_app.aggregation.aggregator import Aggregator
from fl_app.failures import Failure
from fl_app.messages import LocalResult, Task


@dataclass(frozen=True)
class Quorum:
    """The number of results with which a round may end early, and that it needs at least."""

    wanted: int
    needed: int


@dataclass
class RoundReport:
    """A cohort's results without their updates, which are in the aggregator, and its failures."""

    results: dict[str, LocalResult] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)


class RoundProtocol(Protocol):
    """Carries out one attempt of a round.

    Retries belong to the loop, which comes with fresh tasks, their `attempt` raised, and a fresh
    aggregator.
    """

    def run(self, tasks: Mapping[str, Task], aggregator: Aggregator, quorum: Quorum) -> RoundReport:
        """Has the cohort do its tasks and folds the results into the aggregator.

        Raises QuorumError as soon as too few results can come.
        """
