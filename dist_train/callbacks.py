"""Keras callbacks for training on ranks. Public: LearningRateWarmup, LearningRateSchedule,
AverageLogs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras

from dist_train.agreement import AgreedError, meet
from dist_train.collectives import Communicator


@dataclass
class _BaseRate:
    """An optimizer's base rate, and the rate and number of steps that these callbacks left."""

    base: float
    left: float
    iterations: int


_base_rates: WeakKeyDictionary[keras.optimizers.Optimizer, _BaseRate] = WeakKeyDictionary()


class _RateCallback(keras.callbacks.Callback):
    """Sets the learning rate from the base rate: the compiled one, unless given.

    | the optimizer, at the start of `fit`                  | base rate                           |
    |-------------------------------------------------------|-------------------------------------|
    | has taken no step                                     | its rate                            |
    | has the rate that these callbacks left                | that of the `fit` before            |
    | has been given another rate since, and taken no step  | its rate                            |
    | any other, such as a loaded one                       | ValueError, unless `base` is given  |
    """

    def __init__(self, base: float | None) -> None:
        super().__init__()
        self.given_base = base

    def on_train_begin(self, logs: object = None) -> None:
        self.base = base_rate(self.model, self.given_base)

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        note_rate(self.model, self.base)

    def set_rate(self, rate: float) -> None:
        self.model.optimizer.learning_rate = rate


class LearningRateWarmup(_RateCallback):
    """Climbs linearly to the compiled learning rate.

    rate(t) = rate (1/N + (1 - 1/N) min(t / T, 1)), with t and T = warmup_epochs in steps. Compile
    with the scaled rate, N times that of one process (Goyal et al. 2017, arXiv:1706.02677, section
    2.2). With steps_per_execution > 1 the rate changes once per execution. Raises ValueError if the
    rate follows a schedule of its own, or if the compiled rate is not known (`base`).
    """

    def __init__(self, world_size: int, warmup_epochs: int, base: float | None = None) -> None:
        super().__init__(base)
        self.world_size = world_size
        self.warmup_epochs = warmup_epochs

    def on_train_begin(self, logs: object = None) -> None:
        super().on_train_begin()
        self.num_steps = self.warmup_epochs * self.params["steps"]
        self.epoch = 0

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        if self.epoch < self.warmup_epochs:
            step = self.epoch * self.params["steps"] + batch
            start = self.base / self.world_size
            climbed = (self.base - start) * (step / self.num_steps)
            self.set_rate(start + climbed)

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        # Before the next epoch, whose rate a schedule may set.
        if epoch == self.warmup_epochs - 1:
            self.set_rate(self.base)
        super().on_epoch_end(epoch)


class LearningRateSchedule(_RateCallback):
    """Sets the rate to the compiled one times multiplier(epoch), in some epochs.

    From `first_epoch` on, and before `last_epoch` (None: to the end). Raises ValueError if the rate
    follows a schedule of its own, or if the compiled rate is not known (`base`).
    """

    def __init__(
        self,
        multiplier: Callable[[int], float],
        first_epoch: int = 0,
        last_epoch: int | None = None,
        base: float | None = None,
    ) -> None:
        super().__init__(base)
        self.multiplier = multiplier
        self.first_epoch = first_epoch
        self.last_epoch = last_epoch

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        has_begun = self.first_epoch <= epoch
        has_ended = self.last_epoch is not None and epoch >= self.last_epoch
        if has_begun and not has_ended:
            self.set_rate(self.base * self.multiplier(epoch))


class AverageLogs(keras.callbacks.Callback):
    """Averages over ranks the named values that callbacks before it have put into an epoch's logs.

    The model's own metrics need no such thing: they are those of all ranks' examples already.
    Raises ValueError for a name that some rank does not log.
    """

    def __init__(self, communicator: Communicator, *names: str) -> None:
        super().__init__()
        self.communicator = communicator
        self.names = names

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {} if logs is None else logs
        own = {name: float(logs[name]) for name in self.names if name in logs}
        by_rank = meet(self.communicator, "the averages of logs", own)

        for name in self.names:
            logged_by = [rank for rank, values in enumerate(by_rank) if name in values]
            if len(logged_by) < len(by_rank):
                raise AgreedError(
                    f"AverageLogs takes names that every rank logs; received {name!r}, logged by"
                    f" ranks {logged_by}. Put the callback that logs it before AverageLogs, on"
                    " every rank."
                )
            logs[name] = sum(values[name] for values in by_rank) / len(by_rank)


def settable_learning_rate(model: keras.Model) -> float:
    """Returns the optimizer's rate. Raises ValueError if it follows a schedule of its own."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not isinstance(optimizer._learning_rate, keras.Variable):
        received = type(optimizer._learning_rate).__name__
        raise ValueError(
            f"This callback sets the learning rate; received an optimizer with a {received} for it."
            " Compile with a number, or leave the callback out."
        )
    return float(optimizer.learning_rate)


def base_rate(model: keras.Model, given: float | None = None) -> float:
    """Returns the rate that callbacks set the optimizer's from, and notes it (`_RateCallback`)."""
    rate = settable_learning_rate(model)
    iterations = int(model.optimizer.iterations)
    noted = _base_rates.get(model.optimizer)

    if given is not None:
        base = given
    elif iterations == 0 or (noted and noted.iterations == iterations and noted.left != rate):
        base = rate
    elif noted and noted.left == rate:
        base = noted.base
    else:
        raise ValueError(
            "A warm-up or schedule goes from the compiled learning rate; received an optimizer"
            f" that has taken {iterations} steps before, with the rate {rate:g}, which may be a"
            " changed one. Pass the compiled rate: base=..."
        )
    note_rate(model, base)
    return base


def note_compiled_rate(model: keras.Model) -> None:
    """Notes the rate of an optimizer that has taken no step, if callbacks can set it."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if isinstance(optimizer._learning_rate, keras.Variable) and int(optimizer.iterations) == 0:
        note_rate(model, settable_learning_rate(model))


def note_rate(model: keras.Model, base: float) -> None:
    """Notes the optimizer's base rate, beside the rate and the steps that it has now."""
    optimizer = model.optimizer
    left = settable_learning_rate(model)
    _base_rates[optimizer] = _BaseRate(base, left, int(optimizer.iterations))
