"""The server's way to the silos, by name: what every engine implements, and `ask` over it."""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fl_app.failures import Failure
from fl_app.messages import Reply, SiloEntry, Task


@dataclass(frozen=True)
class Roster:
    """The silos that have introduced themselves, by name, and how many have yet to answer."""

    entries: Mapping[str, SiloEntry]
    num_pending: int = 0


@dataclass(frozen=True)
class Traffic:
    """Payload so far, in both directions: bytes, and the seconds that its requests took.

    The bytes are those of the arrays; headers, some hundred bytes a message, are not counted.
    """

    num_bytes: int = 0
    seconds: float = 0.0

    def since(self, earlier: "Traffic") -> "Traffic":
        return Traffic(self.num_bytes - earlier.num_bytes, self.seconds - earlier.seconds)


class Exchange(Protocol):
    """Carries tasks to silos and their replies back. It never raises for what a silo does.

    A silo has one task at a time: a newer one replaces it, and the reply to the older is dropped.
    """

    @property
    def traffic(self) -> Traffic: ...

    def silos(self) -> Roster:
        """The connected silos. Asks newcomers who they are, without waiting for them.

        A newcomer that fails, or claims the name of a connected silo, is reported and left out.
        """

    def post(self, tasks: Mapping[str, Task], timeout_s: float) -> None:
        """Sends each silo its task; equal content is packed once.

        A silo that has not answered after `timeout_s` seconds, or disconnects, is a Failure.
        """

    def next(self, timeout_s: float) -> Reply | None:
        """The next reply, or None if there is none within `timeout_s` seconds."""

    def withdraw(self) -> None:
        """Forgets the tasks that have no reply yet: it is dropped when it comes."""


def ask(
    exchange: Exchange, tasks: Mapping[str, Task], timeout_s: float
) -> Generator[Reply, None, None]:
    """Posts the tasks and yields the replies as they come in, one for each silo.

    Who stops early withdraws the tasks that are left.
    """
    unanswered = set(tasks)
    deadline = time.monotonic() + timeout_s
    exchange.post(tasks, timeout_s)
    del tasks  # as large as the model; it is gone when the first reply comes
    try:
        while unanswered:
            reply = exchange.next(max(0.0, deadline - time.monotonic()))
            if reply is None:
                break
            if reply[0] in unanswered:
                unanswered.discard(reply[0])
                yield reply
            del reply  # its arrays, before the next one is fetched
        for silo in sorted(unanswered):
            yield silo, Failure(f"no answer within {timeout_s:g} s")
    finally:
        exchange.withdraw()
