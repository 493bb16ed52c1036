"""The batches of an epoch: their sizes, and the order in which ranks and epochs get examples."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from shared.batches import EpochBatches, batch_slices
from shared.data import Dataset


def orders(batches: EpochBatches, epochs: range) -> list[list[int]]:
    """The numbers of the examples, in the order in which each epoch shows them."""
    shown = []
    for epoch in epochs:
        batches.start_epoch(epoch)
        shown.append([int(i) for step in range(len(batches)) for i in batches[step][1]])
    return shown


# --- partitioning an epoch into batches


@pytest.mark.parametrize("batch_size", range(1, 14))
def test_slices_cover_the_epoch_in_so_few_steps_that_none_is_smaller_than_half_a_batch(
    batch_size: int,
):
    for num_examples in range(1, 60):
        slices = batch_slices(num_examples, batch_size)
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(num_examples))
        assert len(slices) == math.ceil(num_examples / batch_size)
        sizes = [s.stop - s.start for s in slices]
        assert max(sizes) <= batch_size
        assert min(sizes) >= min(batch_size / 2, num_examples)
        assert set(sizes[:-2]) <= {batch_size}  # only the last two may be evened out


def test_a_batch_size_of_0_or_of_more_than_there_is_means_one_batch_of_everything():
    for batch_size in (0, 7, 8, 1000):
        assert batch_slices(7, batch_size) == [slice(0, 7)]


# --- the order of examples


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_examples", [8, 23, 24])
def test_the_ranks_parts_of_a_global_batch_are_the_batch_of_one_process(
    numbered: Callable[..., Dataset], num_examples: int, world_size: int
):
    data = numbered(num_examples, weighted=True)
    alone = EpochBatches(data, 8, seed=0)
    ranks = [
        EpochBatches(data, 8, seed=0, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(2):
        for batches in (alone, *ranks):
            batches.start_epoch(epoch)
            assert len(batches) == len(alone)
        for step in range(len(alone)):
            parts = [batches[step] for batches in ranks]
            for whole, *part in zip(alone[step], *parts, strict=True):  # x, y and weights
                np.testing.assert_array_equal(np.concatenate(part), whole)
            sizes = [len(y) for _, y, _ in parts]
            assert max(sizes) - min(sizes) <= 1


def test_every_example_is_shown_once_per_epoch(numbered: Callable[..., Dataset]):
    for order in orders(EpochBatches(numbered(23), 5, seed=0), range(3)):
        assert sorted(order) == list(range(23))


def test_the_order_differs_by_epoch_seed_and_owner(numbered: Callable[..., Dataset]):
    data = numbered(23)
    seen = [
        order
        for seed, owner in itertools.product((0, 1), ("", "a", "b"))
        for order in orders(EpochBatches(data, 5, seed, owner), range(3))
    ]
    assert len({tuple(order) for order in seen}) == 2 * 3 * 3
    assert list(range(23)) not in seen


def test_the_order_of_an_epoch_does_not_depend_on_the_epochs_before(
    numbered: Callable[..., Dataset],
):
    data = numbered(23)
    *_, after_the_others = orders(EpochBatches(data, 5, seed=0), range(4))
    (directly,) = orders(EpochBatches(data, 5, seed=0), range(3, 4))
    assert directly == after_the_others


def test_the_order_does_not_depend_on_the_batch_size(numbered: Callable[..., Dataset]):
    data = numbered(23)
    assert orders(EpochBatches(data, 5, seed=0), range(2)) == orders(
        EpochBatches(data, 0, seed=0), range(2)
    )


def test_sample_weights_travel_with_their_examples(numbered: Callable[..., Dataset]):
    batches = EpochBatches(numbered(23, weighted=True), 5, seed=0)
    for step in range(len(batches)):
        x, y, weight = batches[step]
        assert x[:, 0].tolist() == y.tolist() == weight.tolist()
    assert len(EpochBatches(numbered(23), 5, seed=0)[0]) == 2  # none, where there are none
