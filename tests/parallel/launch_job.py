"""Ranks for test_launch.py: what they do, the request says."""

import os
import signal
import sys
import time
from typing import Any

import numpy as np
import tensorflow as tf

from dist_train.job import Communicator, agree, broadcast_unless_equal, serve


def answer(communicator: Communicator, request: str, for_root: Any) -> Any:
    what, _, rank = request.partition(" ")
    if rank and communicator.rank != int(rank):
        if what in ("end", "stop", "fail"):
            communicator.all_gather_object("waits for a rank that does not come")
        return None
    match what:
        case "sum":
            (array,) = communicator.broadcast_arrays(
                [for_root if communicator.is_root else np.zeros(3)]
            )
            return communicator.all_gather_object((communicator.rank, float(array.sum())))
        case "refuse":
            return agree(communicator, lambda: refuse(communicator.rank))
        case "mismatch":
            return broadcast_unless_equal(communicator, [np.zeros(2 + communicator.rank)])
        case "end":
            os._exit(7)
        case "fail":
            tf.gather(tf.zeros(3), 7).numpy()
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(6)
            return "awake"


def refuse(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 does not like it")


if __name__ == "__main__":
    sys.exit(serve(answer))
