"""The round loop of the server: roll call, rounds, checkpoints, resume. Flower is behind the `Exchange`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import keras
import numpy as np

from fl_app.aggregation import Contribution, weighted_mean
from fl_app.local_training import LocalResult, SiloEntry
from shared.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.data import Dataset, Schema, load_dataset, split_pool
from shared.experiment import Experiment
from shared.metrics import describe, merge_means
from shared.run_record import CHECKPOINT, RunRecord
from shared.seeding import rng_for
from shared.training import compile_model, evaluate
from shared.weights import Weights, add, num_bytes
from shared.zoo import build_model


class Exchange(Protocol):
    """The way to the silos, by name. Each call returns when all that were asked have answered.

    Raises FederationError if a silo fails, vanishes or does not answer in time.
    """

    def roll_call(self, min_silos: int) -> dict[str, SiloEntry]: ...
    def train(
        self, silos: list[str], round_number: int, schema: Schema, weights: Weights
    ) -> dict[str, LocalResult]: ...
    def evaluate(self, silos: list[str], schema: Schema, weights: Weights) -> dict[str, LocalResult]: ...


class FederationError(Exception):
    """The federation cannot go on; the checkpoint of the last round stays, to resume from."""


@dataclass
class ServerState:
    """What the server carries from round to round, and what a checkpoint holds."""

    weights: Weights
    round: int = 0  # rounds done
    bytes_sent: int = 0  # weights and updates over all links, in both directions
    silos: tuple[str, ...] = ()  # who takes part, from the first round to the last


def run_federation(experiment: Experiment, exchange: Exchange, record: RunRecord) -> dict[str, Any]:
    """Runs the rounds of the experiment and returns the result.

    Guarantees: the result does not depend on the order in which silos answer; a run resumed after any round ends
    with the weights of the undisturbed one, bit by bit. Raises ValueError for what the user can mend.
    """
    record.check()
    resumed = _restore(experiment, record) if experiment.run.resume else None
    test = _server_test_split(experiment)
    silos = exchange.roll_call(experiment.federation.min_silos)
    if resumed:
        _check_same_silos(resumed.silos, silos)
    schema = common_schema([*silos.values()], test)
    model = compile_model(build_model(experiment.model, schema, experiment.seed), experiment, schema)
    state = resumed or ServerState(model.get_weights(), silos=tuple(sorted(silos)))
    record.open()
    if resumed:
        record.resume_at(state.round)
    else:
        record.append({"round": 0, **_test_metrics(model, state, test), "bytes_sent": 0})
        _save(experiment, record, state)
    for round_number in range(state.round + 1, experiment.federation.num_rounds + 1):
        cohort = draw_cohort(experiment, list(silos), round_number)
        results = exchange.train(cohort, round_number, schema, state.weights)
        _append_validation(record, round_number - 1, results)
        state = next_state(state, results)
        metrics = {"train": merge_means((r.train, r.num_examples) for _, r in sorted(results.items()))}
        metrics |= _test_metrics(model, state, test)
        record.append({"round": round_number, **metrics, "bytes_sent": state.bytes_sent, "cohort": cohort})
        _save(experiment, record, state)
        print(f"round {round_number}/{experiment.federation.num_rounds}: {describe(metrics)}", flush=True)
    return _finish(experiment, exchange, record, model, state, sorted(silos), schema, test)


def draw_cohort(experiment: Experiment, silos: list[str], round_number: int) -> list[str]:
    """The silos of a round, by name: all, or `cohort_size` drawn without replacement by (seed, round)."""
    size = experiment.federation.cohort_size
    if size == 0:
        return sorted(silos)
    rng = rng_for(experiment.seed, "cohort", round_number)
    return sorted(str(name) for name in rng.choice(sorted(silos), size, replace=False))


def next_state(state: ServerState, results: Mapping[str, LocalResult]) -> ServerState:
    """One step of the federation: global weights + the weighted mean of the updates."""
    mean = weighted_mean({silo: Contribution(r.update, r.num_examples) for silo, r in results.items()})
    down, up = num_bytes(state.weights) * len(results), sum(num_bytes(r.update) for r in results.values())
    return replace(
        state,
        weights=add(state.weights, mean),
        round=state.round + 1,
        bytes_sent=state.bytes_sent + down + up,
    )


def common_schema(silos: list[SiloEntry], test: Dataset | None) -> Schema:
    """The schema that the silos' data (and the server's test data) share; classes are the union of theirs.

    Raises ValueError if shapes or tasks differ, naming who has what.
    """
    schemas = {f"silo {entry.name!r}": entry.schema for entry in silos}
    if test is not None:
        schemas["the server's test data"] = test.schema
    kinds = {(s.input_shape, s.task) for s in schemas.values()}
    if len(kinds) > 1:
        found = "; ".join(f"{who}: {s.task} on examples of {s.input_shape}" for who, s in sorted(schemas.items()))
        raise ValueError(
            f"All parties must hold the same kind of examples; received {found}. Give every silo the same columns; "
            "if the server's data is another, set federation.evaluate_on_server = false."
        )
    ((input_shape, _),) = kinds
    return Schema(input_shape, max(s.num_classes for s in schemas.values()))


def _server_test_split(experiment: Experiment) -> Dataset | None:
    if not experiment.federation.evaluate_on_server or experiment.data.test_fraction == 0:
        return None
    _, test = split_pool(load_dataset(experiment.data), experiment.seed, experiment.data.test_fraction)
    return test


def _test_metrics(model: keras.Model, state: ServerState, test: Dataset | None) -> dict[str, dict[str, float]]:
    if test is None:
        return {}
    model.set_weights(state.weights)
    return {"test": evaluate(model, test)}


def _validation_metrics(results: Mapping[str, LocalResult]) -> dict[str, dict[str, float]]:
    parts = [(r.validation, r.num_validation) for _, r in sorted(results.items()) if r.validation]
    return {"validation": merge_means(parts)} if parts else {}


def _append_validation(record: RunRecord, round_number: int, results: Mapping[str, LocalResult]) -> None:
    """The silos judge a round's weights when they receive them, with the next round: a second row for that round."""
    if metrics := _validation_metrics(results):
        record.append({"round": round_number, **metrics})


def _save(experiment: Experiment, record: RunRecord, state: ServerState) -> None:
    meta = {"round": state.round, "bytes_sent": state.bytes_sent, "silos": state.silos}
    save_checkpoint(record.directory / CHECKPOINT, experiment, Checkpoint({"weights": state.weights}, meta))


def _restore(experiment: Experiment, record: RunRecord) -> ServerState:
    checkpoint = load_checkpoint(record.directory / CHECKPOINT, experiment, "weights")
    weights = [np.asarray(array) for array in checkpoint.arrays["weights"]]
    meta = {**checkpoint.meta, "silos": tuple(checkpoint.meta["silos"])}
    return ServerState(weights, **meta)


def _check_same_silos(before: tuple[str, ...], now: Mapping[str, SiloEntry]) -> None:
    if set(before) != set(now):
        missing, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
        raise FederationError(
            f"A run is resumed by the silos that began it; missing: {missing}, new: {new}. Set "
            f"federation.min_silos = {len(before)} to wait for all, and stop the new ones."
        )


def _finish(
    experiment: Experiment,
    exchange: Exchange,
    record: RunRecord,
    model: keras.Model,
    state: ServerState,
    silos: list[str],
    schema: Schema,
    test: Dataset | None,
) -> dict[str, Any]:
    metrics = _test_metrics(model, state, test)
    if experiment.federation.evaluate_on_silos and experiment.data.validation_fraction > 0:
        results = exchange.evaluate(silos, schema, state.weights)
        _append_validation(record, state.round, results)
        metrics |= _validation_metrics(results)
    model.set_weights(state.weights)
    result = {
        "num_silos": len(silos),
        "silos": silos,
        "metrics": metrics,
        "rounds": state.round,
        "bytes_sent": state.bytes_sent,
    }
    record.finish(model, result)
    return result
