"""Keras callbacks for training on ranks. Public: LearningRateWarmup, LearningRateSchedule, AverageLogs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from dist_train.collectives import AgreedError, Communicator


class Synchronise(keras.callbacks.Callback):
    """At the start of `fit`: equal steps on all ranks, then the root's variables on all ranks."""

    def __init__(self, communicator: Communicator, validates: bool, broadcast: Callable[[keras.Model], None]) -> None:
        super().__init__()
        self.communicator = communicator
        self.validates = validates
        self.broadcast = broadcast

    def on_train_begin(self, logs: object = None) -> None:
        validates = self.communicator.all_gather_object(self.validates)
        if len(set(validates)) > 1:
            raise AgreedError(
                f"All ranks must validate or none, as metrics are summed over ranks; received {validates} by rank. "
                "Give every rank its part of the validation data."
            )
        steps = self.communicator.all_gather_object(self.params.get("steps"))
        if len(set(steps)) > 1 or steps[0] is None:
            raise AgreedError(
                f"All ranks must run the same, known number of steps per epoch; received {steps} by rank. Give every "
                "rank as many batches, or pass steps_per_epoch to fit."
            )
        self.broadcast(self.model)


class LearningRateWarmup(keras.callbacks.Callback):
    """Climbs to the compiled learning rate: rate(t) = rate (1/N + (1 - 1/N) min(t / T, 1)), t and T in steps.

    Compile with the scaled rate, N times that of one process (Goyal et al. 2017, arXiv:1706.02677, section 2.2).
    With steps_per_execution > 1 the rate changes once per execution.
    """

    def __init__(self, world_size: int, warmup_epochs: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.warmup_epochs = warmup_epochs

    def on_train_begin(self, logs: object = None) -> None:
        self.target = settable_learning_rate(self.model)
        self.num_steps = self.warmup_epochs * self.params["steps"]
        self.epoch = 0

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        if self.epoch < self.warmup_epochs:
            progress = (self.epoch * self.params["steps"] + batch) / self.num_steps
            start = self.target / self.world_size
            self.model.optimizer.learning_rate = start + (self.target - start) * progress
        elif self.epoch == self.warmup_epochs and batch == 0:
            self.model.optimizer.learning_rate = self.target


class LearningRateSchedule(keras.callbacks.Callback):
    """From `first_epoch` on, and before `last_epoch`: rate = compiled rate times multiplier(epoch)."""

    def __init__(self, multiplier: Callable[[int], float], first_epoch: int = 0, last_epoch: int | None = None) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.first_epoch = first_epoch
        self.last_epoch = last_epoch

    def on_train_begin(self, logs: object = None) -> None:
        self.base = settable_learning_rate(self.model)

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        if self.first_epoch <= epoch and (self.last_epoch is None or epoch < self.last_epoch):
            self.model.optimizer.learning_rate = self.base * self.multiplier(epoch)


class AverageLogs(keras.callbacks.Callback):
    """Averages over ranks the named values that callbacks before it have put into the logs of an epoch.

    The model's own metrics need no such thing: they are those of all ranks' examples already.
    """

    def __init__(self, communicator: Communicator, *names: str) -> None:
        super().__init__()
        self.communicator = communicator
        self.names = names

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        values = {} if logs is None else {name: float(logs[name]) for name in self.names if name in logs}
        by_rank = self.communicator.all_gather_object(values)
        for name in self.names:
            if logs is None or not all(name in values for values in by_rank):
                raise ValueError(
                    f"AverageLogs takes names that every rank logs; received {name!r}, logged by ranks "
                    f"{[rank for rank, values in enumerate(by_rank) if name in values]}. Put the callback that logs it "
                    "before AverageLogs, on every rank."
                )
            logs[name] = sum(values[name] for values in by_rank) / len(by_rank)


def settable_learning_rate(model: keras.Model) -> float:
    """The optimizer's rate. Raises ValueError if it follows a schedule of its own."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not isinstance(optimizer._learning_rate, keras.Variable):
        received = type(optimizer._learning_rate).__name__
        raise ValueError(
            f"This callback sets the learning rate; received an optimizer with a {received} for it. Compile with a "
            "number, or leave the callback out."
        )
    return float(optimizer.learning_rate)
