"""A living job of Horovod ranks, for a program that has work for ranks now and then: the door from outside.

That program holds a `RankJob` and calls it; the ranks run `serve`, each in a process of its own under one `horovodrun`.
Between calls they wait on their sockets to the caller and use no processor: Horovod is joined for a call and left after
it. A rank whose caller is gone ends itself, wherever it runs.
"""

from __future__ import annotations

import os
import queue
import secrets
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from dist_train.collectives import (
    AgreedError,
    Communicator,
    MeetingPoint,
    agree,
    broadcast_unless_equal,
    check_same_examples,
    joined,
    launcher_address,
    place_on_host,
    tells_of_a_lost_rank,
    told_rank,
)
from dist_train.resources import prepare_process, use_own_gpu
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

CALLER = "ARCHIPELAGO_CALLER"  # host:port:key, for the ranks; no host: the launcher's
START_TIMEOUT_S = 180.0
SILENT_S, ASK_S = 30.0, 5.0  # a rank that says nothing for so long is lost; how often it is asked
GREETING_S = 10.0  # for who connects to say who he is
LOOK_S = 0.2
GRACE_S = 3.0  # for ranks to end when their caller hangs up
ARE_YOU_THERE = "are you there?"


class JobLost(Exception):
    """The ranks cannot go on; the job can be started anew."""


@dataclass(frozen=True)
class Hello:
    """What a rank says first."""

    rank: int
    host: str
    pid: int


@dataclass(frozen=True)
class Call:
    """A piece of work for all ranks. They find each other at the port."""

    request: Any
    for_root: Any
    port: int


@dataclass(frozen=True)
class Answer:
    value: Any = None
    refusal: str | None = None  # of all ranks: a mistake of the user
    failure: str | None = None  # of a rank that ends: to do the same again would fail again


@dataclass(frozen=True)
class _Rank:
    name: str
    host: str
    connection: Connection
    process: psutil.Process | None  # None on another host


class RankJob:
    """`num_ranks` ranks of `python -m MODULE`, which runs `serve`. `hosts` as horovodrun's -H: h1:2,h2:2; "": here.

    A context manager; it starts nothing before `start`. Not for several threads at once.
    """

    def __init__(self, module: str, num_ranks: int, hosts: str = "") -> None:
        self.module, self.num_ranks, self.hosts = module, num_ranks, hosts
        self._group = ProcessGroup()
        self._meeting_point = MeetingPoint()
        self._ranks: dict[int, _Rank] = {}

    def __enter__(self) -> Self:
        self._group.__enter__()
        self._port = self._meeting_point.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._meeting_point.stop()
        self._group.__exit__(kind, error, trace)

    def start(self) -> None:
        """Starts the ranks, anew if there are some, and waits until all have come. Raises JobLost if they do not."""
        self.stop()
        key, deadline = secrets.token_hex(32), time.monotonic() + START_TIMEOUT_S
        here = "" if self.hosts else "127.0.0.1"
        with socket.create_server((here, 0)) as server:
            server.settimeout(LOOK_S)
            environment = child_environment(**{CALLER: f"{here}:{server.getsockname()[1]}:{key}"})
            horovodrun = Path(sys.executable).with_name("horovodrun")
            command: list[str | Path] = [horovodrun, "--gloo", "-np", str(self.num_ranks)]
            command += ["-H", self.hosts] if self.hosts else []
            command += [sys.executable, "-m", self.module]
            self._launcher = self._group.start("horovodrun", command, environment, inherits_output=True)
            while len(self._ranks) < self.num_ranks:
                self._check_launcher()
                if time.monotonic() > deadline:
                    raise self._lost(
                        f"{len(self._ranks)} of {self.num_ranks} ranks have come within {START_TIMEOUT_S:.0f} s"
                    )
                try:
                    self._greet(server.accept()[0], key.encode())
                except (TimeoutError, EOFError, OSError, AuthenticationError, psutil.NoSuchProcess):
                    continue

    def call(self, request: Any, for_root: Any = None) -> Any:
        """Gives all ranks the request, and the root something more; returns what the root answers.

        Raises ValueError for a mistake of the user that the ranks agree on. After the following nothing of the job is
        left: ValueError if the work raises an exception on a rank, which tells more on its stderr; JobLost if a rank or
        the launcher ends or a rank says nothing for half a minute.
        """
        self.check()
        self._meeting_point.clear()
        try:
            for number, rank in self._ranks.items():
                self._send(rank, Call(request, for_root if number == 0 else None, self._port))
            answers = self._answers()
        except BaseException:  # no half of a call may be left to the next one
            self.stop()
            raise
        for answer in answers.values():
            if answer.failure is not None:
                self.stop()
            if (wrong := answer.failure or answer.refusal) is not None:
                raise ValueError(wrong)
        return answers[0].value

    def __str__(self) -> str:
        hosts = [rank.host for _, rank in sorted(self._ranks.items())]
        return f"{len(hosts)} ranks on " + ", ".join(dict.fromkeys(hosts))

    def check(self) -> None:
        """Raises JobLost, after which nothing of the job is left, if a rank or the launcher has ended."""
        if not self._ranks:
            raise JobLost("the ranks are not running")
        self._check_launcher()
        self._receive(timeout_s=0)

    def stop(self) -> None:
        """Ends the ranks: those that are well end when their caller hangs up, the others on this host are killed."""
        ranks, self._ranks = self._ranks, {}
        for rank in ranks.values():
            rank.connection.close()
        own = [rank.process for rank in ranks.values() if rank.process]
        _, stubborn = psutil.wait_procs(own, timeout=GRACE_S)
        for process in stubborn:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if ranks:
            with suppress(subprocess.TimeoutExpired):
                self._launcher.wait(GRACE_S)  # it notices, and ends without a complaint
        self._group.stop()

    # --- the ranks' side of it

    def _greet(self, accepted: socket.socket, key: bytes) -> None:
        """Takes a rank in. Whoever else calls at this port lacks the key, or keeps silent: an error in good time."""
        _limit(accepted, socket.SO_SNDTIMEO, SILENT_S)
        _limit(accepted, socket.SO_RCVTIMEO, GREETING_S)
        _notice_lost_hosts(accepted)
        connection = Connection(accepted.detach())
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        hello: Hello = connection.recv()
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            _limit(same, socket.SO_RCVTIMEO, SILENT_S)  # within an answer
        own = {process.pid: process for process in psutil.Process(self._launcher.pid).children(recursive=True)}
        self._ranks[hello.rank] = _Rank(f"rank {hello.rank}", hello.host, connection, own.get(hello.pid))

    def _answers(self) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        heard = dict.fromkeys(self._ranks, time.monotonic())
        asked = time.monotonic()
        while len(answers) < self.num_ranks and not any(answer.failure for answer in answers.values()):
            received = self._receive(timeout_s=1.0)
            answers |= {number: message for number, message in received if isinstance(message, Answer)}
            self._check_launcher()
            now = time.monotonic()
            has_answer = any(isinstance(message, Answer) for _, message in received)
            # an answer may be large, and while it is received nobody else is asked or heard
            heard |= dict.fromkeys(heard if has_answer else (number for number, _ in received), now)
            silent = [number for number, last in heard.items() if number not in answers and now - last > SILENT_S]
            if silent:
                raise self._lost(f"{self._ranks[silent[0]].name} has said nothing for {SILENT_S:.0f} s")
            if now - asked > ASK_S:
                asked = now
                for number in set(self._ranks) - set(answers):
                    self._send(self._ranks[number], ARE_YOU_THERE)
        return answers

    def _receive(self, timeout_s: float) -> list[tuple[int, Any]]:
        """What the ranks have to say within this time, if anything."""
        by_connection = {rank.connection: (number, rank) for number, rank in self._ranks.items()}
        received, ended = [], []
        for connection in wait(list(by_connection), timeout_s):
            number, rank = by_connection[connection]  # type: ignore[index]
            try:
                received.append((number, rank.connection.recv()))
            except (EOFError, OSError):
                ended.append(rank.name)
        why = any(isinstance(message, Answer) and message.failure for _, message in received)
        if ended and not why:
            raise self._lost(f"{ended[0]} has ended")
        return received

    def _send(self, rank: _Rank, message: Any) -> None:
        try:
            rank.connection.send(message)
        except OSError:
            raise self._lost(f"{rank.name} has ended, or takes nothing") from None

    def _check_launcher(self) -> None:
        code = self._launcher.poll()
        if code is not None:
            raise self._lost(f"horovodrun ended with status {code}")

    def _lost(self, reason: str) -> JobLost:
        self.stop()
        return JobLost(reason)


def _limit(connected: socket.socket, which: int, seconds: float) -> None:
    """How long sending or receiving may take before it is an OSError; 0: for ever."""
    connected.setsockopt(socket.SOL_SOCKET, which, struct.pack("ll", int(seconds), 0))


def _notice_lost_hosts(connected: socket.socket) -> None:
    """Makes a connection whose other end is gone without a word an OSError after about half a minute, idle or not."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# --- in each rank


def prepare_rank() -> None:
    """Gives this rank its share of the host's cores, and a GPU of its own where there are some; imports TensorFlow."""
    local_rank, local_size = place_on_host()
    prepare_process(local_rank, local_size)
    use_own_gpu(local_rank, local_size)


def compile_for_ranks(*arguments: Any) -> None:
    """`trainer.compile_for_ranks`: an experiment's model, compiled to be trained by all ranks together."""
    from dist_train import trainer  # TensorFlow: not for the caller

    trainer.compile_for_ranks(*arguments)


def serve(answer: Callable[[Communicator, Any, Any], Any]) -> None:
    """Answers the caller's calls by `answer(communicator, request, for_root)`, for ever; all ranks do so together.

    An AgreedError is a refusal, which the caller gets; any other exception of `answer` too, but it ends the job.
    """
    host, port, key = os.environ.pop(CALLER).split(":")
    connection = Client((host or launcher_address(), int(port)), authkey=key.encode())
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        _notice_lost_hosts(same)
    connection.send(Hello(told_rank(), socket.gethostname(), os.getpid()))
    calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
    lock = threading.Lock()

    def send(message: Any) -> None:
        with lock:
            connection.send(message)

    def listen() -> None:
        """Also while a call is worked on: this tells a rank that computes from one that hangs."""
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):  # the caller has hung up
                os._exit(0)  # from a thread, and amid a collective, nothing else ends the process
            if isinstance(message, Call):
                calls.put(message)
            else:
                send("here")

    threading.Thread(target=listen, daemon=True).start()
    while True:
        send(_reply(calls.get(), answer, send))


def _reply(call: Call, answer: Callable[[Communicator, Any, Any], Any], send: Callable[[Answer], None]) -> Answer:
    try:
        with joined(call.port) as communicator:
            try:
                return Answer(answer(communicator, call.request, call.for_root))
            except Exception as error:
                if isinstance(error, AgreedError) or tells_of_a_lost_rank(error):
                    raise
                _print_trace()  # and send, before the others, who wait for this rank, fail for its sake
                send(Answer(failure=f"rank {communicator.rank} failed with {type(error).__name__}; its lines say why"))
                os._exit(1)
    except AgreedError as error:
        return Answer(refusal=str(error))
    except BaseException:
        _print_trace()
        os._exit(1)  # what is left of Horovod might wait for ranks that are gone


def _print_trace() -> None:
    traceback.print_exc()
    sys.stderr.flush()
