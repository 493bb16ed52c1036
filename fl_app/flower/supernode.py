"""python -m fl_app.flower.supernode [flower-supernode's options]: Flower's SuperNode, with short
waits.

Flower 1.42 waits by fixed sleeps: a SuperNode polls for messages every 3 s and for its app's reply
every 0.5 s, and gets an object that is announced but not stored yet after 1 s at the soonest. Here
a poll comes the sooner, the shorter it is since something happened.
"""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fl_app.flower.internals import Internals, shorten_backoff
from shared.polling import AdaptiveWait

HEARTBEAT_S = 10  # the shortest that a SuperLink accepts; it gives a node up after twice as long

LOOP = "flwr.supernode.start_client_internal"
CONNECTION = "flwr.supernode.fleet_http_connection"
HEARTBEAT = "flwr.supercore.heartbeat"

INTERNALS: Internals = {
    (LOOP, "time"): (),
    (LOOP, "pull_objects"): ("initial_backoff", "backoff_cap"),
    (LOOP, "_pull_and_store_message"): ("pull_object", "confirm_message_received"),
    (CONNECTION, "HEARTBEAT_DEFAULT_INTERVAL"): (),
    (HEARTBEAT, "HEARTBEAT_DEFAULT_INTERVAL"): (),
    ("flwr.supernode.cli.flower_supernode", "flower_supernode"): (),
}


def run_supernode() -> None:
    """Runs `flower-supernode` on sys.argv in this process, with its waits shortened."""
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection, start_client_internal
    from flwr.supernode.cli.flower_supernode import flower_supernode

    vars(start_client_internal)["time"] = ShortSleeps()
    shorten_backoff(start_client_internal, "pull_objects")
    _drop_messages_of_ended_runs(start_client_internal)
    for module in (fleet_http_connection, heartbeat):
        vars(module)["HEARTBEAT_DEFAULT_INTERVAL"] = HEARTBEAT_S
    flower_supernode()


class ShortSleeps:
    """Stands for the module `time` in the SuperNode's loop, whose sleeps it shortens."""

    def __init__(self) -> None:
        self.idle = AdaptiveWait()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """Waits by how long no message has come (Flower's 3 s), or shortly for one that is being
        worked on: that polls the SuperNode's own memory, which costs little.
        """
        if seconds > 1:
            self.idle.wait()
        else:
            self.idle.happened()
            time.sleep(min(seconds, self.idle.shortest_s))


def _drop_messages_of_ended_runs(loop: ModuleType) -> None:
    """Makes a SuperNode drop a message whose run ends while it comes in.

    Flower 1.42 keeps it: its task waits for content that never comes, and its late answer takes the
    place of the next one, so that from then on each answer is sent when the next message comes.
    """
    from flwr.supercore.run import RunNotRunningException

    plain = loop._pull_and_store_message

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, with a BaseException of Flower's turned into one that its loop handles."""

        def wrapper(*arguments: Any) -> Any:
            try:
                return call(*arguments)
            except RunNotRunningException:
                raise RuntimeError("the run has ended") from None

        return wrapper

    def pull_and_store_message(**calls: Any) -> int | None:
        for name in ("pull_object", "confirm_message_received"):
            calls[name] = failing(calls[name])
        return plain(**calls)

    vars(loop)["_pull_and_store_message"] = pull_and_store_message


if __name__ == "__main__":
    run_supernode()
