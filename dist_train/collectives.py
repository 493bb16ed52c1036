"""The communicator: what ranks do together. The only file that imports Horovod.

`connect()` gives a `HorovodCommunicator` in a process that `horovodrun` (or `mpirun`) started, and otherwise the null
object `LocalCommunicator`, so that the code that uses it has one path for 1 to N ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

T = TypeVar("T")

# Set by horovodrun, and by mpirun for programs started without horovodrun.
LAUNCHER_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
MEETING_ADDRESS, MEETING_PORT = "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"
PLACE_VARIABLES = (  # this rank's number among those of its host, and how many those are
    ("HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
PERFORMANCE_DEFAULTS = {
    "HOROVOD_CYCLE_TIME": "0.5",  # ms between two looks for new tensors; Horovod's 1 wastes half of one in each step
    "OMPI_MCA_mpi_yield_when_idle": "1",  # a rank that waits must leave its core to its own computing threads
}


class Communicator(Protocol):
    """A group of `world_size` ranks. Every collective must be called by all ranks in the same order.

    Tensor collectives work in graphs; `name` tells one collective of a step from another and must agree over ranks.
    """

    rank: int
    world_size: int
    local_rank: int  # among the ranks on this host
    local_size: int

    @property
    def is_root(self) -> bool: ...

    def on_root(self, root: T, others: T) -> T:
        """The one value on the root, the other one elsewhere: root-only objects meet null objects here."""

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks, by rank."""

    def broadcast_object(self, value: T) -> T:
        """The root's value."""

    def broadcast_arrays(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The root's arrays; shapes and dtypes must agree over ranks."""

    def all_reduce_sum(self, tensors: Sequence[tf.Tensor], name: str, scale: float = 1.0) -> list[tf.Tensor]:
        """`scale` times the sums over ranks, fused into one collective."""

    def all_reduce_adasum(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """The ranks' tensors combined pairwise by Adasum (Maleki et al. 2020, arXiv:2006.02924)."""

    def why_no_adasum(self) -> str:
        """Why `all_reduce_adasum` cannot work here, and the remedy; empty if it can."""

    def all_gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """The ranks' tensors, concatenated along the first axis, which may differ in length."""


class LocalCommunicator:
    """One process: every collective is the identity."""

    rank = 0
    world_size = 1
    local_rank = 0
    local_size = 1
    is_root = True

    def on_root(self, root: T, others: T) -> T:
        return root

    def all_gather_object(self, value: T) -> list[T]:
        return [value]

    def broadcast_object(self, value: T) -> T:
        return value

    def broadcast_arrays(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(arrays)

    def all_reduce_sum(self, tensors: Sequence[tf.Tensor], name: str, scale: float = 1.0) -> list[tf.Tensor]:
        return list(tensors) if scale == 1.0 else [tensor * scale for tensor in tensors]

    def all_reduce_adasum(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        return list(tensors)

    def why_no_adasum(self) -> str:
        return ""

    def all_gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return tensor


class HorovodCommunicator:
    """All ranks of the Horovod job that this process belongs to."""

    def __init__(self) -> None:
        import horovod.tensorflow as hvd  # a process without ranks needs no Horovod installed

        self._hvd = hvd

    def start(self) -> HorovodCommunicator:
        """Joins the job. Idempotent."""
        for name, value in PERFORMANCE_DEFAULTS.items():
            os.environ.setdefault(name, value)
        self._hvd.init()
        self.rank: int = self._hvd.rank()
        self.world_size: int = self._hvd.size()
        self.local_rank: int = self._hvd.local_rank()
        self.local_size: int = self._hvd.local_size()
        return self

    def leave(self) -> None:
        """Leaves the job, which `start` can join again."""
        self._hvd.shutdown()

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def on_root(self, root: T, others: T) -> T:
        return root if self.is_root else others

    def all_gather_object(self, value: T) -> list[T]:
        from horovod.tensorflow.functions import allgather_object

        return allgather_object(value)

    def broadcast_object(self, value: T) -> T:
        from horovod.tensorflow.functions import broadcast_object

        return broadcast_object(value, root_rank=0)

    def broadcast_arrays(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One broadcast of the bytes of all arrays: Horovod lacks some dtypes, and each collective has its latency."""
        flat = np.frombuffer(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays), dtype=np.uint8)
        received = self._hvd.broadcast(flat, root_rank=0, name="archipelago.broadcast").numpy().tobytes()
        result, start = [], 0
        for array in arrays:
            part = np.frombuffer(received, dtype=array.dtype, count=array.size, offset=start)
            result.append(part.reshape(array.shape))
            start += array.nbytes
        return result

    def all_reduce_sum(self, tensors: Sequence[tf.Tensor], name: str, scale: float = 1.0) -> list[tf.Tensor]:
        hvd = self._hvd
        return list(hvd.grouped_allreduce(list(tensors), op=hvd.Sum, postscale_factor=scale, name=name))

    def all_reduce_adasum(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        hvd = self._hvd
        return [hvd.allreduce(tensor, op=hvd.Adasum, name=f"{name}.{i}") for i, tensor in enumerate(tensors)]

    def why_no_adasum(self) -> str:
        if not (self._hvd.mpi_enabled() or self._hvd.nccl_built()):
            return (
                "Adasum needs ranks that talk over MPI; received a job over Gloo. Set Horovod up with MPI (make setup "
                "MPI=1) and start with horovodrun --mpi, or use op='average'."
            )
        if self.world_size & (self.world_size - 1):
            return (
                f"Adasum combines ranks pairwise, so their number must be a power of two; received {self.world_size}. "
                "Start 2, 4, 8 ... ranks, or use op='average'."
            )
        return ""

    def all_gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return self._hvd.allgather(tensor, name=name)


def place_on_host(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(local_rank, local_size) as the launcher tells them, before anything is joined; (0, 1) without a launcher."""
    for rank, size in PLACE_VARIABLES:
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size])
    return 0, 1


def connect() -> Communicator:
    """The communicator of this process: Horovod's if a launcher started it as a rank, else the local one."""
    if any(name in os.environ for name in LAUNCHER_VARIABLES):
        return HorovodCommunicator().start()
    return LocalCommunicator()


# --- joining again and again, in a job whose ranks wait between pieces of work


class MeetingPoint:
    """Where ranks that `join` find each other. It is to run on the host of their launcher."""

    def start(self) -> int:
        """Returns its port."""
        from horovod.runner.http.http_server import RendezvousHandler, RendezvousServer

        class Host(RendezvousHandler):
            def do_DELETE(self) -> None:
                """Keeps all: a rank takes its address back when it has met the others, who may not have read it yet."""
                self.send_status_code(200)

            def _get_value(self, scope: str, key: str) -> bytes | None:
                """Lets who asks too early wait here: a rank that is told so sleeps for 10 ms, eight times a meeting."""
                deadline = time.monotonic() + EARLY_S
                while (value := super()._get_value(scope, key)) is None and time.monotonic() < deadline:
                    time.sleep(0.0005)
                return value

        self._server = RendezvousServer()
        port: int = self._server.start(Host)
        self.clear()
        return port

    def clear(self) -> None:
        """Forgets who was here: before each meeting."""
        self._server.init([])

    def stop(self) -> None:
        self._server.stop()
        self._server._httpd.server_close()


EARLY_S = 0.1
STALLED = ("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "600")  # for ranks that live but wait for each other; else for ever


@contextmanager
def joined(port: int) -> Iterator[Communicator]:
    """Joins the ranks that meet at this port and leaves them again: who waits must not use a processor.

    Horovod's thread looks for tensors every cycle as long as it is there. Only over Gloo: MPI starts once.
    """
    os.environ[MEETING_PORT] = str(port)
    os.environ.setdefault(*STALLED)
    try:
        communicator = HorovodCommunicator().start()
    except ValueError as error:  # what Horovod raises if another rank does not come
        from horovod.common.exceptions import HorovodInternalError

        raise HorovodInternalError(str(error)) from error
    try:
        yield communicator
    finally:
        communicator.leave()


def told_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank as its launcher tells it, before anything is joined."""
    return next(int(environment[name]) for name in LAUNCHER_VARIABLES if name in environment)


def launcher_address(environment: Mapping[str, str] = os.environ) -> str:
    """The launcher's host, as seen from this rank's."""
    return environment[MEETING_ADDRESS]


def tells_of_a_lost_rank(error: BaseException) -> bool:
    """Whether a collective ended with this error because other ranks had ended, and not by a mistake of its own."""
    import tensorflow as tf
    from horovod.common.exceptions import HorovodInternalError

    in_graph = isinstance(error, tf.errors.UnknownError) and "Horovod" in str(error)
    return in_graph or isinstance(error, HorovodInternalError)


class AgreedError(ValueError):
    """A mistake of the user that every rank knows of; the root tells it."""


def agree(communicator: Communicator, make: Callable[[], T]) -> T:
    """Runs `make` on every rank; if it raises ValueError or OSError on any, raises the first as AgreedError on all.

    So a mistake that only one rank can see (a missing file) ends the job everywhere, instead of leaving the others
    waiting in their next collective.
    """
    value: Any = None
    message = None
    try:
        value = make()
    except (ValueError, OSError) as error:
        message = str(error)
    messages = [m for m in communicator.all_gather_object(message) if m is not None]
    if messages:
        raise AgreedError(messages[0])
    return value


def broadcast_unless_equal(communicator: Communicator, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The root's arrays; nothing but hashes travels if all ranks hold the same. They are not copied then.

    Raises AgreedError if the ranks' arrays differ in number, shape or dtype.
    """
    layout = [(array.shape, str(array.dtype)) for array in arrays]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    layouts, digests = zip(*communicator.all_gather_object((layout, digest.digest())), strict=True)
    for rank, other in enumerate(layouts):
        if other != layouts[0]:
            wanted, received = next((a, b) for a, b in itertools.zip_longest(layouts[0], other) if a != b)
            raise AgreedError(
                f"All ranks must build the same model; received the array {received} on rank {rank} in the place of "
                f"{wanted} on rank 0. Install the same code on all hosts; a builder must not depend on its host."
            )
    return list(arrays) if len(set(digests)) == 1 else communicator.broadcast_arrays(arrays)


def check_same_examples(communicator: Communicator, sha256: str) -> None:
    """Raises AgreedError if the ranks' training examples have not all this hash.

    Each rank takes its part of the data by position: on hosts with other data, parts would overlap or be missing.
    """
    by_rank = communicator.all_gather_object(sha256[:8])
    if len(set(by_rank)) > 1:
        raise AgreedError(
            f"All ranks must load the same training examples; received sets with the hashes {by_rank} by rank. Copy "
            "the data of one host to the others, or use a shared folder."
        )
