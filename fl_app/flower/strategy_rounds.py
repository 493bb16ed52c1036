"""Rounds that a Flower strategy leads, in place of `server.rounds`: federation.strategy =
"flwr.serverapp.strategy:FedTrimmedAvg", or any other.

The strategy runs by its own `start`, over a grid that polls often. Its messages are Flower's own: a
record of arrays and one of settings there, and back the local weights and metrics with
"num-examples".
"""

import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fl_app.failures import FederationError
from fl_app.flower.exchange import FlowerExchange
from fl_app.flower.grid import PollingGrid
from fl_app.flower.strategy_choice import check_needs, make_strategy
from fl_app.flower.wire import strategy_arrays, strategy_config
from fl_app.messages import printable_line
from fl_app.server.evaluation import build_server_model, server_test_split
from fl_app.server.registration import call_roll, common_schema
from shared.data import fit_schema
from shared.experiment import Experiment
from shared.metrics import describe
from shared.run_record import Record


def run_strategy(
    experiment: Experiment, grid: Grid, exchange: FlowerExchange, record: Record
) -> dict[str, Any]:
    """Runs the experiment's rounds by its strategy; returns the result.

    Raises ValueError as `run_federation` does, and if the strategy needs more silos than the run
    begins with; FederationError if the strategy gives up, waits too long for silos, or aggregated
    nothing in any round.
    """
    record.check()
    strategy = make_strategy(experiment)
    check_needs(strategy, experiment.federation)
    num_rounds = experiment.federation.num_rounds
    test = server_test_split(experiment)

    # Register the silos, and build the model that fits their common schema.
    own = fit_schema(test, experiment.data) if test else None
    silos = call_roll(exchange, experiment.federation, own)
    schema = common_schema([*silos.values()], own)
    model = build_server_model(experiment, schema, test)
    record.open()
    polling_grid = PollingGrid(
        grid, lambda: exchange.nodes_of(silos), experiment.federation.silo_timeout_s
    )

    def after_round(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        metrics = model.test_metrics(arrays.to_numpy_ndarrays())
        record.append({"round": number, **metrics, "bytes_sent": polling_grid.bytes_sent})
        print(f"round {number}/{num_rounds}: {describe(metrics)}", flush=True)
        return MetricRecord({**metrics["test"]}) if metrics else None

    # The strategy does the rounds.
    config = strategy_config(schema)
    with _in_one_sentence(experiment, strategy), _last_warning() as warning:
        outcome = strategy.start(
            grid=polling_grid,
            initial_arrays=strategy_arrays(model.model.get_weights()),
            num_rounds=num_rounds,
            timeout=experiment.federation.round_timeout_s,
            train_config=config,
            evaluate_config=config,
            evaluate_fn=after_round,
        )
    if not outcome.train_metrics_clientapp:
        said = f"; it said: {warning[-1]}" if warning else ""
        raise FederationError(
            f"The strategy {experiment.federation.strategy!r} aggregated nothing in any"
            f" round{said}. The silos' logs and the lines above say which of them failed."
        )

    # Record the silos' metrics of all rounds, and those of the last one as the result.
    weights = outcome.arrays.to_numpy_ndarrays()
    metrics = model.test_metrics(weights)
    _append_rows(record, "train", outcome.train_metrics_clientapp)
    validation = _append_rows(record, "validation", outcome.evaluate_metrics_clientapp)
    if validation:
        metrics["validation"] = validation
    result = {
        "num_silos": len(silos),
        "silos": sorted(silos),
        "metrics": metrics,
        "rounds": num_rounds,
        "bytes_sent": polling_grid.bytes_sent,
        "strategy": experiment.federation.strategy,
    }
    model.model.set_weights(weights)
    record.finish(model.model, schema, result)
    return result


def _append_rows(
    record: Record, name: str, metrics_by_round: Mapping[int, MetricRecord]
) -> dict[str, float]:
    """Appends a row of metrics for each round; returns the last round's, empty without any."""
    last: dict[str, float] = {}
    for number, metrics in sorted(metrics_by_round.items()):
        record.append({"round": number, name: dict(metrics)})
        last = {key: float(value) for key, value in metrics.items()}  # type: ignore[arg-type]
    return last


@contextmanager
def _in_one_sentence(experiment: Experiment, strategy: Strategy) -> Iterator[None]:
    """Turns what a strategy raises into a FederationError; that of a user's own is shown whole."""
    try:
        yield
    except (FederationError, OSError):
        raise
    except Exception as error:
        if not type(strategy).__module__.startswith("flwr."):
            traceback.print_exc()
        raise FederationError(
            f"The strategy {experiment.federation.strategy!r} has given up:"
            f" {type(error).__name__}: {printable_line(error)}"
        ) from error


@contextmanager
def _last_warning() -> Iterator[list[str]]:
    """The last warning that Flower logs in the block: strategies say so what they lack."""
    last: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            last[:] = [printable_line(record.getMessage()).rstrip(".")]

    keep = Keep(logging.WARNING)
    logger = logging.getLogger("flwr")
    logger.addHandler(keep)
    try:
        yield last
    finally:
        logger.removeHandler(keep)
