"""The server's grid with short waits: how a Flower strategy and our exchange get replies soon."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fl_app.failures import Failure, FederationError
from fl_app.flower.internals import Internals, missing_internals, shorten_backoff
from fl_app.flower.members import reply_of
from fl_app.flower.wire import check_strategy_task, is_refusal
from shared.polling import AdaptiveWait

INTERNALS: Internals = {
    ("flwr.superlink.grid.http_grid", "pull_objects"): ("initial_backoff", "backoff_cap")
}


def shorten_server_waits() -> list[str]:
    """Makes this process's Flower grid retry sooner for replies that are announced.

    Returns the missing internals: if there are any, nothing is changed.
    """
    missing = missing_internals(INTERNALS)
    if not missing:
        from flwr.superlink.grid import http_grid

        shorten_backoff(http_grid, "pull_objects")
    return missing


@dataclass
class PollingGrid(Grid):
    """The grid of a Flower strategy: over the silos of the run alone, with bounded waits.

    It polls for replies often, where Flower's own polls every 3 s, and counts the bytes of the
    arrays that pass. Silos that fail are reported, and the strategy gets the replies of the others.

    `find_nodes` returns the connected nodes of the run's silos. Raises FederationError if the
    strategy waits for more of them for longer than `waits_s` seconds.
    """

    grid: Grid
    find_nodes: Callable[[], list[int]]
    waits_s: float
    bytes_sent: int = 0
    wait: AdaptiveWait = field(default_factory=AdaptiveWait)
    _looking_since: float | None = None  # for silos to send to, on the monotonic clock
    _reported: set[str] = field(default_factory=set)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Sends the messages; returns the results that come within `timeout` seconds."""
        pending = set(self.push_messages(messages))
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        results: list[Message] = []
        self.wait.happened()
        while pending and time.monotonic() < deadline:
            for reply in self.pull_messages(pending):
                pending.discard(reply.metadata.reply_to_message_id)
                if self._is_result(reply):
                    results.append(reply)
                self.wait.happened()
            if pending:
                self.wait.wait()
        if pending and timeout is not None:
            self._report(f"{len(pending)} silos gave no answer within {timeout:g} s")
        return results

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Sends the messages; returns the ids of those that the SuperLink has accepted."""
        self._looking_since = None
        messages = list(messages)
        if not messages:
            return []
        try:
            for message in messages:
                check_strategy_task(message.content)
        except ValueError as error:
            raise FederationError(str(error)) from None
        self.bytes_sent += sum(map(num_array_bytes, messages))

        # An id for each message, None for one whose silo has gone; nothing if they are too large.
        ids = list(self.grid.push_messages(messages))
        if not ids:
            raise FederationError(
                "The SuperLink takes no messages as large as the strategy's; received"
                f" {num_array_bytes(messages[0]) / 1e6:.3g} MB of weights. Choose a smaller model."
            )
        return [each for each in ids if each is not None]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = list(self.grid.pull_messages(message_ids))
        self.bytes_sent += sum(map(num_array_bytes, replies))
        return replies

    def get_node_ids(self) -> list[int]:
        nodes = self.find_nodes()
        now = time.monotonic()
        if self._looking_since is None:
            self._looking_since = now
        if now - self._looking_since > self.waits_s:
            raise FederationError(
                f"The strategy waits for more silos than the {len(nodes)} that are connected;"
                f" received no other within {self.waits_s:g} s (federation.silo_timeout_s). Start"
                " them again, or lower the numbers of nodes in federation.strategy_options."
            )
        return nodes

    def _is_result(self, reply: Message) -> bool:
        """True unless the reply is an error or a refusal, which is reported."""
        if not reply.has_error() and not is_refusal(reply.content):
            return True
        failure = reply_of(reply)
        assert isinstance(failure, Failure)
        self._report(f"a silo is left out by the strategy: {failure.reason}")
        return False

    def _report(self, line: str) -> None:
        """Prints a line, once in a run."""
        if line not in self._reported:
            self._reported.add(line)
            print(line, flush=True)

    def get_nodes(self) -> Any:
        return self.grid.get_nodes()

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.grid.create_message(*args, **kwargs)

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run


def num_array_bytes(message: Message) -> int:
    """The bytes of the message's arrays."""
    if not message.has_content():
        return 0
    return sum(
        len(array.data)
        for record in message.content.array_records.values()
        for array in record.values()
    )
