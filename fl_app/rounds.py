"""The round loop of the server: roll call, rounds, checkpoints, resume. Flower is behind the `Exchange`."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from fl_app.cohort import Failure, FederationError, Replies, Reply, collect, draw_cohort
from fl_app.local_training import LocalResult, SiloEntry
from fl_app.server_optimizer import ServerOptimizer, ServerOptimizerState, apply_update, initial_state
from shared.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.data import Dataset, Schema, Table, encode, fit_schema, load_examples, split_pool
from shared.data.schema import check_same_kind, merge_schemas
from shared.experiment import DataSection, Experiment
from shared.metrics import describe, merge_means
from shared.outcome import outcome
from shared.run_record import CHECKPOINT, Record
from shared.training import compile_model, evaluate, evaluation_batches
from shared.weights import Weights, add, num_bytes
from shared.zoo import build_model

BEST_MODEL = "best.keras"
MOMENTS = ("first_moment", "second_moment")


class Exchange(Protocol):
    """The way to the silos, by name. `train` and `evaluate` yield replies as they come in.

    They end when all that were asked have answered, failed or let the time pass. The roll call raises FederationError
    if too few silos come.
    """

    transfer_seconds: float

    def roll_call(self, min_silos: int) -> dict[str, SiloEntry]: ...
    def train(
        self,
        silos: Sequence[str],
        round_number: int,
        schema: Schema,
        weights: Weights,
        evaluate: bool,
        timeout_s: float,
    ) -> Iterable[Reply]: ...
    def evaluate(self, silos: Sequence[str], schema: Schema, weights: Weights) -> Iterable[Reply]: ...


@dataclass(frozen=True)
class Best:
    """The weights with the lowest validation loss so far."""

    round: int = -1  # none yet
    loss: float = float("inf")
    evaluations_since: int = 0
    weights: Weights = field(default_factory=list)


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round, and what a checkpoint holds."""

    weights: Weights
    round: int = 0  # rounds done
    bytes_sent: int = 0  # weights and updates over all links, in both directions
    silos: tuple[str, ...] = ()  # who takes part, from the first round to the last
    optimizer: ServerOptimizerState = field(default_factory=ServerOptimizerState)
    best: Best = field(default_factory=Best)


def run_federation(experiment: Experiment, exchange: Exchange, record: Record) -> dict[str, Any]:
    """Runs the rounds of the experiment and returns the result.

    Guarantees: the result does not depend on the order in which silos answer; a run resumed after any round ends
    with the weights of the undisturbed one, bit by bit. Raises ValueError for what the user can mend.
    """
    record.check()
    resumed = _restore(experiment, record) if experiment.run.resume else None
    test = server_test_split(experiment)
    silos = exchange.roll_call(experiment.federation.min_silos)
    _check_silos(experiment, resumed.silos if resumed else (), silos)
    schema = common_schema([*silos.values()], test, experiment.data)
    model = compile_model(build_model(experiment.model, schema, experiment.seed), experiment, schema)
    batches = evaluation_batches(encode(test, schema)) if test else None
    run = Federation(experiment, exchange, record, silos, schema, model, batches)
    return run.finish(run.all_rounds(run.begin(resumed)))


@dataclass(frozen=True)
class Federation:
    """A run with all that stays the same from round to round."""

    experiment: Experiment
    exchange: Exchange
    record: Record
    silos: Mapping[str, SiloEntry]
    schema: Schema
    model: keras.Model
    test: tf.data.Dataset | None

    @property
    def trainable(self) -> list[bool]:
        return [variable.trainable for variable in self.model.weights]

    @property
    def server_optimizer(self) -> ServerOptimizer:
        return ServerOptimizer(**self.experiment.server_optimizer.model_dump())

    def begin(self, resumed: ServerState | None) -> ServerState:
        self.record.open()
        if resumed:
            self.record.resume_at(resumed.round)
            return resumed
        weights = self.model.get_weights()
        optimizer = initial_state(self.server_optimizer, weights, self.trainable)
        state = ServerState(weights, silos=tuple(sorted(self.silos)), optimizer=optimizer)
        self.record.append({"round": 0, **self._test_metrics(state.weights), "bytes_sent": 0})
        _save(self.experiment, self.record, state)
        return state

    def all_rounds(self, state: ServerState) -> ServerState:
        settings = self.experiment.federation
        while state.round < settings.num_rounds and not self._has_stopped_early(state):
            state = self._one_round(state)
            _save(self.experiment, self.record, state)
        return state

    def _one_round(self, state: ServerState) -> ServerState:
        started, transferred = time.monotonic(), self.exchange.transfer_seconds
        number, settings = state.round + 1, self.experiment.federation
        cohort = draw_cohort(self.experiment, self.silos, number)
        judges = settings.evaluate_on_silos and self._is_evaluated(state.round)
        asked = (cohort, number, self.schema, state.weights, judges, settings.round_timeout_s)
        found = collect(self.exchange.train(*asked), cohort, self.silos, state.weights, self.experiment)
        state = self._watch(self._append_validation(state.round, found.results), state)
        weights, optimizer = apply_update(
            self.server_optimizer, state.optimizer, state.weights, found.mean.mean(), self.trainable
        )
        sent = num_bytes(state.weights) * len(cohort) + found.bytes_received
        state = replace(state, weights=weights, optimizer=optimizer, round=number, bytes_sent=state.bytes_sent + sent)
        metrics = {"train": merge_means((r.train, r.num_examples) for _, r in sorted(found.results.items()))}
        if self._is_evaluated(number):
            metrics |= self._test_metrics(state.weights)
        computed = max(result.seconds for result in found.results.values())
        timing = _timing(time.monotonic() - started, computed, self.exchange.transfer_seconds - transferred)
        self._append_round(state, metrics, found, timing)
        told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in timing.items() if name != "round")
        print(
            f"round {number}/{settings.num_rounds}: {describe(metrics)}, {len(found.results)} silos, "
            f"{timing['round']:.2f} s ({told}), {sent / 1e6:.3g} MB",
            flush=True,
        )
        return state

    def finish(self, state: ServerState) -> dict[str, Any]:
        settings, metrics = self.experiment.federation, {}
        if settings.evaluate_on_silos and self.experiment.data.validation_fraction > 0:
            results = self._evaluate_at_all(state.weights)
            metrics = self._append_validation(state.round, results)
            state = self._watch(metrics, state)
        if settings.restore_best and state.best.round not in (-1, state.round):
            state = replace(state, weights=state.best.weights)
            metrics = self._validation(self._evaluate_at_all(state.weights))
        result = {
            "num_silos": len(self.silos),
            "silos": sorted(self.silos),
            "metrics": {**self._test_metrics(state.weights), **metrics},
            "rounds": state.round,
            "bytes_sent": state.bytes_sent,
        }
        if self._watches and state.best.weights:
            result["best_round"] = state.best.round
            self.model.set_weights(state.best.weights)
            self.model.save(self.record.directory / BEST_MODEL)
        if settings.cross_site_evaluation:
            result["cross_site"] = self._cross_site(state)
        self.model.set_weights(state.weights)
        result |= outcome(self.model, self.test, self.schema, self.experiment.seed) if self.test else {}
        self.record.finish(self.model, self.schema, result)
        return result

    # --- evaluation

    @property
    def _watches(self) -> bool:
        return self.experiment.federation.early_stopping_patience > 0 or self.experiment.federation.restore_best

    def _is_evaluated(self, round_number: int) -> bool:
        settings = self.experiment.federation
        return round_number % settings.evaluate_every == 0 or round_number == settings.num_rounds

    def _has_stopped_early(self, state: ServerState) -> bool:
        patience = self.experiment.federation.early_stopping_patience
        if patience == 0 or state.best.evaluations_since < patience:
            return False
        print(
            f"stopped early after round {state.round}: the validation loss was lowest after round {state.best.round} "
            f"({state.best.loss:.4f})",
            flush=True,
        )
        return True

    def _watch(self, validation: Mapping[str, Mapping[str, float]], state: ServerState) -> ServerState:
        """The state with the validation loss of its weights taken into account."""
        if not self._watches or not validation:
            return state
        loss = validation["validation"]["loss"]
        if loss < state.best.loss:
            best = Best(state.round, loss, 0, state.weights)
        else:
            best = replace(state.best, evaluations_since=state.best.evaluations_since + 1)
        return replace(state, best=best)

    def _test_metrics(self, weights: Weights) -> dict[str, dict[str, float]]:
        if self.test is None:
            return {}
        self.model.set_weights(weights)
        return {"test": evaluate(self.model, self.test)}

    def _validation(self, results: Mapping[str, LocalResult]) -> dict[str, dict[str, float]]:
        parts = [(r.validation, r.num_validation) for _, r in sorted(results.items()) if r.validation]
        return {"validation": merge_means(parts)} if parts else {}

    def _evaluate_at_all(self, weights: Weights) -> dict[str, LocalResult]:
        """Of the silos that answer; the others are named: a trained model must not be lost for want of a metric."""
        results = {}
        for silo, reply in self.exchange.evaluate(sorted(self.silos), self.schema, weights):
            if isinstance(reply, Failure):
                print(f"silo {silo!r} is left out of the evaluation: {reply.reason}", flush=True)
            else:
                results[silo] = reply
        return results

    def _cross_site(self, state: ServerState) -> dict[str, dict[str, dict[str, float]]]:
        """Each silo's model, a local round from the final weights, on each silo's data: [model][data][metric]."""
        table = {}
        timeout_s = self.experiment.federation.round_timeout_s
        for silo in sorted(self.silos):
            replies = self.exchange.train([silo], state.round + 1, self.schema, state.weights, False, timeout_s)
            local = add(state.weights, _all_results(replies)[silo].update)
            results = self._evaluate_at_all(local)
            table[silo] = {at: dict(result.validation) for at, result in sorted(results.items())}
            print(f"cross-site evaluation: model of {silo} judged by {len(results)} silos", flush=True)
        return table

    # --- the record

    def _append_validation(self, round_number: int, results: Mapping[str, LocalResult]) -> dict[str, dict[str, float]]:
        """The silos judge a round's weights when they receive them, with the next: a second row for that round."""
        if metrics := self._validation(results):
            self.record.append({"round": round_number, **metrics})
        return metrics

    def _append_round(
        self, state: ServerState, metrics: Mapping[str, Any], found: Replies, timing: Mapping[str, float]
    ) -> None:
        row = {"round": state.round, **metrics, "bytes_sent": state.bytes_sent, "cohort": sorted(found.results)}
        if found.failures:
            row["failures"] = dict(sorted(found.failures.items()))
        self.record.append({**row, "timing": {name: round(seconds, 4) for name, seconds in timing.items()}})
        self.record.append_silos(
            {"round": state.round, "silo": silo, **{k: v for k, v in vars(result).items() if k != "update"}}
            for silo, result in sorted(found.results.items())
        )


def common_schema(silos: list[SiloEntry], test: Table | Dataset | None, config: DataSection) -> Schema:
    """The schema of the silos' training examples together; numbered classes go up to the highest of any party's.

    Raises ValueError if they, or the server's test data, are of different kinds, naming who has what.
    """
    schemas = {f"silo {entry.name!r}": entry.schema for entry in silos}
    if test is None:
        return merge_schemas(schemas)
    own = fit_schema(test, config)
    check_same_kind({**schemas, "the server's test data": own})
    schema = merge_schemas(schemas)
    if schema.columns or schema.classes:
        return schema
    return replace(schema, num_classes=max(schema.num_classes, own.num_classes))


def _timing(total: float, computed: float, transferred: float) -> dict[str, float]:
    """Seconds of a round: what the slowest silo computed, what the server's own transfers took, and the rest."""
    wait = max(0.0, total - computed - transferred)
    return {"round": total, "compute": computed, "wait": wait, "transfer": transferred}


def _all_results(replies: Iterable[Reply]) -> dict[str, LocalResult]:
    results = {}
    for silo, reply in replies:
        if isinstance(reply, Failure):
            raise FederationError(f"silo {silo!r} was to answer: {reply.reason}. See its log; the run can be resumed.")
        results[silo] = reply
    return results


def server_test_split(experiment: Experiment) -> Table | Dataset | None:
    """The examples that the server judges weights on; None if the experiment wants none."""
    if not experiment.federation.evaluate_on_server or experiment.data.test_fraction == 0:
        return None
    _, test = split_pool(load_examples(experiment.data), experiment.seed, experiment.data.test_fraction)
    return test


def _save(experiment: Experiment, record: Record, state: ServerState) -> None:
    moments = {name: getattr(state.optimizer, name) for name in MOMENTS}
    arrays = {"weights": state.weights, **moments, "best": state.best.weights}
    best = {"round": state.best.round, "loss": state.best.loss, "evaluations_since": state.best.evaluations_since}
    meta = {"round": state.round, "bytes_sent": state.bytes_sent, "silos": state.silos, "best": best}
    meta["server_optimizer_step"] = state.optimizer.step
    save_checkpoint(record.directory / CHECKPOINT, experiment, Checkpoint(arrays, meta))


def _restore(experiment: Experiment, record: Record) -> ServerState:
    checkpoint = load_checkpoint(record.directory / CHECKPOINT, experiment, "weights")
    arrays = {name: [np.asarray(array) for array in group] for name, group in checkpoint.arrays.items()}
    meta = checkpoint.meta
    moments = {name: arrays.get(name, []) for name in MOMENTS}
    return ServerState(
        weights=arrays["weights"],
        round=meta["round"],
        bytes_sent=meta["bytes_sent"],
        silos=tuple(meta["silos"]),
        optimizer=ServerOptimizerState(meta["server_optimizer_step"], **moments),
        best=Best(**meta["best"], weights=arrays.get("best", [])),
    )


def _check_silos(experiment: Experiment, before: tuple[str, ...], now: Mapping[str, SiloEntry]) -> None:
    if experiment.federation.min_replies > len(now):
        raise ValueError(
            f"federation.min_replies cannot exceed the silos that take part; received "
            f"{experiment.federation.min_replies} with {len(now)}. Lower it, or raise federation.min_silos."
        )
    missing, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    if before and (new or (missing and not experiment.federation.min_replies)):
        raise FederationError(
            f"A run is resumed by the silos that began it; missing: {missing}, new: {new}. Set "
            f"federation.min_silos = {len(before)} to wait for all, or federation.min_replies to go on without those "
            "that are missing, and stop the new ones."
        )
    if before and missing:
        print(f"the run goes on without {', '.join(missing)}, who began it", flush=True)
