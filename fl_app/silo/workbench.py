"""The workbench of a silo's process: computes tasks, keeps data, batches and compiled models."""

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from fl_app.messages import TRAIN, LocalResult, Task, TrainingRequest
from fl_app.silo.data import Silo, check_schema, load_silo
from fl_app.silo.policy import SiloSettings
from fl_app.silo.training import (
    ALONE,
    LocalData,
    LocalTrainer,
    Ranks,
    epochs_of_round,
    prepare_data,
    prepare_trainer,
)
from shared.data import Schema
from shared.experiment import Experiment
from shared.state import State
from shared.weights import Weights


class Bench(Protocol):
    """The place where a silo's tasks are computed: this process, or the ranks of a cluster."""

    @property
    def load(self) -> "Loader":
        """Loads the silo's examples."""

    def run(
        self, task: Task, settings: SiloSettings, experiment: Experiment, state: State
    ) -> tuple[LocalResult, State]:
        """Trains or evaluates from the task's weights; returns the result and the state after it.

        Raises ValueError, or SiloFailure, if it cannot be done.
        """


Loader = Callable[[SiloSettings, Experiment], Silo]


class KeptSilos:
    """Loads silos' examples; reads those that it keeps again only if their file has changed."""

    def __init__(self, num_kept: int = 2) -> None:
        self._load = lru_cache(num_kept)(_load_stamped)

    def __call__(self, settings: SiloSettings, experiment: Experiment) -> Silo:
        """The silo's examples. Raises ValueError if they cannot be used, SiloFailure if the owner's
        rules forbid it.
        """
        return self._load(settings, _stamp(settings.source), experiment)


class Workbench:
    """Computes tasks in this process; keeps data, batches and compiled models for the next ones.

    A compiled model is kept by experiment and schema: a further silo in the same process compiles
    nothing again.
    """

    def __init__(self, ranks: Ranks = ALONE, load: Loader | None = None, num_kept: int = 2) -> None:
        """`num_kept`: the silos whose batches, and the experiments whose models, are kept."""
        self.load = load or KeptSilos(num_kept)
        self._ranks = ranks
        self._data = lru_cache(num_kept)(self._prepare_data)
        self._trainer = lru_cache(num_kept)(self._prepare_trainer)

    def prepare(
        self, schema: Schema, settings: SiloSettings, experiment: Experiment
    ) -> tuple[LocalTrainer, LocalData]:
        """The compiled model of the experiment, and the silo's batches for it."""
        silo = self.load(settings, experiment)
        check_schema(schema, silo.schema)
        data = self._data(silo, schema, experiment)
        # Only schedules of learning rates that ranks share depend on the steps.
        steps_per_epoch = 0 if self._ranks is ALONE else len(data.batches)
        return self._trainer(schema, experiment, steps_per_epoch), data

    def run(
        self, task: Task, settings: SiloSettings, experiment: Experiment, state: State
    ) -> tuple[LocalResult, State]:
        started = time.perf_counter()
        request = TrainingRequest.from_task(task)
        trainer, data = self.prepare(request.schema, settings, experiment)

        # Evaluate the incoming weights, if asked to, then train from them.
        weights = list(task.arrays)
        trainer.check_weights(weights)
        validation = trainer.evaluate(data, weights) if request.evaluate else {}
        metrics: dict[str, float] = {}
        update: Weights = []
        if task.kind == TRAIN:
            epochs = epochs_of_round(experiment, task.round)
            outcome = trainer.train(data, weights, epochs, state)
            metrics, update, state = outcome.metrics, outcome.update, outcome.state

        result = LocalResult(
            num_examples=len(data.silo.train),
            num_validation=len(data.silo.validation),
            train=metrics,
            validation=validation,
            update=update,
            seconds=time.perf_counter() - started,
        )
        return result, state

    def _prepare_data(self, silo: Silo, schema: Schema, experiment: Experiment) -> LocalData:
        return prepare_data(silo, schema, experiment, self._ranks)

    def _prepare_trainer(
        self, schema: Schema, experiment: Experiment, steps_per_epoch: int
    ) -> LocalTrainer:
        return prepare_trainer(schema, experiment, steps_per_epoch, self._ranks)


def _load_stamped(
    settings: SiloSettings, stamp: tuple[int, ...] | None, experiment: Experiment
) -> Silo:
    """Loads a silo. The stamp is part of the key under which the silo is kept."""
    return load_silo(settings, experiment)


def _stamp(source: str) -> tuple[int, ...] | None:
    """Numbers that change when the data does; None for a built-in set.

    Of a folder: when something is added, taken out or renamed in it or in a subfolder, or a file of
    its own changes. The files of subfolders, which may be many thousands, are not looked at.
    """
    path = Path(source)
    if not path.exists():
        return None
    stamp: list[int] = []
    for file in [path, *(sorted(path.iterdir()) if path.is_dir() else [])]:
        status = file.stat()
        stamp += [status.st_mtime_ns, status.st_size]
    return tuple(stamp)
