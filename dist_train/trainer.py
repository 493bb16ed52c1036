"""The trainer: one experiment on 1 to N ranks, with checkpoints, resume and a run record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from dist_train.agreement import agree, check_same_examples
from dist_train.collectives import Communicator
from dist_train.keras_horovod import broadcast_variables, bytes_sent, distribute
from dist_train.progress import (
    Circumstances,
    Progress,
    read_best,
    restore_state,
    save_best,
    save_state,
)
from dist_train.reduction import Aggregation
from shared.augmentation import augmentation_of
from shared.data import Dataset, Schema, Splits, load_examples, shard, split
from shared.experiment import Experiment
from shared.mlflow_record import make_record
from shared.outcome import outcome
from shared.run_record import CHECKPOINT, NullRecord, Record, aborted_on_error
from shared.training import (
    EpochBatches,
    LearningRate,
    batch_slices,
    compile_model,
    evaluate,
    evaluation_batches,
    fit_epochs,
)
from shared.zoo import build_model, check_own_model


def train(experiment: Experiment, communicator: Communicator, verbose: int = 0) -> dict[str, Any]:
    """Trains the experiment's model on all ranks and returns the result.

    The root writes the run record. Guarantees: for a given experiment the global batches, and so
    the weights up to rounding, do not depend on the number of ranks; a resumed run ends with the
    weights of the undisturbed one. Raises ValueError, on every rank, for anything that the user can
    fix, before a step is taken.
    """
    job = agree(communicator, lambda: _build(experiment, communicator))
    check_same_examples(communicator, job.circumstances.training_data)

    # Open the record, on the root.
    runtime = "horovod" if communicator.world_size > 1 else "single"
    writer: Record = make_record(experiment, runtime, step_name="epoch")
    record = communicator.on_root(writer, NullRecord(experiment.run_directory))
    with aborted_on_error(record):
        agree(communicator, record.open)

        # Train, from the beginning or from the checkpoint on.
        progress = _restore(job, record) if experiment.run.resume else _begin(job, record)
        if not progress.stopped_early:
            progress = _fit(job, record, progress, verbose)
        return _finish(job, record, progress)


# --- settings that depend on the ranks


def global_batch_size(experiment: Experiment, world_size: int, num_examples: int) -> int:
    """Returns the examples per step over all ranks. Raises ValueError if a rank would get none."""
    size = experiment.training.batch_size(world_size)
    smallest = min(batch.stop - batch.start for batch in batch_slices(num_examples, size))
    if smallest < world_size:
        raise ValueError(
            "Every rank needs an example in every step: a global batch must not be smaller than"
            f" the number of ranks; received batches of {size} (the smallest of the epoch:"
            f" {smallest}) for {world_size} ranks. Set training.global_batch_size ="
            f" {2 * world_size} or more, or start fewer ranks."
        )
    return size


def learning_rate(experiment: Experiment, world_size: int, steps_per_epoch: int) -> LearningRate:
    """Returns the base rate or, if the experiment scales it, N times it after a linear warm-up.

    rate(t) = base (1 + (N - 1) min(t / t_warmup, 1)), with t in steps (Goyal et al. 2017,
    arXiv:1706.02677, section 2.2).
    """
    base = experiment.optimizer.learning_rate
    if not experiment.training.scale_learning_rate:
        return base

    scaled = base * world_size
    if experiment.training.warmup_epochs == 0:
        return scaled

    # A polynomial "decay" of power 1 that ends higher: of Keras, so saved models load anywhere.
    return keras.optimizers.schedules.PolynomialDecay(
        base,
        decay_steps=experiment.training.warmup_epochs * steps_per_epoch,
        end_learning_rate=scaled,
        power=1.0,
    )


def aggregation(experiment: Experiment) -> Aggregation:
    """Returns the way in which the experiment wants its ranks' gradients reduced."""
    performance = experiment.performance
    return Aggregation(
        op=experiment.training.aggregation,
        grouping=performance.gradient_grouping,
        predivide_factor=performance.predivision,
    )


def compile_for_ranks(
    model: keras.Model,
    experiment: Experiment,
    schema: Schema,
    steps_per_epoch: int,
    communicator: Communicator,
) -> None:
    """Compiles in place, as the experiment says, so that `fit` trains on all ranks together."""
    world_size = communicator.world_size
    rate = learning_rate(experiment, world_size, steps_per_epoch)
    compile_model(model, experiment, schema, rate, world_size)
    distribute(
        model,
        communicator,
        aggregation=aggregation(experiment),
        sync_batch_norm=experiment.training.sync_batch_norm,
        compile_update=None if experiment.performance.compile_update else False,
    )


# --- before the first step


@dataclass(frozen=True)
class _Job:
    """One rank's part of the training, built and checked."""

    experiment: Experiment
    communicator: Communicator
    splits: Splits
    batches: EpochBatches
    model: keras.Model
    circumstances: Circumstances

    def my_part(self, dataset: Dataset) -> Dataset:
        return shard(dataset, self.communicator.rank, self.communicator.world_size)


def _build(experiment: Experiment, communicator: Communicator) -> _Job:
    """Builds everything that a user's mistake can break."""
    data = experiment.data
    splits = split(load_examples(data), data, experiment.seed)
    _check_validation(experiment, splits)

    rank = communicator.rank
    world_size = communicator.world_size
    batches = EpochBatches(
        splits.train,
        global_batch_size(experiment, world_size, len(splits.train)),
        experiment.seed,
        rank=rank,
        world_size=world_size,
        augmentation=augmentation_of(data, splits.schema.input_shape),
    )

    check_own_model(experiment.model, splits.schema)
    model = build_model(experiment.model, splits.schema, experiment.seed)
    compile_for_ranks(model, experiment, splits.schema, len(batches), communicator)
    model.optimizer.build(model.trainable_variables)
    circumstances = Circumstances(world_size, splits.train.sha256())
    return _Job(experiment, communicator, splits, batches, model, circumstances)


def _check_validation(experiment: Experiment, splits: Splits) -> None:
    if experiment.training.selects_by_validation and len(splits.validation) == 0:
        raise ValueError(
            "training.early_stopping_patience and training.restore_best need validation examples;"
            f" received {experiment.data.validation_fraction:g} of {len(splits.train)}, which is"
            " none. Raise data.validation_fraction."
        )


def _begin(job: _Job, record: Record) -> Progress:
    """Saves the state before the first epoch."""
    progress = Progress()
    _save_state(job, record, progress)
    return progress


def _restore(job: _Job, record: Record) -> Progress:
    """Reads the checkpoint on the root; every rank gets its variables and the progress."""
    communicator = job.communicator
    path = record.directory / CHECKPOINT

    def read() -> Progress:
        return restore_state(path, job.experiment, job.model, job.circumstances)

    progress = agree(communicator, communicator.on_root(read, Progress))
    broadcast_variables(job.model, communicator)
    progress = communicator.broadcast_object(progress)
    record.resume_at(progress.epoch)
    return progress


def _save_state(job: _Job, record: Record, progress: Progress) -> None:
    if job.communicator.is_root:
        path = record.directory / CHECKPOINT
        save_state(path, job.experiment, job.model, job.circumstances, progress)


# --- the epochs


def _fit(job: _Job, record: Record, progress: Progress, verbose: int) -> Progress:
    """Trains the epochs that are left; returns the progress after the last."""
    end_epoch = EndEpoch(job, record, progress)
    callbacks: list[keras.callbacks.Callback] = [end_epoch]
    if job.experiment.run.tensorboard and job.communicator.is_root:
        callbacks.append(keras.callbacks.TensorBoard(str(record.directory / "tensorboard")))

    fit_epochs(
        job.model,
        job.batches,
        first_epoch=progress.epoch,
        last_epoch=job.experiment.training.epochs,
        validation=job.my_part(job.splits.validation),
        callbacks=callbacks,
        verbose=verbose,
    )
    return end_epoch.progress


class EndEpoch(keras.callbacks.Callback):
    """Ends each epoch: saves the best model, writes the record's row and the checkpoint.

    Stops the training when the validation loss has not fallen for
    training.early_stopping_patience epochs.
    """

    def __init__(self, job: _Job, record: Record, progress: Progress) -> None:
        super().__init__()
        self.job = job
        self.record = record
        self.progress = progress
        self.bytes_before = progress.bytes_sent

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        metrics = _by_split(logs or {})
        bytes_by_rank = self.job.communicator.all_gather_object(bytes_sent(self.model))

        # Keep the best model; without validation examples there is none.
        validation_loss = metrics.get("validation", {}).get("loss", math.inf)
        best = self.progress.best.after(epoch + 1, validation_loss)
        is_improved = best.evaluations_since == 0
        if is_improved and self.job.communicator.is_root:
            save_best(self.record.directory, self.model)
        has_stopped = self.job.experiment.training.stops_early(best.evaluations_since)
        if has_stopped:
            self.model.stop_training = True

        # The row first: a run resumed from the checkpoint drops the rows after it.
        num_bytes = self.bytes_before + sum(bytes_by_rank)
        self.progress = Progress(epoch + 1, best, num_bytes, has_stopped)
        self.record.append({"epoch": epoch + 1, **metrics, "bytes_sent": num_bytes})
        _save_state(self.job, self.record, self.progress)


def _by_split(logs: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Returns an epoch's logs as train and, if there are some, validation metrics.

    >>> _by_split({"loss": 1.0, "val_loss": 2.0})
    {'train': {'loss': 1.0}, 'validation': {'loss': 2.0}}
    """
    train_metrics = {}
    validation_metrics = {}
    for name, value in logs.items():
        if name.startswith("val_"):
            validation_metrics[name.removeprefix("val_")] = float(value)
        else:
            train_metrics[name] = float(value)

    if not validation_metrics:
        return {"train": train_metrics}
    return {"train": train_metrics, "validation": validation_metrics}


# --- after the last step


def _finish(job: _Job, record: Record, progress: Progress) -> dict[str, Any]:
    """Evaluates the final model and writes the result, which it returns."""
    if job.experiment.training.restore_best and progress.best.step:
        job.model.set_weights(_best_weights(job, record))

    splits = {name: getattr(job.splits, name) for name in ("train", "validation", "test")}
    metrics = {
        name: evaluate(job.model, job.my_part(dataset))
        for name, dataset in splits.items()
        if len(dataset)
    }
    result = {
        "world_size": job.communicator.world_size,
        "metrics": metrics,
        "epochs": progress.epoch,
        "best_epoch": progress.best.step,  # 0: no validation examples
        "bytes_sent": progress.bytes_sent,
    }

    # The root alone has a use for confusions and samples.
    if len(job.splits.test) and job.communicator.is_root:
        batches = evaluation_batches(job.splits.test)
        result |= outcome(job.model, batches, job.splits.schema, job.experiment.seed)
    record.finish(job.model, job.splits.schema, result)
    return result


def _best_weights(job: _Job, record: Record) -> list[np.ndarray]:
    """Returns the weights of the best epoch on every rank; the root reads them."""
    is_root = job.communicator.is_root
    own = read_best(record.directory, job.model) if is_root else job.model.get_weights()
    return job.communicator.broadcast_arrays(own)
