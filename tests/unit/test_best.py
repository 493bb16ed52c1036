"""The best evaluation so far, which decides on early stopping."""

import math

import pytest

from shared.early_stopping import Best


def test_the_lowest_loss_is_the_best_and_the_evaluations_since_are_counted():
    best = Best(step=-1)
    steps = []
    for step, loss in enumerate([5.0, 4.0, 3.0, 3.5, 3.25, 2.0, 6.0]):
        best = best.after(step, loss)
        steps.append((best.step, best.loss, best.evaluations_since))
    assert steps == [
        (0, 5.0, 0),
        (1, 4.0, 0),
        (2, 3.0, 0),
        (2, 3.0, 1),
        (2, 3.0, 2),
        (5, 2.0, 0),
        (5, 2.0, 1),
    ]


@pytest.mark.parametrize("loss", [0.5, math.nan, math.inf])
def test_an_equal_loss_or_none_is_no_better(loss: float):
    assert Best(3, 0.5).after(4, loss) == Best(3, 0.5, evaluations_since=1)


def test_without_a_finite_loss_nothing_is_the_best():
    assert Best().after(1, math.nan).after(2, math.inf) == Best(evaluations_since=2)
