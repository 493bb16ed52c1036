"""Signals: what ranks tell each other beside the gradients of an update, at no cost of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_train.collectives import Communicator


class Signals:
    """An alarm that any rank can raise, and the learning rate of the root, which all ranks take.

    `outgoing` and `receive` belong to the graph of a train step, around the sum over ranks and
    before the update; the rest is for Python, between blocks of steps.
    """

    def __init__(self, communicator: Communicator, optimizer: keras.optimizers.Optimizer) -> None:
        self._is_root = communicator.is_root
        self._rate = _settable_rate(optimizer)
        self._alarm = tf.Variable(0.0, trainable=False)
        self._heard = tf.Variable(0.0, trainable=False)

    # --- in the graph

    def outgoing(self) -> list[tf.Tensor]:
        """Returns this rank's signals, scalars of float32; their sums over ranks: `receive`."""
        signals = [self._alarm.read_value()]
        if self._rate is not None:
            rate = tf.convert_to_tensor(self._rate) if self._is_root else tf.constant(0.0)
            signals.append(rate)
        return signals

    def receive(self, sums: Sequence[tf.Tensor]) -> None:
        self._heard.assign_add(sums[0])
        if self._rate is not None:
            self._rate.assign(sums[1])

    # --- between blocks of steps

    def reset(self) -> None:
        self._alarm.assign(0.0)
        self._heard.assign(0.0)

    def raise_alarm(self) -> None:
        """Sends the alarm beside the gradients of the next updates."""
        self._alarm.assign(1.0)

    def is_alarmed(self) -> bool:
        """Returns whether some rank's alarm has come; all ranks hear it after the same update."""
        # Called at each block of steps: four times as fast as the variable's own numpy().
        heard = tf.raw_ops.ReadVariableOp(resource=self._heard.handle, dtype=tf.float32)
        return bool(heard.numpy() > 0)


def _settable_rate(optimizer: keras.optimizers.Optimizer) -> Any:
    """Returns the variable of the learning rate; None for a schedule, which is equal on all ranks.

    Also None where a signal, of float32, could not hold its bits.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    rate = inner._learning_rate
    is_exact = isinstance(rate, keras.Variable) and rate.dtype == "float32"
    return rate if is_exact else None
