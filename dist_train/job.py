"""A living job of Horovod ranks, for a program that has work for ranks now and then: the door from
outside.

That program, the caller, holds a `RankJob` and calls it. The ranks run `serve` (serving.py), each
in a process of its own under one `horovodrun`. Both sides import from here.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from dist_train.agreement import agree, broadcast_unless_equal, check_same_examples
from dist_train.calls import CALLER_VARIABLE, PING, Call, Hello, Reply, notice_lost_hosts
from dist_train.collectives import Communicator
from dist_train.rendezvous import Rendezvous
from dist_train.serving import compile_for_ranks, prepare_rank, serve
from shared.processes import ProcessGroup, child_environment

__all__ = [
    "Communicator",
    "JobLost",
    "RankJob",
    "agree",
    "broadcast_unless_equal",
    "check_same_examples",
    "compile_for_ranks",
    "prepare_rank",
    "serve",
]

START_TIMEOUT_S = 180.0
SILENCE_TIMEOUT_S = 30.0  # a rank that sends nothing for so long is lost
PING_INTERVAL_S = 5.0
HANDSHAKE_TIMEOUT_S = 10.0  # for a process that connects to prove that it is a rank
ACCEPT_POLL_S = 0.2
REPLY_POLL_S = 1.0
STOP_GRACE_S = 3.0  # for ranks to end when their caller hangs up


class JobLost(Exception):
    """The ranks cannot go on; the job can be started again."""


@dataclass(frozen=True)
class _Rank:
    name: str
    host: str
    connection: Connection
    process: psutil.Process | None  # None on another host


class RankJob:
    """`num_ranks` ranks of `python -m MODULE`, which runs `serve`.

    `hosts` as horovodrun's -H: h1:2,h2:2; "": this host. A context manager; it starts no rank
    before `start`. Not for several threads at once.
    """

    def __init__(self, module: str, num_ranks: int, hosts: str = "") -> None:
        self.module = module
        self.num_ranks = num_ranks
        self.hosts = hosts
        self._group = ProcessGroup()
        self._rendezvous = Rendezvous()
        self._ranks: dict[int, _Rank] = {}

    def __enter__(self) -> Self:
        self._group.__enter__()
        self._port = self._rendezvous.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._rendezvous.stop()
        self._group.__exit__(kind, error, trace)

    def __str__(self) -> str:
        hosts = [rank.host for _, rank in sorted(self._ranks.items())]
        return f"{len(hosts)} ranks on " + ", ".join(dict.fromkeys(hosts))

    # --- starting and stopping

    def start(self) -> None:
        """Starts the ranks, or restarts them, and waits until all have connected.

        Raises JobLost if they do not.
        """
        self.stop()
        deadline = time.monotonic() + START_TIMEOUT_S
        key = secrets.token_hex(32)
        address = "" if self.hosts else "127.0.0.1"
        with socket.create_server((address, 0)) as server:
            server.settimeout(ACCEPT_POLL_S)
            port = server.getsockname()[1]
            self._launch(caller=f"{address}:{port}:{key}")
            while len(self._ranks) < self.num_ranks:
                self._check_launcher()
                if time.monotonic() > deadline:
                    raise self._lost(
                        f"{len(self._ranks)} of {self.num_ranks} ranks have connected within"
                        f" {START_TIMEOUT_S:.0f} s"
                    )
                # Other processes than ranks may connect, keep silent, or end amid the handshake.
                with suppress(
                    TimeoutError, EOFError, OSError, AuthenticationError, psutil.NoSuchProcess
                ):
                    self._accept(server, key.encode())

    def stop(self) -> None:
        """Ends the ranks, by hanging up; kills those of this host that do not end by themselves."""
        ranks = list(self._ranks.values())
        self._ranks = {}
        for rank in ranks:
            rank.connection.close()

        processes = [rank.process for rank in ranks if rank.process]
        _, alive = psutil.wait_procs(processes, timeout=STOP_GRACE_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()

        # The launcher notices, and ends without a complaint.
        if ranks:
            with suppress(subprocess.TimeoutExpired):
                self._launcher.wait(STOP_GRACE_S)
        self._group.stop()

    def check(self) -> None:
        """Raises JobLost if a rank or the launcher has ended; nothing of the job is left then."""
        if not self._ranks:
            raise JobLost("the ranks are not running")
        self._check_launcher()
        self._receive(timeout_s=0)

    def _launch(self, caller: str) -> None:
        """Starts horovodrun, whose ranks connect to the caller."""
        horovodrun = Path(sys.executable).with_name("horovodrun")
        command: list[str | Path] = [horovodrun, "--gloo", "-np", str(self.num_ranks)]
        if self.hosts:
            command += ["-H", self.hosts]
        command += [sys.executable, "-m", self.module]
        environment = child_environment(**{CALLER_VARIABLE: caller})
        self._launcher = self._group.start("horovodrun", command, environment, inherits_output=True)

    def _accept(self, server: socket.socket, key: bytes) -> None:
        """Accepts a rank. Raises an error, in good time, if the process that connects is none.

        Such a process lacks the key, or keeps silent.
        """
        accepted, _ = server.accept()
        _limit(accepted, socket.SO_SNDTIMEO, SILENCE_TIMEOUT_S)
        _limit(accepted, socket.SO_RCVTIMEO, HANDSHAKE_TIMEOUT_S)
        notice_lost_hosts(accepted)

        # Both ends prove that they hold the key.
        connection = Connection(accepted.detach())
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        hello: Hello = connection.recv()

        # From now on a message may take longer, once it has begun.
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            _limit(same, socket.SO_RCVTIMEO, SILENCE_TIMEOUT_S)

        descendants = psutil.Process(self._launcher.pid).children(recursive=True)
        process = next((child for child in descendants if child.pid == hello.pid), None)
        name = f"rank {hello.rank}"
        self._ranks[hello.rank] = _Rank(name, hello.host, connection, process)

    # --- calling

    def call(self, request: Any, for_root: Any = None) -> Any:
        """Sends all ranks the request, and the root `for_root` too; returns the root's value.

        | what happens                                             | raises     | the job    |
        |----------------------------------------------------------|------------|------------|
        | the ranks agree on a mistake of the user                 | ValueError | goes on    |
        | the work raises an exception on a rank (see its stderr)  | ValueError | has ended  |
        | a rank or the launcher ends, a rank is silent for 30 s   | JobLost    | has ended  |
        """
        self.check()
        self._rendezvous.clear()
        try:
            for number, rank in self._ranks.items():
                self._send(rank, Call(request, for_root if number == 0 else None, self._port))
            replies = self._replies()
        except BaseException:  # no half of a call may be left to the next one
            self.stop()
            raise

        for reply in replies.values():
            if reply.failure is not None:
                self.stop()
                raise ValueError(reply.failure)
            if reply.refusal is not None:
                raise ValueError(reply.refusal)
        return replies[0].value

    def _replies(self) -> dict[int, Reply]:
        """Returns the ranks' replies, by rank: of all, or up to the first failure.

        Raises JobLost for a rank that sends neither a reply nor an answer to pings.
        """
        replies: dict[int, Reply] = {}
        last_heard = dict.fromkeys(self._ranks, time.monotonic())
        last_ping = time.monotonic()
        while len(replies) < self.num_ranks:
            messages = self._receive(timeout_s=REPLY_POLL_S)
            self._check_launcher()
            now = time.monotonic()

            # A reply may be large, and while it is received no other rank is pinged or heard.
            new_replies = {n: message for n, message in messages if isinstance(message, Reply)}
            heard = self._ranks if new_replies else [number for number, _ in messages]
            last_heard.update(dict.fromkeys(heard, now))

            replies.update(new_replies)
            if any(reply.failure for reply in new_replies.values()):
                break

            working = [number for number in self._ranks if number not in replies]
            for number in working:
                if now - last_heard[number] > SILENCE_TIMEOUT_S:
                    raise self._lost(
                        f"{self._ranks[number].name} has said nothing for {SILENCE_TIMEOUT_S:.0f} s"
                    )
            if now - last_ping > PING_INTERVAL_S:
                last_ping = now
                for number in working:
                    self._send(self._ranks[number], PING)
        return replies

    def _receive(self, timeout_s: float) -> list[tuple[int, Any]]:
        """Returns the (rank, message) pairs that arrive within this time, if any.

        Raises JobLost if a rank has ended and none reports a failure, which would be the reason.
        """
        numbers = {rank.connection: number for number, rank in self._ranks.items()}
        messages = []
        ended = []
        for connection in wait(list(numbers), timeout_s):
            number = numbers[connection]  # type: ignore[index]
            rank = self._ranks[number]
            try:
                messages.append((number, rank.connection.recv()))
            except (EOFError, OSError):
                ended.append(rank.name)

        has_failure = any(isinstance(m, Reply) and m.failure for _, m in messages)
        if ended and not has_failure:
            raise self._lost(f"{ended[0]} has ended")
        return messages

    def _send(self, rank: _Rank, message: Call | str) -> None:
        try:
            rank.connection.send(message)
        except OSError:
            raise self._lost(f"{rank.name} has ended, or takes nothing") from None

    def _check_launcher(self) -> None:
        status = self._launcher.poll()
        if status is not None:
            raise self._lost(f"horovodrun ended with status {status}")

    def _lost(self, reason: str) -> JobLost:
        self.stop()
        return JobLost(reason)


def _limit(connected: socket.socket, option: int, seconds: float) -> None:
    """Sets the time-out of sending or receiving, which is an OSError when it expires."""
    connected.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), 0))
