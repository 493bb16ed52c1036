"""Flower beyond its public interface: that the names are all there, and what we do with them."""

import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fl_app.flower import grid, memory, node_tasks, randomness, supernode
from fl_app.flower.internals import missing_internals, shorten_backoff
from fl_app.flower.memory import join_arrays_at_once
from fl_app.flower.node_tasks import message_from_bytes, message_to_bytes
from fl_app.flower.randomness import separate_random_draws
from fl_app.flower.supernode import ShortSleeps
from shared import polling
from shared.data import Schema
from shared.experiment import ModelSection
from shared.weights import weights_sha256
from shared.zoo import build_model

TABLES = {
    "supernode": supernode.INTERNALS,
    "node_tasks": node_tasks.INTERNALS,
    "grid": grid.INTERNALS,
    "memory": memory.INTERNALS,
    "randomness": randomness.INTERNALS,
}


class Clock:
    """Stands for the module `time`: a sleep moves it on at once."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0.0
        self.now += seconds

    def strftime(self) -> str:
        return "passed on"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (polling, supernode):
        monkeypatch.setattr(module, "time", clock)
    return clock


# --- the SuperNode's loop


def test_the_supernodes_long_sleep_becomes_an_adaptive_wait(clock: Clock):
    quick = ShortSleeps()
    before = clock.now
    for _ in range(100):
        quick.sleep(3.0)
    assert 100 * 0.02 < clock.now - before < 100 * 1.0

    clock.now += 1e6
    before = clock.now
    quick.sleep(3.0)
    assert clock.now - before == 2.0


def test_the_supernodes_short_sleep_is_no_longer_than_the_shortest_wait_and_ends_its_idling(
    clock: Clock,
):
    quick = ShortSleeps()
    clock.now += 1e6
    for seconds in (0.5, 0.02, 0.001):
        before = clock.now
        quick.sleep(seconds)
        assert clock.now - before == pytest.approx(min(seconds, 0.02))

    before = clock.now
    quick.sleep(3.0)
    assert clock.now - before == pytest.approx(0.02)


def test_all_else_of_the_module_time_is_passed_on(clock: Clock):
    quick = ShortSleeps()
    assert (quick.monotonic(), quick.strftime()) == (clock.now, "passed on")
    with pytest.raises(AttributeError):
        _ = quick.nothing_like_this


# --- whether it is all there


@pytest.mark.parametrize("table", TABLES)
def test_the_installed_flower_has_all_that_is_used(table: str):
    assert TABLES[table]
    assert missing_internals(TABLES[table]) == []


@pytest.mark.parametrize(
    ("module", "name", "parameters", "missing"),
    [
        ("flwr.supernode.gone", "time", (), ["flwr.supernode.gone.time"]),
        ("flwr.gone.altogether", "time", (), ["flwr.gone.altogether.time"]),
        ("flwr.supercore.heartbeat", "GONE", (), ["flwr.supercore.heartbeat.GONE"]),
        (
            "flwr.supercore.heartbeat",
            "HeartbeatSender",
            ("heartbeat_fn", "gone"),
            ["flwr.supercore.heartbeat.HeartbeatSender(heartbeat_fn, gone)"],
        ),
        ("flwr.supercore.heartbeat", "HeartbeatSender", ("heartbeat_fn",), []),
    ],
)
def test_what_flower_lacks_is_reported(
    module: str, name: str, parameters: tuple[str, ...], missing: list[str]
):
    assert missing_internals({(module, name): parameters}) == missing
    some = {**supernode.INTERNALS, (module, name): parameters, ("flwr.other", "lacking"): ()}
    assert missing_internals(some) == [*missing, "flwr.other.lacking"]


def test_a_function_of_flowers_retries_soon_however_often_that_is_asked_for():
    def pull(objects: str, initial_backoff: float = 1.0, backoff_cap: float = 10.0) -> tuple:
        return objects, initial_backoff, backoff_cap

    module = SimpleNamespace(pull=pull)
    for _ in range(2):
        shorten_backoff(module, "pull")
        assert module.pull("a") == ("a", 0.02, 1.0)
    assert module.pull.func is pull


# --- random draws


def test_a_heartbeat_while_a_model_is_built_does_not_change_its_weights(
    monkeypatch: pytest.MonkeyPatch,
):
    """Keras's initialisers draw their seeds from Python's generator; so does Flower's heartbeat."""
    for module_name, name in randomness.INTERNALS:
        monkeypatch.setattr(f"{module_name}.{name}", random)  # put back afterwards
    assert separate_random_draws() == []

    config = ModelSection(name="mlp", options="units = [8]")
    undisturbed = build_model(config, Schema((4,), 3), seed=0)
    draw = random.randint

    def draw_after_a_heartbeat(low: int, high: int) -> int:
        has_beaten = threading.Event()

        def beat() -> bool:
            has_beaten.set()
            return True

        sender = HeartbeatSender(beat)
        sender.start()
        has_beaten.wait()
        sender.stop()  # which waits until the time of the next one is drawn
        return draw(low, high)

    monkeypatch.setattr(random, "randint", draw_after_a_heartbeat)
    disturbed = build_model(config, Schema((4,), 3), seed=0)
    assert weights_sha256(disturbed.get_weights()) == weights_sha256(undisturbed.get_weights())


# --- messages on disk


def test_a_message_comes_back_without_its_content_and_can_be_answered(
    monkeypatch: pytest.MonkeyPatch,
):
    for name in ("_run_id", "_node_id", "_task_id"):  # private, and Flower's messages ask for them
        monkeypatch.setattr(TaskIdentity, name, 17)
    message = Message(RecordDict(), dst_node_id=5, message_type="train", group_id="3", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "the id"
    restored = message_from_bytes(message_to_bytes(message))
    assert restored.metadata == message.metadata

    for answered in (restored, message):
        reply = Message(Error(1, "it died"), reply_to=answered).metadata
        assert reply.reply_to_message_id == "the id"
        assert reply.src_node_id == 5
        assert reply.dst_node_id == 17
        assert reply.run_id == 17


# --- arrays joined at once


def over_the_wire(content: RecordDict) -> RecordDict:
    nested = get_all_nested_objects(content)
    objects = {object_id: each.deflate() for object_id, each in nested.items()}
    received = inflate_object_from_contents(content.object_id, objects)
    assert isinstance(received, RecordDict)
    return received


def test_an_array_joined_at_once_is_what_was_sent_and_others_are_left_to_flower(
    monkeypatch: pytest.MonkeyPatch,
):
    """Also of equal pieces, which are sent once; Flower's own arrays may share pieces with each
    other.
    """
    monkeypatch.setattr(Array, "inflate", vars(Array)["inflate"])  # put back afterwards
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 4)
    assert join_arrays_at_once("ours") == []
    assert join_arrays_at_once("ours") == []  # once more changes nothing

    data = b"aaaabbbbaaaaaaaacc"
    array = Array("uint8", (len(data),), "ours", data)
    ours = over_the_wire(RecordDict({"r": ArrayRecord({"a": array})}))
    assert bytes(ours.array_records["r"]["a"].data) == data

    equal = [np.zeros(3, np.float32), np.zeros(3, np.float32)]
    theirs = over_the_wire(RecordDict({"r": ArrayRecord(equal)}))
    received = theirs.array_records["r"].to_numpy_ndarrays()
    assert [each.tolist() for each in received] == [[0.0] * 3] * 2
