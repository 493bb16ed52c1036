"""The ServerApp: FedAvg as it comes, which trains and evaluates on all nodes in each round."""

from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.federation_workload import compiled_model, write_mark

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    marks = Path(str(context.run_config["marks"]))

    def mark_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        write_mark(marks)
        return None

    arrays = ArrayRecord(compiled_model(str(context.run_config["size"])).get_weights())
    num_nodes = int(context.run_config["num-nodes"])
    strategy = FedAvg(
        min_train_nodes=num_nodes, min_evaluate_nodes=num_nodes, min_available_nodes=num_nodes
    )
    num_rounds = int(context.run_config["num-server-rounds"])
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=num_rounds, evaluate_fn=mark_round)
