"""The communicator: the collectives of a group of ranks. The only file that imports Horovod.

`connect()` returns a `HorovodCommunicator` in a process that `horovodrun` (or `mpirun`) started as
a rank, and otherwise the null object `LocalCommunicator`, so that callers have one path for 1 to N
ranks. The environment variables by which a launcher reports a rank's place, and the parts of
Horovod that rendezvous.py and serving.py need, are here as well.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

T = TypeVar("T")

# Set by horovodrun, and by mpirun for programs started without horovodrun.
LAUNCHER_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")

# This rank's number among those of its host, and the number of these.
PLACE_VARIABLES = (
    ("HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)

# The HTTP server over which ranks find each other (Gloo).
RENDEZVOUS_ADDRESS = "HOROVOD_GLOO_RENDEZVOUS_ADDR"
RENDEZVOUS_PORT = "HOROVOD_GLOO_RENDEZVOUS_PORT"

# Time-out of a collective that some ranks have not entered; Horovod's own default waits for ever.
STALL_TIMEOUT_S = "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"

FAILURE_KEY = "archipelago/failure"  # where a rank that fails leaves its reason, at the rendezvous
FAILURE_TIMEOUT_S = 2.0

DEFAULTS = {
    STALL_TIMEOUT_S: "600",
    # ms between two polls for new tensors; Horovod's 1 wastes half of one in each step
    "HOROVOD_CYCLE_TIME": "0.5",
    # a rank that waits must leave its core to its own computing threads
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


class LostRank(RuntimeError):
    """Another rank has failed or ended, or does not come to a collective."""


class Communicator(Protocol):
    """A group of `world_size` ranks. All ranks must call every collective, in the same order.

    Collectives of tensors work in graphs; `name` tells one collective of a step from another and
    must agree over ranks.
    """

    rank: int
    world_size: int
    local_rank: int  # among the ranks on this host
    local_size: int

    @property
    def is_root(self) -> bool: ...

    def on_root(self, root: T, others: T) -> T:
        """Returns `root` on rank 0 and `others` elsewhere, such as a null object."""

    def all_gather_object(self, value: T) -> list[T]:
        """Returns the values of all ranks, by rank."""

    def broadcast_object(self, value: T) -> T:
        """Returns the root's value."""

    def broadcast_arrays(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the root's arrays; shapes and dtypes must agree over ranks."""

    def all_reduce_sum(
        self, tensors: Sequence[tf.Tensor], name: str, scale: float = 1.0
    ) -> list[tf.Tensor]:
        """Returns `scale` times the sums over ranks, fused into one collective."""

    def all_reduce_adasum(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        """Combines the ranks' tensors pairwise by Adasum (Maleki et al. 2020, arXiv:2006.02924)."""

    def why_no_adasum(self) -> str:
        """Returns why `all_reduce_adasum` cannot work here, with the remedy; empty if it can."""

    def all_gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Concatenates the ranks' tensors along the first axis, whose length may differ."""

    def leave(self, reason: str = "") -> None:
        """Leaves the job, which fails the other ranks' collectives; they can read the reason."""

    def why_lost(self) -> str:
        """Returns the reason for which a rank has left the job, with its number; empty: unknown."""


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

    def all_reduce_sum(
        self, tensors: Sequence[tf.Tensor], name: str, scale: float = 1.0
    ) -> list[tf.Tensor]:
        if scale == 1.0:
            return list(tensors)
        return [tensor * scale for tensor in tensors]

    def all_reduce_adasum(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        return list(tensors)

    def why_no_adasum(self) -> str:
        return ""

    def all_gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return tensor

    def leave(self, reason: str = "") -> None:
        return

    def why_lost(self) -> str:
        return ""


class HorovodCommunicator:
    """All ranks of the Horovod job that this process belongs to."""

    def __init__(self) -> None:
        import horovod.tensorflow as hvd  # a process without ranks needs no Horovod installed

        self._hvd = hvd

    def start(self) -> HorovodCommunicator:
        """Joins the job. Idempotent."""
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)

        self._hvd.init()

        self.rank: int = self._hvd.rank()
        self.world_size: int = self._hvd.size()
        self.local_rank: int = self._hvd.local_rank()
        self.local_size: int = self._hvd.local_size()
        return self

    def leave(self, reason: str = "") -> None:
        """Leaves the job, which `start` can join again."""
        if reason:
            _at_rendezvous("PUT", f"Rank {self.rank} has failed: {reason}".encode())
        self._hvd.shutdown()

    def why_lost(self) -> str:
        return _at_rendezvous("GET").decode(errors="replace")

    @property
    def is_root(self) -> bool:
        return self.rank == 0

    def on_root(self, root: T, others: T) -> T:
        return root if self.is_root else others

    def all_gather_object(self, value: T) -> list[T]:
        """Gathers the pickled values in one collective, each behind its length.

        Horovod's own takes two.
        """
        import cloudpickle  # of Horovod

        pickled = cloudpickle.dumps(value)
        sent = np.frombuffer(len(pickled).to_bytes(8, "little") + pickled, dtype=np.uint8)
        received = self._hvd.allgather(sent, name="archipelago.objects").numpy().tobytes()

        values = []
        start = 0
        for _ in range(self.world_size):
            stop = start + 8 + int.from_bytes(received[start : start + 8], "little")
            values.append(cloudpickle.loads(received[start + 8 : stop]))
            start = stop
        return values

    def broadcast_object(self, value: T) -> T:
        from horovod.tensorflow.functions import broadcast_object

        return broadcast_object(value, root_rank=0)

    def broadcast_arrays(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Sends the bytes of all arrays in one broadcast.

        Horovod lacks some dtypes, and each collective has its latency.
        """
        sent = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        flat = np.frombuffer(sent, dtype=np.uint8)
        tensor = self._hvd.broadcast(flat, root_rank=0, name="archipelago.broadcast")
        received = tensor.numpy().tobytes()

        result = []
        start = 0
        for array in arrays:
            part = np.frombuffer(received, dtype=array.dtype, count=array.size, offset=start)
            result.append(part.reshape(array.shape))
            start += array.nbytes
        return result

    def all_reduce_sum(
        self, tensors: Sequence[tf.Tensor], name: str, scale: float = 1.0
    ) -> list[tf.Tensor]:
        sums = self._hvd.grouped_allreduce(
            list(tensors), op=self._hvd.Sum, postscale_factor=scale, name=name
        )
        return list(sums)

    def all_reduce_adasum(self, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
        return [
            self._hvd.allreduce(tensor, op=self._hvd.Adasum, name=f"{name}.{i}")
            for i, tensor in enumerate(tensors)
        ]

    def why_no_adasum(self) -> str:
        if not (self._hvd.mpi_enabled() or self._hvd.nccl_built()):
            return (
                "Adasum needs ranks that talk over MPI; received a job over Gloo. Set Horovod up"
                " with MPI (make setup MPI=1) and start with horovodrun --mpi, or use op='average'."
            )
        is_power_of_two = self.world_size & (self.world_size - 1) == 0
        if not is_power_of_two:
            return (
                "Adasum combines ranks pairwise, so their number must be a power of two; received"
                f" {self.world_size}. Start 2, 4, 8 ... ranks, or use op='average'."
            )
        return ""

    def all_gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        return self._hvd.allgather(tensor, name=name)


def connect() -> Communicator:
    """Returns Horovod's communicator if a launcher started this process as a rank, else the local
    one.
    """
    if any(name in os.environ for name in LAUNCHER_VARIABLES):
        return HorovodCommunicator().start()
    return LocalCommunicator()


def is_lost_rank(error: BaseException) -> bool:
    """Returns whether a collective failed with this error because another rank has ended."""
    import tensorflow as tf
    from horovod.common.exceptions import HorovodInternalError

    # In a graph TensorFlow hides Horovod's error in one of its own.
    in_graph = isinstance(error, tf.errors.UnknownError) and "Horovod" in str(error)
    return in_graph or isinstance(error, HorovodInternalError | LostRank)


def _at_rendezvous(method: str, data: bytes | None = None) -> bytes:
    """Writes or reads the reason of a failure at the launcher's rendezvous (Gloo).

    Returns what was read. A reason is a courtesy: without it, or without a rendezvous, empty.
    """
    if RENDEZVOUS_ADDRESS not in os.environ:
        return b""
    place = f"{os.environ[RENDEZVOUS_ADDRESS]}:{os.environ[RENDEZVOUS_PORT]}"
    request = urllib.request.Request(f"http://{place}/{FAILURE_KEY}", data, method=method)
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with without_proxy.open(request, timeout=FAILURE_TIMEOUT_S) as response:
            return bytes(response.read())
    except OSError:
        return b""


def horovod_http_server() -> ModuleType:
    """Returns Horovod's module of the HTTP server over which ranks find each other."""
    from horovod.runner.http import http_server

    return http_server
