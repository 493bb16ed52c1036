"""The round loop of a federation's server: roll call, rounds, result. The engine is behind the
`Exchange`.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fl_app.aggregation.aggregator import Aggregator
from fl_app.aggregation.mean import RunningMean
from fl_app.exchange import Exchange
from fl_app.failures import Failure, QuorumError
from fl_app.messages import EVALUATE, TRAIN, LocalResult, SiloEntry, Task, TrainingRequest
from fl_app.protocols.plain import PlainProtocol
from fl_app.protocols.protocol import RoundProtocol, RoundReport
from fl_app.server.cohort import draw_cohort, quorum_of
from fl_app.server.evaluation import (
    Metrics,
    ServerModel,
    build_server_model,
    evaluate_at_silos,
    local_weights,
    report_lost_metrics,
    server_test_split,
    training_metrics,
    validation_losses,
    validation_metrics,
)
from fl_app.server.optimizer import ServerOptimizer
from fl_app.server.registration import call_roll, common_schema, leave_out, select_silos
from fl_app.server.reporting import round_line, round_row, silo_rows, timing_of
from fl_app.server.state import (
    NO_ROUND,
    ServerState,
    begin_state,
    restore_state,
    save_state,
    step,
    with_validation,
)
from shared.data import fit_schema
from shared.experiment import Experiment
from shared.run_record import Record
from shared.weights import Weights

BEST_MODEL = "best.keras"
MAX_RETRIES = 3  # of one round


def run_federation(experiment: Experiment, exchange: Exchange, record: Record) -> dict[str, Any]:
    """Runs the rounds of the experiment and returns the result.

    Guarantees: the result does not depend on the order in which silos answer; a run resumed after
    any round ends with the weights of the undisturbed one, bit by bit. Raises ValueError for what
    the user can fix, FederationError if the federation cannot go on.
    """
    record.check()
    resumed = restore_state(experiment, record) if experiment.run.resume else None
    test = server_test_split(experiment)

    # The silos, and the model that fits the data of all.
    settings = experiment.federation
    own = fit_schema(test, experiment.data) if test else None
    entries = call_roll(exchange, settings, own)
    silos = select_silos(exchange, settings, resumed.silos if resumed else (), entries)
    schema = common_schema([*silos.values()], own)
    model = build_server_model(experiment, schema, test)

    protocol = PlainProtocol(exchange, settings.round_timeout_s, silos)
    run = Federation(experiment, exchange, protocol, record, silos, model)
    state = run.begin(resumed)
    state = run.all_rounds(state)
    return run.finish(state)


@dataclass(frozen=True)
class Federation:
    """A run with all that stays the same from round to round."""

    experiment: Experiment
    exchange: Exchange
    protocol: RoundProtocol
    record: Record
    silos: Mapping[str, SiloEntry]
    model: ServerModel
    newcomers: set[str] = field(default_factory=set)  # that were reported

    @property
    def server_optimizer(self) -> ServerOptimizer:
        return ServerOptimizer(**self.experiment.server_optimizer.model_dump())

    def begin(self, resumed: ServerState | None) -> ServerState:
        """Opens the record; returns the state before the first round, or the resumed one."""
        self.record.open()
        if resumed:
            self.record.resume_at(resumed.round)
            return resumed

        weights = self.model.model.get_weights()
        state = begin_state(self.server_optimizer, weights, self.model.trainable, self.silos)
        self.record.append({"round": 0, **self.model.test_metrics(weights), "bytes_sent": 0})
        save_state(self.experiment, self.record, state)
        return state

    def all_rounds(self, state: ServerState) -> ServerState:
        """Runs the rounds that are left, or fewer if it stops early; saves after each."""
        settings = self.experiment.federation
        while state.round < settings.num_rounds and not self._has_stopped_early(state):
            state = self._one_round(state)
            save_state(self.experiment, self.record, state)
        return state

    def _one_round(self, state: ServerState) -> ServerState:
        started = time.monotonic()
        traffic_before = self.exchange.traffic
        connected = self.exchange.silos().entries
        self._report_newcomers(connected)

        # Have the cohort train. Each silo evaluates the incoming weights first, which are those of
        # the round before: so its validation metrics are a second row of that round.
        cohort = draw_cohort(self.experiment, self.silos, connected, state.round + 1)
        evaluated = self._evaluate_to_select(state)
        report, aggregator = self._train_cohort(state, cohort, evaluates=not evaluated)
        state = self._note_validation(state, evaluated or report.results)

        # One pure step of the server's mathematics.
        update = aggregator.result()
        state = step(state, self.server_optimizer, update, self.model.trainable, report.results)
        traffic = self.exchange.traffic.since(traffic_before)
        state = replace(state, bytes_sent=state.bytes_sent + traffic.num_bytes)

        # Evaluate, record and report.
        report_lost_metrics(report.results)
        metrics = {"train": training_metrics(report.results)}
        if self.experiment.federation.is_evaluated(state.round):
            metrics |= self.model.test_metrics(state.weights)
        computed_s = max(result.seconds for result in report.results.values())
        timing = timing_of(time.monotonic() - started, computed_s, traffic.seconds)
        self.record.append(round_row(state, metrics, report, timing))
        self.record.append_silos(silo_rows(state.round, report))
        num_rounds = self.experiment.federation.num_rounds
        line = round_line(state.round, num_rounds, metrics, report, timing, traffic.num_bytes)
        print(line, flush=True)
        return state

    def _evaluate_to_select(self, state: ServerState) -> dict[str, LocalResult]:
        """All silos' results on the weights, where the cohorts that train are parts of them.

        An experiment that selects weights by the validation loss would else compare the losses of
        other silos from round to round.
        """
        settings = self.experiment.federation
        is_drawn = settings.num_wanted(len(self.silos)) < len(self.silos)
        if is_drawn and settings.selects_by_validation and settings.is_evaluated(state.round):
            return self._evaluate_at_all(state)
        return {}

    def _train_cohort(
        self, state: ServerState, cohort: list[str], evaluates: bool
    ) -> tuple[RoundReport, Aggregator]:
        """Has the cohort train; again, up to MAX_RETRIES times, if silos that were lost are back.

        Raises QuorumError if too few results come.
        """
        settings = self.experiment.federation
        evaluates &= settings.evaluate_on_silos and settings.is_evaluated(state.round)
        quorum = quorum_of(settings, len(cohort))
        expected_examples = sum(self.silos[name].num_examples for name in cohort)

        attempt = 0
        while True:
            tasks = self._tasks(TRAIN, state, cohort, evaluates, attempt)
            aggregator = RunningMean(state.weights, expected_examples)
            try:
                return self.protocol.run(tasks, aggregator, quorum), aggregator
            except QuorumError as error:
                back = self._reconnected(error.failures)
                num_left = len(cohort) - len(error.failures) + len(back)
                if attempt == MAX_RETRIES or not back or num_left < quorum.needed:
                    raise
            attempt += 1
            print(
                f"round {state.round + 1} is repeated: {', '.join(back)} connected again",
                flush=True,
            )

    def _report_newcomers(self, connected: Iterable[str]) -> None:
        """Reports silos that connected after the roll call, once each: this run is without them."""
        newcomers = set(connected) - set(self.silos) - self.newcomers
        leave_out(self.exchange, dict.fromkeys(newcomers, "it connected after the roll call"))
        self.newcomers.update(newcomers)

    def _reconnected(self, failures: Mapping[str, Failure]) -> list[str]:
        """The silos among the failed that had lost their connection and have another one now."""
        lost = [silo for silo, failure in failures.items() if failure.is_disconnected]
        connected = self.exchange.silos().entries if lost else {}
        return sorted(silo for silo in lost if silo in connected)

    def _tasks(
        self,
        kind: str,
        state: ServerState,
        silos: Iterable[str],
        evaluates: bool,
        attempt: int = 0,
    ) -> dict[str, Task]:
        """A task with the state's weights for each silo; they differ in what was acknowledged."""
        round_number = state.round + 1 if kind == TRAIN else state.round
        tasks = {}
        for silo in silos:
            acknowledged_round = state.acknowledged_rounds.get(silo, 0)
            request = TrainingRequest(self.model.schema, evaluates, acknowledged_round)
            tasks[silo] = Task(
                kind, state.run_id, round_number, attempt, request.to_body(), state.weights
            )
        return tasks

    def finish(self, state: ServerState) -> dict[str, Any]:
        """Evaluates the last, or the best weights, and writes the result."""
        settings = self.experiment.federation
        metrics: Metrics = {}
        if settings.evaluate_on_silos and self.experiment.data.validation_fraction > 0:
            results = self._evaluate_at_all(state)
            state = self._note_validation(state, results)
            metrics = validation_metrics(results)

        # End with the best weights instead of the last, if the experiment says so.
        if settings.restore_best and state.best.step not in (NO_ROUND, state.round):
            state = replace(state, weights=state.best_weights)
            metrics = validation_metrics(self._evaluate_at_all(state))
        result = {
            "num_silos": len(self.silos),
            "silos": sorted(self.silos),
            "metrics": {**self.model.test_metrics(state.weights), **metrics},
            "rounds": state.round,
            "bytes_sent": state.bytes_sent,
        }

        if settings.selects_by_validation and state.best_weights:
            result["best_round"] = state.best.step
            self._save_best(state.best_weights)
        if settings.cross_site_evaluation:
            result["cross_site"] = self._cross_site(state)
        result |= self.model.outcome(state.weights, self.experiment.seed)
        self.record.finish(self.model.model, self.model.schema, result)
        return result

    # --- evaluation

    def _has_stopped_early(self, state: ServerState) -> bool:
        if not self.experiment.federation.stops_early(state.best.evaluations_since):
            return False
        print(
            f"stopped early after round {state.round}: the validation loss was lowest after round"
            f" {state.best.step} ({state.best.loss:.4f})",
            flush=True,
        )
        return True

    def _note_validation(
        self, state: ServerState, results: Mapping[str, LocalResult]
    ) -> ServerState:
        """The state with the silos' validation losses of its weights, if those select weights.

        Adds a second row for the round, as silos have now evaluated its weights.
        """
        metrics = validation_metrics(results)
        if metrics:
            self.record.append({"round": state.round, **metrics})
        if not self.experiment.federation.selects_by_validation:
            return state
        return with_validation(state, validation_losses(results))

    def _evaluate_at_all(self, state: ServerState) -> dict[str, LocalResult]:
        tasks = self._tasks(EVALUATE, state, sorted(self.silos), evaluates=True)
        timeout_s = self.experiment.federation.silo_timeout_s
        return evaluate_at_silos(self.exchange, tasks, timeout_s, self.silos)

    def _cross_site(self, state: ServerState) -> dict[str, dict[str, dict[str, float]]]:
        """Each silo's model on each silo's data: [model][data][metric].

        A silo's model is the final weights after one more round of its local training.
        """
        table = {}
        timeout_s = self.experiment.federation.round_timeout_s
        for silo, entry in sorted(self.silos.items()):
            task = self._tasks(TRAIN, state, [silo], evaluates=False)[silo]
            weights = local_weights(self.exchange, task, entry, timeout_s)
            if isinstance(weights, Failure):
                reason = weights.reason
                print(f"cross-site evaluation goes without silo {silo!r}: {reason}", flush=True)
                continue

            results = self._evaluate_at_all(replace(state, weights=weights))
            table[silo] = {at: dict(result.validation) for at, result in sorted(results.items())}
            print(
                f"cross-site evaluation: model of {silo} evaluated by {len(results)} silos",
                flush=True,
            )
        return table

    def _save_best(self, weights: Weights) -> None:
        self.model.model.set_weights(weights)
        self.model.model.save(self.record.directory / BEST_MODEL)
