"""Evaluation of global weights: on the server's test split and on the silos' examples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from fl_app.aggregation.mean import check_update
from fl_app.exchange import Exchange, ask
from fl_app.failures import Failure
from fl_app.messages import LocalResult, SiloEntry, Task, result_of
from fl_app.server.state import Loss
from shared.data import Dataset, Schema, Table, encode, load_examples, split_pool
from shared.experiment import Experiment
from shared.metrics import merge_means
from shared.outcome import outcome
from shared.training import compile_model, evaluate, evaluation_batches
from shared.weights import Weights, add
from shared.zoo import build_model, check_own_model

Metrics = dict[str, dict[str, float]]  # by split and name


def server_test_split(experiment: Experiment) -> Table | Dataset | None:
    """The examples on which the server evaluates weights; None if the experiment wants none."""
    if not experiment.federation.evaluate_on_server or experiment.data.test_fraction == 0:
        return None
    _, test = split_pool(
        load_examples(experiment.data), experiment.seed, experiment.data.test_fraction
    )
    return test


@dataclass(frozen=True)
class ServerModel:
    """The compiled model of a run at the server, and the test split, if there is one."""

    model: keras.Model
    test: tf.data.Dataset | None
    schema: Schema

    @property
    def trainable(self) -> list[bool]:
        """For each of the weights' arrays: true if it is trained, false if it is a statistic."""
        return [variable.trainable for variable in self.model.weights]

    def test_metrics(self, weights: Weights) -> Metrics:
        """The metrics of the weights on the test split; empty without one."""
        if self.test is None:
            return {}
        self.model.set_weights(weights)
        return {"test": evaluate(self.model, self.test)}

    def outcome(self, weights: Weights, seed: int) -> dict[str, Any]:
        """The weights' predictions on the test split, as shared/outcome.py shows them."""
        self.model.set_weights(weights)
        return outcome(self.model, self.test, self.schema, seed) if self.test else {}


def build_server_model(
    experiment: Experiment, schema: Schema, test: Table | Dataset | None
) -> ServerModel:
    """The experiment's model for the silos' common schema."""
    check_own_model(experiment.model, schema)
    model = build_model(experiment.model, schema, experiment.seed)
    compile_model(model, experiment, schema)
    batches = evaluation_batches(encode(test, schema)) if test else None
    return ServerModel(model, batches, schema)


def training_metrics(results: Mapping[str, LocalResult]) -> dict[str, float]:
    """The mean of the silos' training metrics, weighted by examples."""
    in_order = [result for _, result in sorted(results.items())]
    return merge_means((finite(result.train), result.num_examples) for result in in_order)


def validation_metrics(results: Mapping[str, LocalResult]) -> Metrics:
    """The mean of the silos' validation metrics, weighted by examples; empty if none has any."""
    in_order = [result for _, result in sorted(results.items())]
    parts = [(finite(r.validation), r.num_validation) for r in in_order if finite(r.validation)]
    return {"validation": merge_means(parts)} if parts else {}


def validation_losses(results: Mapping[str, LocalResult]) -> dict[str, Loss]:
    """By silo, the loss on its validation examples and their number; of those that report one."""
    return {
        silo: (result.validation["loss"], result.num_validation)
        for silo, result in results.items()
        if "loss" in result.validation
    }


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are finite."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def report_lost_metrics(results: Mapping[str, LocalResult]) -> None:
    """Names the silos whose metrics are not finite, and so not in the means."""
    for silo, result in sorted(results.items()):
        splits = {"train": result.train, "validation": result.validation}
        lost = [
            f"{split} {name}"
            for split, metrics in splits.items()
            for name in sorted({*metrics} - {*finite(metrics)})
        ]
        if lost:
            print(f"silo {silo!r}: {', '.join(lost)} not finite, left out of the means", flush=True)


def evaluate_at_silos(
    exchange: Exchange,
    tasks: Mapping[str, Task],
    timeout_s: float,
    claims: Mapping[str, SiloEntry],
) -> dict[str, LocalResult]:
    """The results of the silos that answer; the others are reported.

    A trained model must not be lost for want of a metric, so this raises nothing.
    """
    results = {}
    for silo, reply in ask(exchange, tasks, timeout_s):
        result = result_of(reply, claims[silo])
        if isinstance(result, Failure):
            print(f"silo {silo!r} is left out of the evaluation: {result.reason}", flush=True)
        else:
            results[silo] = result
    report_lost_metrics(results)
    return results


def local_weights(
    exchange: Exchange, task: Task, claim: SiloEntry, timeout_s: float
) -> Weights | Failure:
    """The weights that one silo has after training on the task's; a failure if it gives none."""
    result: LocalResult | Failure = Failure("it did not answer")
    for _, reply in ask(exchange, {claim.name: task}, timeout_s):
        result = result_of(reply, claim)
    if isinstance(result, Failure):
        return result
    try:
        check_update(result.update, task.arrays)
    except ValueError as error:
        return Failure(f"{error}.")
    return add(task.arrays, result.update)
