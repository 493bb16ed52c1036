"""Run by test_course.py on ranks: fits in which one rank decides something alone.

    python course_job.py OUTPUT_FOLDER CASE...       (under horovodrun -np N)

Each rank writes what every case ended with.
"""

import json
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import dist_train.keras_horovod as hvk
from dist_train.agreement import AgreedError
from dist_train.collectives import Communicator, LostRank
from shared.weights import weights_sha256

callbacks = keras.callbacks
NUM_STEPS = 10  # of an epoch
NUM_EPOCHS = 4
BATCH_SIZE = 4

Facts = dict[str, Any]


def main(folder: Path, names: Sequence[str]) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    ranks = hvk.init(pin=False)
    run_cases(names, ranks, folder)


def run_cases(names: Sequence[str], ranks: Communicator, folder: Path) -> None:
    """Writes the facts of each case, of this rank."""
    facts = {name: run_case(CASES[name], ranks, folder / name) for name in names}
    (folder / f"course.{ranks.rank}.json").write_text(json.dumps(facts))


def run_case(case: Callable[[Communicator, Path], Facts], ranks: Communicator, folder: Path) -> Any:
    """Returns a case's facts, or the error with which it ended, and the lines that it logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dist_train")
    logger.addHandler(handler)
    try:
        return {**case(ranks, folder), "lines": lines}
    except (AgreedError, LostRank, ValueError, KeyError, tf.errors.OpError) as error:
        return {"error": f"{type(error).__name__}: {error}", "lines": lines}
    finally:
        logger.removeHandler(handler)


# --- what is trained


def make_model(seed: int = 0, steps_per_execution: int = 1, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    optimizer = options.pop("optimizer", None) or keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(
        optimizer, "mse", steps_per_execution=steps_per_execution, jit_compile=False, **options
    )
    return hvk.distribute(model)


def make_data(rank: int, num_steps: int = NUM_STEPS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rank)
    x = rng.normal(size=(num_steps * BATCH_SIZE, 6)).astype(np.float32)
    return x, x[:, :3] * 2 - 1


def fit(
    model: keras.Model, ranks: Communicator, own_callbacks: Sequence[Any] = (), **options: Any
) -> Facts:
    """Fits and returns how it went on this rank."""
    x, y = make_data(ranks.rank)
    data = {"x": x, "y": y, "batch_size": BATCH_SIZE} if "x" not in options else {}
    options = {"epochs": NUM_EPOCHS, "shuffle": False, "verbose": 0, **data, **options}
    history = model.fit(callbacks=list(own_callbacks), **options)
    return facts_of(model, history)


def facts_of(model: keras.Model, history: keras.callbacks.History) -> Facts:
    variables = [np.asarray(variable) for variable in model.optimizer.variables]
    return {
        "weights": weights_sha256([*model.get_weights(), *variables]),
        "epochs": history.epoch,
        "steps": int(model.optimizer.iterations),
        "rate": float(model.optimizer.learning_rate),
        "first_weight": float(model.get_weights()[0].flat[0]),
    }


def on_rank(ranks: Communicator, rank: int, *own: Any) -> list[Any]:
    return list(own) if ranks.rank == rank else []


class Do(callbacks.Callback):
    """Does something with the model at one point of the training."""

    def __init__(self, what: Callable[[keras.Model], None], **at: int) -> None:
        super().__init__()
        self.what = what
        self.at = at

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.epoch = epoch
        if self.at == {"begin_of": epoch}:
            self.what(self.model)

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        if self.at == {"end_of": epoch}:
            self.what(self.model)

    def on_train_end(self, logs: object = None) -> None:
        if not self.at:
            self.what(self.model)


class AtStep(Do):
    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        if self.at == {"epoch": self.epoch, "step": batch}:
            self.what(self.model)


def stop(model: keras.Model) -> None:
    model.stop_training = True


def set_ones(model: keras.Model) -> None:
    model.set_weights([np.ones_like(array) for array in model.get_weights()])


def fail(model: keras.Model) -> None:
    raise KeyError("a mistake of this rank's callback")


# --- what happens in the cases

Case = Callable[[Communicator, Path], Facts]


def with_callback(rank: int, make: Callable[[], Any], **options: Any) -> Case:
    """A fit with a callback on one rank alone."""

    def case(ranks: Communicator, folder: Path) -> Facts:
        return fit(make_model(ranks.rank), ranks, on_rank(ranks, rank, make()), **options)

    return case


def stops_from_a_thread(ranks: Communicator, folder: Path) -> Facts:
    """As a signal's handler does: no callback is to be seen."""
    model = make_model()
    begun = threading.Event()

    def wait_and_stop() -> None:
        begun.wait()
        model.stop_training = True

    threading.Thread(target=wait_and_stop, daemon=True).start()
    notice = Do(lambda _: begun.set() if ranks.rank == 1 else None, begin_of=1)
    facts = fit(model, ranks, [notice], epochs=2000)
    begun.set()
    return {**facts, "epochs": len(facts["epochs"]) < 2000}


def rates_of_a_schedule_on_the_root(ranks: Communicator, folder: Path) -> Facts:
    """The root changes its rate at each step; the weights tell whether all ranks followed."""

    class ByStep(callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
            self.model.optimizer.learning_rate = 0.1 / (1 + batch)

    everywhere = fit(make_model(), ranks, [ByStep()])
    on_root = fit(make_model(), ranks, on_rank(ranks, 0, ByStep()))
    return {**on_root, "as_everywhere": on_root["weights"] == everywhere["weights"]}


def restored_backup(ranks: Communicator, folder: Path, own: bool) -> Facts:
    """A run that was interrupted in its third epoch and is started again, and the undisturbed."""
    undisturbed = fit(make_model(), ranks)

    def backup() -> list[Any]:
        keep = callbacks.BackupAndRestore(folder, delete_checkpoint=False)
        return [keep] if own or ranks.is_root else []

    fit(make_model(), ranks, backup(), epochs=2)
    restored = fit(make_model(seed=ranks.rank), ranks, backup())
    return {**restored, "as_undisturbed": restored["weights"] == undisturbed["weights"]}


def from_generator(ranks: Communicator, num_steps: int) -> tf.data.Dataset:
    x, y = make_data(ranks.rank, num_steps)

    def examples() -> Any:
        yield from zip(x, y, strict=True)

    signature = (tf.TensorSpec((6,), tf.float32), tf.TensorSpec((3,), tf.float32))
    return tf.data.Dataset.from_generator(examples, output_signature=signature).batch(BATCH_SIZE)


def ends_early(known: bool, steps_per_execution: int = 1) -> Case:
    """Rank 1's data ends after 7 of 10 steps."""

    def case(ranks: Communicator, folder: Path) -> Facts:
        num_steps = 7 if ranks.rank == 1 else NUM_STEPS
        data = from_generator(ranks, num_steps)
        if known:
            data = tf.data.Dataset.from_tensor_slices(make_data(ranks.rank, num_steps))
            data = data.batch(BATCH_SIZE)
        model = make_model(steps_per_execution=steps_per_execution)
        return fit(model, ranks, x=data, steps_per_epoch=NUM_STEPS, epochs=2)

    return case


def data_fails(ranks: Communicator, folder: Path) -> Facts:
    """Rank 1's data raises an error within a step."""

    def read(x: tf.Tensor, y: tf.Tensor) -> Any:
        def check(x: np.ndarray) -> np.ndarray:
            if ranks.rank == 1 and x[0] == last:
                raise OSError("a mistake of this rank's data")
            return x

        checked = tf.numpy_function(check, [x], tf.float32)
        return tf.ensure_shape(checked, x.shape), y

    x, y = make_data(ranks.rank)
    last = x[-1, 0]
    data = tf.data.Dataset.from_tensor_slices((x, y)).map(read).batch(BATCH_SIZE)
    return fit(make_model(), ranks, x=data)


def endless_data(ranks: Communicator, folder: Path) -> Facts:
    data = from_generator(ranks, 7).repeat()
    return fit(make_model(), ranks, x=data, steps_per_epoch=NUM_STEPS)


def evaluates_alone(ranks: Communicator, folder: Path) -> Facts:
    x, y = make_data(0)

    def evaluate(model: keras.Model) -> None:
        model.evaluate(x, y, verbose=0)

    return fit(make_model(), ranks, on_rank(ranks, 0, Do(evaluate, end_of=1)))


def fails_before_the_begin(ranks: Communicator, folder: Path) -> Facts:
    x, y = make_data(0)
    return fit(make_model(), ranks, x=x, y=y if ranks.is_root else y[:3])


def other_settings(ranks: Communicator, folder: Path) -> Facts:
    optimizer = keras.optimizers.SGD(0.1, clipnorm=1.0 + ranks.rank)
    return fit(make_model(optimizer=optimizer), ranks)


def other_epochs(ranks: Communicator, folder: Path) -> Facts:
    return fit(make_model(), ranks, epochs=1 + ranks.rank)


class Largest(keras.metrics.Metric):
    """The largest target of all examples."""

    over_ranks = "max"

    def __init__(self, name: str = "largest") -> None:
        super().__init__(name=name)
        self.largest = self.add_weight(shape=(), initializer="zeros", name="largest")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.largest.assign(keras.ops.maximum(self.largest, keras.ops.max(y_true)))

    def result(self) -> Any:
        return self.largest.value


class Undeclared(Largest):
    over_ranks = None


def metric_of_a_maximum(ranks: Communicator, folder: Path) -> Facts:
    x, y = make_data(ranks.rank)
    model = make_model(metrics=[Largest()])
    history = model.fit(x, y, BATCH_SIZE, verbose=0, validation_data=(x, y)).history
    largest = max(float(values.max()) for values in ranks.all_gather_object(y))
    found = [history["largest"][0], history["val_largest"][0]]
    return {"is_largest": [abs(value - largest) < 1e-6 for value in found]}


def undeclared_metric(ranks: Communicator, folder: Path) -> Facts:
    return fit(make_model(metrics=[Undeclared()]), ranks)


# --- the cases

CASES: dict[str, Case] = {
    # one rank stops
    "early_stopping": with_callback(
        0, lambda: callbacks.EarlyStopping("loss", min_delta=100.0, patience=1)
    ),
    "early_stopping_restores": with_callback(
        0,
        lambda: callbacks.EarlyStopping(
            "loss", min_delta=100.0, patience=2, restore_best_weights=True
        ),
    ),
    "stop_of_rank_1": with_callback(1, lambda: Do(stop, end_of=1)),
    "stop_at_a_step": with_callback(1, lambda: AtStep(stop, epoch=1, step=4)),
    "stop_at_the_last_step": with_callback(1, lambda: AtStep(stop, epoch=1, step=9)),
    "stop_from_a_thread": stops_from_a_thread,
    # one rank sets the rate or the weights
    "reduce_on_plateau": with_callback(
        0, lambda: callbacks.ReduceLROnPlateau("loss", min_delta=100.0, patience=1, factor=0.5)
    ),
    "scheduler": with_callback(
        0, lambda: callbacks.LearningRateScheduler(lambda epoch: 0.1 * 0.5**epoch)
    ),
    "rate_of_rank_1": with_callback(
        1, lambda: callbacks.LearningRateScheduler(lambda epoch: 0.1 * 0.5**epoch)
    ),
    "rate_by_step": rates_of_a_schedule_on_the_root,
    "weights_at_the_begin": with_callback(0, lambda: Do(set_ones, begin_of=2)),
    "weights_at_the_end": with_callback(0, lambda: Do(set_ones, end_of=3)),
    "weights_after_the_end": with_callback(0, lambda: Do(set_ones)),
    "weights_of_rank_1": with_callback(1, lambda: Do(set_ones, end_of=1)),
    # one rank restores a backup
    "backup_on_the_root": lambda ranks, folder: restored_backup(ranks, folder, own=False),
    "backup_in_one_folder": lambda ranks, folder: restored_backup(ranks, folder, own=True),
    "backup_on_rank_1": with_callback(1, lambda: callbacks.BackupAndRestore("unused")),
    # one rank's data ends
    "known_data_ends": ends_early(known=True),
    "data_ends": ends_early(known=False),
    "data_ends_within_a_block": ends_early(known=False, steps_per_execution=4),
    "endless_data": endless_data,
    # one rank leaves the others
    "evaluates_alone": evaluates_alone,
    "fails_before_the_begin": fails_before_the_begin,
    "other_settings": other_settings,
    "other_epochs": other_epochs,
    # metrics
    "maximum": metric_of_a_maximum,
    "undeclared_metric": undeclared_metric,
    # each ends its job
    "fails_in_a_callback": with_callback(1, lambda: Do(fail, end_of=1)),
    "data_fails": data_fails,
    "fails_at_a_step": with_callback(1, lambda: AtStep(fail, epoch=0, step=3)),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
