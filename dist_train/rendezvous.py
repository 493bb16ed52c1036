"""The rendezvous, where ranks find each other again and again, and a launcher's reports to them.

A job whose ranks wait between pieces of work joins Horovod for each piece and leaves it afterwards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dist_train.collectives import (
    LAUNCHER_VARIABLES,
    PLACE_VARIABLES,
    RENDEZVOUS_ADDRESS,
    RENDEZVOUS_PORT,
    Communicator,
    HorovodCommunicator,
    horovod_http_server,
)

# A request that comes before its value waits at the server for so long; a rank that is refused
# sleeps for 10 ms, eight times a rendezvous.
EARLY_REQUEST_S = 0.1
POLL_S = 0.0005


class Rendezvous:
    """The server where ranks that join find each other; to be run on their launcher's host."""

    def start(self) -> int:
        """Starts the server and returns its port."""
        http_server = horovod_http_server()

        class Handler(http_server.RendezvousHandler):  # type: ignore[name-defined]
            def do_DELETE(self) -> None:
                """Keeps a rank's address, which others may not have read yet."""
                self.send_status_code(200)

            def _get_value(self, scope: str, key: str) -> bytes | None:
                """Waits for a value that another rank has not sent yet."""
                deadline = time.monotonic() + EARLY_REQUEST_S
                value: bytes | None = super()._get_value(scope, key)
                while value is None and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                    value = super()._get_value(scope, key)
                return value

        self._server = http_server.RendezvousServer()
        port: int = self._server.start(Handler)
        self.clear()
        return port

    def clear(self) -> None:
        """Forgets all addresses; to be called before ranks join again."""
        self._server.init([])

    def stop(self) -> None:
        self._server.stop()
        self._server._httpd.server_close()


@contextmanager
def joined(port: int) -> Iterator[Communicator]:
    """Joins the ranks at this port of the launcher's host, and leaves them afterwards.

    A rank that waits must not use a processor, and Horovod's thread polls for tensors every cycle
    as long as the job is joined. Works over Gloo only: MPI starts once per process. Raises
    RuntimeError if another rank does not come.
    """
    os.environ[RENDEZVOUS_PORT] = str(port)
    try:
        communicator = HorovodCommunicator().start()
    except ValueError as error:  # not a mistake of the user
        raise RuntimeError(f"the ranks cannot be joined: {error}") from error

    try:
        yield communicator
    finally:
        communicator.leave()


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Returns this process's rank as its launcher reports it, before anything is joined."""
    return next(int(environment[name]) for name in LAUNCHER_VARIABLES if name in environment)


def launcher_address(environment: Mapping[str, str] = os.environ) -> str:
    """Returns the launcher's host, as seen from this rank's."""
    return environment[RENDEZVOUS_ADDRESS]


def place_on_host(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns (local_rank, local_size) as the launcher reports them, before anything is joined.

    Without a launcher: (0, 1).
    """
    for local_rank, local_size in PLACE_VARIABLES:
        if local_rank in environment and local_size in environment:
            return int(environment[local_rank]), int(environment[local_size])
    return 0, 1
