"""Run by test_equality.py on N ranks: trains each case for 20 steps and writes what every rank ended with.

    python equality_job.py OUTPUT_FOLDER CASE...       (under horovodrun -np N, or alone)

The case "facts" stands for what else the ranks are asked: resume, refusals, dropout.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import dist_train.keras_horovod as hvk
from dist_train.collectives import AgreedError, Communicator
from dist_train.trainer import train
from shared.data import Dataset, Schema
from shared.experiment import experiment_from_flat
from shared.training import EpochBatches, fit_epochs
from shared.weights import max_difference
from shared.zoo import wide_deep

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


def cross_entropy(reduction: str = "sum_over_batch_size") -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


# name: (model, optimizer, loss, data, steps_per_execution)
Case = tuple[Callable[[], keras.Model], Callable[[], optimizers.Optimizer], keras.losses.Loss, Dataset, int]
CASES: dict[str, Case] = {
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


CASES["masked_tokens"] = (MaskedTokens, lambda: optimizers.SGD(0.2), masked_case()[1], masked_case()[0], 1)


def run_case(case: Case, communicator: Communicator, folder: Path, name: str) -> None:
    build, make_optimizer, loss, dataset, steps_per_execution = case
    keras.utils.set_random_seed(1 + communicator.rank)  # only the root starts with the one process's weights
    model = build()
    model.compile(
        make_optimizer(),
        loss,
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        steps_per_execution=steps_per_execution,
        jit_compile=False,
    )
    hvk.distribute(model)
    batches = EpochBatches(
        dataset, GLOBAL_BATCH_SIZE, seed=3, rank=communicator.rank, world_size=communicator.world_size
    )
    validation = dataset.take(np.array_split(np.arange(50), communicator.world_size)[communicator.rank])
    history = fit_epochs(model, batches, 0, NUM_EPOCHS, validation=validation).history
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
    from shared.training import StartEpoch

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
