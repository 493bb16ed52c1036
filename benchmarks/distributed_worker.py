"""The TensorFlow contenders of the distributed benchmark: one process measures all models, one after the other.

dist_train    this project: distribute(model), then epochs of shared.training
bare_horovod  a plain loop around Horovod's DistributedGradientTape, in Horovod's own settings
mwms          the same loop under MultiWorkerMirroredStrategy, with the ring of TensorFlow's collectives
one_process   the same epochs in one process on all cores, with the batch of all ranks: what there is without ranks

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

from benchmarks.workloads import (
    LEARNING_RATE,
    NUM_CLASSES,
    NUM_EXAMPLES,
    NUM_RANKS,
    NUM_SLICES,
    SEED,
    WORKLOADS,
    Workload,
    check_equal_weights,
    examples,
    keras_model,
    local_rank,
    num_steps,
    pin_to_core,
    throughput,
    write_samples,
)
from shared.data import Dataset
from shared.training import EpochBatches, fit_epochs

EPOCH_S = 1.5  # long enough that the start of an epoch does not count for much

# Prepares the process, and returns this rank and what measures a workload: examples per second over all ranks.
Measure: TypeAlias = Callable[[Workload], list[float]]
Prepare: TypeAlias = Callable[[], tuple[int, Measure]]


def dist_train() -> tuple[int, Measure]:
    import dist_train.keras_horovod as hvk

    communicator = hvk.init(threads_per_rank=1)

    def mean(value: float) -> float:
        return float(np.mean(communicator.all_gather_object(value)))

    def measure(workload: Workload) -> list[float]:
        model = hvk.distribute(compiled(workload), communicator)
        found = throughput_of_epochs(model, workload, mean, communicator.rank, communicator.world_size)
        check_equal_weights(model.get_weights(), mean)
        return found

    return communicator.rank, measure


def one_process() -> tuple[int, Measure]:
    return 0, lambda workload: throughput_of_epochs(compiled(workload), workload, mean=float)


def bare_horovod() -> tuple[int, Measure]:
    import horovod.tensorflow as hvd

    compute_with_one_thread()
    hvd.init()

    def mean(value: float) -> float:
        return float(hvd.allreduce(tf.constant(value, tf.float64), op=hvd.Average))

    def measure(workload: Workload) -> list[float]:
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

        return measure_loop(workload, model, step, repeated_batches(workload, hvd.rank()), mean)

    return hvd.rank(), measure


def mwms() -> tuple[int, Measure]:
    compute_with_one_thread()
    ring = tf.distribute.experimental.CommunicationImplementation.RING
    how = tf.distribute.experimental.CommunicationOptions(implementation=ring)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=how)
    rank = strategy.cluster_resolver.task_id

    @tf.function
    def sum_over_ranks(value: tf.Tensor) -> tf.Tensor:
        def total(own: tf.Tensor) -> tf.Tensor:
            placed = tf.identity(own)  # on the replica's device, which all_reduce asks for
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, placed)

        return strategy.run(total, args=(value,))

    def mean(value: float) -> float:
        return float(sum_over_ranks(tf.constant(value, tf.float64))) / NUM_RANKS

    def measure(workload: Workload) -> list[float]:
        with strategy.scope():
            model, optimizer = keras_model(workload), adam()
            optimizer.build(model.trainable_variables)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def train(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                value = loss(y, model(x, training=True)) / NUM_RANKS  # the optimizer sums over ranks
            gradients = tape.gradient(value, [variable.value for variable in model.trainable_variables])
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            return value

        @tf.function
        def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
            return strategy.run(train, args=(x, y))

        batches = strategy.distribute_datasets_from_function(lambda _: repeated_batches(workload, rank))
        return measure_loop(workload, model, step, batches, mean)

    return rank, measure


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


def compiled(workload: Workload) -> keras.Model:
    model = keras_model(workload)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(adam(), loss, metrics=["accuracy"], jit_compile=False)
    return model


def repeated_batches(workload: Workload, rank: int) -> tf.data.Dataset:
    """A rank's examples over and over, in batches."""
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    dataset = tf.data.Dataset.from_tensor_slices(examples(workload, NUM_EXAMPLES, rank)).repeat()
    return dataset.batch(workload.batch_size, drop_remainder=True).prefetch(2).with_options(options)


def measure_loop(
    workload: Workload, model: keras.Model, step: Callable[..., Any], batches: Any, mean: Callable[[float], float]
) -> list[float]:
    """The throughput of step(x, y) over the batches, after which all ranks must hold the same weights."""
    iterator = iter(batches)

    def run(steps: int) -> None:
        for _ in range(steps):
            value = step(*next(iterator))
        float(value)  # waits until the last step is done

    found = throughput(run, mean, workload.global_batch_size)
    check_equal_weights(model.get_weights(), mean)
    return found


class EpochTimer(keras.callbacks.Callback):
    """Times each epoch of a fit, from on_epoch_begin to the last on_train_batch_end."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.seconds_per_step = 0.0  # of the last epoch, its first step not counted

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.started = time.perf_counter()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.ends.append(time.perf_counter())

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        self.seconds.append(self.ends[-1] - self.started)
        self.seconds_per_step = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def throughput_of_epochs(
    model: keras.Model, workload: Workload, mean: Callable[[float], float], rank: int = 0, world_size: int = 1
) -> list[float]:
    """Examples per second of fit, in NUM_SLICES epochs of about EPOCH_S; the epochs before them warm up."""

    def run_epochs(steps: int, epochs: int) -> EpochTimer:
        x, y = examples(workload, steps * workload.global_batch_size, rank=0)
        dataset = Dataset(x, y, NUM_CLASSES)
        batches = EpochBatches(dataset, workload.global_batch_size, SEED, rank=rank, world_size=world_size)
        timer = EpochTimer()
        fit_epochs(model, batches, first_epoch=0, last_epoch=epochs, callbacks=[timer])
        return timer

    steps = max(2, num_steps(mean(run_epochs(steps=2, epochs=2).seconds_per_step), EPOCH_S))
    seconds = run_epochs(steps, 1 + NUM_SLICES).seconds[1:]
    return [workload.global_batch_size * steps / each for each in seconds]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.contender in PINNED:
        pin_to_core(local_rank())
    rank, measure = CONTENDERS[options.contender]()
    samples = {}
    for name in options.models:
        samples[name] = measure(WORKLOADS[name])
        keras.backend.clear_session()
    if rank == 0:
        write_samples(options.output, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
