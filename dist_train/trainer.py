"""The trainer: one experiment on 1 to N ranks, with checkpoints, resume and a run record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dist_train.collectives import Communicator, agree, check_same_examples
from dist_train.gradients import Aggregation
from dist_train.keras_horovod import broadcast_variables, bytes_sent, distribute
from shared.augmentation import augmentation_of
from shared.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.data import Dataset, Schema, Splits, load_examples, shard, split
from shared.experiment import Experiment
from shared.mlflow_record import make_record
from shared.outcome import outcome
from shared.run_record import CHECKPOINT, NullRecord, Record
from shared.training import (
    EpochBatches,
    LearningRate,
    batch_slices,
    compile_model,
    evaluate,
    evaluation_batches,
    fit_epochs,
)
from shared.zoo import build_model
from shared.zoo.adapters import adapter_weights

BEST_MODEL = "best.keras"
BEST_WEIGHTS = "best.npz"  # of a model with adapters, which Keras merges into what it saves

STEPS_PER_EXECUTION = 8  # on ranks, whose cores have little time for Keras's Python between steps (docs/log.md)


def train(experiment: Experiment, communicator: Communicator, verbose: int = 0) -> dict[str, Any]:
    """Trains the experiment's model on all ranks and returns the result; the root writes the run record.

    Guarantees: for a given experiment the global batches, and so the weights up to rounding, do not depend on the
    number of ranks; a resumed run ends with the weights of the undisturbed one. Raises ValueError, on every rank, for
    anything that the user can mend, before a step is taken.
    """
    job = agree(communicator, lambda: _build(experiment, communicator))
    check_same_examples(communicator, job.splits.train.sha256())
    runtime = "horovod" if communicator.world_size > 1 else "single"
    writer: Record = make_record(experiment, runtime, step_name="epoch")
    record = communicator.on_root(writer, NullRecord(experiment.run_directory))
    agree(communicator, record.open)
    if not experiment.run.resume:
        communicator.on_root(_save_state, _skip)(record.directory / CHECKPOINT, job, Progress())
    progress = _restore(job, record) if experiment.run.resume else Progress()
    if not progress.stopped_early:
        _fit(job, record, progress, verbose)
    return _finish(job, record, progress)


def global_batch_size(experiment: Experiment, world_size: int, num_examples: int) -> int:
    """The examples per step over all ranks. Raises ValueError if a rank would get none."""
    per_rank = experiment.training.per_rank_batch_size
    size = per_rank * world_size if per_rank else experiment.training.global_batch_size
    smallest = min(s.stop - s.start for s in batch_slices(num_examples, size))
    if smallest < world_size:
        raise ValueError(
            "Every rank needs an example in every step: a global batch must not be smaller than the number of ranks; "
            f"received batches of {size} (the smallest of the epoch: {smallest}) for {world_size} ranks. Set "
            f"training.global_batch_size = {2 * world_size} or more, or start fewer ranks."
        )
    return size


def learning_rate(experiment: Experiment, world_size: int, steps_per_epoch: int) -> LearningRate:
    """The base rate, or N times it after a linear warm-up (Goyal et al. 2017, arXiv:1706.02677, section 2.2).

    rate(t) = base (1 + (N - 1) min(t / t_warmup, 1)), with t in steps.
    """
    base = experiment.optimizer.learning_rate
    if not experiment.training.scale_learning_rate:
        return base
    scaled = base * world_size
    if experiment.training.warmup_epochs == 0:
        return scaled
    # a polynomial "decay" of power 1 that ends higher: part of Keras, so saved models load anywhere
    return keras.optimizers.schedules.PolynomialDecay(
        base, decay_steps=experiment.training.warmup_epochs * steps_per_epoch, end_learning_rate=scaled, power=1.0
    )


def aggregation(experiment: Experiment) -> Aggregation:
    """How the experiment wants its ranks' gradients reduced."""
    performance = experiment.performance
    return Aggregation(
        op=experiment.training.aggregation,
        grouping=performance.gradient_grouping,
        predivide_factor=performance.predivide_factor or None,
    )


def compile_for_ranks(
    model: keras.Model, experiment: Experiment, schema: Schema, steps_per_epoch: int, communicator: Communicator
) -> None:
    """Compiles in place, as the experiment says, so that `fit` trains on all ranks together."""
    world_size = communicator.world_size
    rate = learning_rate(experiment, world_size, steps_per_epoch)
    compile_model(model, experiment, schema, rate, STEPS_PER_EXECUTION if world_size > 1 else 1)
    distribute(
        model,
        communicator,
        aggregation=aggregation(experiment),
        sync_batch_norm=experiment.training.sync_batch_norm,
        compile_update=None if experiment.performance.compile_update else False,
    )


@dataclass
class Progress:
    """What a checkpoint holds beside the arrays: how far the run is and what it has seen."""

    epoch: int = 0  # epochs done
    best_epoch: int = 0
    best_loss: float = math.inf
    epochs_since_best: int = 0
    bytes_sent: int = 0  # by all ranks
    stopped_early: bool = False


@dataclass(frozen=True)
class _Job:
    """One rank's part of the training, built and checked."""

    experiment: Experiment
    communicator: Communicator
    splits: Splits
    batches: EpochBatches
    model: keras.Model

    def my_part(self, dataset: Dataset) -> Dataset:
        return shard(dataset, self.communicator.rank, self.communicator.world_size)


def _build(experiment: Experiment, communicator: Communicator) -> _Job:
    """Everything that a user's mistake can break."""
    data = experiment.data
    splits = split(load_examples(data), data, experiment.seed)
    watches = experiment.training.early_stopping_patience > 0 or experiment.training.restore_best
    if watches and len(splits.validation) == 0:
        raise ValueError(
            f"training.early_stopping_patience and training.restore_best need validation examples; received "
            f"{data.validation_fraction:g} of {len(splits.train)}, which is none. Raise data.validation_fraction."
        )
    rank, world_size = communicator.rank, communicator.world_size
    batch_size = global_batch_size(experiment, world_size, len(splits.train))
    batches = EpochBatches(
        splits.train,
        batch_size,
        experiment.seed,
        rank=rank,
        world_size=world_size,
        augmentation=augmentation_of(experiment.data, splits.schema.input_shape),
    )
    model = build_model(experiment.model, splits.schema, experiment.seed)
    compile_for_ranks(model, experiment, splits.schema, len(batches), communicator)
    model.optimizer.build(model.trainable_variables)
    return _Job(experiment, communicator, splits, batches, model)


def _fit(job: _Job, record: Record, progress: Progress, verbose: int) -> None:
    callbacks: list[keras.callbacks.Callback] = [EndEpoch(job, record, progress)]
    if job.experiment.run.tensorboard:
        board = keras.callbacks.TensorBoard(str(record.directory / "tensorboard"))
        callbacks += job.communicator.on_root([board], [])
    fit_epochs(
        job.model,
        job.batches,
        first_epoch=progress.epoch,
        last_epoch=job.experiment.training.epochs,
        validation=job.my_part(job.splits.validation),
        callbacks=callbacks,
        verbose=verbose,
    )


class EndEpoch(keras.callbacks.Callback):
    """After each epoch: note the best, decide whether to stop, write the record's row and the checkpoint."""

    def __init__(self, job: _Job, record: Record, progress: Progress) -> None:
        super().__init__()
        self.job, self.record, self.progress = job, record, progress
        self.bytes_before = progress.bytes_sent
        self.save_best, self.save_state = job.communicator.on_root((_save_best, _save_state), (_skip, _skip))

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        logs = {name: float(value) for name, value in (logs or {}).items()}
        metrics = {"train": {name: value for name, value in logs.items() if not name.startswith("val_")}}
        if validation := {name[4:]: value for name, value in logs.items() if name.startswith("val_")}:
            metrics["validation"] = validation
        progress = self.progress
        progress.epoch = epoch + 1
        progress.bytes_sent = self.bytes_before + sum(self.job.communicator.all_gather_object(bytes_sent(self.model)))
        self._note_best(validation.get("loss", math.inf))
        self.record.append({"epoch": progress.epoch, **metrics, "bytes_sent": progress.bytes_sent})
        self.save_state(self.record.directory / CHECKPOINT, self.job, progress)

    def _note_best(self, validation_loss: float) -> None:
        progress = self.progress
        progress.epochs_since_best += 1
        if validation_loss < progress.best_loss:
            progress.best_loss, progress.best_epoch, progress.epochs_since_best = validation_loss, progress.epoch, 0
            self.save_best(self.record.directory, self.model)
        patience = self.job.experiment.training.early_stopping_patience
        if patience and progress.epochs_since_best >= patience:
            progress.stopped_early = self.model.stop_training = True


def _skip(*_: Any) -> None:
    """What the other ranks do where the root writes a file."""


def _nothing(*_: Any) -> dict[str, Any]:
    """What the other ranks add to the result."""
    return {}


def _save_best(directory: Path, model: keras.Model) -> None:
    model.save(directory / BEST_MODEL)
    if adapter_weights(model):
        np.savez(directory / BEST_WEIGHTS, *model.get_weights(), allow_pickle=False)


def _save_state(path: Path, job: _Job, progress: Progress) -> None:
    arrays = {
        "model": [np.asarray(v) for v in job.model.variables],
        "optimizer": [np.asarray(v) for v in job.model.optimizer.variables],
    }
    meta = {**vars(progress), "world_size": job.communicator.world_size}
    save_checkpoint(path, job.experiment, Checkpoint(arrays, meta))


def _restore(job: _Job, record: Record) -> Progress:
    """The root reads the checkpoint; every rank gets its variables and progress."""
    communicator = job.communicator
    path = record.directory / CHECKPOINT
    meta = agree(communicator, communicator.on_root(lambda: _read_state(path, job), dict))
    broadcast_variables(job.model, communicator)
    progress = Progress(**communicator.broadcast_object(meta))
    record.resume_at(progress.epoch)
    return progress


def _read_state(path: Path, job: _Job) -> dict[str, Any]:
    """Sets the variables of the model and its optimizer to the checkpoint's, and returns the progress in it."""
    checkpoint = load_checkpoint(path, job.experiment, "model", "optimizer")
    for name, variables in (("model", job.model.variables), ("optimizer", job.model.optimizer.variables)):
        arrays = checkpoint.arrays[name]
        if [array.shape for array in arrays] != [tuple(variable.shape) for variable in variables]:
            raise ValueError(
                f"The {name} in {path} has other variables than the one built now: {len(arrays)} against "
                f"{len(variables)}, or other shapes. Resume with the code and the data that the run began with."
            )
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)
    meta = dict(checkpoint.meta)
    began, now = meta.pop("world_size"), job.communicator.world_size
    if job.experiment.training.per_rank_batch_size and began != now:
        raise ValueError(
            "With training.per_rank_batch_size the number of ranks is part of the experiment; the run began with "
            f"{began}, received {now}. Resume with {began} ranks."
        )
    return meta


def _finish(job: _Job, record: Record, progress: Progress) -> dict[str, Any]:
    if job.experiment.training.restore_best and progress.best_epoch:
        job.model.set_weights(_best_weights(job, record))
    splits = {name: getattr(job.splits, name) for name in ("train", "validation", "test")}
    metrics = {name: evaluate(job.model, job.my_part(dataset)) for name, dataset in splits.items() if len(dataset)}
    result = {
        "world_size": job.communicator.world_size,
        "metrics": metrics,
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,  # 0: no validation examples to tell
        "bytes_sent": progress.bytes_sent,
    }
    if len(job.splits.test):
        show = job.communicator.on_root(outcome, _nothing)
        result |= show(job.model, evaluation_batches(job.splits.test), job.splits.schema, job.experiment.seed)
    record.finish(job.model, job.splits.schema, result)
    return result


def _best_weights(job: _Job, record: Record) -> list[np.ndarray]:
    own = job.model.get_weights()
    read = job.communicator.on_root(lambda: _read_best(record.directory, job.model), lambda: own)
    return job.communicator.broadcast_arrays(read())


def _read_best(directory: Path, model: keras.Model) -> list[np.ndarray]:
    if not adapter_weights(model):
        weights: list[np.ndarray] = keras.models.load_model(directory / BEST_MODEL, compile=False).get_weights()
        return weights
    with np.load(directory / BEST_WEIGHTS) as file:
        return [file[f"arr_{i}"] for i in range(len(file))]
