"""A federation in one process: the silos' real training, reached by function calls instead of Flower messages."""

from collections.abc import Mapping

from fl_app.local_training import (
    LocalResult,
    SiloEntry,
    evaluate_at_silo,
    load_silo,
    train_at_silo,
    with_federation_schema,
)
from shared.data import Schema
from shared.experiment import Experiment
from shared.weights import Weights


class LocalExchange:
    """Implements `rounds.Exchange`. `data` maps each silo's name to the name or path of its data."""

    def __init__(self, experiment: Experiment, data: Mapping[str, str]) -> None:
        self.experiment = experiment
        self.silos = {name: load_silo({"silo": name, "data": source}, experiment) for name, source in data.items()}

    def roll_call(self, min_silos: int) -> dict[str, SiloEntry]:
        assert len(self.silos) >= min_silos
        return {name: SiloEntry(name, silo.schema, len(silo.train)) for name, silo in self.silos.items()}

    def train(self, silos: list[str], round_number: int, schema: Schema, weights: Weights) -> dict[str, LocalResult]:
        return {
            name: train_at_silo(
                with_federation_schema(self.silos[name], schema), self.experiment, weights, round_number
            )
            for name in silos
        }

    def evaluate(self, silos: list[str], schema: Schema, weights: Weights) -> dict[str, LocalResult]:
        return {
            name: evaluate_at_silo(with_federation_schema(self.silos[name], schema), self.experiment, weights)
            for name in silos
        }
