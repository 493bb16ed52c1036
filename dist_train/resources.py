"""A rank's share of its host: cores, threads, a GPU. Before TensorFlow computes anything."""

from __future__ import annotations

import os
from collections.abc import Sequence


def prepare_process(
    local_rank: int, local_size: int, threads_per_rank: int = 0, pin: bool = True
) -> None:
    """Gives this rank its threads and, if `pin`, its own cores of the host.

    `threads_per_rank` 0: the rank's share of the cores. Ranks that use all cores hinder each other,
    and a rank that wanders between cores finds neither its caches nor its partner's messages in
    time. Sets the variables that TensorFlow reads when it first computes; those that the user has
    set stay, and so does the affinity that a launcher has set.
    """
    allowed = sorted(os.sched_getaffinity(0))
    cores = own_cores(allowed, local_rank, local_size) if pin else allowed
    os.sched_setaffinity(0, cores)  # before Horovod and TensorFlow start threads, which inherit it

    # Between operations at least two threads: one computes while one communicates.
    share = max(1, len(allowed) // local_size)
    num_threads = threads_per_rank or share
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(num_threads))
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", str(max(2, num_threads)))


def own_cores(allowed: Sequence[int], local_rank: int, local_size: int) -> list[int]:
    """Returns the rank's share of the host's cores: disjoint ones, as many for each rank.

    All of them if there are fewer cores than ranks: too few, or a launcher that has bound each rank
    already.

    >>> own_cores([0, 1, 2, 3, 4], local_rank=1, local_size=2)
    [2, 3]
    """
    share = len(allowed) // local_size
    if share == 0:
        return list(allowed)
    start = local_rank * share
    return list(allowed[start : start + share])


def own_gpu(num_gpus: int, local_rank: int, local_size: int) -> int | None:
    """Returns the number of the rank's GPU on its host: one each; None where there are none.

    Raises ValueError if there are some, but fewer than ranks: two ranks on one GPU block each other
    in NCCL.

    >>> own_gpu(num_gpus=4, local_rank=1, local_size=2)
    1
    """
    if num_gpus == 0:
        return None
    if local_size > num_gpus:
        raise ValueError(
            f"Every rank needs a GPU of its own; received {local_size} ranks on a host with"
            f" {num_gpus}. Start {num_gpus} ranks per host (horovodrun -np, -H host:{num_gpus}), or"
            " hide the GPUs: CUDA_VISIBLE_DEVICES=-1"
        )
    return local_rank


def use_own_gpu(local_rank: int, local_size: int) -> int | None:
    """Shows TensorFlow the rank's GPU alone, with memory taken as needed; returns its number.

    Raises RuntimeError (TensorFlow's) if TensorFlow has used its GPUs already, and ValueError as
    `own_gpu`.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    number = own_gpu(len(gpus), local_rank, local_size)
    if number is not None:
        tf.config.set_visible_devices(gpus[number], "GPU")
        tf.config.experimental.set_memory_growth(gpus[number], True)
    return number
