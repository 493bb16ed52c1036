"""A rank's side of a living job: `serve` works on the caller's calls until the caller hangs up.

Horovod is joined for a call and left after it; between calls a rank waits on its socket and uses no
processor. A rank whose caller is gone ends itself, wherever it runs.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any, TypeAlias

from dist_train.agreement import AgreedError
from dist_train.calls import CALLER_VARIABLE, PONG, Call, Hello, Reply, notice_lost_hosts
from dist_train.collectives import Communicator, is_lost_rank
from dist_train.rendezvous import joined, launched_rank, launcher_address, place_on_host
from dist_train.resources import prepare_process, use_own_gpu

LOST_GRACE_S = 2.0  # before a rank that was lost by another ends: that one shall say why, first

Work: TypeAlias = Callable[[Communicator, Any, Any], Any]  # communicator, request, for_root


def prepare_rank() -> None:
    """Gives this rank its share of the host's cores, and a GPU of its own where there are some.

    Imports TensorFlow. Raises ValueError if there are fewer GPUs than ranks.
    """
    local_rank, local_size = place_on_host()
    prepare_process(local_rank, local_size)
    use_own_gpu(local_rank, local_size)


def compile_for_ranks(*arguments: Any) -> None:
    """Compiles an experiment's model for all ranks, as `trainer.compile_for_ranks` does."""
    from dist_train import trainer  # TensorFlow: not for the caller

    trainer.compile_for_ranks(*arguments)


def serve(work: Work) -> None:
    """Replies to the caller's calls with `work(communicator, request, for_root)`, on all ranks.

    Never returns: the process ends when the caller hangs up. An AgreedError of `work` is a refusal,
    which the caller gets; so is any other exception, but it ends the job.
    """
    connection = _RankConnection()
    connection.start()
    while True:
        call = connection.calls.get()
        connection.send(_reply_to(call, work, connection))


class _RankConnection:
    """A rank's connection to its caller.

    A thread of its own answers pings while a call is worked on, so that a rank that computes can be
    told from one that hangs.
    """

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Connects to the caller and begins to listen."""
        host, port, key = os.environ.pop(CALLER_VARIABLE).split(":")
        address = (host or launcher_address(), int(port))
        self._connection: Connection = Client(address, authkey=key.encode())
        with socket.socket(fileno=os.dup(self._connection.fileno())) as same:
            notice_lost_hosts(same)

        self.send(Hello(launched_rank(), socket.gethostname(), os.getpid()))
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: Hello | Reply | str) -> None:
        with self._lock:
            self._connection.send(message)

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):  # the caller has hung up
                os._exit(0)  # from a thread, and amid a collective, nothing else ends the process
            if isinstance(message, Call):
                self.calls.put(message)
            else:
                self.send(PONG)


def _reply_to(call: Call, work: Work, connection: _RankConnection) -> Reply:
    """Returns the reply to a call; ends the process where the job cannot go on."""
    try:
        with joined(call.port) as communicator:
            return Reply(_work_or_fail(call, work, communicator, connection))
    except AgreedError as refusal:
        return Reply(refusal=str(refusal))
    except BaseException as error:
        _print_trace()
        if is_lost_rank(error):
            time.sleep(LOST_GRACE_S)
        os._exit(1)  # what is left of Horovod might wait for ranks that are gone


def _work_or_fail(
    call: Call, work: Work, communicator: Communicator, connection: _RankConnection
) -> Any:
    """Returns the work's value; an exception of its own is sent to the caller and ends the rank.

    The other ranks wait for this one, or have been told that it has left: they fail in their turn.
    """
    try:
        return work(communicator, call.request, call.for_root)
    except Exception as error:
        if isinstance(error, AgreedError) or is_lost_rank(error):
            raise
        _print_trace()
        kind = type(error).__name__
        failure = f"rank {communicator.rank} failed with {kind}; its lines say why"
        connection.send(Reply(failure=failure))
        os._exit(1)


def _print_trace() -> None:
    traceback.print_exc()
    sys.stderr.flush()
