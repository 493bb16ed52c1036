"""The server's way to the silos over Flower: by name, without fixed waits. Node ids end here."""

import time
from collections.abc import Iterator

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fl_app.local_training import LocalResult, SiloEntry
from fl_app.messages import pack_task, unpack_refusal, unpack_result, unpack_silo
from fl_app.rounds import FederationError
from shared.data import Schema
from shared.weights import Weights

REPLY_POLL_S = 0.2  # well below what a round takes, and rare enough to leave the cores to the silos
NODES_POLL_S = 0.5


class FlowerExchange:
    """Implements `rounds.Exchange` on a Flower grid. A Flower node id, new at each start, stands for a silo's name."""

    def __init__(self, grid: Grid, silo_timeout_s: float) -> None:
        self.grid = grid
        self.silo_timeout_s = silo_timeout_s
        self.nodes: dict[str, int] = {}

    def roll_call(self, min_silos: int) -> dict[str, SiloEntry]:
        """Waits for `min_silos` connected nodes and asks each who it is. Raises FederationError if names repeat."""
        nodes = self._wait_for_nodes(min_silos)
        entries: dict[str, SiloEntry] = {}
        for node, reply in self._ask(MessageType.QUERY, {node: RecordDict() for node in nodes}, group="roll call"):
            entry = unpack_silo(reply)
            if entry.name in entries:
                raise FederationError(
                    f"Every silo needs a name of its own; received {entry.name!r} twice. Change silo=... in one "
                    "supernode's --node-config."
                )
            entries[entry.name], self.nodes[entry.name] = entry, node
        listed = ", ".join(f"{e.name} ({e.num_examples} examples)" for _, e in sorted(entries.items()))
        print(f"roll call: {len(entries)} silos: {listed}", flush=True)
        return dict(sorted(entries.items()))

    def train(self, silos: list[str], round_number: int, schema: Schema, weights: Weights) -> dict[str, LocalResult]:
        return self._collect(MessageType.TRAIN, silos, pack_task(schema, weights, round_number), str(round_number))

    def evaluate(self, silos: list[str], schema: Schema, weights: Weights) -> dict[str, LocalResult]:
        return self._collect(MessageType.EVALUATE, silos, pack_task(schema, weights, 0), "evaluate")

    def _collect(self, kind: str, silos: list[str], task: RecordDict, group: str) -> dict[str, LocalResult]:
        names = {self.nodes[silo]: silo for silo in silos}
        replies = self._ask(kind, dict.fromkeys(names, task), group)
        return {names[node]: unpack_result(reply) for node, reply in replies}

    def _wait_for_nodes(self, min_silos: int) -> list[int]:
        deadline = time.monotonic() + self.silo_timeout_s
        told = -1
        while len(nodes := sorted(self.grid.get_node_ids())) < min_silos:
            if len(nodes) != told:
                told = len(nodes)
                print(f"waiting for silos: {told} of {min_silos} connected", flush=True)
            if time.monotonic() > deadline:
                raise FederationError(
                    f"The federation needs {min_silos} silos (federation.min_silos); {len(nodes)} connected within "
                    f"{self.silo_timeout_s:g} s. Start more supernodes, or lower federation.min_silos."
                )
            time.sleep(NODES_POLL_S)
        return nodes

    def _ask(self, kind: str, contents: dict[int, RecordDict], group: str) -> Iterator[tuple[int, RecordDict]]:
        """Sends each node its content and yields (node, reply) as they come in, until all have answered."""
        names = {node: silo for silo, node in self.nodes.items()}
        messages = [
            Message(content, dst_node_id=node, message_type=kind, group_id=group, ttl=self.silo_timeout_s)
            for node, content in contents.items()
        ]
        pending = dict(zip(self.grid.push_messages(messages), contents, strict=True))
        deadline = time.monotonic() + self.silo_timeout_s
        while pending:
            for reply in self.grid.pull_messages(list(pending)):
                node = pending.pop(reply.metadata.reply_to_message_id)
                yield node, _content(reply, names.get(node, f"node {node}"))
            if pending and time.monotonic() > deadline:
                late = ", ".join(sorted(names.get(node, f"node {node}") for node in pending.values()))
                raise FederationError(
                    f"No answer from {late} within federation.silo_timeout_s = {self.silo_timeout_s:g}. See the logs "
                    "of these silos, raise the limit, or resume once they are back."
                )
            time.sleep(REPLY_POLL_S)


def _content(reply: Message, silo: str) -> RecordDict:
    if reply.has_error():
        reason = (reply.error.reason or "no reason given").strip().splitlines()
        raise FederationError(f"{silo} failed: {reason[-1]} (code {reply.error.code}). See the log of that silo.")
    refusal = unpack_refusal(reply.content)
    if refusal is not None:
        raise FederationError(refusal)
    return reply.content
