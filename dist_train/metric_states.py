"""Metric states: what of a metric's state is brought together over ranks, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

# How the state of a metric class of the user's own, `over_ranks`, may be brought together.
REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda states: np.sum(states, axis=0, dtype=states.dtype),
    "max": lambda states: np.max(states, axis=0),
    "min": lambda states: np.min(states, axis=0),
}


def states_of(metrics: Sequence[keras.metrics.Metric]) -> list[tuple[keras.Variable, str]]:
    """Returns the variables of all metrics, each with the name of its reduction.

    Raises ValueError for a metric of the user's own that does not declare one.
    """
    return [
        (variable, _reduction_of(metric))
        for metric in _with_own_state(metrics)
        for variable in metric._variables
    ]


def _with_own_state(metrics: Sequence[keras.metrics.Metric]) -> Iterator[keras.metrics.Metric]:
    """Yields all metrics that have variables of their own, also those within others."""
    for metric in metrics:
        if metric._variables:
            yield metric
        yield from _with_own_state(getattr(metric, "metrics", metric._metrics))


def _reduction_of(metric: keras.metrics.Metric) -> str:
    """Returns the name of the reduction of a metric's state: "sum" for those of Keras.

    | the metric's class                                            | reduction                  |
    |---------------------------------------------------------------|----------------------------|
    | declares `over_ranks`                                         | that                       |
    | Keras's own, or one that has its update_state                 | sum                        |
    | updates a total and a count (keras.metrics.Mean, Sum, ...)    | sum                        |
    | any other                                                     | ValueError                 |
    """
    declared = getattr(metric, "over_ranks", None)
    if declared in REDUCTIONS:
        return str(declared)

    of_keras: Any = next(c for c in type(metric).__mro__ if c.__module__.startswith("keras."))
    has_its_update = of_keras.update_state is type(metric).update_state
    names = {variable.name for variable in metric._variables}
    is_mean = issubclass(of_keras, keras.metrics.Mean | keras.metrics.Sum)
    if declared is None and (has_its_update or (is_mean and names <= {"total", "count"})):
        return "sum"

    kind = type(metric).__name__
    raise ValueError(
        "A metric of your own must say how ranks bring its state together; received"
        f" {metric.name!r} of the class {kind} with over_ranks = {declared!r}. Write in the class:"
        " over_ranks = 'sum' (totals and counts), 'max' or 'min'."
    )
