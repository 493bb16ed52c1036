"""Variables that ranks bring together between steps: broadcast, averaged or summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from dist_train.agreement import differing_arrays, meet
from dist_train.collectives import Communicator
from dist_train.metric_states import REDUCTIONS, states_of


def broadcast_from_root(
    communicator: Communicator,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    point: str = "the broadcast of variables",
) -> dict[str, list[int]]:
    """Gives every rank the root's model and optimizer variables.

    Returns the ranks that had another value than the root, by variable. Random layers keep their
    own state, and an optimizer the gradients that it accumulates. Builds the optimizer if need be.
    Variables travel only if ranks differ in them. Raises AgreedError if the ranks have built
    different models.
    """
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    of_rank = {id(variable) for variable in _accumulated_gradients(optimizer)}
    variables = [
        variable
        for variable in (*model.variables, *optimizer.variables)
        if not _is_random_state(variable) and id(variable) not in of_rank
    ]

    arrays = [np.asarray(variable) for variable in variables]
    differing = differing_arrays(communicator, point, arrays)
    if differing:
        received = communicator.broadcast_arrays([arrays[i] for i in differing])
        for i, array in zip(differing, received, strict=True):
            variables[i].assign(array)
    return {variables[i].path: ranks for i, ranks in differing.items()}


def batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """Returns all BatchNormalization layers, also those of models within the model."""
    layers = model._flatten_layers()
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


def bring_together(
    model: keras.Model, metrics: Sequence[keras.metrics.Metric], communicator: Communicator
) -> None:
    """Makes the metrics those of all ranks' examples, as their classes say (metric_states.py).

    Averages the moving statistics of batch normalisation over ranks: each has its own part.
    """
    states = states_of(metrics)
    statistics = [
        variable for layer in batch_norms(model) for variable in layer.non_trainable_variables
    ]
    own = [np.asarray(variable) for variable in (*(v for v, _ in states), *statistics)]
    by_rank = meet(communicator, "the metrics of an evaluation or an epoch", own)
    by_variable = [np.stack(values) for values in zip(*by_rank, strict=True)]

    for (variable, reduction), values in zip(states, by_variable[: len(states)], strict=True):
        variable.assign(REDUCTIONS[reduction](values))
    for variable, values in zip(statistics, by_variable[len(states) :], strict=True):
        variable.assign(np.mean(values, axis=0, dtype=np.float64))


def _is_random_state(variable: Any) -> bool:
    return variable.path.endswith("seed_generator_state")


def _accumulated_gradients(optimizer: keras.optimizers.Optimizer) -> Sequence[keras.Variable]:
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(inner, "_accumulated_gradients", None) or ()
