"""The course of a `fit`: whatever one rank alone decides while it runs reaches all ranks.

| a rank alone ...                               | all ranks ...         | from              |
|------------------------------------------------|-----------------------|-------------------|
| asks to stop, in a callback                    | stop                  | the same step     |
| asks to stop, from a thread, a signal handler  | stop                  | a step later      |
| sets the learning rate                         | take the root's       | the next step     |
| sets variables, or restores a backup           | take the root's       | the next epoch    |
| begins at another epoch                        | begin at the root's   | the first epoch   |
| runs out of data before its steps_per_epoch    | end the epoch         | the step it lacks |
| fails                                          | fail, with its reason | at once           |
| evaluates or fits, while others do not         | fail                  | the next exchange |

Where ranks differ, each rank logs one sentence that says which rank did what. Stops, epochs and
variables are exchanged between epochs; the learning rate travels beside the gradients
(signals.py). Only where callbacks look at each batch, or data may run out, are there exchanges of
their own between steps. A rank that fails leaves the job, since the others may wait for it within a
step; that fails their collectives.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import keras

from dist_train.agreement import AgreedError, describe, is_known_to_all, meet, meet_as_failed
from dist_train.collectives import Communicator, LostRank, is_lost_rank
from dist_train.metric_states import states_of
from dist_train.signals import Signals
from dist_train.variables import broadcast_from_root

LOGGER = logging.getLogger("dist_train")


@dataclass(frozen=True)
class Request:
    """What a rank's `fit` is asked for.

    plan: what must be equal on all ranks, by name. steps: of an epoch; None: unknown.
    may_run_out: whether the data may end before these steps. watches_batches: whether a callback
    may stop the training at a batch. has_backup: whether there is a BackupAndRestore.
    """

    plan: Mapping[str, Any]
    steps: int | None = None
    may_run_out: bool = False
    watches_batches: bool = False
    has_backup: bool = False


class Course:
    """The course of one `fit` of a model, on this rank; a context manager around it."""

    def __init__(self, model: keras.Model, communicator: Communicator, signals: Signals) -> None:
        self.model = model
        self.communicator = communicator
        self.signals = signals

        # Whether some rank's data may run out, and some rank's callbacks watch each batch.
        self._may_run_out = False
        self._watches_batches = False

        self._has_begun = False
        self._epoch = 0
        self._step = 0
        self._has_data = True  # on all ranks, for the next block of this epoch
        self._wants_to_stop = False  # this rank, in this epoch
        self._has_stopped = False  # all ranks, in this epoch
        self._logged: set[str] = set()

    def __enter__(self) -> Self:
        self.signals.reset()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._may_run_out:
            self.model.train_function = self._plain_train_function
        if error is None:
            return

        # The other ranks wait for this one: where all begin, or anywhere.
        if self._has_begun and not is_known_to_all(error) and not is_lost_rank(error):
            self.communicator.leave(describe(error))
        else:
            tell_other_ranks(self.communicator, "the begin of fit", error)

    # --- the begin

    def begin(self, request: Request, steps: int | None) -> None:
        """Checks that all ranks are asked for the same, then gives them the root's variables."""
        states_of(self.model.metrics)  # refuses metrics that say not how ranks bring them together
        own = replace(request, steps=steps)
        requests = meet(self.communicator, "the begin of fit", own)
        self._has_begun = True
        _check(requests)

        self._watches_batches = any(request.watches_batches for request in requests)
        self._may_run_out = any(request.may_run_out for request in requests)
        if self._may_run_out:
            self._plain_train_function = self.model.train_function
            self.model.train_function = self._run_block
        broadcast_from_root(self.communicator, self.model, self.model.optimizer)

    def begin_at_the_roots_epoch(self) -> None:
        """Makes all ranks begin where the root does, which may have restored a backup."""
        epochs = meet(self.communicator, "the first epoch", self.model._initial_epoch)
        if any(epoch != epochs[0] for epoch in epochs):
            restored = [epoch or 0 for epoch in epochs]
            self._log_once(
                "epoch", f"Ranks have restored the epochs {restored}: all begin at rank 0's."
            )
        self.model._initial_epoch = epochs[0]

    # --- epochs

    def begin_epoch(self, epoch: int) -> None:
        """Gives all ranks the root's variables, which callbacks may have set."""
        self._epoch = epoch
        self._step = 0
        self._has_data = True
        self._wants_to_stop = False
        self._has_stopped = False
        self.take_the_roots_variables(f"the begin of epoch {epoch + 1}")

    def take_the_roots_variables(self, point: str) -> None:
        model = self.model
        differing = broadcast_from_root(self.communicator, model, model.optimizer, point)
        for path, ranks in itertools.islice(differing.items(), 1):
            more = f" and {len(differing) - 1} other variables" if len(differing) > 1 else ""
            self._log_once(
                "variables",
                f"Ranks {ranks} have another {path}{more} than rank 0 at {point}:"
                " all ranks take rank 0's.",
            )

    def end_epoch(self) -> None:
        """Stops all ranks if one asks for it."""
        own = self._wants_to_stop or (self.model.stop_training and not self._has_stopped)
        asks = meet(self.communicator, f"the end of epoch {self._epoch + 1}", own)
        if any(asks) and not all(asks):
            ranks = [rank for rank, has_asked in enumerate(asks) if has_asked]
            self._log_once(
                "stop", f"Ranks {ranks} stop in epoch {self._epoch + 1}: all ranks stop."
            )
        self.model.stop_training = any(asks)

    # --- blocks of steps

    def end_block(self) -> None:
        """Stops all ranks after the same block of steps if one asks for it."""
        asks = bool(self.model.stop_training)
        self._wants_to_stop |= asks
        if self._watches_batches:
            self._has_stopped = any(meet(self.communicator, "the end of a batch", asks))
        else:
            # The others may be in the next step already: this rank takes it too.
            if asks:
                self.signals.raise_alarm()
            self._has_stopped = self.signals.is_alarmed()
        self.model.stop_training = self._has_stopped

    def end_steps(self) -> None:
        """Ends the steps of an epoch: waits for ranks that may have more data."""
        if self._may_run_out and self._has_data:
            self._share_num_batches(0)

    def _run_block(self, iterator: Iterator[Any]) -> Any:
        """Runs as many of the block's steps as all ranks have data for."""
        batches = list(itertools.islice(iterator, self.model.steps_per_execution))
        num_batches = self._share_num_batches(len(batches))
        if num_batches == 0:
            raise StopIteration
        self._step += num_batches
        return self._plain_train_function(iter(batches[:num_batches]))

    def _share_num_batches(self, own: int) -> int:
        """Returns the number of batches that every rank has for the next block."""
        by_rank = meet(self.communicator, "the begin of a batch", own)
        smallest = min(by_rank)
        self._has_data = smallest > 0
        if smallest < max(by_rank):
            ended = [rank for rank, number in enumerate(by_rank) if number == smallest]
            self._log_once(
                "data",
                f"The data of ranks {ended} ended after {self._step + smallest} steps of epoch"
                f" {self._epoch + 1}: all ranks end the epoch there. Give every rank as many"
                " batches, or repeat() them.",
            )
        return smallest

    def _log_once(self, kind: str, sentence: str) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            LOGGER.warning(sentence)


def tell_other_ranks(communicator: Communicator, point: str, error: BaseException) -> None:
    """Tells the other ranks of an error, which the caller raises, at the next point where all meet.

    Unless they know. Raises LostRank in its place if another rank's failure is the cause of it.
    """
    if isinstance(error, LostRank) or is_known_to_all(error):
        return
    if not is_lost_rank(error):
        meet_as_failed(communicator, point, error)
        return

    reason = communicator.why_lost() or (
        "A rank has ended, or has not come to an exchange in the time of"
        " HOROVOD_STALL_SHUTDOWN_TIME_SECONDS (600 s); its lines, or Horovod's warnings of stalled"
        " tensors, say which and where"
    )
    raise LostRank(f"{reason}. The job's other ranks end too: start it again.") from None


def _check(requests: Sequence[Request]) -> None:
    """Raises AgreedError with the first thing that differs between ranks."""
    plans = [request.plan for request in requests]
    validates = [plan["validates"] for plan in plans]
    if len(set(validates)) > 1:
        raise AgreedError(
            "All ranks must validate or none, as metrics are summed over ranks; received"
            f" {validates} by rank. Give every rank its part of the validation data."
        )

    steps = [request.steps for request in requests]
    if len(set(steps)) > 1 or steps[0] is None:
        raise AgreedError(
            f"All ranks must run the same, known number of steps per epoch; received {steps} by"
            " rank. Give every rank as many batches, or pass steps_per_epoch to fit."
        )

    backups = [request.has_backup for request in requests]
    if any(backups) and not backups[0]:
        raise AgreedError(
            "Rank 0 keeps the backup of all ranks; received BackupAndRestore on ranks"
            f" {[rank for rank, has in enumerate(backups) if has]} alone. Give it to rank 0."
        )

    for name in dict.fromkeys(itertools.chain.from_iterable(plans)):
        values = [plan.get(name) for plan in plans]
        if any(value != values[0] for value in values):
            raise AgreedError(
                f"All ranks must compile and fit alike; received {name} = {values} by rank. Pass"
                " the same on every rank."
            )


class Begin(keras.callbacks.Callback):
    """The first of a fit's callbacks: the others find ranks that agree."""

    def __init__(self, course: Course, request: Request) -> None:
        super().__init__()
        self.course = course
        self.request = request

    def on_train_begin(self, logs: object = None) -> None:
        self.course.begin(self.request, self.params.get("steps"))


class Follow(keras.callbacks.Callback):
    """The last of a fit's callbacks: what those before it have decided reaches all ranks."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self.course = course

    def on_train_begin(self, logs: object = None) -> None:
        self.course.begin_at_the_roots_epoch()

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.course.begin_epoch(epoch)

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.course.end_block()

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        self.course.end_epoch()

    def on_train_end(self, logs: object = None) -> None:
        self.course.take_the_roots_variables("the end of fit")
