"""A federation in one process without Keras at the silos: what they answer is simple arithmetic."""

from collections.abc import Iterator, Sequence

import keras
import numpy as np

from fl_app.cohort import Failure, Reply
from fl_app.local_training import LocalResult, SiloEntry
from shared.data import Schema
from shared.weights import Weights
from tests.local_exchange import WINE


class Arithmetic:
    """Implements `rounds.Exchange`: what a silo answers follows from its number and the weights.

    Silo i holds i + 1 examples; its update is (i + 1) times the round's number, its validation loss i + sum(weights).
    """

    def __init__(self, num_silos: int = 3, reverse: bool = False, fails_in_round: int = 0) -> None:
        self.numbers = {f"silo-{i}": i for i in range(num_silos)}
        self.reverse, self.fails_in_round = reverse, fails_in_round
        self.transfer_seconds = 0.0
        self.seen: list[Weights] = []

    def roll_call(self, min_silos: int) -> dict[str, SiloEntry]:
        return {name: SiloEntry(name, WINE, self.numbers[name] + 1) for name in self._in_order(list(self.numbers))}

    def train(
        self,
        silos: Sequence[str],
        round_number: int,
        schema: Schema,
        weights: Weights,
        evaluate: bool,
        timeout_s: float,
    ) -> Iterator[Reply]:
        self.seen.append(weights)
        for name in self._in_order(silos):
            if round_number == self.fails_in_round and name == "silo-1":
                yield name, Failure("it vanished")
            else:
                yield name, self.result(self.numbers[name], round_number, weights, evaluate)

    def evaluate(self, silos: Sequence[str], schema: Schema, weights: Weights) -> Iterator[Reply]:
        self.seen.append(weights)
        for name in self._in_order(silos):
            yield name, self.result(self.numbers[name], 0, weights, True)

    def result(self, i: int, round_number: int, weights: Weights, evaluate: bool) -> LocalResult:
        """Silo i's; round 0: it does not train."""
        return LocalResult(
            num_examples=i + 1,
            num_validation=2 * (i + 1),
            train={"loss": 0.1 * (i + 1)},
            validation={"loss": self.loss(i, weights)} if evaluate else {},
            update=self.update(i, round_number, weights) if round_number else [],
            seconds=0.5 * (i + 1),
        )

    def update(self, i: int, round_number: int, weights: Weights) -> Weights:
        return [np.full_like(w, (i + 1) * round_number) for w in weights]

    def loss(self, i: int, weights: Weights) -> float:
        return i + float(sum(w.sum(dtype=np.float64) for w in weights))

    def _in_order(self, silos: Sequence[str]) -> list[str]:
        return sorted(silos, reverse=self.reverse)


class GivenLosses(Arithmetic):
    """Silos that judge the weights after round r by losses[r]: each round adds 1 to them, whoever takes part."""

    def __init__(self, losses: Sequence[float], num_silos: int = 2) -> None:
        super().__init__(num_silos)
        self.losses = losses
        self.judged: list[int] = []  # the rounds, once for each silo

    def update(self, i: int, round_number: int, weights: Weights) -> Weights:
        return [np.ones_like(w) for w in weights]

    def loss(self, i: int, weights: Weights) -> float:
        self.judged.append(round(float(weights[-1].flat[0])))  # of the biases, which begin at 0
        return self.losses[self.judged[-1]]


def build_with_statistics(schema: Schema) -> keras.Model:
    """A model of the user's own, of which not every array is trainable."""
    inputs = keras.Input(schema.input_shape)
    x = keras.layers.BatchNormalization(name="statistics")(keras.layers.Dense(4, name="hidden")(inputs))
    return keras.Model(inputs, keras.layers.Dense(schema.num_outputs, name="output")(x), name="with_statistics")
