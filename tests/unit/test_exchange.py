"""Asking silos: one reply for each, as they come in, and nothing of earlier tasks."""

import gc
import weakref
from contextlib import closing
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pytest

from fl_app.exchange import Roster, ask
from fl_app.failures import Failure, FederationError
from fl_app.messages import INFORM, TRAIN, Answer, Reply, Task
from fl_app.server.registration import call_roll, select_silos
from fl_app.simulation.exchange import InProcessExchange
from shared.data import Schema
from shared.experiment import Experiment
from tests.arithmetic_exchange import Arithmetic
from tests.local_exchange import WINE

NAMES = ["silo-0", "silo-1", "silo-2"]


def tasks(round_number: int, names: list[str] = NAMES) -> dict[str, Task]:
    return {name: Task(TRAIN, round=round_number, body={"own": name}) for name in names}


class Echo(InProcessExchange):
    """Silos that answer with what they were asked."""

    def __init__(self) -> None:
        super().__init__(Arithmetic().silos().entries.values(), self.respond)

    def respond(self, silo: str, task: Task) -> Answer | Failure:
        return Answer({"silo": silo, "round": task.round, **task.body})


def test_every_silo_gets_its_own_task_and_gives_one_reply():
    replies = dict(ask(Echo(), tasks(7), timeout_s=1.0))
    assert list(replies) == NAMES
    for name, reply in replies.items():
        assert reply == Answer({"silo": name, "round": 7, "own": name})


def test_tasks_that_are_left_over_are_withdrawn():
    exchange = Echo()
    with closing(ask(exchange, tasks(1), timeout_s=1.0)) as replies:
        assert next(replies)[0] == "silo-0"
    assert exchange.next(0.0) is None
    assert [reply.body["round"] for _, reply in ask(exchange, tasks(2), 1.0)] == [2, 2, 2]


class Repeats(Echo):
    """A silo that answers twice, and another one that nobody asked."""

    def next(self, timeout_s: float) -> Reply | None:
        reply = super().next(timeout_s)
        if reply is None or reply[0] != "silo-1":
            return reply
        self._tasks.appendleft(("silo-0", tasks(1)["silo-0"]))
        self._tasks.appendleft(("a stranger", Task(TRAIN)))
        return reply


def test_replies_that_were_not_asked_for_are_dropped():
    assert [silo for silo, _ in ask(Repeats(), tasks(1), 1.0)] == NAMES


class Silent(Echo):
    """An exchange to which the replies of one silo never come."""

    def next(self, timeout_s: float) -> Reply | None:
        reply = super().next(timeout_s)
        return None if reply and reply[0] == "silo-2" else reply


def test_a_silo_without_a_reply_is_a_failure_when_the_time_is_up():
    replies = dict(ask(Silent(), tasks(1), timeout_s=0.5))
    assert replies["silo-2"] == Failure("no answer within 0.5 s")
    assert isinstance(replies["silo-1"], Answer)


def test_the_weights_that_were_sent_are_not_held_while_replies_come():
    """Only whoever asks decides how long they live: they may be as large as the memory."""

    class Weights(np.ndarray):
        pass

    def weights_task() -> tuple[dict[str, Task], weakref.ref[Weights]]:
        weights = np.zeros(3).view(Weights)
        sent = {name: replace(task, arrays=[weights]) for name, task in tasks(1).items()}
        return sent, weakref.ref(weights)

    sent, alive = weights_task()
    replies = ask(Echo(), sent, 1.0)
    del sent
    assert len(list(replies)) == 3
    gc.collect()
    assert alive() is None


# --- the roll call


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr("time.sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Arrivals(Arithmetic):
    """Silos that connect, and introduce themselves, at given times."""

    def __init__(self, clock: Clock, connects: list[float], answers: list[float]) -> None:
        super().__init__(num_silos=len(connects))
        self.clock = clock
        self.times = list(zip(connects, answers, strict=True))

    def silos(self) -> Roster:
        entries = list(super().silos().entries.values())
        there = [e for e, (_, at) in zip(entries, self.times, strict=True) if at <= self.clock.now]
        connected = sum(at <= self.clock.now for at, _ in self.times)
        return Roster({e.name: e for e in there}, num_pending=connected - len(there))


def settings(**changes: float) -> Experiment:
    return Experiment.model_validate({"federation": changes})


def roll(exchange: Arrivals, **changes: float) -> list[str]:
    return list(call_roll(exchange, settings(**changes).federation))


def test_a_run_begins_with_all_that_are_connected_once_enough_have_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = Clock(monkeypatch)
    exchange = Arrivals(clock, connects=[0.0, 5.0, 5.0, 60.0], answers=[1.0, 6.0, 15.0, 61.0])
    assert roll(exchange, min_silos=2) == NAMES
    assert 15.0 <= clock.now < 17.0
    printed = capsys.readouterr().out
    assert "waiting for silos: 1 of 2 connected" in printed
    assert "roll call: 3 silos: silo-0 (1 examples), silo-1 (2 examples)" in printed


def test_a_silo_that_hangs_does_not_keep_a_run_from_beginning(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    exchange = Arrivals(clock, connects=[0.0, 0.0, 0.0], answers=[1.0, 1e9, 2.0])
    assert roll(exchange, min_silos=2, silo_timeout_s=600.0) == ["silo-0", "silo-2"]
    assert 32.0 <= clock.now < 36.0


def test_too_few_silos_end_the_roll_call_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    exchange = Arrivals(clock, connects=[0.0, 0.0], answers=[1.0, 1e9])
    with pytest.raises(
        FederationError, match=r"needs 2 silos \(federation\.min_silos\); 1 answered .* within 50 s"
    ):
        roll(exchange, min_silos=2, silo_timeout_s=50.0)
    assert 50.0 <= clock.now < 54.0


def test_a_silo_that_connects_in_time_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    exchange = Arrivals(clock, connects=[0.0, 300.0], answers=[1.0, 310.0])
    assert roll(exchange, min_silos=2, silo_timeout_s=600.0) == ["silo-0", "silo-1"]


def test_the_members_of_a_new_run_are_all_that_answered():
    exchange = Arithmetic()
    entries = exchange.silos().entries
    assert list(select_silos(exchange, Experiment().federation, (), entries)) == NAMES


class Claims(Arithmetic):
    """Silos that claim so many examples, or hold examples of such a shape."""

    def __init__(self, *claims: int, shapes: tuple[int, ...] = ()) -> None:
        super().__init__(len(claims))
        self.told: dict[str, str] = {}
        entries = self._entries.values()
        for entry, claim, shape in zip_longest(entries, claims, shapes):
            schema = Schema((shape,), 3) if shape else WINE
            self._entries[entry.name] = replace(entry, num_examples=claim, schema=schema)

    def respond(self, silo: str, task: Task) -> Answer | Failure:
        assert task.kind == INFORM
        self.told[silo] = task.body["reason"]
        return Answer()


@pytest.mark.parametrize(
    ("claims", "left_out"),
    [
        ((100, 2**31, 120), "silo-1"),
        ((5, 5 * 2**20 + 1), "silo-1"),
        ((5, 5 * 2**20), None),
        ((1, 7, 10**6), None),
    ],
)
def test_a_silo_whose_claim_would_round_the_others_away_is_left_out_and_told(
    capsys: pytest.CaptureFixture[str], claims: tuple[int, ...], left_out: str | None
):
    """Updates of 0.01 that rest on 100 examples of 2^45 would come to exactly 0."""
    exchange = Claims(*claims)
    names = [name for name in NAMES[: len(claims)] if name != left_out]
    assert list(call_roll(exchange, settings(min_silos=1).federation)) == names
    while exchange.next(0.0):
        pass
    assert [*exchange.told] == [name for name in [left_out] if name]
    printed = capsys.readouterr().out
    assert printed.count("times those of the silo in the middle") == len(exchange.told)


def test_a_silo_with_other_examples_than_most_is_left_out_and_told(
    capsys: pytest.CaptureFixture[str],
):
    exchange = Claims(10, 10, 10, shapes=(4, 5, 4))
    assert list(call_roll(exchange, settings(min_silos=2).federation)) == ["silo-0", "silo-2"]
    while exchange.next(0.0):
        pass
    assert (
        "other examples than the rest: classification on examples of (5,)"
        in (exchange.told["silo-1"])
    )
    assert capsys.readouterr().out.count("silo 'silo-1' is left out: it holds other") == 1


def test_a_silo_with_other_examples_than_the_servers_is_left_out_though_most_are_like_it():
    exchange = Claims(10, 10, 10, shapes=(4, 5, 4))
    own = Schema((5,), 3)
    assert list(call_roll(exchange, settings(min_silos=1).federation, own)) == ["silo-1"]


def test_where_too_few_fit_the_run_ends_after_others_could_have_come(
    monkeypatch: pytest.MonkeyPatch,
):
    clock = Clock(monkeypatch)
    with pytest.raises(ValueError, match="All parties must hold the same kind of examples"):
        call_roll(Claims(10, 10, 10, shapes=(4, 5, 4)), settings(min_silos=3).federation)
    assert 10 < clock.now < 14
    with pytest.raises(FederationError, match="of 2 that answered the roll call 1 cannot take"):
        call_roll(Claims(10, 2**31), settings(min_silos=2).federation)
