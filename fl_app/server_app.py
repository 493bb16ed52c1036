"""The ServerApp: Flower's side of the coordinator."""

import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_app.cohort import FederationError
from fl_app.exchange import FlowerExchange
from fl_app.rounds import run_federation
from fl_app.strategy_run import run_strategy
from shared.experiment import experiment_from_flat
from shared.metrics import describe
from shared.run_record import RunRecord

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    try:
        experiment = experiment_from_flat(context.run_config)
        record = RunRecord(experiment, "flower", step_name="round")
        exchange = FlowerExchange(grid, experiment.federation.silo_timeout_s)
        exchange.open()
        if experiment.federation.strategy:
            result = run_strategy(experiment, grid, exchange, record)
        else:
            result = run_federation(experiment, exchange, record)
    except (ValueError, OSError, FederationError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise
    print(f"{experiment.name}: {describe(result['metrics'])}", flush=True)
    print(f"run record: {record.directory.resolve()}", flush=True)
