"""The exchange over Flower's grid: who is who, who is left out, and what becomes of their replies.

The grid here is Flower's interface over a dictionary; real ones are in tests/federation.
"""

import gc
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fl_app.failures import Failure
from fl_app.flower import members
from fl_app.flower.exchange import FlowerExchange
from fl_app.flower.wire import pack_answer, pack_refusal, unpack_task
from fl_app.messages import DESCRIBE, TRAIN, Answer, SiloEntry, Task
from shared.data import Schema

WINE = Schema((13,), 3)

Node = Callable[[Task], RecordDict | Error | None]  # None: silence


class GridHere(Grid):
    """Flower's grid, whose nodes answer at once, or never."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.replies: dict[str, Message] = {}
        self.pulled: list[list[str]] = []
        self.refuses_large = False
        self.held: dict[str, Message] = {}  # replies of slow nodes, until they are released
        self.slow: set[int] = set()

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        if self.refuses_large:
            return []
        ids: list[str | None] = []
        for message in messages:
            node = self.nodes.get(message.metadata.dst_node_id)
            message_id = (
                f"message {len(self.replies)}-{message.metadata.dst_node_id}-{time.monotonic_ns()}"
            )
            message.metadata.__dict__["_message_id"] = message_id
            content = node(unpack_task(copy(message.content))) if node else Error(5, "gone")
            if content is not None:
                where = self.held if message.metadata.dst_node_id in self.slow else self.replies
                where[message_id] = Message(content, reply_to=message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulled.append(list(message_ids))
        return [self.replies.pop(i) for i in message_ids if i in self.replies]

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def get_nodes(self) -> Any: ...
    def send_and_receive(self, *args: Any, **kwargs: Any) -> Any: ...
    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...
    def set_run(self, run: Any) -> None: ...
    @property
    def run(self) -> Any: ...


def copy(content: RecordDict) -> RecordDict:
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

    return recorddict_from_proto(recorddict_to_proto(content))


def silo(name: str, answer: Callable[[Task], RecordDict | Error | None] | None = None) -> Node:
    """A node of a silo that echoes the first array it gets, times two."""

    def node(task: Task) -> RecordDict | Error | None:
        if task.kind == DESCRIBE:
            return pack_answer(SiloEntry(name, WINE, 10).to_answer())
        if answer:
            return answer(task)
        return pack_answer(Answer({"round": task.round, **task.body}, [2 * task.arrays[0]]))

    return node


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> GridHere:
    for name in ("_run_id", "_node_id", "_task_id"):  # private, and Flower's messages ask for them
        monkeypatch.setattr(TaskIdentity, name, 1)
    return GridHere()


def exchange_on(grid: GridHere, timeout_s: float = 60.0) -> FlowerExchange:
    exchange = FlowerExchange(grid, timeout_s)
    for _ in range(2):  # newcomers are asked, then their answers are read
        exchange.silos()
    return exchange


def train(names: str, round_number: int = 1) -> dict[str, Task]:
    weights = [np.float32([1.0, 2.0])]
    return {n: Task(TRAIN, "run", round_number, 0, {"own": n}, weights) for n in names}


def replies_of(exchange: FlowerExchange, tasks: dict[str, Task], timeout_s: float = 5.0) -> dict:
    exchange.post(tasks, timeout_s)
    found = {}
    while len(found) < len(tasks) and (reply := exchange.next(timeout_s)):
        found[reply[0]] = reply[1]
    return found


# --- tasks and replies


def test_each_silo_gets_its_own_task_and_its_reply_comes_under_its_name(grid: GridHere):
    grid.nodes = {3: silo("a"), 1: silo("b")}
    exchange = exchange_on(grid)
    assert sorted(exchange.silos().entries) == ["a", "b"]
    for name, reply in replies_of(exchange, train("ab", 7)).items():
        assert reply.body == {"round": 7, "own": name}
        assert [array.tolist() for array in reply.arrays] == [[2.0, 4.0]]


def test_the_bytes_of_arrays_are_counted_in_both_directions(grid: GridHere):
    grid.nodes = {1: silo("a"), 2: silo("b")}
    exchange = exchange_on(grid)
    assert exchange.traffic.num_bytes == 0
    replies_of(exchange, train("ab"))
    assert exchange.traffic.num_bytes == 2 * (8 + 8)


def test_refusals_errors_and_garbage_are_failures_of_one_silo(grid: GridHere):
    grid.nodes = {
        1: silo("a"),
        2: silo("b", lambda task: pack_refusal("b", "no.")),
        3: silo("c", lambda task: Error(3, "Traceback\n...\nKeyError: 'x'")),
        4: silo("d", lambda task: RecordDict()),
    }
    replies = replies_of(exchange_on(grid), train("abcd"))
    assert isinstance(replies["a"], Answer)
    assert replies["b"] == Failure("silo 'b' refuses: no.")
    assert replies["c"] == Failure("KeyError: 'x' (Flower's code 3)")
    assert "it sent a message that this version of Archipelago" in replies["d"].reason


@pytest.mark.parametrize("text", ["", "  \n ", "\x1b[2J" * 10**4])
def test_an_error_without_a_reason_that_can_be_printed_is_a_failure_all_the_same(
    grid: GridHere, text: str
):
    grid.nodes = {1: silo("a", lambda task: Error(3, text))}
    reason = replies_of(exchange_on(grid), train("a"))["a"].reason
    assert reason.endswith("(Flower's code 3)")
    assert reason.isprintable()
    assert len(reason) < 2100


def test_a_silo_that_is_silent_is_late_and_the_others_are_not(grid: GridHere):
    grid.nodes = {1: silo("a"), 2: silo("b", lambda task: None)}
    exchange = exchange_on(grid)
    exchange.post(train("ab"), timeout_s=0.3)
    replies = [exchange.next(5.0), exchange.next(5.0)]
    assert replies[0] is not None
    assert replies[0][0] == "a"
    assert replies[1] == ("b", Failure("no answer within 0.3 s"))
    assert exchange.next(0.1) is None


def test_a_silo_that_vanishes_is_noticed_before_the_time_is_up(grid: GridHere):
    grid.nodes = {1: silo("a", lambda task: None)}
    exchange = exchange_on(grid)
    exchange.post(train("a"), timeout_s=60.0)
    del grid.nodes[1]
    assert exchange.next(10.0) == ("a", members.DISCONNECTED)


def test_a_silo_that_has_gone_before_it_is_asked_is_disconnected(grid: GridHere):
    grid.nodes = {1: silo("a")}
    exchange = exchange_on(grid)
    del grid.nodes[1]
    assert replies_of(exchange, train("a")) == {"a": members.DISCONNECTED}


def test_tasks_that_the_superlink_does_not_take_are_failures(grid: GridHere):
    grid.nodes = {1: silo("a"), 2: silo("b")}
    exchange = exchange_on(grid)
    grid.refuses_large = True
    replies = replies_of(exchange, train("ab"))
    assert all("not accepted by the SuperLink" in reply.reason for reply in replies.values())
    assert sorted(replies) == ["a", "b"]


def test_the_late_reply_to_a_withdrawn_task_never_comes(grid: GridHere):
    grid.nodes = {1: silo("a"), 2: silo("b")}
    exchange = exchange_on(grid)
    grid.slow = {2}
    exchange.post(train("ab", 1), timeout_s=5.0)
    assert exchange.next(1.0) is not None
    exchange.withdraw()

    grid.replies |= grid.held
    grid.slow = set()
    replies = replies_of(exchange, train("ab", 2))
    assert [reply.body["round"] for reply in replies.values()] == [2, 2]
    assert exchange.next(0.1) is None


def test_large_replies_are_fetched_one_at_a_time(grid: GridHere):
    grid.nodes = {i: silo(name) for i, name in enumerate("abc")}
    exchange = exchange_on(grid)
    large = [np.zeros(9 << 20, np.float32)]
    tasks = {name: Task(TRAIN, "run", 1, 0, {}, large) for name in "abc"}
    grid.pulled.clear()
    assert sorted(replies_of(exchange, tasks)) == ["a", "b", "c"]
    assert [len(ids) for ids in grid.pulled] == [1, 1, 1]


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Grows with each collection of all garbage that is asked for."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            found.append(1)

    gc.disable()
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.enable()


def test_memory_is_searched_for_garbage_when_something_large_passed_and_not_at_each_poll(
    grid: GridHere, collections: list[int]
):
    grid.nodes = {1: silo("a"), 2: silo("b", lambda task: None)}
    exchange = exchange_on(grid)
    large = [np.zeros(9 << 20, np.float32)]
    exchange.post({name: Task(TRAIN, "run", 1, 0, {}, large) for name in "ab"}, 60.0)
    assert len(collections) == 1

    assert exchange.next(5.0) is not None
    assert len(collections) == 2
    num_polls = len(grid.pulled)
    assert exchange.next(1.0) is None
    assert len(grid.pulled) - num_polls > 3
    assert len(collections) == 2


# --- who is who


def test_a_newcomer_is_asked_once_and_not_waited_for(grid: GridHere):
    asked: list[Task] = []

    def hangs(task: Task) -> None:
        asked.append(task)

    grid.nodes = {1: silo("a"), 2: hangs}
    exchange = exchange_on(grid, timeout_s=0.2)
    assert (list(exchange.silos().entries), exchange.silos().num_pending) == (["a"], 1)
    assert [task.kind for task in asked] == [DESCRIBE]
    time.sleep(0.3)
    assert exchange.silos().num_pending == 0
    assert [task.kind for task in asked] == [DESCRIBE]


@pytest.mark.parametrize(
    ("introduction", "reason"),
    [
        (pack_refusal("mallory", "its data cannot be used."), "silo 'mallory' refuses: its data"),
        (pack_answer(Answer({"silo": "mallory"})), "garbles 'schema'"),
        (Error(3, "it crashed"), r"it crashed \(Flower's code 3\)"),
        (RecordDict(), "does not understand"),
    ],
    ids=["refusal", "garbage", "crash", "nothing"],
)
def test_a_newcomer_that_fails_is_left_out_with_one_line(
    grid: GridHere, capsys: pytest.CaptureFixture[str], introduction: Any, reason: str
):
    grid.nodes = {1: silo("a"), 2: lambda task: introduction}
    exchange = exchange_on(grid)
    for _ in range(3):
        assert (list(exchange.silos().entries), exchange.silos().num_pending) == (["a"], 0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("a silo (Flower's node 2) is left out: ")
    assert re.search(reason, line)


def test_a_name_in_use_stays_with_the_silo_that_has_it(
    grid: GridHere, capsys: pytest.CaptureFixture[str]
):
    grid.nodes = {1: silo("a")}
    exchange = exchange_on(grid)
    impostor = silo("a", lambda task: pack_answer(Answer({"impostor": True})))
    grid.nodes[2] = impostor
    for _ in range(3):
        exchange.silos()
    assert replies_of(exchange, train("a"))["a"].body["own"] == "a"
    (line,) = capsys.readouterr().out.splitlines()
    told = "a silo (Flower's node 2) is left out: the name 'a' is that of a connected silo"
    assert line.startswith(told)


def test_a_silo_that_was_restarted_takes_its_place_again_when_its_old_node_is_gone(
    grid: GridHere,
):
    grid.nodes = {1: silo("a", lambda task: None)}
    exchange = exchange_on(grid)
    grid.nodes[2] = silo("a")  # within the seconds in which Flower still counts the old node
    exchange.silos()
    exchange.silos()
    exchange.post(train("a"), timeout_s=60.0)
    del grid.nodes[1]
    assert exchange.next(10.0) == ("a", members.DISCONNECTED)
    assert list(exchange.silos().entries) == ["a"]
    assert isinstance(replies_of(exchange, train("a"))["a"], Answer)


def test_a_silo_is_not_in_the_roster_while_it_is_gone(grid: GridHere):
    grid.nodes = {1: silo("a"), 2: silo("b")}
    exchange = exchange_on(grid)
    del grid.nodes[1]
    assert list(exchange.silos().entries) == ["b"]
