"""Agreement of ranks: on mistakes, on arrays and on examples."""

from collections.abc import Callable

import numpy as np
import pytest

from dist_train.agreement import AgreedError, agree, broadcast_unless_equal, check_same_examples
from dist_train.collectives import LocalCommunicator

ALONE = LocalCommunicator()


class SecondOfTwo(LocalCommunicator):
    """Rank 1, whose root contributes `root_value` to what is gathered."""

    rank, world_size, is_root = 1, 2, False

    def __init__(self, root_value: object) -> None:
        self.root_value = root_value

    def all_gather_object(self, value: object) -> list[object]:
        return [self.root_value, value]


def fail_with(error: BaseException) -> Callable[[], None]:
    def make() -> None:
        raise error

    return make


# --- on mistakes


def test_agreeing_ranks_get_what_they_made():
    assert agree(ALONE, lambda: [1]) == [1]
    assert agree(SecondOfTwo(None), lambda: None) is None


@pytest.mark.parametrize("error", [ValueError, PermissionError])
def test_what_the_user_can_fix_is_raised_again_as_agreed_with_its_text(error: type[Exception]):
    with pytest.raises(AgreedError, match=r"^set seed$"):
        agree(ALONE, fail_with(error("set seed")))


def test_a_mistake_that_another_rank_sees_is_raised_here_too():
    with pytest.raises(AgreedError, match=r"^no file$"):
        agree(SecondOfTwo("no file"), lambda: 1)


def test_of_several_mistakes_that_of_the_lowest_rank_is_raised():
    with pytest.raises(AgreedError, match=r"^of rank 0$"):
        agree(SecondOfTwo("of rank 0"), fail_with(ValueError("of rank 1")))


@pytest.mark.parametrize("error", [KeyError, RuntimeError, KeyboardInterrupt])
def test_other_exceptions_are_no_mistakes_of_the_user_and_pass_through(error: type[BaseException]):
    with pytest.raises(error, match="ours"):
        agree(ALONE, fail_with(error("ours")))


# --- on arrays and examples


class Gathers(LocalCommunicator):
    """Two ranks in turn: the first call notes the root's contribution, which later ones see."""

    world_size = 2

    def __init__(self) -> None:
        self.root_value: object = None
        self.num_broadcasts = 0

    def all_gather_object(self, value: object) -> list[object]:
        self.root_value = self.root_value or value
        return [self.root_value, value]

    def broadcast_arrays(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        self.num_broadcasts += 1
        return [np.full_like(array, 7) for array in arrays]


def test_equal_arrays_do_not_travel_and_are_not_copied():
    ranks = Gathers()
    for arrays in ([np.arange(3.0), np.array(1)], [np.arange(3.0), np.array(1)]):
        received = broadcast_unless_equal(ranks, arrays)
        assert [id(array) for array in received] == [id(array) for array in arrays]
    assert ranks.num_broadcasts == 0


def test_arrays_that_differ_in_one_entry_become_the_roots():
    ranks = Gathers()
    broadcast_unless_equal(ranks, [np.arange(3.0)])
    (received,) = broadcast_unless_equal(ranks, [np.array([0.0, 1.0, 2.5])])
    assert ranks.num_broadcasts == 1
    assert received.tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("arrays", "received"),
    [
        ([np.zeros(4)], r"\(\(4,\), 'float64'\)"),
        ([np.zeros(3, np.float32)], r"\(\(3,\), 'float32'\)"),
        ([], "None"),
    ],
)
def test_arrays_of_another_model_are_refused_with_the_first_that_differs(
    arrays: list[np.ndarray], received: str
):
    ranks = Gathers()
    broadcast_unless_equal(ranks, [np.zeros(3)])
    with pytest.raises(AgreedError, match=rf"array {received} on rank 1 .*\(3,\), 'float64'"):
        broadcast_unless_equal(ranks, arrays)


def test_other_examples_are_refused_with_the_hashes():
    check_same_examples(ALONE, "0123456789")
    with pytest.raises(AgreedError, match=r"\['abcd', '01234567'\] by rank"):
        check_same_examples(SecondOfTwo("abcd"), "0123456789")
