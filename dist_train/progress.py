"""The progress of a run on ranks, and its files: the checkpoint of the last epoch, the best model.

The root alone writes and reads the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

from shared.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.early_stopping import Best
from shared.experiment import Experiment
from shared.zoo.adapters import adapter_weights
from shared.zoo.own import load_saved_weights

BEST_MODEL = "best.keras"
BEST_WEIGHTS = "best.npz"  # of a model with adapters, which Keras merges into what it saves


@dataclass(frozen=True)
class Progress:
    """The state of a run beside its arrays."""

    epoch: int = 0  # epochs done
    best: Best = field(default_factory=Best)
    bytes_sent: int = 0  # by all ranks
    stopped_early: bool = False

    def to_meta(self) -> dict[str, Any]:
        """Returns the JSON values that a checkpoint holds."""
        return {
            "epoch": self.epoch,
            "best_epoch": self.best.step,
            "best_loss": self.best.loss,
            "epochs_since_best": self.best.evaluations_since,
            "bytes_sent": self.bytes_sent,
            "stopped_early": self.stopped_early,
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        best = Best(meta["best_epoch"], meta["best_loss"], meta["epochs_since_best"])
        return cls(meta["epoch"], best, meta["bytes_sent"], meta["stopped_early"])


@dataclass(frozen=True)
class Circumstances:
    """What a checkpoint notes of a run beside its experiment, for those who resume it.

    training_data: the hash of the training examples.
    """

    world_size: int
    training_data: str


def save_state(
    path: Path,
    experiment: Experiment,
    model: keras.Model,
    circumstances: Circumstances,
    progress: Progress,
) -> None:
    """Writes the checkpoint: the variables of the model and of its optimizer, and the progress."""
    arrays = {
        name: [np.asarray(variable) for variable in variables]
        for name, variables in _variables(model).items()
    }
    meta = {**progress.to_meta(), **asdict(circumstances)}
    save_checkpoint(path, experiment, Checkpoint(arrays, meta))


def restore_state(
    path: Path, experiment: Experiment, model: keras.Model, circumstances: Circumstances
) -> Progress:
    """Sets the variables of the model and of its optimizer to the checkpoint's.

    Returns the progress in it. Raises ValueError if there is no such checkpoint, if it belongs to
    another experiment, was trained on other examples, or if it has other variables.
    """
    checkpoint = load_checkpoint(path, experiment, "model", "optimizer")
    trained_on = checkpoint.meta.get("training_data", "")
    if trained_on != circumstances.training_data:
        raise ValueError(
            "A run is resumed on the training examples that it began with; received examples of the"
            f" hash {circumstances.training_data[:8]}, and {path} was trained on"
            f" {trained_on[:8] or 'unknown ones'}. Restore the data, or start over in another run"
            " directory."
        )

    for name, variables in _variables(model).items():
        _assign(variables, checkpoint.arrays[name], f"The {name} in {path}")

    began = checkpoint.meta["world_size"]
    world_size = circumstances.world_size
    if experiment.training.batch_grows_with_ranks and began != world_size:
        raise ValueError(
            "With training.per_rank_batch_size the number of ranks is part of the experiment; the"
            f" run began with {began}, received {world_size}. Resume with {began} ranks."
        )
    return Progress.from_meta(checkpoint.meta)


def save_best(directory: Path, model: keras.Model) -> None:
    """Writes the model, as the best so far."""
    model.save(directory / BEST_MODEL)
    if adapter_weights(model):
        np.savez(directory / BEST_WEIGHTS, *model.get_weights(), allow_pickle=False)


def read_best(directory: Path, model: keras.Model) -> list[np.ndarray]:
    """Returns the weights that `save_best` has written last, of a model like this one.

    The model has them too then, and its optimizer that epoch's variables.
    """
    if adapter_weights(model):
        with np.load(directory / BEST_WEIGHTS) as file:
            return [file[f"arr_{i}"] for i in range(len(file))]

    # Not by loading the model in it: Keras may not know the classes of the user's own.
    load_saved_weights(model, directory / BEST_MODEL)
    weights: list[np.ndarray] = model.get_weights()
    return weights


def _variables(model: keras.Model) -> dict[str, Sequence[keras.Variable]]:
    return {"model": model.variables, "optimizer": model.optimizer.variables}


def _assign(variables: Sequence[keras.Variable], arrays: Sequence[np.ndarray], where: str) -> None:
    if [array.shape for array in arrays] != [tuple(variable.shape) for variable in variables]:
        raise ValueError(
            f"{where} has other variables than the one built now: {len(arrays)} against"
            f" {len(variables)}, or other shapes. Resume with the code and the data that the run"
            " began with."
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
