"""A federation in one process: the silos' real training, reached by function calls instead of Flower messages."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_app.cohort import Reply
from fl_app.local_training import Silo, SiloEntry, Workbench, load_silo, make_silo
from fl_app.rounds import Exchange, run_federation
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


class LocalExchange:
    """Implements `rounds.Exchange`. `data` maps each silo's name to the name or path of its data."""

    transfer_seconds = 0.0

    def __init__(self, experiment: Experiment, data: Mapping[str, str]) -> None:
        self.begin(experiment, [load_silo(name, source, experiment) for name, source in data.items()])

    def begin(self, experiment: Experiment, silos: Sequence[Silo]) -> None:
        self.experiment = experiment
        self.silos = {silo.name: silo for silo in silos}
        self.workbenches = {silo.name: Workbench() for silo in silos}

    def roll_call(self, min_silos: int) -> dict[str, SiloEntry]:
        assert len(self.silos) >= min_silos
        return {name: SiloEntry(name, silo.schema, len(silo.train)) for name, silo in self.silos.items()}

    def train(
        self,
        silos: Sequence[str],
        round_number: int,
        schema: Schema,
        weights: Weights,
        evaluate: bool,
        timeout_s: float,
    ) -> Iterator[Reply]:
        for name in silos:
            silo, workbench = self.silos[name], self.workbenches[name]
            yield name, workbench.train(silo, schema, self.experiment, weights, round_number, evaluate)

    def evaluate(self, silos: Sequence[str], schema: Schema, weights: Weights) -> Iterator[Reply]:
        for name in silos:
            yield name, self.workbenches[name].evaluate(self.silos[name], schema, self.experiment, weights)


class SilosHere(LocalExchange):
    """Silos that really train, in this process, on the examples they are given."""

    def __init__(self, experiment: Experiment, silos: Sequence[Silo]) -> None:
        self.begin(experiment, silos)


def wine_silos(experiment: Experiment, num_silos: int) -> list[Silo]:
    """Unequal silos: a split of wine, less the test examples, as [partition] says."""
    pool, _ = split_pool(load_examples(experiment.data), experiment.seed, experiment.data.test_fraction)
    parts = partition(experiment.partition, pool, num_silos, experiment.seed)
    names = [f"silo-{i}" for i in range(num_silos)]
    return [make_silo(name, part, experiment) for name, part in zip(names, parts, strict=True)]


# --- a run and what it leaves behind


def configure(directory: Path, changes: Mapping[str, Any] = {}, **run: Any) -> Experiment:
    where = {"run.directory": str(directory / "run")} | {f"run.{key}": value for key, value in run.items()}
    return experiment_from_flat(BASE | dict(changes) | where)


def run(experiment: Experiment, exchange: Exchange) -> dict[str, Any]:
    return run_federation(experiment, exchange, RunRecord(experiment, "flower", "round"))


def initial_weights(experiment: Experiment, schema: Schema = WINE) -> Weights:
    return build_model(experiment.model, schema, experiment.seed).get_weights()


def final_weights(experiment: Experiment) -> Weights:
    """Those that the last round ended with."""
    return list(load_checkpoint(experiment.run_directory / "checkpoint.npz", experiment).arrays["weights"])


def rows_without_times(experiment: Experiment) -> list[dict[str, Any]]:
    rows = read_metrics(experiment.run_directory)
    return [{key: row[key] for key in row if key not in ("seconds", "timing")} for row in rows]
