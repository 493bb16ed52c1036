"""A federation in one process without Keras at the silos: their answers are simple arithmetic."""

from collections.abc import Mapping, Sequence

import keras
import numpy as np

from fl_app.failures import Failure
from fl_app.messages import INFORM, TRAIN, Answer, LocalResult, SiloEntry, Task
from fl_app.simulation.exchange import InProcessExchange
from shared.data import Schema
from shared.weights import Weights
from tests.local_exchange import WINE


class Arithmetic(InProcessExchange):
    """An exchange whose silos answer by their number, the round and the weights.

    Silo i holds i + 1 examples; its update is (i + 1) times the round's number, its validation loss
    i + sum(weights).
    """

    def __init__(self, num_silos: int = 3, reverse: bool = False, fails_in_round: int = 0) -> None:
        self.numbers = {f"silo-{i}": i for i in range(num_silos)}
        self.reverse = reverse
        self.fails_in_round = fails_in_round
        self.seen: list[Weights] = []  # that were sent, once for each time that silos were asked
        entries = [SiloEntry(name, WINE, i + 1, 2 * (i + 1)) for name, i in self.numbers.items()]
        super().__init__(sorted(entries, key=lambda e: e.name, reverse=reverse), self.respond)

    def post(self, tasks: Mapping[str, Task], timeout_s: float) -> None:
        first = next(iter(tasks.values()))
        if first.kind != INFORM:
            self.seen.append(list(first.arrays))
        super().post(dict(sorted(tasks.items(), reverse=self.reverse)), timeout_s)

    def respond(self, silo: str, task: Task) -> Answer | Failure:
        if task.kind == INFORM:
            return Answer()
        if task.kind == TRAIN and task.round == self.fails_in_round and silo == "silo-1":
            return Failure("it vanished")
        round_number = task.round if task.kind == TRAIN else 0
        weights = list(task.arrays)
        result = self.result(self.numbers[silo], round_number, weights, task.body["evaluate"])
        return result.to_answer()

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


class GivenLosses(Arithmetic):
    """Silos that judge the weights after round r by losses[r]: each round adds 1 to them, whoever
    takes part.
    """

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
    x = keras.layers.BatchNormalization(name="statistics")(
        keras.layers.Dense(4, name="hidden")(inputs)
    )
    return keras.Model(
        inputs, keras.layers.Dense(schema.num_outputs, name="output")(x), name="with_statistics"
    )
