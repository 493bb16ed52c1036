"""Who takes part in a round, and what becomes of their replies."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fl_app.aggregation.aggregator import Contribution
from fl_app.aggregation.mean import RunningMean
from fl_app.exchange import Roster
from fl_app.failures import Failure, FederationError
from fl_app.messages import LocalResult, Reply, SiloEntry
from fl_app.protocols.plain import collect
from fl_app.protocols.protocol import RoundReport
from fl_app.server.cohort import draw_cohort, quorum_of
from shared.data import Schema
from shared.experiment import Experiment, experiment_from_flat
from shared.weights import Weights, weights_sha256
from tests.arithmetic_exchange import Arithmetic
from tests.local_exchange import configure, final_weights, initial_weights, rows_without_times, run

NAMES = [f"silo-{i}" for i in range(7)]


def cohort_config(
    size: int, seed: int = 0, over_selection: int = 0, min_replies: int = 0
) -> Experiment:
    federation = {
        "cohort_size": size,
        "over_selection": over_selection,
        "min_replies": min_replies,
        "min_silos": 7,
    }
    return experiment_from_flat(
        {"seed": seed} | {f"federation.{key}": value for key, value in federation.items()}
    )


# --- cohorts


@pytest.mark.parametrize("size", [0, 1, 3, 7])
def test_a_cohort_is_so_many_different_silos_whatever_the_order_of_their_names(size: int):
    for round_number in range(1, 20):
        cohort = draw_cohort(cohort_config(size), NAMES, NAMES, round_number)
        assert len(cohort) == len(set(cohort)) == (size or 7)
        assert set(cohort) <= set(NAMES)
        assert (
            cohort
            == sorted(cohort)
            == draw_cohort(cohort_config(size), NAMES[::-1], NAMES, round_number)
        )


@pytest.mark.parametrize(
    ("size", "over_selection", "drawn"), [(1, 1, 2), (3, 2, 5), (5, 2, 7), (5, 9, 7), (7, 1, 7)]
)
def test_over_selection_draws_so_many_more_as_far_as_there_are(
    size: int, over_selection: int, drawn: int
):
    for round_number in range(1, 20):
        cohort = draw_cohort(
            cohort_config(size, over_selection=over_selection), NAMES, NAMES, round_number
        )
        assert len(cohort) == len(set(cohort)) == drawn
        assert cohort == sorted(cohort)


def test_cohorts_differ_by_round_and_by_seed():
    drawn = {
        (
            seed,
            tuple(tuple(draw_cohort(cohort_config(3, seed), NAMES, NAMES, r)) for r in range(1, 6)),
        )
        for seed in range(3)
    }
    assert len({cohorts for _, cohorts in drawn}) == 3
    assert all(len(set(cohorts)) > 1 for _, cohorts in drawn)


def test_every_silo_is_drawn_equally_often():
    rounds = 700
    drawn = [name for r in range(rounds) for name in draw_cohort(cohort_config(3), NAMES, NAMES, r)]
    counts = [drawn.count(name) for name in NAMES]
    # binomial: mean 700 * 3/7 = 300, standard deviation sqrt(700 * 3/7 * 4/7) = 13; 4 of them are
    # 52
    assert max(abs(count - 300) for count in counts) < 52
    assert sum(counts) == 3 * rounds


@pytest.mark.parametrize(
    ("size", "over_selection", "connected"),
    [(3, 0, NAMES[:4]), (3, 1, NAMES[2:]), (3, 0, NAMES[4:]), (5, 1, NAMES[:2]), (3, 0, [])],
)
def test_silos_that_are_gone_are_drawn_only_if_too_few_others_are_there(
    size: int, over_selection: int, connected: list[str]
):
    config = cohort_config(size, over_selection=over_selection)
    drawn_once: set[str] = set()
    for round_number in range(1, 50):
        cohort = draw_cohort(config, NAMES, connected, round_number)
        assert len(cohort) == len(set(cohort)) == size + over_selection
        num_present = len(set(cohort) & set(connected))
        assert num_present == min(len(connected), size + over_selection)
        drawn_once.update(cohort)
    is_enough = len(connected) >= size + over_selection
    assert drawn_once == set(connected if is_enough else NAMES)


def test_all_silos_are_asked_where_none_are_drawn_whoever_is_gone():
    assert draw_cohort(cohort_config(0), NAMES, NAMES[:2], 1) == NAMES


class WithoutSilo2(Arithmetic):
    """Silo 2 goes after the roll call."""

    def silos(self) -> Roster:
        roster = super().silos()
        if not self.seen:
            return roster
        return Roster({name: e for name, e in roster.entries.items() if name != "silo-2"})


def test_a_round_is_not_lost_to_a_silo_that_is_gone(tmp_path: Path):
    experiment = configure(
        tmp_path,
        {
            "federation.cohort_size": 1,
            "federation.min_silos": 3,
            "federation.num_rounds": 12,
            "federation.evaluate_on_silos": False,
        },
    )
    run(experiment, WithoutSilo2())
    cohorts = [row["cohort"] for row in rows_without_times(experiment)[1:]]
    assert {name for cohort in cohorts[1:] for name in cohort} == {"silo-0", "silo-1"}


def test_only_the_cohort_trains(tmp_path: Path):
    experiment = configure(tmp_path, {"federation.cohort_size": 1, "federation.min_silos": 3})
    run(experiment, Arithmetic())
    cohorts = [row["cohort"] for row in rows_without_times(experiment)[1:]]
    silos = ["silo-0", "silo-1", "silo-2"]
    assert cohorts == [draw_cohort(experiment, silos, silos, r) for r in (1, 2, 3)]
    numbers = [int(cohort[0].removeprefix("silo-")) for cohort in cohorts]
    moved = final_weights(experiment)[1] - initial_weights(experiment)[1]
    np.testing.assert_allclose(
        moved, sum((i + 1) * r for r, i in enumerate(numbers, start=1)), rtol=1e-6
    )


# --- replies: silo i holds i + 1 examples


LIKE = [np.zeros((2, 3), np.float32), np.zeros(2, np.float32)]
ENTRIES = {name: SiloEntry(name, Schema((2,), 3), i + 1) for i, name in enumerate(NAMES)}


def good(i: int) -> LocalResult:
    rng = np.random.default_rng(i)
    update = [rng.normal(size=array.shape).astype(array.dtype) for array in LIKE]
    return LocalResult(i + 1, 5, {"loss": 0.5 * i}, {"loss": 0.25 * i}, update, seconds=1.5 * i)


def broken(update: Weights) -> LocalResult:
    return LocalResult(2, 5, {"loss": 0.5}, {}, update)


def mean_of(*numbers: int, asked: int) -> str:
    """Of what these silos sent; the first `asked` were to send something."""
    mean = RunningMean(LIKE, sum(range(1, asked + 1)))
    for i in numbers:
        mean.add(NAMES[i], Contribution(good(i).update, i + 1))
    return weights_sha256([*mean.result()])


@dataclass
class Collected:
    """A round's report, and the mean that its updates are in."""

    report: RoundReport
    mean: RunningMean

    @property
    def results(self) -> dict[str, LocalResult]:
        return self.report.results

    @property
    def failures(self) -> dict[str, Failure]:
        return self.report.failures


def collected(replies: Iterable[Reply], cohort: list[str], experiment: Experiment) -> Collected:
    mean = RunningMean(LIKE, sum(ENTRIES[name].num_examples for name in cohort))
    quorum = quorum_of(experiment.federation, len(cohort))
    return Collected(collect(replies, mean, quorum, len(cohort)), mean)


class Stream:
    """Replies in this order, and how many of them were asked for."""

    def __init__(self, *replies: LocalResult | Failure, names: Sequence[str] = NAMES) -> None:
        self.replies, self.names, self.num_taken, self.was_exhausted = replies, names, 0, False

    def __iter__(self) -> Iterator[Reply]:
        for name, reply in zip(self.names, self.replies, strict=False):
            self.num_taken += 1
            yield name, reply if isinstance(reply, Failure) else reply.to_answer()
        self.was_exhausted = True


GONE = Failure("it is no longer connected")


def test_results_are_kept_by_name_without_their_updates_which_are_in_the_mean():
    found = collected(Stream(good(0), good(1), good(2)), NAMES[:3], cohort_config(0))
    assert list(found.results) == NAMES[:3]
    for i, result in enumerate(found.results.values()):
        assert result == LocalResult(i + 1, 5, {"loss": 0.5 * i}, {"loss": 0.25 * i}, [], 1.5 * i)
    assert weights_sha256([*found.mean.result()]) == mean_of(0, 1, 2, asked=3)
    assert found.failures == {}


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_the_mean_of_the_replies_is_bit_equal_for_every_order_of_arrival(order: tuple[int, ...]):
    stream = Stream(*(good(i) for i in order), names=[NAMES[i] for i in order])
    assert weights_sha256(
        [*collected(stream, NAMES[:3], cohort_config(0)).mean.result()]
    ) == mean_of(0, 1, 2, asked=3)


def test_the_first_results_that_a_cohort_needs_end_the_round_and_the_rest_are_not_waited_for():
    stream = Stream(good(0), GONE, good(2), good(3), good(4))
    found = collected(stream, NAMES[:5], cohort_config(2, over_selection=3))
    assert (list(found.results), list(found.failures)) == (["silo-0", "silo-2"], ["silo-1"])
    assert stream.num_taken == 3
    assert weights_sha256([*found.mean.result()]) == mean_of(0, 2, asked=5)


def test_without_over_selection_all_are_waited_for_even_if_fewer_would_do():
    stream = Stream(good(0), GONE, good(2), good(3))
    found = collected(stream, NAMES[:4], cohort_config(0, min_replies=2))
    assert list(found.results) == ["silo-0", "silo-2", "silo-3"]
    assert stream.was_exhausted


@pytest.mark.parametrize(("size", "over_selection", "asked"), [(0, 0, 4), (4, 0, 4), (2, 2, 4)])
@pytest.mark.parametrize("min_replies", [0, 1, 2])
def test_the_round_ends_in_an_error_as_soon_as_too_few_can_be_left(
    size: int, over_selection: int, asked: int, min_replies: int
):
    needed = min_replies or size or asked
    stream = Stream(*[GONE] * asked)
    with pytest.raises(
        FederationError, match=rf"needs {needed} results \(federation\.min_replies\) of 4 silos"
    ) as told:
        collected(
            stream,
            NAMES[:asked],
            cohort_config(size, over_selection=over_selection, min_replies=min_replies),
        )
    assert stream.num_taken == asked - needed + 1
    for name in NAMES[: stream.num_taken]:
        assert f"silo '{name}': it is no longer connected" in str(told.value)
    assert "lower min_replies or raise round_timeout_s; the run can be resumed" in str(told.value)


def test_replies_that_end_too_early_are_an_error():
    with pytest.raises(
        FederationError,
        match=r"needs 3 results .* of 3 silos; received 2\. The others did not answer",
    ):
        collected(Stream(good(0), good(1)), NAMES[:3], cohort_config(0))
    with pytest.raises(FederationError, match=r"received 0\. The others did not answer"):
        collected(Stream(), NAMES[:3], cohort_config(0, min_replies=1))


def test_replies_that_end_early_will_do_if_there_are_enough():
    found = collected(Stream(good(0), good(1)), NAMES[:3], cohort_config(0, min_replies=2))
    assert weights_sha256([*found.mean.result()]) == mean_of(0, 1, asked=3)


BROKEN = {
    "not a number": (broken([LIKE[0], np.float32([0.0, np.nan])]), "must be finite.*received nan"),
    "another shape": (broken([LIKE[0].T, LIKE[1]]), r"array 0 is float32 of shape \(3, 2\)"),
    "another dtype": (
        broken([LIKE[0], np.float64(LIKE[1])]),
        r"array 1 is float64 of shape \(2,\)",
    ),
    "nothing": (broken([]), "must have the model's 2 arrays; received 0"),
    "no examples": (LocalResult(0, 5, {}, {}, LIKE), "must rest on examples.*received 0"),
    "a million times its examples": (
        LocalResult(10**6, 5, {}, {}, LIKE),
        "the roll call lets expect.*received 1000000",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_update_that_cannot_be_averaged_is_refused_by_name_and_the_round_goes_on(
    case: str, capsys: pytest.CaptureFixture[str]
):
    refused, reason = BROKEN[case]
    found = collected(Stream(good(0), refused, good(2)), NAMES[:3], cohort_config(0, min_replies=2))
    assert list(found.results) == ["silo-0", "silo-2"]
    assert list(found.failures) == ["silo-1"]
    assert weights_sha256([*found.mean.result()]) == mean_of(0, 2, asked=3)
    assert "silo 'silo-1' is left out of the round: an update" in capsys.readouterr().out
    with pytest.raises(
        FederationError, match=rf"received 1\. silo 'silo-1': an update .*{reason}.*See the logs"
    ):
        collected(Stream(good(0), refused, good(2)), NAMES[:3], cohort_config(0))


def test_nothing_is_asked_of_the_replies_before_the_round_begins_or_after_it_has_ended():
    """They are a generator that waits for the network."""
    stream = Stream(good(0), good(1), good(2))
    collected(stream, NAMES[:3], cohort_config(2, over_selection=1))
    assert (stream.num_taken, stream.was_exhausted) == (2, False)
    stream = Stream(good(0), good(1))
    collected(stream, NAMES[:2], cohort_config(0))
    assert (stream.num_taken, stream.was_exhausted) == (2, False)


def test_a_cohort_smaller_than_wanted_will_do_if_there_are_no_more_silos():
    """cohort_size 5, of which only 2 could be drawn."""
    found = collected(Stream(good(0), good(1)), NAMES[:2], cohort_config(5))
    assert list(found.results) == NAMES[:2]
