"""Run by test_equality.py on N ranks: trains each case for 20 steps and writes what every rank ended with.

    python equality_job.py OUTPUT_FOLDER CASE...       (under horovodrun -np N, or alone)

The case "facts" stands for what else the ranks are asked: resume, refusals, dropout.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import dist_train.keras_horovod as hvk
from dist_train.collectives import AgreedError, Communicator
from dist_train.trainer import train
from shared.augmentation import Augmentation
from shared.data import Dataset, Schema
from shared.data.texts import language_model_dataset
from shared.experiment import experiment_from_flat
from shared.training import EpochBatches, StartEpoch, fit_epochs
from shared.weights import max_difference
from shared.zoo import autoencoder, cnn, transformer, wide_deep
from shared.zoo.adapters import enable_adapters

NUM_FEATURES, NUM_CLASSES = 6, 3
GLOBAL_BATCH_SIZE = 24
STEPS_PER_EPOCH, NUM_EPOCHS = 10, 2  # 20 steps

layers, optimizers = keras.layers, keras.optimizers


def make_data(num_examples: int = STEPS_PER_EPOCH * GLOBAL_BATCH_SIZE, weighted: bool = False) -> Dataset:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(num_examples, NUM_FEATURES)).astype(np.float32)
    y = np.argmax(x[:, :NUM_CLASSES] + 0.3 * rng.normal(size=(num_examples, NUM_CLASSES)), axis=1).astype(np.int32)
    weight = rng.exponential(size=num_examples).astype(np.float32) if weighted else None
    return Dataset(x, y, NUM_CLASSES, weight)


def mlp(**output_options: object) -> keras.Model:
    inputs = keras.Input((NUM_FEATURES,))
    hidden = layers.Dense(16, activation="tanh")(inputs)
    return keras.Model(inputs, layers.Dense(NUM_CLASSES, **output_options)(hidden))


def adapted_mlp() -> keras.Model:
    model = mlp()
    enable_adapters(model, rank=2)
    return model


def embeddings() -> keras.Model:
    return wide_deep.build(Schema((NUM_FEATURES,), NUM_CLASSES), embedding_dim=3, units=(8,), num_buckets=5)


def deferred() -> keras.Model:
    return keras.Sequential([layers.Dense(16, activation="tanh"), layers.Dense(NUM_CLASSES)])  # built by fit


class MaskedTokens(keras.Model):
    """Predicts a class for every feature taken as a token; small ones are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = layers.Embedding(8, 4, mask_zero=True)
        self.head = layers.Dense(NUM_CLASSES)

    def call(self, x):
        tokens = tf.cast(tf.clip_by_value(tf.abs(x) * 3.0, 0.0, 7.0), tf.int32)
        embedded = self.embedding(tokens)
        return self.head(embedded)


class OwnTrainStep(keras.Model):
    """A custom train step that never calls scale_loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers.Dense(16, activation="tanh")
        self.head = layers.Dense(NUM_CLASSES)

    def call(self, x):
        return self.head(self.body(x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        self._loss_tracker.update_state(loss, sample_weight=tf.shape(x)[0])
        return self.compute_metrics(x, y, y_pred)


class OwnLossTerm(keras.Model):
    """Adds a term of its own to the compiled loss, as users do in compute_loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = layers.Dense(NUM_CLASSES)

    def call(self, x):
        return self.head(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 0.1 * tf.reduce_sum(tf.square(self.head.kernel))


class TwoOutputs(keras.Model):
    """A class for each token of a sequence (masked where it is padding), and a number for the whole of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = MaskedTokens()
        self.number = layers.Dense(1)

    def call(self, x):
        return {"tokens": self.tokens(x), "number": self.number(x)}


def batch_norm() -> keras.Model:
    inputs = keras.Input((NUM_FEATURES,))
    hidden = layers.BatchNormalization(momentum=0.9)(layers.Dense(16, activation="tanh")(inputs))
    return keras.Model(inputs, layers.Dense(NUM_CLASSES)(hidden))


@keras.saving.register_keras_serializable("tests")
class UsersOwn(optimizers.Optimizer):
    """Sign descent with decay, written as the Keras guide tells users to."""

    def update_step(self, gradient, variable, learning_rate):
        rate = tf.cast(learning_rate, variable.dtype)
        variable.assign_sub(rate * (tf.math.tanh(100.0 * gradient) + 0.01 * variable))


def cross_entropy(reduction: str = "sum_over_batch_size") -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


# name: (model, optimizer, loss, data, steps_per_execution)
Case = tuple[Callable[[], keras.Model], Callable[[], optimizers.Optimizer], Any, Dataset, int]
UNEVEN = make_data(229)
OPTIMIZERS: dict[str, Callable[[], optimizers.Optimizer]] = {
    "sgd": lambda: optimizers.SGD(0.1),
    "rmsprop": lambda: optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    "adagrad": lambda: optimizers.Adagrad(0.05),
    "adadelta": lambda: optimizers.Adadelta(1.0),
    "adamax": lambda: optimizers.Adamax(0.01),
    "nadam": lambda: optimizers.Nadam(0.01, clipvalue=0.05),
    "ftrl": lambda: optimizers.Ftrl(0.05),
    "lion": lambda: optimizers.Lion(0.001),
    "lamb": lambda: optimizers.Lamb(0.01),
    "adafactor": lambda: optimizers.Adafactor(0.01),
    "amsgrad": lambda: optimizers.Adam(0.01, amsgrad=True, weight_decay=0.01),
    "users_own": lambda: UsersOwn(0.01),
    "scheduled": lambda: optimizers.SGD(optimizers.schedules.CosineDecay(0.2, 20), momentum=0.9),
}
CASES: dict[str, Case] = {
    **{name: (mlp, make, cross_entropy(), UNEVEN, 1) for name, make in OPTIMIZERS.items()},
    "sgd_momentum": (mlp, lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True), cross_entropy(), make_data(), 1),
    "adam": (mlp, lambda: optimizers.Adam(0.01), cross_entropy(), make_data(), 1),
    "adamw_global_clip": (mlp, lambda: optimizers.AdamW(0.01, global_clipnorm=0.05), cross_entropy(), make_data(), 1),
    "embeddings": (embeddings, lambda: optimizers.Adam(0.01, global_clipnorm=0.1), cross_entropy(), make_data(), 1),
    "uneven_last_batch": (mlp, lambda: optimizers.SGD(0.1, momentum=0.9), cross_entropy(), make_data(229), 1),
    "uneven_embeddings": (embeddings, lambda: optimizers.SGD(0.5), cross_entropy(), make_data(229), 1),
    "sample_weights": (mlp, lambda: optimizers.Adam(0.01), cross_entropy(), make_data(229, weighted=True), 1),
    "weighted_mean_loss": (
        mlp,
        lambda: optimizers.SGD(0.1),
        cross_entropy("mean_with_sample_weight"),
        make_data(229, weighted=True),
        1,
    ),
    "deferred_build": (deferred, lambda: optimizers.Adam(0.01), cross_entropy(), make_data(), 1),
    "regularised": (
        lambda: mlp(kernel_regularizer="l2"),
        lambda: optimizers.SGD(0.1),
        cross_entropy(),
        make_data(229),
        1,
    ),
    "accumulation": (
        mlp,
        lambda: optimizers.Adam(0.01, gradient_accumulation_steps=2, clipnorm=0.05),
        cross_entropy(),
        make_data(229),
        1,
    ),
    "steps_per_execution": (mlp, lambda: optimizers.Adam(0.01), cross_entropy(), make_data(229), 4),
    "loss_scale": (
        mlp,
        lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01), dynamic_growth_steps=4),
        cross_entropy(),
        make_data(229),
        1,
    ),
    "own_train_step": (OwnTrainStep, lambda: optimizers.SGD(0.1), cross_entropy(), make_data(229), 1),
    "ema": (mlp, lambda: optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=4), cross_entropy(), make_data(), 1),
}


def masked_case() -> tuple[Dataset, keras.losses.Loss]:
    base = make_data(229)
    tokens_y = np.stack([np.roll(base.y, shift) for shift in range(NUM_FEATURES)], axis=1)
    return Dataset(base.x, tokens_y, NUM_CLASSES), cross_entropy()


TOKENS, TOKEN_LOSS = masked_case()
CASES["masked_tokens"] = (MaskedTokens, lambda: optimizers.SGD(0.2), TOKEN_LOSS, TOKENS, 1)
CASES["weighted_masked_mean"] = (
    MaskedTokens,
    lambda: optimizers.SGD(0.2),
    cross_entropy("mean_with_sample_weight"),
    replace(TOKENS, sample_weight=make_data(229, weighted=True).sample_weight[:, None]),
    1,
)
CASES["two_outputs"] = (
    TwoOutputs,
    lambda: optimizers.SGD(0.1),
    {"tokens": cross_entropy(), "number": "mse"},
    TOKENS,
    1,
)
CASES["summed_loss"] = (mlp, lambda: optimizers.SGD(0.01), cross_entropy("sum"), UNEVEN, 1)
CASES["own_loss_term"] = (OwnLossTerm, lambda: optimizers.SGD(0.1), cross_entropy(), UNEVEN, 1)
CASES["class_weights"] = (mlp, lambda: optimizers.SGD(0.1), cross_entropy(), UNEVEN, 1)
CASES["own_loop"] = (mlp, lambda: optimizers.Adam(0.01), cross_entropy(), UNEVEN, 1)
CASES["sync_batch_norm"] = (batch_norm, lambda: optimizers.SGD(0.1), cross_entropy(), UNEVEN, 1)
CASES["batch_norm"] = (batch_norm, lambda: optimizers.SGD(0.1), cross_entropy(), UNEVEN, 1)
CASES["per_tensor"] = (mlp, lambda: optimizers.Adam(0.01), cross_entropy(), UNEVEN, 1)
CASES["predivided"] = (mlp, lambda: optimizers.Adam(0.01), cross_entropy(), UNEVEN, 1)
CASES["clipped"] = (mlp, lambda: optimizers.SGD(0.3, global_clipnorm=0.3), cross_entropy(), UNEVEN, 1)
CASES["warmup"] = (mlp, lambda: optimizers.SGD(0.3, momentum=0.9), cross_entropy(), make_data(), 1)
AUTO = replace(UNEVEN, y=UNEVEN.x, num_classes=0)
LETTERS = language_model_dataset([" ".join(str(number) for number in range(700))], sequence_length=12)
IMAGES = replace(UNEVEN, x=np.random.default_rng(5).normal(size=(229, 8, 8, 1)).astype(np.float32))
CASES["language_model"] = (
    lambda: transformer.build_language_model(LETTERS.schema, dim=16, num_heads=2, num_layers=1),
    lambda: optimizers.SGD(0.2, momentum=0.9),  # Adam would blow up the rounding of a key's bias, whose gradient is 0
    cross_entropy(),
    LETTERS,
    1,
)
CASES["autoencoder"] = (
    lambda: autoencoder.build(AUTO.schema, units=[4]),
    lambda: optimizers.SGD(0.1, momentum=0.9),
    "mse",
    AUTO,
    1,
)
CASES["adapters"] = (adapted_mlp, lambda: optimizers.Adam(0.01), cross_entropy(), UNEVEN, 1)
CASES["augmentation"] = (lambda: cnn.build(IMAGES.schema), lambda: optimizers.SGD(0.1), cross_entropy(), IMAGES, 1)
CASES["mixed_precision"] = (
    lambda: mlp(dtype="mixed_float16"),
    lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.1), initial_scale=2.0**8),
    cross_entropy(),
    UNEVEN,
    1,
)

NO_CLASSES = ("two_outputs", "autoencoder")
# What `distribute` and `fit` are given beyond the model.
DISTRIBUTE_OPTIONS: dict[str, dict[str, Any]] = {
    "sync_batch_norm": {"sync_batch_norm": True},
    "per_tensor": {"aggregation": hvk.Aggregation(grouping="per_tensor"), "compile_update": False},
    "predivided": {"aggregation": hvk.Aggregation(predivide_factor=1.0)},
    "users_own": {"compile_update": True},
}


def fit(model: keras.Model, batches: EpochBatches, validation: Dataset, name: str) -> dict[str, list[float]]:
    """Trains as the case wants it; returns what Keras's History holds."""
    callbacks = [hvk.LearningRateWarmup(4, warmup_epochs=1)] if name == "warmup" else []
    data, more = batches.as_tf_dataset(), {}
    if name == "class_weights":
        more["class_weight"] = {0: 0.5, 1: 1.0, 2: 3.0}
    elif name == "two_outputs":
        data = data.map(lambda x, y: (x, {"tokens": y, "number": x[:, :1]}))
    else:
        return fit_epochs(model, batches, 0, NUM_EPOCHS, validation=validation, callbacks=callbacks).history
    return model.fit(data, epochs=NUM_EPOCHS, callbacks=[StartEpoch(batches)], verbose=0, **more).history


def own_loop(model: keras.Model, batches: EpochBatches, communicator: Communicator) -> dict[str, list[float]]:
    """Plain TensorFlow with the distributed tape; the optimizer and the loss are the compiled ones."""
    optimizer, loss_function = model.optimizer, model.loss
    hvk.broadcast_variables(model)

    @tf.function(reduce_retracing=True)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with hvk.DistributedGradientTape() as tape:
            loss = loss_function(y, model(x, training=True))
        grads = tape.gradient(loss, model.trainable_variables, num_examples=tf.shape(x)[0])
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        return loss

    losses = []
    for epoch in range(NUM_EPOCHS):
        batches.start_epoch(epoch)
        parts = [(float(step(x, y)) * len(x), len(x)) for x, y in map(batches.__getitem__, range(len(batches)))]
        everyone = np.sum(communicator.all_gather_object(np.sum(parts, axis=0)), axis=0)
        losses.append(everyone[0] / everyone[1])
    return {"loss": losses}


def run_case(case: Case, communicator: Communicator, folder: Path, name: str) -> None:
    build, make_optimizer, loss, dataset, steps_per_execution = case
    keras.utils.set_random_seed(1 + communicator.rank)  # only the root starts with the one process's weights
    model = build()
    model.compile(
        make_optimizer(),
        loss,
        metrics=[] if name in NO_CLASSES else [keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        steps_per_execution=steps_per_execution,
        jit_compile=False,
    )
    if name != "own_loop":
        hvk.distribute(model, **DISTRIBUTE_OPTIONS.get(name, {}))
    batches = EpochBatches(
        dataset,
        GLOBAL_BATCH_SIZE,
        seed=3,
        rank=communicator.rank,
        world_size=communicator.world_size,
        augmentation=Augmentation(flip=name == "augmentation", shift=name == "augmentation"),
    )
    validation = dataset.take(np.array_split(np.arange(50), communicator.world_size)[communicator.rank])
    history = own_loop(model, batches, communicator) if name == "own_loop" else fit(model, batches, validation, name)
    keys = sorted(history)
    np.savez(
        folder / f"{name}.{communicator.rank}.npz",
        *model.get_weights(),
        metrics=np.array([history[key] for key in keys]),
        bytes_sent=hvk.bytes_sent(model),
    )
    if communicator.is_root and name == "adamw_global_clip":
        model.save(folder / "saved.keras")


def run_resumes(communicator: Communicator, folder: Path) -> dict[str, float]:
    """Differences of the final weights between a run resumed after each epoch and the undisturbed one."""

    def run(directory: str, epochs: int, resume: bool = False) -> list[np.ndarray]:
        flat = {
            "data.name": "wine",
            "model.name": "mlp",
            "model.options": "units = [8]\ndropout_rate = 0.2",
            "optimizer.name": "adam",
            "optimizer.learning_rate": 0.01,
            "training.epochs": epochs,
            "training.global_batch_size": 20,
            "run.directory": str(folder / directory),
            "run.resume": resume,
        }
        train(experiment_from_flat(flat), communicator)
        weights = (
            keras.models.load_model(folder / directory / "model.keras").get_weights() if communicator.is_root else []
        )
        return weights

    undisturbed = run("undisturbed", 3)
    differences = {}
    for epoch in (1, 2):
        run(f"stopped{epoch}", epoch)
        differences[f"after epoch {epoch}"] = max_difference(run(f"stopped{epoch}", 3, resume=True), undisturbed)
    return differences


def run_refusals(communicator: Communicator) -> dict[str, str]:
    """The messages of what must be refused, before a step is taken."""
    refusals = {}
    model = mlp()
    model.compile(optimizers.SGD(0.1), cross_entropy(), jit_compile=False)
    hvk.distribute(model)
    before = model.get_weights()
    data = make_data(24 * (1 + communicator.rank))
    try:
        model.fit(data.x, data.y, batch_size=24, verbose=0)
    except AgreedError as error:
        refusals["unequal steps"] = str(error)
    own_part = make_data(24)
    try:
        validation = (own_part.x, own_part.y) if communicator.is_root else None
        model.fit(own_part.x, own_part.y, batch_size=24, validation_data=validation, verbose=0)
    except AgreedError as error:
        refusals["validation on the root only"] = str(error)
    refusals["weights moved"] = str(max_difference(before, model.get_weights()))
    newer_keras = mlp()
    newer_keras.compile(optimizers.SGD(0.1), cross_entropy(), jit_compile=False)
    hooks = hvk.OPTIMIZER_HOOKS
    hvk.OPTIMIZER_HOOKS = (*hooks, "hook_that_this_keras_lacks")
    try:
        hvk.distribute(newer_keras)
    except RuntimeError as error:
        refusals["missing hook"] = str(error)
    finally:
        hvk.OPTIMIZER_HOOKS = hooks
    return refusals


def dropout_differs(communicator: Communicator) -> float:
    """How far the ranks' dropout masks of the same layer and epoch differ; 0: not at all."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), layers.Dropout(0.5)])
    model.compile(optimizers.SGD(0.1), "mse")
    data = Dataset(np.ones((4, 64), np.float32), np.ones((4,), np.float32), 0)
    batches = EpochBatches(data, 4, seed=0, rank=communicator.rank, world_size=1)
    start = StartEpoch(batches)
    start.set_model(model)
    start.on_epoch_begin(0)
    masks = communicator.all_gather_object(np.asarray(model(data.x, training=True)))
    return float(np.abs(masks[0] - masks[-1]).max())


def main(folder: Path, names: list[str]) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    communicator = hvk.init()
    for name in names:
        if name in CASES:
            run_case(CASES[name], communicator, folder, name)
    if "facts" in names:
        find_facts(communicator, folder)


def find_facts(communicator: Communicator, folder: Path) -> None:
    facts: dict[str, object] = {"resume": run_resumes(communicator, folder)}
    if communicator.world_size > 1:
        facts |= {"refusals": run_refusals(communicator), "dropout": dropout_differs(communicator)}
    if communicator.is_root:
        (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
