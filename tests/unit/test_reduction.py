"""The factors of gradients and what is summed, on one rank of two. Real ranks: tests/parallel."""

from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow as tf

from dist_train.collectives import LocalCommunicator
from dist_train.reduction import Aggregation, GradientReduction

OWN_EXAMPLES = 3
OTHER_EXAMPLES = 5
OWN_SHARE = 3 / 8
OWN_HALF = 1 / 2


class FirstOfTwo(LocalCommunicator):
    """Rank 0, beside a rank of five examples, whose gradients are 0."""

    world_size = 2

    def __init__(self) -> None:
        self.names: list[str] = []

    def all_reduce_sum(
        self, tensors: Sequence[tf.Tensor], name: str, scale: float = 1.0
    ) -> list[tf.Tensor]:
        self.names.append(name)
        sums = [
            tensor + OTHER_EXAMPLES if "denominator" in name or tensor.shape == (1,) else tensor
            for tensor in tensors
        ]
        return [scale * total for total in sums]


def reduced_gradient(
    reduction: GradientReduction,
    num_examples: int | None = OWN_EXAMPLES,
    is_deferred: bool = False,
    weights_term: bool = True,
    divides_loss: bool = True,
) -> float:
    """The gradient of the loss x in the global batch, where rank 0 alone has it."""
    x = tf.Variable(1.0)
    with reduction.step(num_examples, is_deferred) as step:
        with tf.GradientTape() as tape:
            loss = tf.identity(x)
            if weights_term:
                loss = step.denominators.weight_term(loss, None)
            if divides_loss:
                loss = step.denominators.divide_loss(loss)
        sums = step.reduce([tape.gradient(loss, x)])
        (grad,) = step.denominators.after_sum(sums)
    return float(grad)


@pytest.mark.parametrize("predivide_factor", [None, 1.0, 7.0])
@pytest.mark.parametrize("divides_loss", [True, False])
@pytest.mark.parametrize("weights_term", [True, False])
def test_each_way_to_divide_gives_the_mean_over_the_global_batch(
    predivide_factor: float | None, divides_loss: bool, weights_term: bool
):
    reduction = GradientReduction(
        FirstOfTwo(), Aggregation(predivide_factor=predivide_factor), "gradients"
    )
    grad = reduced_gradient(reduction, weights_term=weights_term, divides_loss=divides_loss)
    assert grad == pytest.approx(OWN_SHARE)


@pytest.mark.parametrize("divides_loss", [True, False])
def test_a_deferred_division_gives_it_too_in_one_collective(divides_loss: bool):
    ranks = FirstOfTwo()
    reduction = GradientReduction(ranks, Aggregation(), "gradients")
    grad = reduced_gradient(reduction, is_deferred=True, divides_loss=divides_loss)
    assert grad == pytest.approx(OWN_SHARE)
    assert ranks.names == ["gradients.0"]


def test_ranks_weigh_the_same_where_the_numbers_of_examples_are_not_known():
    reduction = GradientReduction(FirstOfTwo(), Aggregation(), "gradients")
    grad = reduced_gradient(reduction, None, weights_term=False, divides_loss=False)
    assert grad == OWN_HALF


@pytest.mark.parametrize("is_deferred", [False, True])
def test_nothing_of_a_step_is_left_for_the_next_one_or_for_what_comes_between(is_deferred: bool):
    first, second = FirstOfTwo(), FirstOfTwo()
    reduction = GradientReduction(first, Aggregation(), "gradients")
    reduced_gradient(reduction, is_deferred=is_deferred)

    outside = reduction.current
    (grad,) = outside.denominators.after_sum(outside.reduce([tf.constant(1.0)]))
    assert float(grad) == OWN_HALF

    reduction.communicator = second
    reduced_gradient(reduction, is_deferred=is_deferred)
    assert first.names == [*second.names, "gradients.0"]  # each step counts from 0


def test_the_sums_of_a_deferred_step_are_divided_once():
    reduction = GradientReduction(FirstOfTwo(), Aggregation(), "gradients")
    with reduction.step(OWN_EXAMPLES, is_deferred=True) as step:
        sums = step.reduce([tf.constant(8.0)])
        grads = step.denominators.after_sum(sums)
        assert [float(grad) for grad in step.denominators.after_sum(grads)] == [OWN_EXAMPLES]


@pytest.mark.parametrize(("grouping", "num_groups"), [("grouped", 2), ("per_tensor", 3)])
def test_a_group_holds_one_dtype_and_no_sparse_gradient(grouping: str, num_groups: int):
    ranks = FirstOfTwo()
    reduction = GradientReduction(ranks, Aggregation(grouping=grouping), "g")
    sparse = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([4]), tf.constant([9, 2]))
    reduced = reduction.current.reduce(
        [tf.ones(2), tf.ones(2, tf.float16), sparse, tf.ones((2, 2)), None]
    )
    assert ranks.names == [f"g.{number}" for number in range(num_groups)]
    assert reduced[1].dtype == tf.float16
    assert isinstance(reduced[2], tf.IndexedSlices)
    assert reduced[4] is None
    for i in (0, 1, 3):
        np.testing.assert_allclose(reduced[i], np.full(reduced[i].shape, OWN_HALF))
