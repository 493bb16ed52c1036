"""What we use of Flower beyond its public interface: waits, on a clock of their own, and whether it is all there."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fl_app import flower_internals
from fl_app.flower_internals import (
    EXECUTOR,
    SERVER_WAITS,
    WAITS,
    AdaptiveWait,
    QuickTime,
    message_from_bytes,
    message_to_bytes,
    missing_internals,
)


@dataclass
class Clock:
    now: float = 1000.0
    num_sleeps: int = 0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0.0
        self.now += seconds
        self.num_sleeps += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    stand_in = SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep, strftime=lambda: "passed on")
    monkeypatch.setattr(flower_internals, "time", stand_in)
    return clock


# --- waits


@pytest.mark.parametrize(
    ("silent_for_s", "waits_s"), [(0.0, 0.02), (0.25, 0.02), (1.0, 0.05), (10.0, 0.5), (20.0, 1.0), (1e6, 2.0)]
)
def test_a_wait_is_a_twentieth_of_the_silence_within_bounds(clock: Clock, silent_for_s: float, waits_s: float):
    wait = AdaptiveWait()
    clock.now += silent_for_s
    assert wait.seconds == pytest.approx(waits_s)
    before = clock.now
    wait.wait()
    assert clock.now - before == pytest.approx(waits_s)


def test_bounds_and_share_are_as_asked_for(clock: Clock):
    wait = AdaptiveWait(shortest_s=0.5, longest_s=2.0, share=0.25)
    seconds = []
    for _ in range(4):
        seconds.append(wait.seconds)
        clock.now += 4.0
    assert seconds == [0.5, 1.0, 2.0, 2.0]  # after 0, 4, 8 and 12 s


def test_waits_are_short_again_once_something_happened(clock: Clock):
    wait = AdaptiveWait()
    clock.now += 1e6
    wait.happened()
    assert wait.seconds == 0.02
    clock.now += 2.0
    assert wait.seconds == pytest.approx(0.1)


@pytest.mark.parametrize("comes_after_s", [0.001, 0.1, 1.0, 7.0, 60.0, 3600.0])
def test_what_comes_is_noticed_a_twentieth_late_at_most_and_who_idles_looks_rarely(clock: Clock, comes_after_s: float):
    wait, comes_at = AdaptiveWait(), clock.now + comes_after_s
    while clock.now < comes_at:
        wait.wait()
    assert clock.now - comes_at <= min(max(0.02, 0.05 * comes_after_s), 2.0) + 1e-9
    # 20 looks while waits are the shortest, then each a twentieth later than the one before, then one in two seconds
    assert clock.num_sleeps <= 150 + comes_after_s


# --- the SuperNode's loop


def test_the_supernodes_long_sleep_becomes_an_adaptive_wait(clock: Clock):
    quick = QuickTime()
    before = clock.now
    for _ in range(100):
        quick.sleep(3.0)
    assert 100 * 0.02 < clock.now - before < 100 * 1.0
    clock.now += 1e6
    before = clock.now
    quick.sleep(3.0)
    assert clock.now - before == 2.0


def test_the_supernodes_short_sleep_is_no_longer_than_the_shortest_wait_and_ends_its_idling(clock: Clock):
    quick = QuickTime()
    clock.now += 1e6
    for seconds in (0.5, 0.02, 0.001):
        before = clock.now
        quick.sleep(seconds)
        assert clock.now - before == pytest.approx(min(seconds, 0.02))
    before = clock.now
    quick.sleep(3.0)
    assert clock.now - before == pytest.approx(0.02)


def test_all_else_of_the_module_time_is_passed_on(clock: Clock):
    quick = QuickTime()
    assert (quick.monotonic(), quick.strftime()) == (clock.now, "passed on")
    with pytest.raises(AttributeError):
        _ = quick.nothing_like_this


# --- whether it is all there


@pytest.mark.parametrize("needed", [WAITS, EXECUTOR, SERVER_WAITS], ids=["waits", "executor", "server's waits"])
def test_the_installed_flower_has_all_that_is_used(needed: dict):
    assert needed
    assert missing_internals(needed) == []


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
def test_what_flower_lacks_is_named(module: str, name: str, parameters: tuple[str, ...], missing: list[str]):
    assert missing_internals({(module, name): parameters}) == missing
    some = {**WAITS, (module, name): parameters, ("flwr.other", "lacking"): ()}
    assert missing_internals(some) == [*missing, "flwr.other.lacking"]


# --- messages on disk


def test_a_message_comes_back_without_its_content_and_can_be_answered(monkeypatch: pytest.MonkeyPatch):
    for name in ("_run_id", "_node_id", "_task_id"):  # private, and Flower's messages ask for them
        monkeypatch.setattr(TaskIdentity, name, 17)
    message = Message(RecordDict(), dst_node_id=5, message_type="train", group_id="3", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "the id"
    restored = message_from_bytes(message_to_bytes(message))
    assert restored.metadata == message.metadata
    answers = [Message(Error(1, "it died"), reply_to=each).metadata for each in (restored, message)]
    for each in answers:
        assert (each.reply_to_message_id, each.src_node_id, each.dst_node_id, each.run_id) == ("the id", 5, 17, 17)


# --- arrays joined at once


def over_the_wire(content: RecordDict) -> RecordDict:
    objects = {object_id: found.deflate() for object_id, found in get_all_nested_objects(content).items()}
    received = inflate_object_from_contents(content.object_id, objects)
    assert isinstance(received, RecordDict)
    return received


def test_an_array_joined_at_once_is_what_was_sent_and_others_are_left_to_flower(monkeypatch: pytest.MonkeyPatch):
    """Also of equal pieces, which are sent once; Flower's own arrays may share pieces with each other."""
    monkeypatch.setattr(Array, "inflate", vars(Array)["inflate"])  # put back afterwards
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 4)
    assert flower_internals.join_arrays_at_once("ours") == []
    assert flower_internals.join_arrays_at_once("ours") == []  # once more changes nothing
    data = b"aaaabbbbaaaaaaaacc"
    ours = over_the_wire(RecordDict({"r": ArrayRecord({"a": Array("uint8", (len(data),), "ours", data)})}))
    assert bytes(ours.array_records["r"]["a"].data) == data
    equal = [np.zeros(3, np.float32), np.zeros(3, np.float32)]
    theirs = over_the_wire(RecordDict({"r": ArrayRecord(equal)}))
    assert [array.tolist() for array in theirs.array_records["r"].to_numpy_ndarrays()] == [[0.0] * 3] * 2
