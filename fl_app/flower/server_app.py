"""The ServerApp: Flower's side of the coordinator."""

import logging
import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_app.failures import FederationError
from fl_app.flower.exchange import FlowerExchange
from fl_app.flower.randomness import separate_random_draws
from fl_app.flower.strategy_rounds import run_strategy
from fl_app.server.rounds import run_federation
from shared.experiment import experiment_from_flat
from shared.metrics import describe
from shared.mlflow_record import make_record
from shared.run_record import aborted_on_error

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    if missing := separate_random_draws():
        print(
            f"warning: this Flower has no {', '.join(missing)}: runs may differ in initial weights",
            flush=True,
        )
    try:
        experiment = experiment_from_flat(context.run_config)
        record = make_record(experiment, "flower", step_name="round")
        exchange = FlowerExchange(grid, experiment.federation.silo_timeout_s)
        exchange.open()
        with aborted_on_error(record):
            if experiment.federation.strategy:
                result = run_strategy(experiment, grid, exchange, record)
            else:
                result = run_federation(experiment, exchange, record)
    except (ValueError, OSError, FederationError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        logging.getLogger("flwr").addFilter(_WithoutTraceback(error))
        raise
    print(f"{experiment.name}: {describe(result['metrics'])}", flush=True)
    print(f"run record: {record.directory.resolve()}", flush=True)


class _WithoutTraceback(logging.Filter):
    """Flower logs the exception that ends a run; the user has been told what it says."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is self.error:
            record.exc_info = None
        return True
