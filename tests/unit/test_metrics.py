"""Metrics that can be merged: the merged value is that of the union."""

import itertools
import math

import numpy as np
import pytest

from shared.metrics import WeightedMean, merge_means

# Whole numbers and quarters: every sum below is exact, so the laws hold bit by bit.
PARTS = [
    WeightedMean.of(0.25, 3),
    WeightedMean.of(-2.0, 8),
    WeightedMean.of(7.5, 1),
    WeightedMean.of(100.0, 0),
]


def test_zero_is_neutral():
    for part in PARTS:
        assert WeightedMean() + part == part == part + WeightedMean()


def test_merging_is_commutative_and_associative():
    for a, b, c in itertools.permutations(PARTS, 3):
        assert a + b == b + a
        assert (a + b) + c == a + (b + c)


def test_a_mean_of_one_part_is_its_value():
    assert [part.value for part in PARTS[:3]] == [0.25, -2.0, 7.5]


def test_a_mean_over_nothing_is_nan():
    assert math.isnan(WeightedMean().value)
    assert math.isnan(WeightedMean.of(100.0, 0).value)
    assert math.isnan(merge_means([({"loss": 1.0}, 0)])["loss"])


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
def test_the_mean_of_the_parts_means_is_the_mean_of_the_union(num_parts: int):
    values = np.random.default_rng(0).integers(-64, 64, size=40) / 4
    cuts = np.sort(
        np.random.default_rng(num_parts).choice(np.arange(1, 40), num_parts - 1, replace=False)
    )
    parts = np.split(values, cuts)
    merged = merge_means([({"loss": float(part.mean())}, len(part)) for part in parts])
    assert merged["loss"] == pytest.approx(values.mean(), rel=1e-15)  # the parts' means are rounded


def test_merging_merged_parts_is_merging_all():
    parts = [
        ({"loss": 0.25, "accuracy": 0.5}, 4),
        ({"loss": 2.0, "accuracy": 1.0}, 4),
        ({"loss": 8.0}, 8),
    ]
    first = (merge_means(parts[:2]), 8)
    assert merge_means([first, parts[2]]) == merge_means(parts)
    # loss: (4 * 0.25 + 4 * 2 + 8 * 8) / 16 = 73 / 16
    # accuracy, which the third lacks: (4 * 0.5 + 4 * 1) / 8
    assert merge_means(parts) == {"loss": 73 / 16, "accuracy": 0.75}


def test_no_parts_have_no_metrics():
    assert merge_means([]) == {}
    assert merge_means([({}, 5)]) == {}
