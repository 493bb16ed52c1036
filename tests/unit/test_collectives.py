"""The communicator of one process, agreement, and what it takes to connect."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_train.collectives import LAUNCHER_VARIABLES, AgreedError, LocalCommunicator, agree

ALONE = LocalCommunicator()


class SecondOfTwo(LocalCommunicator):
    """As rank 1 sees it: rank 0 came to `root_says`."""

    rank, world_size, is_root = 1, 2, False

    def __init__(self, root_says: object) -> None:
        self.root_says = root_says

    def all_gather_object(self, value: object) -> list[object]:
        return [self.root_says, value]


def fail_with(error: BaseException) -> Callable[[], None]:
    def make() -> None:
        raise error

    return make


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


# --- agreement


def test_agreeing_ranks_get_what_they_made():
    assert agree(ALONE, lambda: [1]) == [1]
    assert agree(SecondOfTwo(None), lambda: None) is None


@pytest.mark.parametrize("error", [ValueError, PermissionError])
def test_what_the_user_can_mend_is_raised_again_as_agreed_with_its_text(error: type[Exception]):
    with pytest.raises(AgreedError, match=r"^set seed$"):
        agree(ALONE, fail_with(error("set seed")))


def test_a_mistake_that_another_rank_sees_is_raised_here_too():
    with pytest.raises(AgreedError, match=r"^no file$"):
        agree(SecondOfTwo("no file"), lambda: 1)


def test_of_several_mistakes_the_first_rank_tells():
    with pytest.raises(AgreedError, match=r"^of rank 0$"):
        agree(SecondOfTwo("of rank 0"), fail_with(ValueError("of rank 1")))


@pytest.mark.parametrize("error", [KeyError, RuntimeError, KeyboardInterrupt])
def test_other_exceptions_are_no_mistakes_of_the_user_and_pass_through(error: type[BaseException]):
    with pytest.raises(error, match="ours"):
        agree(ALONE, fail_with(error("ours")))


# --- connecting


def test_a_process_that_no_launcher_started_connects_to_itself_without_horovod_or_tensorflow(project: Path):
    script = """if True:
        import sys
        from dist_train.collectives import connect
        print(type(connect()).__name__, *sorted({"horovod", "tensorflow", "keras"} & set(sys.modules)))"""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stderr, child.stdout) == (0, "", "LocalCommunicator\n")
