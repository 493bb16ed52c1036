"""The local training that every runtime uses: compile, fit epochs, evaluate.

One process, a rank of a cluster and a silo of a federation run this same code; the adapters change
only who owns which examples and what happens to the gradient or to the weights afterwards.
"""

import inspect
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from shared.batches import EpochBatches, batch_slices, evaluation_batches
from shared.data import Dataset, Schema
from shared.experiment import Experiment, OptimizerSection, nearest_names
from shared.seeding import rng_for

__all__ = [
    "EpochBatches",  # of shared.batches, for those who train
    "StartEpoch",
    "batch_slices",
    "compile_model",
    "evaluate",
    "evaluation_batches",
    "fit_epochs",
    "make_loss",
    "make_optimizer",
]

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule


def make_optimizer(
    config: OptimizerSection, learning_rate: LearningRate
) -> keras.optimizers.Optimizer:
    """Returns the optimizer of the experiment's section, with this learning rate."""
    common: dict[str, Any] = {}
    if config.global_clip_norm > 0:
        common["global_clipnorm"] = config.global_clip_norm
    if config.accumulation_steps > 1:
        common["gradient_accumulation_steps"] = config.accumulation_steps

    match config.name:
        case "sgd":
            return keras.optimizers.SGD(
                learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay or None,
                **common,
            )
        case "adam":
            return keras.optimizers.Adam(learning_rate, **common)
        case "adamw":
            return keras.optimizers.AdamW(learning_rate, weight_decay=config.weight_decay, **common)


def make_loss(name: str, schema: Schema) -> keras.losses.Loss:
    """Returns the loss on a model's outputs, which are logits where there are classes.

    "auto" is cross-entropy for classes and mean squared error for numbers; any other name is a
    class of keras.losses, which is told that it gets logits if it can be. Raises ValueError, with
    the nearest names, if Keras has none of that name.
    """
    if name == "auto":
        if schema.task == "classification":
            return keras.losses.SparseCategoricalCrossentropy(from_logits=True, name="loss")
        return keras.losses.MeanSquaredError(name="loss")

    classes = _loss_classes()
    if name not in classes:
        nearest = ", ".join(nearest_names(name, classes)[:3])
        raise ValueError(
            f"training.loss must be 'auto' or a class of keras.losses; received {name!r}. "
            f"Nearest: {nearest}."
        )

    loss = classes[name]
    takes_logits = "from_logits" in inspect.signature(loss).parameters
    return loss(from_logits=True) if takes_logits else loss()


def _loss_classes() -> dict[str, type[keras.losses.Loss]]:
    base = keras.losses.Loss
    return {
        name: member
        for name, member in vars(keras.losses).items()
        if isinstance(member, type) and issubclass(member, base) and member != base
    }


def compile_model(
    model: keras.Model,
    experiment: Experiment,
    schema: Schema,
    learning_rate: LearningRate | None = None,
    world_size: int = 1,
) -> keras.Model:
    """Compiles in place: optimizer, loss, and accuracy (classes) or mean absolute error (numbers).

    `learning_rate` stands in for the experiment's where that is to be scaled. Returns the model.
    """
    if schema.task == "classification":
        metric = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    else:
        metric = keras.metrics.MeanAbsoluteError(name="mae")
    learning_rate = learning_rate or experiment.optimizer.learning_rate

    model.compile(
        optimizer=make_optimizer(experiment.optimizer, learning_rate),
        loss=make_loss(experiment.training.loss, schema),
        metrics=[metric],
        steps_per_execution=experiment.performance.steps_per_execution_on(world_size),
        # XLA cannot hold a collective, and its rounding differs: one path keeps all runtimes equal
        jit_compile=False,
    )
    return model


class StartEpoch(keras.callbacks.Callback):
    """Sets the order of examples before each epoch, and reseeds random layers.

    Their seeds are determined by (seed, owner, rank, epoch). So an epoch does not depend on how the
    ones before it were run: a resumed run draws what the uninterrupted one drew.
    """

    def __init__(self, batches: EpochBatches) -> None:
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        batches = self.batches
        batches.start_epoch(epoch)

        rng = rng_for(batches.seed, "random layers", batches.owner, batches.rank, epoch)
        for variable in self.model.variables:
            if variable.path.endswith("seed_generator_state"):
                state = rng.integers(2**32, size=variable.shape, dtype=np.uint32)
                variable.assign(state)


def fit_epochs(
    model: keras.Model,
    batches: EpochBatches,
    first_epoch: int,
    last_epoch: int,
    validation: Dataset | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int = 0,
) -> keras.callbacks.History:
    """Runs the epochs first_epoch .. last_epoch - 1 of a compiled model.

    Each epoch evaluates the `validation` examples, if there are any, and then calls `callbacks`
    with the metrics of both. One compiled model may train on the batches of several data sets of
    one schema, one call after another: Keras traces its step for the first only.
    """
    return model.fit(
        batches.as_tf_dataset(),
        initial_epoch=first_epoch,
        epochs=last_epoch,
        validation_data=evaluation_batches(validation) if validation else None,
        callbacks=[StartEpoch(batches), *callbacks],
        shuffle=False,
        verbose=verbose,
    )


def evaluate(model: keras.Model, dataset: Dataset | tf.data.Dataset) -> dict[str, float]:
    """Returns the mean loss and metrics of a compiled model over a data set.

    `dataset` may be its `evaluation_batches`, where they are kept.
    """
    batches = evaluation_batches(dataset) if isinstance(dataset, Dataset) else dataset
    results = model.evaluate(batches, verbose=0, return_dict=True)
    return {name: float(value) for name, value in results.items()}
