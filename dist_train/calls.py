"""Messages between a `RankJob` (job.py) and its ranks (serving.py), and an option of their sockets.

| from       | message | when                        | reply                     |
|------------|---------|-----------------------------|---------------------------|
| a rank     | `Hello` | it has started              |                           |
| the caller | `Call`  | there is work for all ranks | a `Reply`, from each rank |
| the caller | PING    | amid a call, now and then   | PONG                      |

Each travels pickled over a connection that both ends have authenticated with the job's key.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

CALLER_VARIABLE = "ARCHIPELAGO_CALLER"  # host:port:key, for the ranks; no host: the launcher's
PING = "ping"
PONG = "pong"


@dataclass(frozen=True)
class Hello:
    """A rank's first message."""

    rank: int
    host: str
    pid: int


@dataclass(frozen=True)
class Call:
    """A piece of work for all ranks, which find each other at the port of the rendezvous."""

    request: Any
    for_root: Any  # None for the other ranks
    port: int


@dataclass(frozen=True)
class Reply:
    """A rank's reply to a call: a value, or one of two kinds of errors.

    refusal: a mistake of the user, which all ranks agree on; they stay ready for the next call.
    failure: an exception of the work on this rank, which ends: the same call would fail again.
    """

    value: Any = None
    refusal: str | None = None
    failure: str | None = None


def notice_lost_hosts(connected: socket.socket) -> None:
    """Makes a connection fail with OSError when its other end is gone without closing it.

    After about half a minute, idle or not.
    """
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)  # s until the first probe
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)  # s between probes
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)  # ms
