"""Polling with waits that adapt to how long nothing has happened."""

import time


class AdaptiveWait:
    """Waits that grow with the time since something last happened: a share of it, within bounds.

    So an event is noticed at most `share` of its own delay late, and idle processes poll rarely.
    """

    def __init__(
        self, shortest_s: float = 0.02, longest_s: float = 2.0, share: float = 0.05
    ) -> None:
        self.shortest_s = shortest_s
        self.longest_s = longest_s
        self.share = share
        self.happened()

    def happened(self) -> None:
        """Notes that something happened: the next waits are short."""
        self.since = time.monotonic()

    @property
    def seconds(self) -> float:
        """The length of the next wait."""
        idle_s = time.monotonic() - self.since
        return min(max(self.share * idle_s, self.shortest_s), self.longest_s)

    def wait(self) -> None:
        time.sleep(self.seconds)
