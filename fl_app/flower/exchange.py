"""The server's way to the silos over Flower: by name, without fixed waits. Node ids end here."""

import gc
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from flwr.app import Message
from flwr.serverapp import Grid

from fl_app.exchange import Roster, Traffic
from fl_app.failures import Failure
from fl_app.flower.grid import num_array_bytes, shorten_server_waits
from fl_app.flower.members import DISCONNECTED, TTL_MARGIN_S, Members, reply_of
from fl_app.flower.memory import join_arrays_at_once
from fl_app.flower.wire import FORMAT, message_type, pack_tasks
from fl_app.messages import Answer, Reply, Task
from shared.polling import AdaptiveWait
from shared.weights import num_bytes

POLL_NODES_S = 2.0  # between polls for silos that connect or leave
RECENTLY_S = 0.5  # nodes polled so short a time ago are not polled again for a task
BYTES_PER_PULL = 32 << 20  # of replies that are held at once, if more than one


UNSENT = Failure("its task was not accepted by the SuperLink: it is too large, or the silo is gone")


@dataclass(frozen=True)
class Posted:
    """A task that has no reply yet."""

    silo: str
    node: int
    timeout_s: float
    deadline: float  # on the monotonic clock


class FlowerExchange:
    """Implements `Exchange` on a Flower grid. A Flower node id, new at each start, stands for a
    silo's name.
    """

    def __init__(self, grid: Grid, introduction_timeout_s: float) -> None:
        """`introduction_timeout_s`: for a node that connects, to say which silo it is."""
        self._grid = grid
        self._members = Members(grid, introduction_timeout_s)
        self._posted: dict[str, Posted] = {}  # by Flower's message id
        self._arrived: deque[tuple[str, Message]] = deque()
        self._failures: deque[tuple[str, Failure]] = deque()
        self._reply_bytes = 0  # expected, of the largest reply
        self._next_poll_of_nodes = 0.0
        self._wait = AdaptiveWait()
        self.traffic = Traffic()

    def open(self) -> None:
        """Prepares the process, once: quick polls for replies, and little memory for them."""
        if missing := shorten_server_waits():
            print(
                f"warning: this Flower has no {', '.join(missing)}: replies may wait for a second",
                flush=True,
            )
        if missing := join_arrays_at_once(FORMAT):
            print(
                f"warning: this Flower has no {', '.join(missing)}: replies take more memory",
                flush=True,
            )

    def silos(self) -> Roster:
        self._members.poll()
        return self._members.roster()

    def nodes_of(self, silos: Iterable[str]) -> list[int]:
        """The nodes of those of the silos that are connected now."""
        connected = self.silos().entries
        return [self._members.node_of(silo) for silo in sorted(silos) if silo in connected]

    def post(self, tasks: Mapping[str, Task], timeout_s: float) -> None:
        if time.monotonic() - self._members.polled_at > RECENTLY_S:
            self._members.poll()  # a silo that was restarted is another node
        contents = pack_tasks(tasks)
        task_bytes = [num_bytes(task.arrays) for task in tasks.values()]
        self._reply_bytes = max(task_bytes)  # an update is as large as the weights
        nodes = {silo: self._members.node_of(silo) for silo in tasks}
        messages = [
            Message(
                contents[silo],
                dst_node_id=nodes[silo],
                message_type=message_type(task),
                group_id=str(task.round),
                ttl=timeout_s + TTL_MARGIN_S,
            )
            for silo, task in tasks.items()
        ]

        started = time.monotonic()
        message_ids = self._grid.push_messages(messages)
        self._count(sum(task_bytes), time.monotonic() - started)
        _collect_garbage_of(self._reply_bytes)

        deadline = time.monotonic() + timeout_s
        for message_id, silo in zip_longest(message_ids, tasks):
            if message_id is None:
                self._failures.append((silo, UNSENT))
            else:
                self._posted[message_id] = Posted(silo, nodes[silo], timeout_s, deadline)
        self._wait.happened()

    def next(self, timeout_s: float) -> Reply | None:
        deadline = time.monotonic() + timeout_s
        while True:
            if self._failures:
                return self._failures.popleft()
            if self._arrived:
                silo, message = self._arrived.popleft()
                reply = reply_of(message, silo)
                if isinstance(reply, Answer):
                    self._count(num_bytes(reply.arrays))
                return silo, reply
            if not self._posted:
                return None

            self._poll()
            if self._arrived or self._failures:
                self._wait.happened()
            elif time.monotonic() > deadline:
                return None
            else:
                self._wait.wait()

    def withdraw(self) -> None:
        self._posted.clear()
        self._arrived.clear()
        self._failures.clear()

    def _poll(self) -> None:
        """Fetches replies that are there; fails tasks that are late or whose node is gone."""
        self._pull(list(self._posted))
        now = time.monotonic()
        late = {m: posted for m, posted in self._posted.items() if now > posted.deadline}
        for message_id, posted in late.items():
            del self._posted[message_id]
            reason = f"no answer within {posted.timeout_s:g} s"
            self._failures.append((posted.silo, Failure(reason)))

        if now < self._next_poll_of_nodes:
            return
        self._next_poll_of_nodes = now + POLL_NODES_S
        self._members.poll()
        for message_id, posted in [*self._posted.items()]:
            if posted.node not in self._members.connected:
                del self._posted[message_id]
                self._failures.append((posted.silo, DISCONNECTED))

    def _pull(self, message_ids: list[str]) -> None:
        """Fetches replies. Large ones come a few at a time, so that few are in memory at once."""
        at_once = max(1, BYTES_PER_PULL // max(1, self._reply_bytes))
        for start in range(0, len(message_ids), at_once):
            started = time.monotonic()
            messages = list(self._grid.pull_messages(message_ids[start : start + at_once]))
            if messages:
                self._count(0, time.monotonic() - started)
                break
        else:
            return
        for message in messages:
            posted = self._posted.pop(message.metadata.reply_to_message_id)
            self._arrived.append((posted.silo, message))
        _collect_garbage_of(sum(map(num_array_bytes, messages)))

    def _count(self, payload_bytes: int, seconds: float = 0.0) -> None:
        before = self.traffic
        self.traffic = Traffic(before.num_bytes + payload_bytes, before.seconds + seconds)


def _collect_garbage_of(num_bytes: int) -> None:
    """Frees what the HTTP client holds of a transfer so large: its messages lie in cycles."""
    if num_bytes > BYTES_PER_PULL:
        gc.collect()
