"""Run by test_equality.py on N ranks: trains each case for 20 steps and writes what every rank
ended with.

    python equality_job.py OUTPUT_FOLDER CASE...       (under horovodrun -np N, or alone)

The case "facts" stands for what else the ranks are asked: resume, refusals, dropout.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import dist_train.keras_horovod as hvk
from dist_train import hooks
from dist_train.agreement import AgreedError
from dist_train.collectives import Communicator
from dist_train.trainer import train
from shared.data import Dataset
from shared.experiment import experiment_from_flat
from shared.training import EpochBatches, StartEpoch
from shared.weights import max_difference
from tests.parallel.course_expectations import QUICK
from tests.parallel.course_job import run_cases
from tests.parallel.equality_cases import CASES, CROSS_ENTROPY, GLOBAL_BATCH_SIZE, Case, make_data
from tests.parallel.equality_models import mlp

FACTS = "facts"


def main(folder: Path, names: Sequence[str]) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    communicator = hvk.init()
    for name in names:
        if name != FACTS:
            run_case(CASES[name], communicator, folder, name)
    if FACTS in names:
        find_facts(communicator, folder)
    if FACTS in names and communicator.world_size == 2:
        run_cases(QUICK, communicator, folder)  # the last of them ends the job


def run_case(case: Case, communicator: Communicator, folder: Path, name: str) -> None:
    """Trains the case on all ranks; each writes its weights, metrics and bytes sent."""
    # Only the root starts with the weights of the one process.
    keras.utils.set_random_seed(1 + communicator.rank)

    model = case.model()
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    model.compile(
        case.optimizer(),
        case.loss,
        metrics=[accuracy] if case.measures_accuracy else [],
        steps_per_execution=case.steps_per_execution,
        jit_compile=False,
    )
    if case.distribute_options is not None:
        hvk.distribute(model, **case.distribute_options)

    # Every rank takes its part of each global batch, and of the examples for validation.
    batches = EpochBatches(
        case.data,
        GLOBAL_BATCH_SIZE,
        seed=3,
        rank=communicator.rank,
        world_size=communicator.world_size,
        augmentation=case.augmentation,
    )
    parts = np.array_split(np.arange(50), communicator.world_size)
    validation = case.data.take(parts[communicator.rank])
    history = case.train(model, batches, validation, communicator)

    np.savez(
        folder / f"{name}.{communicator.rank}.npz",
        *model.get_weights(),
        metrics=np.array([history[key] for key in sorted(history)]),
        bytes_sent=hvk.bytes_sent(model),
    )
    if communicator.is_root and case.saves_model:
        model.save(folder / "saved.keras")


# --- other facts


def find_facts(communicator: Communicator, folder: Path) -> None:
    """Writes facts.json, on the root."""
    facts: dict[str, object] = {"resume": run_resumes(communicator, folder)}
    if communicator.world_size > 1:
        facts["refusals"] = run_refusals(communicator)
        facts["dropout"] = dropout_difference(communicator)
    if communicator.is_root:
        (folder / "facts.json").write_text(json.dumps(facts))


def run_resumes(communicator: Communicator, folder: Path) -> dict[str, float]:
    """Differences of the final weights between a run resumed after each epoch and the undisturbed
    one.
    """

    def run(directory: str, epochs: int, resume: bool = False) -> list[np.ndarray]:
        """Returns the final weights on the root; nothing on the other ranks."""
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
        if not communicator.is_root:
            return []
        return keras.models.load_model(folder / directory / "model.keras").get_weights()

    undisturbed = run("undisturbed", 3)
    differences = {}
    for epoch in (1, 2):
        run(f"stopped{epoch}", epoch)
        resumed = run(f"stopped{epoch}", 3, resume=True)
        differences[f"after epoch {epoch}"] = max_difference(resumed, undisturbed)
    return differences


def run_refusals(communicator: Communicator) -> dict[str, str]:
    """The messages of what must be refused, before a step is taken."""
    refusals = {}
    model = compiled_mlp()
    hvk.distribute(model)
    before = model.get_weights()

    # Another number of batches on each rank.
    data = make_data(24 * (1 + communicator.rank))
    try:
        model.fit(data.x, data.y, batch_size=24, verbose=0)
    except AgreedError as error:
        refusals["unequal steps"] = str(error)

    # Validation data on the root only.
    data = make_data(24)
    validation = (data.x, data.y) if communicator.is_root else None
    try:
        model.fit(data.x, data.y, batch_size=24, validation_data=validation, verbose=0)
    except AgreedError as error:
        refusals["validation on the root only"] = str(error)
    refusals["weights moved"] = str(max_difference(before, model.get_weights()))

    # A Keras that lacks a hook.
    plain_hooks = hooks.OPTIMIZER_HOOKS
    hooks.OPTIMIZER_HOOKS = (*plain_hooks, "hook_that_this_keras_lacks")
    try:
        hvk.distribute(compiled_mlp())
    except RuntimeError as error:
        refusals["missing hook"] = str(error)
    finally:
        hooks.OPTIMIZER_HOOKS = plain_hooks
    return refusals


def compiled_mlp() -> keras.Model:
    model = mlp()
    model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY, jit_compile=False)
    return model


def dropout_difference(communicator: Communicator) -> float:
    """Distance of two ranks' dropout masks of the same layer and epoch; 0: they are equal."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dropout(0.5)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    data = Dataset(np.ones((4, 64), np.float32), np.ones((4,), np.float32), 0)
    batches = EpochBatches(data, 4, seed=0, rank=communicator.rank, world_size=1)

    start = StartEpoch(batches)
    start.set_model(model)
    start.on_epoch_begin(0)
    masks = communicator.all_gather_object(np.asarray(model(data.x, training=True)))
    return float(np.abs(masks[0] - masks[-1]).max())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
