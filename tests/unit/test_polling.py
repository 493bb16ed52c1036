"""Adaptive waits, on a clock of their own."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from shared import polling
from shared.polling import AdaptiveWait


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
    stand_in = SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep)
    monkeypatch.setattr(polling, "time", stand_in)
    return clock


@pytest.mark.parametrize(
    ("silent_for_s", "waits_s"),
    [(0.0, 0.02), (0.25, 0.02), (1.0, 0.05), (10.0, 0.5), (20.0, 1.0), (1e6, 2.0)],
)
def test_a_wait_is_a_twentieth_of_the_silence_within_bounds(
    clock: Clock, silent_for_s: float, waits_s: float
):
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
def test_an_event_is_noticed_a_twentieth_late_at_most_and_who_idles_polls_rarely(
    clock: Clock, comes_after_s: float
):
    wait = AdaptiveWait()
    comes_at = clock.now + comes_after_s
    while clock.now < comes_at:
        wait.wait()
    assert clock.now - comes_at <= min(max(0.02, 0.05 * comes_after_s), 2.0) + 1e-9
    # 20 polls while waits are the shortest, then each a twentieth later than the one before, then
    # one in two seconds
    assert clock.num_sleeps <= 150 + comes_after_s
