"""The server's way to the silos over Flower: by name, without fixed waits. Node ids end here."""

import gc
import time
from collections.abc import Iterator, Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fl_app.cohort import Failure, FederationError, Reply
from fl_app.flower_internals import AdaptiveWait, join_arrays_at_once, shorten_server_waits
from fl_app.local_training import LocalResult, SiloEntry
from fl_app.messages import FORMAT, pack_task, unpack_refusal, unpack_result, unpack_silo
from shared.data import Schema
from shared.weights import Weights, num_bytes

LOOK_FOR_NODES_S = 2.0  # between looks for silos that connect
GONE = Failure("it is no longer connected")
NODE_UNAVAILABLE = 5  # Flower's code for it
TTL_MARGIN_S = 30.0  # Flower drops a message later than we stop waiting for its answer
BYTES_PER_PULL = 32 << 20  # of replies that are held at once, if more than one


class FlowerExchange:
    """Implements `rounds.Exchange` on a Flower grid. A Flower node id, new at each start, stands for a silo's name."""

    def __init__(self, grid: Grid, silo_timeout_s: float) -> None:
        self.grid = grid
        self.silo_timeout_s = silo_timeout_s
        self.nodes: dict[str, int] = {}
        self.entries: dict[str, SiloEntry] = {}
        self.transfer_seconds = 0.0  # spent on requests that carried weights or updates

    def open(self) -> None:
        """Prepares the process, once: quick looks for replies, and little memory for them."""
        if missing := shorten_server_waits():
            print(f"warning: this Flower has no {', '.join(missing)}: replies may wait for a second", flush=True)
        if missing := join_arrays_at_once(FORMAT):
            print(f"warning: this Flower has no {', '.join(missing)}: replies take more memory", flush=True)

    def roll_call(self, min_silos: int) -> dict[str, SiloEntry]:
        """Waits for `min_silos` connected nodes and asks each who it is. Raises FederationError if names repeat."""
        self._meet(self._wait_for_nodes(min_silos))
        listed = ", ".join(f"{e.name} ({e.num_examples} examples)" for _, e in sorted(self.entries.items()))
        print(f"roll call: {len(self.entries)} silos: {listed}", flush=True)
        return dict(sorted(self.entries.items()))

    def train(
        self,
        silos: Sequence[str],
        round_number: int,
        schema: Schema,
        weights: Weights,
        evaluate: bool,
        timeout_s: float,
    ) -> Iterator[Reply]:
        self._meet_newcomers()
        task = pack_task(schema, weights, round_number, evaluate)
        return self._results(MessageType.TRAIN, silos, task, str(round_number), timeout_s, num_bytes(weights))

    def evaluate(self, silos: Sequence[str], schema: Schema, weights: Weights) -> Iterator[Reply]:
        task = pack_task(schema, weights, 0, True)
        return self._results(MessageType.EVALUATE, silos, task, "evaluate", self.silo_timeout_s, 0)

    def _results(
        self, kind: str, silos: Sequence[str], task: RecordDict, group: str, timeout_s: float, reply_bytes: int
    ) -> Iterator[Reply]:
        names = {self.nodes[silo]: silo for silo in silos}
        replies = self._ask(kind, list(names), task, group, timeout_s, reply_bytes)
        del task  # as large as the model; it is gone when the first reply comes
        for node, reply in replies:
            yield names[node], reply if isinstance(reply, Failure) else _result(reply)
            del reply  # before the next is fetched

    def _wait_for_nodes(self, min_silos: int) -> list[int]:
        wait = AdaptiveWait(longest_s=LOOK_FOR_NODES_S)
        told = -1
        while len(nodes := sorted(self.grid.get_node_ids())) < min_silos:
            if len(nodes) != told:
                told = len(nodes)
                print(f"waiting for silos: {told} of {min_silos} connected", flush=True)
            if time.monotonic() - wait.since > self.silo_timeout_s:
                raise FederationError(
                    f"The federation needs {min_silos} silos (federation.min_silos); {len(nodes)} connected within "
                    f"{self.silo_timeout_s:g} s. Start more silos, or lower federation.min_silos."
                )
            wait.wait()
        return nodes

    def _meet(self, nodes: Sequence[int]) -> None:
        """Asks nodes who they are."""
        for node, reply in self._ask(MessageType.QUERY, nodes, RecordDict(), "roll call", self.silo_timeout_s):
            if isinstance(reply, Failure):
                raise FederationError(f"A silo failed at the roll call: {reply.reason}")
            entry = unpack_silo(reply)
            if self.nodes.get(entry.name, node) != node and self.nodes[entry.name] in self.grid.get_node_ids():
                raise FederationError(
                    f"Every silo needs a name of its own; received {entry.name!r} twice. Change the name of one."
                )
            self.entries[entry.name], self.nodes[entry.name] = entry, node

    def _meet_newcomers(self) -> None:
        """A silo that was started anew is another node with the same name."""
        newcomers = set(self.grid.get_node_ids()) - set(self.nodes.values())
        if newcomers:
            self._meet(sorted(newcomers))

    def _ask(
        self, kind: str, nodes: Sequence[int], content: RecordDict, group: str, timeout_s: float, reply_bytes: int = 0
    ) -> Iterator[tuple[int, RecordDict | Failure]]:
        """Sends the content to the nodes and yields (node, reply) as they come in, until all have answered.

        A node that is gone, or late when the time is up, is a Failure.
        """
        wait, deadline = AdaptiveWait(), time.monotonic() + timeout_s
        messages = [
            Message(content, dst_node_id=node, message_type=kind, group_id=group, ttl=timeout_s + TTL_MARGIN_S)
            for node in nodes
        ]
        started = time.monotonic()
        pending = dict(zip(self.grid.push_messages(messages), nodes, strict=True))
        self.transfer_seconds += time.monotonic() - started
        del messages, content
        looked_for_nodes = time.monotonic()
        while pending:
            for reply in self._pull(list(pending), reply_bytes):
                wait.happened()
                yield pending.pop(reply.metadata.reply_to_message_id), _content(reply)
                del reply
            if time.monotonic() > deadline:
                yield from ((node, Failure(f"no answer within {timeout_s:g} s")) for node in pending.values())
                return
            if pending and time.monotonic() - looked_for_nodes > LOOK_FOR_NODES_S:
                connected = set(self.grid.get_node_ids())
                for message_id, node in [*pending.items()]:
                    if node not in connected:
                        del pending[message_id]
                        yield node, GONE
                looked_for_nodes = time.monotonic()
            if pending:
                wait.wait()

    def _pull(self, message_ids: Sequence[str], reply_bytes: int) -> Iterator[Message]:
        """The replies that are there. Large ones are fetched a few at a time, so that few are in memory at once."""
        at_once = max(1, BYTES_PER_PULL // max(1, reply_bytes))
        for i in range(0, len(message_ids), at_once):
            started = time.monotonic()
            replies = list(self.grid.pull_messages(message_ids[i : i + at_once]))
            if replies:
                self.transfer_seconds += time.monotonic() - started
            if reply_bytes > BYTES_PER_PULL:
                gc.collect()  # the HTTP client's responses lie in cycles, with all their bytes
            while replies:
                yield replies.pop()


def _content(reply: Message) -> RecordDict | Failure:
    if reply.has_error():
        if reply.error.code == NODE_UNAVAILABLE:
            return GONE
        reason = (reply.error.reason or "no reason given").strip().splitlines()
        return Failure(f"{reason[-1]} (Flower's code {reply.error.code})")
    refusal = unpack_refusal(reply.content)
    return reply.content if refusal is None else Failure(refusal)


def _result(content: RecordDict) -> LocalResult | Failure:
    try:
        return unpack_result(content)
    except ValueError as error:
        return Failure(f"it sent {error}")
