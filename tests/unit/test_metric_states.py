"""How the states of metrics are brought together over ranks."""

from typing import Any

import keras
import numpy as np
import pytest

from dist_train.metric_states import REDUCTIONS, states_of


class Own(keras.metrics.Metric):
    """A metric class of the user's own."""

    def __init__(self, name: str = "own") -> None:
        super().__init__(name=name)
        self.state = self.add_weight(shape=(2,), initializer="zeros", name="state")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.state.assign(keras.ops.maximum(self.state, y_true))

    def result(self) -> Any:
        return self.state.value


class Maximum(Own):
    over_ranks = "max"


class Minimum(Own):
    over_ranks = "min"


class Total(Own):
    over_ranks = "sum"


class Typo(Own):
    over_ranks = "maximum"


class Perplexity(keras.metrics.Mean):
    """Extends a mean, as many users do."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(y_pred, sample_weight)

    def result(self) -> Any:
        return keras.ops.exp(super().result())


class Named(keras.metrics.AUC):
    """Changes nothing of what Keras does with the state."""


class Composed(keras.metrics.Metric):
    """Has no state but that of a metric within it."""

    def __init__(self) -> None:
        super().__init__()
        self.within = keras.metrics.Mean()

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.within.update_state(y_pred)

    def result(self) -> Any:
        return self.within.result()


class MeanAndMore(Perplexity):
    """Adds a state that no class declares."""

    def __init__(self) -> None:
        super().__init__()
        self.more = self.add_weight(shape=(), initializer="zeros", name="more")


@pytest.mark.parametrize(
    ("metric", "expected"), [(Maximum, [3, 2]), (Minimum, [1, -1]), (Total, [4, 1])]
)
def test_the_state_of_a_metric_is_brought_together_as_its_class_says(
    metric: type[keras.metrics.Metric], expected: list[int]
) -> None:
    ((_, reduction),) = states_of([metric()])
    by_rank = np.array([[1, 2], [3, -1]], np.float32)
    assert REDUCTIONS[reduction](by_rank).tolist() == expected


@pytest.mark.parametrize("metric", [Perplexity, Named, Composed, keras.metrics.MeanSquaredError])
def test_totals_and_counts_as_in_keras_are_summed(metric: type[keras.metrics.Metric]) -> None:
    states = states_of([metric()])
    assert states
    assert {reduction for _, reduction in states} == {"sum"}


@pytest.mark.parametrize("metric", [Own, Typo, MeanAndMore])
def test_a_state_of_which_nothing_is_said_is_refused_by_name(
    metric: type[keras.metrics.Metric],
) -> None:
    with pytest.raises(ValueError, match=rf"class {metric.__name__} .*Write in the class: over_ra"):
        states_of([keras.metrics.Mean(), metric()])


# Arguments of Keras's metric classes, where they need some.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "MeanMetricWrapper": {"fn": keras.losses.mean_squared_error},
    "MeanRelativeError": {"normalizer": [1.0]},
    "IoU": {"num_classes": 2, "target_class_ids": [0]},
    "OneHotIoU": {"num_classes": 2, "target_class_ids": [0]},
    "MeanIoU": {"num_classes": 2},
    "OneHotMeanIoU": {"num_classes": 2},
    "RecallAtPrecision": {"precision": 0.5},
    "PrecisionAtRecall": {"recall": 0.5},
    "SensitivityAtSpecificity": {"specificity": 0.5},
    "SpecificityAtSensitivity": {"sensitivity": 0.5},
}
OF_KERAS = {
    member.__name__: member
    for member in vars(keras.metrics).values()
    if isinstance(member, type) and issubclass(member, keras.metrics.Metric)
}
del OF_KERAS["Metric"]


def state_after(metric: keras.metrics.Metric, *batch: np.ndarray) -> list[np.ndarray]:
    metric.reset_state()
    metric.update_state(*batch)
    return [np.asarray(variable) for variable in metric.variables]


@pytest.mark.parametrize("name", sorted(OF_KERAS))
def test_the_states_of_two_halves_add_up_for_every_metric_of_keras(name: str) -> None:
    """On this rests that those of Keras are summed."""
    rng = np.random.default_rng(0)
    y_true = rng.integers(0, 2, size=(8, 2)).astype(np.float32)
    y_pred = rng.uniform(0.1, 0.9, size=(8, 2)).astype(np.float32)
    takes_one = name in ("Mean", "Sum")
    batch = (y_pred,) if takes_one else (y_true[:, 0] if "Sparse" in name else y_true, y_pred)

    metric = OF_KERAS[name](**ARGUMENTS.get(name, {}))
    whole = state_after(metric, *batch)
    first = state_after(metric, *(part[:4] for part in batch))
    second = state_after(metric, *(part[4:] for part in batch))
    for total, *parts in zip(whole, first, second, strict=True):
        np.testing.assert_allclose(sum(parts), total, rtol=1e-5)
