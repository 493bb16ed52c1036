"""Which of Flower's nodes is which silo: newcomers are asked who they are, without waiting."""

import math
import time
from dataclasses import dataclass, field

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fl_app.border import printable_line
from fl_app.exchange import Roster
from fl_app.failures import Failure
from fl_app.flower.wire import pack_tasks, unpack_reply
from fl_app.messages import DESCRIBE, Answer, SiloEntry, Task

NODE_UNAVAILABLE = 5  # Flower's code for it
TTL_MARGIN_S = 30.0  # Flower drops a message later than we stop waiting for its answer
DISCONNECTED = Failure("it is no longer connected", is_disconnected=True)


@dataclass
class Members:
    """The nodes that are connected, and the silos that they have introduced themselves as.

    | a node that | is |
    |---|---|
    | answers with a name of its own | a member |
    | answers with the name of a member that is gone | that member, restarted |
    | answers with the name of a member that is connected | left out until that one is gone |
    | refuses, garbles or does not answer in time | left out |

    Nodes are left out with one line that gives the reason; nothing is raised.
    """

    grid: Grid
    introduction_timeout_s: float
    connected: set[int] = field(default_factory=set)
    polled_at: float = -math.inf  # on the monotonic clock
    _nodes: dict[str, int] = field(default_factory=dict)  # by silo
    _entries: dict[str, SiloEntry] = field(default_factory=dict)  # by silo
    _asked: dict[str, tuple[int, float]] = field(default_factory=dict)  # message: node, deadline
    _claims: dict[int, SiloEntry] = field(default_factory=dict)  # nodes whose name is in use
    _left_out: set[int] = field(default_factory=set)

    def poll(self) -> None:
        """Notices who has come, gone and answered."""
        self.connected = set(self.grid.get_node_ids())
        self.polled_at = time.monotonic()
        self._ask_newcomers()
        self._read_introductions()
        for node in sorted(self._claims):
            self._settle_claim(node)

    def roster(self) -> Roster:
        """The connected members, and the number of nodes that have been asked only."""
        entries = {
            silo: entry
            for silo, entry in self._entries.items()
            if self._nodes[silo] in self.connected
        }
        return Roster(entries, num_pending=len(self._asked))

    def node_of(self, silo: str) -> int:
        """The node of a member: the newest one."""
        return self._nodes[silo]

    def _ask_newcomers(self) -> None:
        asked = {node for node, _ in self._asked.values()}
        known = {*self._nodes.values(), *asked, *self._claims, *self._left_out}
        newcomers = sorted(self.connected - known)
        if not newcomers:
            return

        content = pack_tasks({"": Task(DESCRIBE)})[""]
        ttl = self.introduction_timeout_s + TTL_MARGIN_S
        messages = [
            Message(content, node, MessageType.QUERY, ttl=ttl, group_id="roll call")
            for node in newcomers
        ]
        deadline = time.monotonic() + self.introduction_timeout_s
        message_ids = self.grid.push_messages(messages)
        for message_id, node in zip(message_ids, newcomers, strict=True):
            if message_id is not None:  # else it has gone again
                self._asked[message_id] = (node, deadline)

    def _read_introductions(self) -> None:
        if not self._asked:
            return
        for reply in self.grid.pull_messages(list(self._asked)):
            node, _ = self._asked.pop(reply.metadata.reply_to_message_id)
            introduction = reply_of(reply)
            try:
                if isinstance(introduction, Failure):
                    raise ValueError(introduction.reason)
                self._claims[node] = SiloEntry.from_answer(introduction)
            except ValueError as error:
                self._leave_out(node, str(error))

        # Whoever is late or has gone is not waited for.
        for message_id, (node, deadline) in [*self._asked.items()]:
            if time.monotonic() > deadline:
                del self._asked[message_id]
                limit = f"{self.introduction_timeout_s:g} s"
                self._leave_out(node, f"it did not say its name within {limit}")
            elif node not in self.connected:
                del self._asked[message_id]

    def _settle_claim(self, node: int) -> None:
        """Gives a node the name that it claims, unless another connected node has it."""
        entry = self._claims[node]
        holder = self._nodes.get(entry.name)
        if node not in self.connected:
            del self._claims[node]
        elif holder is None or holder not in self.connected:
            del self._claims[node]
            self._left_out.discard(node)
            self._nodes[entry.name] = node
            self._entries[entry.name] = entry
        elif node not in self._left_out:
            self._leave_out(
                node,
                f"the name {entry.name!r} is that of a connected silo. If it was restarted, it"
                " takes part again when Flower has noticed that the old one is gone, after 20 s;"
                " if not, give it a name of its own",
            )

    def _leave_out(self, node: int, reason: str) -> None:
        self._left_out.add(node)
        print(f"a silo (Flower's node {node}) is left out: {reason}", flush=True)


def reply_of(message: Message, silo: str = "") -> Answer | Failure:
    """The reply in a message of Flower's: a silo's answer or refusal, or Flower's own error.

    `silo`: the name of the sender, where it is known.
    """
    if not message.has_error():
        return unpack_reply(message.content, silo)
    if message.error.code == NODE_UNAVAILABLE:
        return DISCONNECTED
    lines = (message.error.reason or "").strip().splitlines()
    reason = printable_line(lines[-1]) if lines else "no reason given"
    return Failure(f"{reason} (Flower's code {message.error.code})")
