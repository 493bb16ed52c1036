"""The seam of aggregation: other rules and protocols fit where the mean and the plain one do."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pytest

from fl_app.aggregation.aggregator import Aggregator, Contribution
from fl_app.aggregation.mean import RunningMean
from fl_app.messages import Task
from fl_app.protocols.plain import PlainProtocol
from fl_app.protocols.protocol import Quorum, RoundReport
from fl_app.server import rounds
from shared.weights import Weights, add
from tests.arithmetic_exchange import Arithmetic
from tests.local_exchange import configure, final_weights, initial_weights, run


@dataclass
class CoordinatewiseMedian:
    """The median of each entry over the silos, whatever their examples; it needs all updates."""

    like: Weights
    needs: Literal["sum", "all"] = "all"
    updates: dict[str, Weights] = field(default_factory=dict)

    def add(self, silo: str, contribution: Contribution) -> None:
        if not all(np.isfinite(array).all() for array in contribution.update):
            raise ValueError("an update must be finite")
        self.updates[silo] = contribution.update

    def merge(self, other: Self) -> None:
        self.updates |= other.updates

    def result(self) -> Iterator[np.ndarray]:
        in_order = [update for _, update in sorted(self.updates.items())]
        for array, entries in zip(self.like, zip(*in_order, strict=True), strict=True):
            yield np.median(np.stack(entries), axis=0).astype(array.dtype)


LIKE = [np.zeros((2, 3), np.float32), np.zeros(2, np.float32)]


def contribution(i: int) -> Contribution:
    rng = np.random.default_rng(i)
    return Contribution([rng.normal(size=a.shape).astype(a.dtype) for a in LIKE], i + 1)


def bits(aggregator: Aggregator) -> list[bytes]:
    return [array.tobytes() for array in aggregator.result()]


@pytest.mark.parametrize(
    "make", [lambda: RunningMean(LIKE, 15), lambda: CoordinatewiseMedian(LIKE)]
)
def test_a_rule_does_not_depend_on_the_order_or_on_how_silos_are_grouped(make: object):
    """The laws of `Aggregator`, for every order and every split of five silos into two groups."""
    assert callable(make)
    contributions = {f"silo-{i}": contribution(i) for i in range(5)}
    expected = None
    for order in itertools.islice(itertools.permutations(contributions), 0, None, 7):
        for num_first in range(6):
            first, second = make(), make()
            for i, silo in enumerate(order):
                (first if i < num_first else second).add(silo, contributions[silo])
            first.merge(second)
            expected = expected or bits(first)
            assert bits(first) == expected


def test_means_over_other_arrays_or_examples_are_not_merged():
    for other in (RunningMean(LIKE[:1], 15), RunningMean(LIKE, 16)):
        other.add("a", Contribution([np.zeros_like(a) for a in LIKE[: len(other._forms)]], 1))
        with pytest.raises(ValueError, match="the same arrays over the same expected examples"):
            RunningMean(LIKE, 15).merge(other)


def test_a_merge_beyond_the_expected_examples_is_refused():
    """Else the sums could leave the 64 bits."""
    one, other = RunningMean(LIKE, 4), RunningMean(LIKE, 4)
    for mean in (one, other):
        mean.add("a", Contribution(contribution(0).update, 8))
    with pytest.raises(ValueError, match="no more than the roll call lets expect"):
        one.merge(other)


def test_a_federation_by_the_median_is_the_median_of_its_silos_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In round r the updates are r, 2 r, 3 r, 4 r and 100 r."""

    class OneIsFarOff(Arithmetic):
        def update(self, i: int, round_number: int, weights: Weights) -> Weights:
            factor = 100 if i == 4 else i + 1
            return [np.full_like(w, factor * round_number) for w in weights]

    monkeypatch.setattr(rounds, "RunningMean", lambda like, _: CoordinatewiseMedian(like))
    experiment = configure(tmp_path, {"federation.num_rounds": 2})
    run(experiment, OneIsFarOff(num_silos=5))
    expected = add(
        initial_weights(experiment),
        [np.full_like(w, 3 * (1 + 2)) for w in initial_weights(experiment)],
    )
    for found, array in zip(final_weights(experiment), expected, strict=True):
        np.testing.assert_allclose(found, array, rtol=1e-6)


def test_a_protocol_of_several_exchanges_fits_in_the_place_of_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Here: whoever is to take part is first asked to evaluate; then all goes the plain way."""

    class AsksTwice(PlainProtocol):
        def run(
            self, tasks: Mapping[str, Task], aggregator: Aggregator, quorum: Quorum
        ) -> RoundReport:
            first = {
                silo: Task("evaluate", task.run, task.round, task.attempt, task.body, task.arrays)
                for silo, task in tasks.items()
            }
            present = RoundReport()
            self.exchange.post(first, self.timeout_s)
            while reply := self.exchange.next(self.timeout_s):
                present.results[reply[0]] = None  # type: ignore[assignment]
            assert sorted(present.results) == sorted(tasks)
            return super().run(tasks, aggregator, quorum)

    plain = configure(tmp_path / "plain")
    run(plain, Arithmetic())
    monkeypatch.setattr(rounds, "PlainProtocol", AsksTwice)
    twice = configure(tmp_path / "twice")
    run(twice, Arithmetic())
    for a, b in zip(final_weights(plain), final_weights(twice), strict=True):
        assert a.tobytes() == b.tobytes()
