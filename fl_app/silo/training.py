"""A silo's local training: the compiled step apart from any silo's data, state explicit.

    LocalTrainer.train(data, weights, epochs, state) -> (update, metrics, state)

One compiled model serves every silo and round of a process; the data of a silo is an argument.
Knows nothing of Flower.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fl_app.failures import MessageError
from fl_app.silo.data import Silo
from shared.data import Schema, encode, shard, weigh_classes
from shared.experiment import Experiment
from shared.state import State
from shared.weights import Weights, subtract

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from shared.training import EpochBatches


@dataclass(frozen=True)
class Ranks:
    """The processes that share a silo's training: this one is `rank` of `world_size`.

    `compile(model, experiment, schema, steps_per_epoch)` compiles in place, so that the ranks train
    together.
    """

    rank: int
    world_size: int
    compile: Callable[["keras.Model", Experiment, Schema, int], None]


def compile_alone(
    model: "keras.Model", experiment: Experiment, schema: Schema, steps_per_epoch: int
) -> None:
    """Compiles in place for one process."""
    from shared.training import compile_model  # Keras: seconds to import, not for a roll call

    compile_model(model, experiment, schema)


ALONE = Ranks(0, 1, compile_alone)


@dataclass(frozen=True)
class LocalData:
    """A silo's examples as batches of model inputs: this rank's part of them."""

    silo: Silo
    batches: "EpochBatches"
    validation_batches: "tf.data.Dataset"

    @property
    def has_validation(self) -> bool:
        return len(self.silo.validation) > 0


@dataclass(frozen=True)
class TrainingOutcome:
    """The result of local training: local weights - global weights, the metrics of the last epoch,
    and the state to go on from in the next round.
    """

    update: Weights
    metrics: dict[str, float]
    state: State


@dataclass(frozen=True)
class LocalTrainer:
    """A compiled model, to be trained on one silo's data after the other, round after round.

    Guarantee: what it returns depends on its arguments alone, bit by bit, not on earlier calls.
    """

    model: "keras.Model"
    fresh_optimizer: Weights  # the optimizer's variables before the first step

    def check_weights(self, weights: Weights) -> None:
        """Raises MessageError for weights that are not this model's, or hold no numbers."""
        expected = [tuple(variable.shape) for variable in self.model.weights]
        received = [array.shape for array in weights]
        if received != expected:
            raise MessageError(
                f"weights of another model: {len(received)} arrays of {sum(map(np.size, weights))}"
                f" numbers, where the experiment's model has {len(expected)} of"
                f" {self.model.count_params()}"
            )
        if not all(np.isfinite(array).all() for array in weights):
            raise MessageError("weights that are not finite (NaN or infinity): the run diverged")

    def evaluate(self, data: LocalData, weights: Weights) -> dict[str, float]:
        """The metrics of the weights on the validation examples; empty if there are none."""
        from shared.training import evaluate

        if not data.has_validation:
            return {}
        self.model.set_weights(weights)
        return evaluate(self.model, data.validation_batches)

    def train(
        self, data: LocalData, weights: Weights, epochs: range, state: State
    ) -> TrainingOutcome:
        """Trains for these epochs from the weights, with a fresh optimizer.

        The order of examples depends on (seed, silo, epoch), with epochs counted over all rounds.
        """
        from shared.training import fit_epochs

        self.model.set_weights(weights)
        for variable, value in zip(
            self.model.optimizer.variables, self.fresh_optimizer, strict=True
        ):
            variable.assign(value)

        history = fit_epochs(self.model, data.batches, epochs.start, epochs.stop).history
        metrics = {name: float(values[-1]) for name, values in history.items()}
        return TrainingOutcome(subtract(self.model.get_weights(), weights), metrics, state)


def epochs_of_round(experiment: Experiment, round_number: int) -> range:
    """The epochs of a round, which are counted over all rounds.

    >>> epochs_of_round(Experiment(), 3)  # with one local epoch
    range(2, 3)
    """
    num_epochs = experiment.federation.local_epochs
    first_epoch = (round_number - 1) * num_epochs
    return range(first_epoch, first_epoch + num_epochs)


def prepare_data(
    silo: Silo, schema: Schema, experiment: Experiment, ranks: Ranks = ALONE
) -> LocalData:
    """Encodes a silo's examples by the federation's schema and makes this rank's batches of them.

    Raises ValueError if a rank would go without examples in some step.
    """
    from shared.augmentation import augmentation_of  # TensorFlow
    from shared.training import EpochBatches, evaluation_batches  # Keras

    train = weigh_classes(encode(silo.train, schema), schema)
    batches = EpochBatches(
        train,
        experiment.federation.local_batch_size,
        experiment.seed,
        owner=silo.name,
        rank=ranks.rank,
        world_size=ranks.world_size,
        augmentation=augmentation_of(experiment.data, schema.input_shape),
    )
    _check_batches(batches)
    validation = shard(encode(silo.validation, schema), ranks.rank, ranks.world_size)
    return LocalData(silo, batches, evaluation_batches(validation))


def prepare_trainer(
    schema: Schema, experiment: Experiment, steps_per_epoch: int, ranks: Ranks = ALONE
) -> LocalTrainer:
    """Builds and compiles the experiment's model for the federation's schema."""
    from shared.zoo import build_model

    # The server's weights replace any initial ones, whose file a silo may not have.
    config = experiment.model.model_copy(update={"initial": ""})
    model = build_model(config, schema, experiment.seed)
    ranks.compile(model, experiment, schema, steps_per_epoch)
    model.optimizer.build(model.trainable_variables)
    return LocalTrainer(model, [np.array(variable) for variable in model.optimizer.variables])


def _check_batches(batches: "EpochBatches") -> None:
    smallest = min(s.stop - s.start for s in batches.slices)
    if smallest < batches.world_size:
        raise ValueError(
            f"Every worker needs an example in every step; received a batch of {smallest} for"
            f" {batches.world_size} workers of silo {batches.owner!r}. Raise"
            " federation.local_batch_size, or start the silo with fewer workers (--num-workers)."
        )
