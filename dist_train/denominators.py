"""Denominators: the factors that make reduced gradients those of the mean over the global batch.

Let rank r's mean loss divide by D_r: the number of its examples, or their weights, or its unmasked
entries. The gradient of the mean over the whole global batch of N ranks is

    g = 1/N sum_r f_r g_r,    f_r = N D_r / sum_s D_s,

with a factor of its own for each term of the loss that divides by something else. Learning
sum_s D_s takes a collective that the backward pass waits for. So where nothing stands between the
gradients' sum and the update, a step is *deferred*: rank r sends D_r g_r with D_r beside it in one
collective, and divides afterwards.

The factors of one train step, in order of time; f and D_r are those of the examples, f_t that of a
term of the loss, p is the predivide factor (N, unless set):

| train step of rank r           | a term's gradient | loss | its gradients | sum | afterwards    |
|--------------------------------|-------------------|------|---------------|-----|---------------|
| deferred                       | f_t / f           | D_r  |               | 1   | 1 / sum_s D_s |
| ... and never calls scale_loss | f_t / f           |      | D_r           | 1   | 1 / sum_s D_s |
| not deferred                   | f_t               | 1/p  |               | p/N |               |
| ... and never calls scale_loss | f_t               |      | 1/p           | p/N |               |
| ... and uses no compiled loss  |                   | 1/p  | f             | p/N |               |
| tape, num_examples given       |                   |      | f, 1/p        | p/N |               |
| tape without; outside of steps |                   |      | 1/p           | p/N |               |
| Adasum                         |                   |      |               |     |               |

A regulariser has no factor, as all ranks have the same; a sum over examples has f_t = N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from keras.src.losses.loss import apply_mask

from dist_train.collectives import Communicator


class Denominators:
    """The divisions of one train step on one rank, while TensorFlow traces the step.

    num_examples: of this rank's batch; None where all ranks weigh the same.
    predivide_factor: p, by which gradients are divided before the sum over ranks.
    is_deferred: whether gradients are divided by the global number of examples after their sum.
    """

    def __init__(
        self,
        communicator: Communicator,
        name: str,
        predivide_factor: float,
        num_examples: tf.Tensor | None = None,
        is_deferred: bool = False,
    ) -> None:
        self.communicator = communicator
        self.name = name
        self.predivide_factor = predivide_factor
        self.num_examples = None if num_examples is None else tf.cast(num_examples, tf.float32)
        self.is_deferred = is_deferred

        self.total_examples: tf.Tensor | None = None  # sum_s D_s, which came with deferred sums
        self._example_factor: tf.Tensor | None = None  # f, once it is needed
        self._num_factors = 0  # collectives so far: part of their names
        self._terms_are_weighted = False
        self._loss_is_divided = False

    @property
    def weighs_losses(self) -> bool:
        """True while the losses of a train step are computed whose ranks are averaged."""
        return self.num_examples is not None

    # --- before the backward pass

    def weight_term(self, value: tf.Tensor, denominator: tf.Tensor | None) -> tf.Tensor:
        """Returns a term of the loss, with f_t times its gradient (f_t / f in a deferred step).

        `denominator`: what the term divides by on this rank, None for the number of examples.
        """
        self._terms_are_weighted = True
        if denominator is None and self.is_deferred:
            return value
        factor = self._examples_factor() if denominator is None else self._factor_of(denominator)
        return self._with_factor(value, factor)

    def weight_sum(self, value: tf.Tensor) -> tf.Tensor:
        """Returns a term that is a sum over examples, with N times its gradient: the ranks' sum."""
        self._terms_are_weighted = True
        factor = tf.cast(self.communicator.world_size, tf.float32)
        return self._with_factor(value, factor)

    def divide_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns the loss, times D_r or divided by p; a scalar, so this costs nothing."""
        if not self.weighs_losses:
            return loss
        self._loss_is_divided = True
        if self.is_deferred:
            return loss * tf.cast(self.num_examples, loss.dtype)
        return loss / tf.cast(self.predivide_factor, loss.dtype)

    # --- around the sum over ranks

    def before_sum(self, grads: Sequence[Any]) -> list[Any]:
        """Returns the gradients, times the factors that the loss has not been given before."""
        if self.is_deferred:
            return list(grads) if self._loss_is_divided else scaled(grads, self.num_examples)

        if self.weighs_losses and not self._terms_are_weighted:
            grads = scaled(grads, self._examples_factor())
        if not self._loss_is_divided:
            grads = scaled(grads, 1.0 / self.predivide_factor)
        return list(grads)

    @property
    def sum_scale(self) -> float:
        """p / N, the factor of the sum over ranks."""
        return self.predivide_factor / self.communicator.world_size

    def after_sum(self, grads: Sequence[Any]) -> list[Any]:
        """Returns the sums of a deferred step, divided by the global number of examples.

        A pass over memory, so where XLA compiles the update it belongs there. Only the first call
        after a sum divides; without a deferred sum nothing changes.
        """
        total = self.total_examples
        self.total_examples = None
        return list(grads) if total is None else scaled(grads, 1.0 / total)

    # --- factors

    def _with_factor(self, value: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
        if self.is_deferred:  # the whole loss gets the examples' factor in the end
            factor = tf.math.divide_no_nan(factor, self._examples_factor())
        return scale_gradient(value, tf.cast(factor, value.dtype))

    def _examples_factor(self) -> tf.Tensor:
        """Returns f, learnt by one collective per step, which runs during the forward pass."""
        if self._example_factor is None:
            self._example_factor = self._factor_of(self.num_examples)
        return self._example_factor

    def _factor_of(self, denominator: tf.Tensor) -> tf.Tensor:
        """Returns N D_r / sum_s D_s, by a collective of one number."""
        name = f"{self.name}.denominator{self._num_factors}"
        self._num_factors += 1
        denominator = tf.cast(denominator, tf.float32)
        (total,) = self.communicator.all_reduce_sum([denominator], name)
        return tf.math.divide_no_nan(denominator * self.communicator.world_size, total)


class RankLoss:
    """A loss of a compiled model, with the gradient of the rank's part of the global mean.

    The value stays the same. `current` returns the denominators of the train step that is being
    traced.
    """

    def __init__(self, loss: Callable[..., tf.Tensor], current: Callable[[], Denominators]) -> None:
        self.loss = loss
        self.current = current

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        value = self.loss(y_true, y_pred, sample_weight)
        denominators = self.current()
        if not denominators.weighs_losses:  # evaluation
            return value

        is_sum = getattr(self.loss, "reduction", None) in ("sum", "none", None)
        if is_sum:
            return denominators.weight_sum(value)
        return denominators.weight_term(value, self._denominator(y_pred, sample_weight))

    def _denominator(self, y_pred: Any, sample_weight: Any) -> tf.Tensor | None:
        """Returns the number that Keras divides by, up to a constant; None: that of examples."""
        mask = getattr(y_pred, "_keras_mask", None)
        reduction = self.loss.reduction  # type: ignore[attr-defined]
        if reduction == "mean_with_sample_weight" and sample_weight is not None:
            return tf.reduce_sum(apply_mask(sample_weight, mask, "float32", reduction))
        if mask is not None:
            return tf.reduce_sum(tf.cast(mask, tf.float32))

        # Ranks may pad to different lengths.
        if isinstance(y_pred, tf.Tensor) and not y_pred.shape[1:].is_fully_defined():
            return tf.cast(tf.size(y_pred), tf.float32)
        return None


def scale_gradient(value: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Returns `value`, with `factor` times its gradient."""

    @tf.custom_gradient
    def identity(x: tf.Tensor) -> Any:
        return tf.identity(x), lambda upstream: upstream * factor

    return identity(value)


def scaled(grads: Sequence[Any], factor: Any) -> list[Any]:
    """Returns the gradients times `factor`; sparse ones stay sparse, None stays None."""
    return [None if grad is None else _scaled(grad, factor) for grad in grads]


def _scaled(grad: tf.Tensor | tf.IndexedSlices, factor: Any) -> tf.Tensor | tf.IndexedSlices:
    if isinstance(grad, tf.IndexedSlices):
        values = grad.values * tf.cast(factor, grad.values.dtype)
        return tf.IndexedSlices(values, grad.indices, grad.dense_shape)
    return grad * tf.cast(factor, grad.dtype)
