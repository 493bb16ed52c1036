"""The communicator of one process, and what it takes to connect."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from dist_train.collectives import LAUNCHER_VARIABLES, LocalCommunicator

ALONE = LocalCommunicator()


# --- one process: every collective is the identity


def test_a_process_alone_is_the_root_of_a_world_of_one():
    assert (ALONE.rank, ALONE.world_size, ALONE.local_rank, ALONE.local_size) == (0, 1, 0, 1)
    assert ALONE.is_root
    assert ALONE.on_root("root's", "others'") == "root's"


def test_collectives_of_one_process_give_back_what_they_got():
    value, arrays = {"any": object()}, [np.float32([1.0, np.nan]), np.array(3)]
    assert ALONE.all_gather_object(value) == [value]
    assert ALONE.broadcast_object(value) is value
    assert ALONE.all_gather(arrays[0], name="a") is arrays[0]
    for result in (
        ALONE.broadcast_arrays(arrays),
        ALONE.all_reduce_sum(arrays, name="a"),
        ALONE.all_reduce_adasum(arrays, name="a"),
    ):
        assert [id(array) for array in result] == [id(array) for array in arrays]


# --- connecting


def test_a_process_that_no_launcher_started_connects_to_itself_without_horovod_or_tensorflow(
    project: Path,
):
    script = """if True:
        import sys
        from dist_train.collectives import connect
        loaded = {"horovod", "tensorflow", "keras"} & set(sys.modules)
        print(type(connect()).__name__, *sorted(loaded))"""
    environment = {
        name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES
    }
    child = subprocess.run(
        [sys.executable, "-c", script],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.returncode, child.stderr, child.stdout) == (0, "", "LocalCommunicator\n")
