"""The TensorFlow contenders of the distributed benchmark.

One process measures all models, one after the other.

dist_train    this project: distribute(model), then epochs of shared.training
bare_horovod  a plain loop around Horovod's DistributedGradientTape, in Horovod's own settings
mwms          the same loop under MultiWorkerMirroredStrategy, with TensorFlow's ring
one_process   the same epochs in one process on all cores, with the batch of all ranks

Ranks are pinned to one core each and compute with one thread. Only dist_train uses XLA, for the
optimizer's update, as it does by default.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from benchmarks.turns import Turns
from benchmarks.workloads import (
    LEARNING_RATE,
    NUM_CLASSES,
    NUM_RANKS,
    SEED,
    WORKLOADS,
    Workload,
    check_equal_weights,
    examples,
    keras_model,
    local_rank,
    measure_slices,
    pin_to_core,
)
from shared.data import Dataset
from shared.experiment import PerformanceSection
from shared.training import EpochBatches, fit_epochs

# A contender prepares the process, and returns its rank, the mean over ranks, and the function that
# reports a workload's slices.
Mean: TypeAlias = Callable[[float], float]
Measure: TypeAlias = Callable[[Workload, Turns], None]
Prepare: TypeAlias = Callable[[], tuple[int, Mean, Measure]]


def dist_train() -> tuple[int, Mean, Measure]:
    import dist_train.keras_horovod as hvk

    communicator = hvk.init(threads_per_rank=1)
    num_steps = PerformanceSection().steps_per_execution_on(communicator.world_size)

    def mean(value: float) -> float:
        return float(np.mean(communicator.all_gather_object(value)))

    def measure(workload: Workload, turns: Turns) -> None:
        model = hvk.distribute(compiled(workload, num_steps), communicator)
        measure_epochs(model, workload, turns, communicator.rank, communicator.world_size)
        check_equal_weights(model.get_weights(), mean)

    return communicator.rank, mean, measure


def one_process() -> tuple[int, Mean, Measure]:
    return 0, float, lambda workload, turns: measure_epochs(compiled(workload), workload, turns)


def bare_horovod() -> tuple[int, Mean, Measure]:
    import horovod.tensorflow as hvd

    compute_with_one_thread()
    hvd.init()

    def mean(value: float) -> float:
        return float(hvd.allreduce(tf.constant(value, tf.float64), op=hvd.Average))

    def measure(workload: Workload, turns: Turns) -> None:
        model, optimizer = keras_model(workload), adam()
        optimizer.build(model.trainable_variables)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        variables = [variable.value for variable in model.trainable_variables]

        @tf.function
        def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                value = loss(y, model(x, training=True))
            gradients = hvd.DistributedGradientTape(tape).gradient(value, variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return value

        measure_loop(workload, model, step, repeated_batches(workload, hvd.rank()), turns)

    return hvd.rank(), mean, measure


def mwms() -> tuple[int, Mean, Measure]:
    compute_with_one_thread()
    ring = tf.distribute.experimental.CommunicationImplementation.RING
    how = tf.distribute.experimental.CommunicationOptions(implementation=ring)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=how)
    rank = strategy.cluster_resolver.task_id

    @tf.function
    def sum_over_ranks(value: tf.Tensor) -> tf.Tensor:
        def total(own: tf.Tensor) -> tf.Tensor:
            placed = tf.identity(own)  # on the replica's device, which all_reduce asks for
            return tf.distribute.get_replica_context().all_reduce(
                tf.distribute.ReduceOp.SUM, placed
            )

        return strategy.run(total, args=(value,))

    def mean(value: float) -> float:
        return float(sum_over_ranks(tf.constant(value, tf.float64))) / NUM_RANKS

    def measure(workload: Workload, turns: Turns) -> None:
        with strategy.scope():
            model, optimizer = keras_model(workload), adam()
            optimizer.build(model.trainable_variables)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def train(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                # The optimizer sums over ranks.
                value = loss(y, model(x, training=True)) / NUM_RANKS
            variables = [variable.value for variable in model.trainable_variables]
            gradients = tape.gradient(value, variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return value

        @tf.function
        def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            return strategy.run(train, args=(x, y))

        batches = strategy.distribute_datasets_from_function(
            lambda _: repeated_batches(workload, rank)
        )
        measure_loop(workload, model, step, batches, turns)

    return rank, mean, measure


CONTENDERS: dict[str, Prepare] = {
    "dist_train": dist_train,
    "bare_horovod": bare_horovod,
    "mwms": mwms,
    "one_process": one_process,
}
PINNED = ("dist_train", "bare_horovod", "mwms")


def compute_with_one_thread() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)


def adam() -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(LEARNING_RATE)


def compiled(workload: Workload, steps_per_execution: int = 1) -> keras.Model:
    model = keras_model(workload)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        adam(),
        loss,
        metrics=["accuracy"],
        steps_per_execution=steps_per_execution,
        jit_compile=False,
    )
    return model


def repeated_batches(workload: Workload, rank: int) -> tf.data.Dataset:
    """A rank's examples over and over, in batches."""
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    dataset = tf.data.Dataset.from_tensor_slices(
        examples(workload, workload.num_examples, rank)
    ).repeat()
    return dataset.batch(workload.batch_size, drop_remainder=True).prefetch(2).with_options(options)


def measure_loop(
    workload: Workload, model: keras.Model, step: Callable[..., Any], batches: Any, turns: Turns
) -> None:
    """Reports the slices of step(x, y) over the batches.

    Raises RuntimeError unless all ranks hold the same weights afterwards.
    """
    iterator = iter(batches)

    def run(steps: int) -> None:
        for _ in range(steps):
            value = step(*next(iterator))
        float(value)  # waits until the last step is done

    measure_slices(run, workload, turns)
    check_equal_weights(model.get_weights(), turns.mean)


class TimedEpochs(keras.callbacks.Callback):
    """Reports each epoch of a fit but the first, which warms up.

    An epoch is timed from its begin to the end of its last step.
    """

    def __init__(self, workload: Workload, turns: Turns) -> None:
        super().__init__()
        self.workload, self.turns = workload, turns

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        if epoch > 0:
            self.turns.begin()
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.ended = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        num_examples = self.workload.num_steps * self.workload.global_batch_size
        if epoch > 0:
            self.turns.report(self.workload.name, num_examples / (self.ended - self.started))


def measure_epochs(
    model: keras.Model, workload: Workload, turns: Turns, rank: int = 0, world_size: int = 1
) -> None:
    """Reports the examples per second of epochs over the examples of all ranks."""
    parts = [examples(workload, workload.num_examples, r) for r in range(NUM_RANKS)]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    dataset = Dataset(x, y, NUM_CLASSES)
    batches = EpochBatches(
        dataset, workload.global_batch_size, SEED, rank=rank, world_size=world_size
    )
    fit_epochs(model, batches, 0, 1 + turns.num_slices, callbacks=[TimedEpochs(workload, turns)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, required=True)
    parser.add_argument("--turns", type=Path, required=True)
    parser.add_argument("--slices", type=int, required=True)
    options = parser.parse_args(arguments)
    if options.contender in PINNED:
        pin_to_core(local_rank())
    rank, mean, measure = CONTENDERS[options.contender]()
    turns = Turns(options.turns, options.slices, rank == 0, mean)
    for name in options.models:
        measure(WORKLOADS[name], turns)
        keras.backend.clear_session()
    return 0


if __name__ == "__main__":
    sys.exit(main())
