"""Federations in this process for the tests: experiments, silos, and what a run leaves behind."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fl_app.exchange import Exchange
from fl_app.messages import Task
from fl_app.server.rounds import run_federation
from fl_app.silo.data import Silo, load_silo, make_silo
from fl_app.silo.policy import OPEN, SiloSettings
from fl_app.simulation.exchange import InProcessExchange, exchange_of_silos
from shared.checkpoint import load_checkpoint
from shared.data import Schema, fit_schema, load_examples, split_pool
from shared.data.partition import partition
from shared.experiment import DataSection, Experiment, experiment_from_flat
from shared.run_record import RunRecord, read_metrics
from shared.weights import Weights
from shared.zoo import build_model

BASE = {
    "data.name": "wine",
    "model.name": "linear",
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.1,
    "federation.num_rounds": 3,
    "federation.evaluate_on_server": False,
}
WINE = fit_schema(load_examples(DataSection(name="wine")), DataSection())  # 13 columns, 3 classes


def exchange_of_files(experiment: Experiment, data: Mapping[str, str]) -> InProcessExchange:
    """Silos in this process. `data` maps each silo's name to the name or path of its data."""
    settings = [SiloSettings(name, source, policy=OPEN) for name, source in data.items()]
    silos = [load_silo(each, experiment) for each in settings]
    return exchange_of_silos(experiment, silos)


def observed(
    exchange: InProcessExchange, observe: Callable[[Mapping[str, Task]], None]
) -> InProcessExchange:
    """The exchange, whose tasks are shown before they are posted."""
    post = exchange.post

    def observed_post(tasks: Mapping[str, Task], timeout_s: float) -> None:
        observe(tasks)
        post(tasks, timeout_s)

    exchange.post = observed_post  # type: ignore[method-assign]
    return exchange


def wine_silos(experiment: Experiment, num_silos: int) -> list[Silo]:
    """Unequal silos: a split of wine, less the test examples, as [partition] says."""
    pool, _ = split_pool(
        load_examples(experiment.data), experiment.seed, experiment.data.test_fraction
    )
    parts = partition(experiment.partition, pool, num_silos, experiment.seed)
    names = [f"silo-{i}" for i in range(num_silos)]
    return [make_silo(name, part, experiment) for name, part in zip(names, parts, strict=True)]


# --- a run and what it leaves behind


def configure(directory: Path, changes: Mapping[str, Any] = {}, **run: Any) -> Experiment:
    where = {"run.directory": str(directory / "run")} | {
        f"run.{key}": value for key, value in run.items()
    }
    return experiment_from_flat(BASE | dict(changes) | where)


def run(experiment: Experiment, exchange: Exchange) -> dict[str, Any]:
    return run_federation(experiment, exchange, RunRecord(experiment, "flower", "round"))


def initial_weights(experiment: Experiment, schema: Schema = WINE) -> Weights:
    return build_model(experiment.model, schema, experiment.seed).get_weights()


def final_weights(experiment: Experiment) -> Weights:
    """Those that the last round ended with."""
    return list(
        load_checkpoint(experiment.run_directory / "checkpoint.npz", experiment).arrays["weights"]
    )


def rows_without_times(experiment: Experiment) -> list[dict[str, Any]]:
    rows = read_metrics(experiment.run_directory)
    return [{key: row[key] for key in row if key not in ("seconds", "timing")} for row in rows]
