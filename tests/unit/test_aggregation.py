"""Aggregation rules against closed forms, in every order of arrival."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from fl_app.aggregation import Contribution, weighted_mean

SHAPES = ((3, 2), (5,), ())


def contribution(seed: int, num_examples: int, scale: float = 1.0) -> Contribution:
    rng = np.random.default_rng(seed)
    return Contribution([np.float32(scale * rng.normal(size=shape)) for shape in SHAPES], num_examples)


# Of wildly different magnitude, the large ones nearly cancelling: the sum of these depends on its order.
WILD = {
    "d": contribution(0, 7, 1e12),
    "a": contribution(1, 1_000_003, 1e-3),
    "c": contribution(0, 7, -1e12),
    "b": contribution(3, 1, 1.0),
}


def bits(arrays: list[np.ndarray]) -> list[tuple[np.dtype, tuple[int, ...], bytes]]:
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def test_the_mean_is_weighted_by_examples():
    parts = {
        "a": Contribution([np.float32([8.0, -4.0]), np.float32([[1.0]])], 1),
        "b": Contribution([np.float32([0.0, 2.0]), np.float32([[5.0]])], 3),
        "c": Contribution([np.float32([-6.0, 0.5]), np.float32([[2.0]])], 4),
    }
    vector, matrix = weighted_mean(parts)
    # (1 * 8 + 3 * 0 + 4 * -6) / 8 = -16 / 8;  (1 * -4 + 3 * 2 + 4 * 0.5) / 8 = 4 / 8
    assert vector.tolist() == [-2.0, 0.5]
    assert matrix.tolist() == [[3.0]]  # (1 * 1 + 3 * 5 + 4 * 2) / 8 = 24 / 8


@pytest.mark.parametrize("num_examples", [1, 3, 1_000_003])
def test_one_contribution_comes_back_bit_by_bit(num_examples: int):
    for scale in (1e-30, 1.0, 1e30):
        alone = contribution(4, num_examples, scale)
        assert bits(weighted_mean({"a": alone})) == bits(alone.update)


def test_equal_contributions_come_back_bit_by_bit():
    updates = contribution(4, 1).update
    parts = {name: Contribution(updates, num_examples) for name, num_examples in (("a", 3), ("b", 7), ("c", 11))}
    assert bits(weighted_mean(parts)) == bits(updates)


def test_the_mean_is_bit_equal_for_every_order_of_arrival():
    assert len({str(bits(weighted_mean(dict(order)))) for order in itertools.permutations(WILD.items())}) == 1


def test_the_order_of_arrival_would_matter_without_sorting():
    """The law above is no accident of its numbers: their plain float64 mean depends on the order, even as float32."""
    total = sum(c.num_examples for c in WILD.values())
    means = {
        np.float32(sum(np.float64(c.update[0]) * c.num_examples for c in order) / total).tobytes()
        for order in itertools.permutations(WILD.values())
    }
    assert len(means) > 1


def test_the_mean_is_that_of_exact_arithmetic_up_to_rounding():
    mean = weighted_mean(WILD)
    total = sum(c.num_examples for c in WILD.values())
    for i, shape in enumerate(SHAPES):
        for at in np.ndindex(shape):
            terms = [Fraction(float(c.update[i][at])) * c.num_examples for c in WILD.values()]
            largest = max(map(abs, terms)) / total
            # float64 sums of 4 terms: a few of its eps of the largest one; then float32 rounds once
            tolerance = largest * 8 * Fraction(2) ** -52 + abs(sum(terms) / total) * Fraction(2) ** -23
            assert abs(Fraction(float(mean[i][at])) - sum(terms) / total) <= tolerance


def test_the_mean_has_dtypes_and_shapes_of_the_updates():
    update = [np.float16([[1.5]]), np.float64([0.25]), np.float32(2.0)]
    mean = weighted_mean({"a": Contribution(update, 1), "b": Contribution(update, 2)})
    assert [(array.dtype, array.shape) for array in mean] == [(array.dtype, np.shape(array)) for array in update]


def test_the_contributions_are_left_as_they_are():
    before = {name: bits(part.update) for name, part in WILD.items()}
    weighted_mean(WILD)[0][:] = 0.0
    assert {name: bits(part.update) for name, part in WILD.items()} == before
    alone = contribution(4, 1)
    weighted_mean({"a": alone})[0][:] = 0.0
    assert bits(alone.update) == bits(contribution(4, 1).update)


def test_a_silo_without_examples_does_not_count():
    parts = {"a": contribution(1, 5), "b": contribution(2, 0)}
    assert bits(weighted_mean(parts)) == bits(contribution(1, 5).update)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(len(SHAPES)))
def test_a_value_that_is_not_finite_is_refused_and_its_silo_named(value: float, place: int):
    update = [np.array(array) for array in contribution(0, 1).update]
    update[place].reshape(-1)[-1] = value
    parts = {"good": contribution(1, 5), "bad": Contribution(update, 0)}  # not even with weight 0
    with pytest.raises(
        ValueError, match=r"Silo 'bad' sent an update that is not finite.*Lower optimizer\.learning_rate"
    ):
        weighted_mean(parts)


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="needs examples; received 0 from 0 silos"):
        weighted_mean({})
    with pytest.raises(ValueError, match="needs examples; received 0 from 1 silos"):
        weighted_mean({"a": contribution(1, 0)})


def test_updates_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        weighted_mean({"a": contribution(1, 1), "b": Contribution(contribution(2, 1).update[:1], 1)})
