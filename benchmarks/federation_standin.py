"""python -m benchmarks.federation_standin ADDRESS SILO.npz ...: many silos in one process.

For measuring the server. Each is a node of its own for the SuperLink, connected as a SuperNode
connects, and answers with our ClientApp; but only the first one trains, and the others send its
update, changed a little. All answer at once, as a federation of equals does.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.common.config import get_fused_config_from_fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supernode.fleet_http_connection import http_request_response

from fl_app.flower.client_app import app
from fl_app.flower.wire import pack_answer, unpack_reply
from fl_app.messages import Answer, LocalResult

POLL_S = 0.05


@dataclass(frozen=True)
class Node:
    """A silo's connection: the functions that a SuperNode gets from `http_request_response`."""

    node_config: dict[str, str]
    node_id: int
    receive: Callable[[], Any]
    send: Callable[[Message, Any, float], tuple[set[str], str]]
    get_run: Callable[[int], Any]
    get_fab: Callable[[str, int], Any]
    pull_object: Callable[[int, str], bytes]
    push_object: Callable[[int, str, str, bytes], None]
    confirm_message_received: Callable[[int, str], None]

    def next_message(self) -> Message:
        """Waits for a message and fetches all of it."""
        while (received := self.receive()) is None:
            time.sleep(POLL_S)
        header, tree = received
        run_id = header.metadata.run_id
        pull, confirm = (
            partial(self.pull_object, run_id),
            partial(self.confirm_message_received, run_id),
        )
        message = pull_and_inflate_object_from_tree(tree, pull, confirm, return_type=Message)
        vars(message.metadata)["_message_id"] = tree.object_id
        return message

    def push(self, reply: Message) -> None:
        vars(reply.metadata)["_message_id"] = reply.object_id
        tree, contents = get_object_tree(reply), get_all_nested_objects(reply)
        wanted, session = self.send(reply, tree, 0.0)
        for each in iterate_object_tree(tree):
            if each.object_id in wanted:
                self.push_object(
                    reply.metadata.run_id,
                    session,
                    each.object_id,
                    contents[each.object_id].deflate(),
                )

    def context(self, run_id: int) -> Context:
        run = self.get_run(run_id)
        run_config = get_fused_config_from_fab(self.get_fab(run.fab_hash, run_id).content, run)
        return Context(run_id, self.node_id, dict(self.node_config), RecordDict(), run_config)


def answers(nodes: Sequence[Node], messages: Sequence[Message], trains: bool) -> Iterator[Message]:
    """The replies of all nodes to one message that all have received: to train, or to introduce
    themselves.
    """
    contexts = (
        node.context(message.metadata.run_id) for node, message in zip(nodes, messages, strict=True)
    )
    if not trains:
        yield from (
            app(message, context) for message, context in zip(messages, contexts, strict=True)
        )
        return
    reply = unpack_reply(app(messages[0], next(contexts)).content)
    if not isinstance(reply, Answer):
        raise RuntimeError(reply.reason)
    result = LocalResult.from_answer(reply)
    for i, message in enumerate(messages):
        update = [np.asarray(array * (1 + 0.001 * i), array.dtype) for array in result.update]
        yield Message(pack_answer(replace(result, update=update).to_answer()), reply_to=message)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.federation_standin", description=__doc__
    )
    parser.add_argument("superlink", metavar="ADDRESS")
    parser.add_argument("silos", type=Path, nargs="+", metavar="SILO.npz")
    parser.add_argument(
        "--answers",
        type=int,
        required=True,
        help="messages that each answers, then all keep silent",
    )
    options = parser.parse_args(arguments)
    with ExitStack() as connections:
        nodes = []
        for silo in options.silos:
            connection = connections.enter_context(
                http_request_response(options.superlink, insecure=True)
            )
            nodes.append(Node({"silo": f"stand-in {silo.stem}", "data": str(silo)}, *connection))
        print(f"{len(nodes)} silos are connected", flush=True)
        for number in range(options.answers):
            messages = [node.next_message() for node in nodes]
            replies = answers(nodes, messages, trains=number > 0)  # the first is the roll call
            for node, reply in zip(nodes, replies, strict=True):
                node.push(reply)
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
