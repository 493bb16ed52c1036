"""The reduction of gradients over ranks, and the factors that make it the gradient of the global batch.

Let rank r's mean loss divide by D_r (its number of examples, or their weights, or its unmasked entries). The gradient
of the mean over the whole global batch is

    g = 1/N sum_r f_r g_r,    f_r = N D_r / sum_s D_s,

with a factor of its own for each term of the loss that divides by something else. Learning sum_s D_s takes a collective
that the backward pass waits for. So where nothing stands between the gradients' sum and the update (`defers`), rank r
sends D_r g_r with D_r beside it, in one collective, and divides afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import keras
import tensorflow as tf
from keras.src.losses.loss import apply_mask

from dist_train.collectives import Communicator

# Up to so many bytes of gradients all are reduced at once; above, each as soon as the backward pass has it.
GROUPED_UP_TO_BYTES = 20_000_000


@dataclass(frozen=True)
class Aggregation:
    """How gradients become one.

    op: "average" (the mean, law 1), or "adasum", which keeps what ranks agree on and adds what is orthogonal.
    grouping: reduce all gradients at once, each by itself, or as the model's size suggests.
    predivide_factor: the mean's 1/N is split into 1/p before the sum and p/N after it; N (None) divides all before, so
        that half-precision sums cannot overflow, 1 divides all after, so that small gradients do not vanish.
    """

    op: Literal["average", "adasum"] = "average"
    grouping: Literal["auto", "grouped", "per_tensor"] = "auto"
    predivide_factor: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("op", self.op, ("average", "adasum")),
            ("grouping", self.grouping, ("auto", "grouped", "per_tensor")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; received {value!r}.")
        if self.predivide_factor is not None and self.predivide_factor <= 0:
            raise ValueError(
                f"predivide_factor must be positive; received {self.predivide_factor}. Leave it out to divide by the "
                "number of ranks before the sum."
            )
        if self.op == "adasum" and self.predivide_factor is not None:
            raise ValueError("predivide_factor splits an average; received op='adasum'. Leave one of them out.")

    def is_grouped(self, num_bytes: int) -> bool:
        """Whether gradients of so many bytes are reduced at once."""
        return self.grouping == "grouped" or (self.grouping == "auto" and num_bytes <= GROUPED_UP_TO_BYTES)


class GradientReduction:
    """Reduces one model's gradients. Its state lives while TensorFlow traces one train step (`step`)."""

    def __init__(
        self, communicator: Communicator, aggregation: Aggregation, name: str, num_bytes: tf.Variable | None = None
    ) -> None:
        self.communicator = communicator
        self.aggregation = aggregation
        self.name = name
        self.num_bytes = num_bytes  # payload that this rank has put into reductions so far
        self._num_examples: tf.Tensor | None = None  # of this rank's batch; None outside of a step
        self._factor: tf.Tensor | None = None  # of the examples, once asked for
        self._num_factors = self._num_moments = 0  # collectives so far in this step: part of their names
        self._defers = False
        self._terms_are_weighted = False  # the loss's terms have their factors
        self._is_divided = False  # the loss has been through divide_loss
        self._divisor: tf.Tensor | None = None  # of the sums that `reduce` returned, until `divided` is called
        self.has_reduced = False  # in this step

    @property
    def weights_losses(self) -> bool:
        """Whether a loss computed now is one of a train step whose ranks are averaged."""
        return self._num_examples is not None and self.aggregation.op == "average"

    @contextmanager
    def step(self, num_examples: tf.Tensor, defers: bool = False) -> Iterator[None]:
        """Within: one train step on so many examples of this rank is being traced.

        `defers`: the gradients are divided by the global number of examples after their sum.
        """
        self._num_examples = tf.cast(num_examples, tf.float32)
        self._factor = None
        self._defers = defers
        self._num_factors = self._num_moments = 0
        self._terms_are_weighted = self._is_divided = self.has_reduced = False
        self._divisor = None
        try:
            yield
        finally:
            self._num_examples, self._defers = None, False

    def weight_term(self, value: tf.Tensor, denominator: tf.Tensor | None) -> tf.Tensor:
        """A term of the loss whose gradient is that of rank r's part of the global mean, times N; same value.

        `denominator` is D_r, None for the number of examples.
        """
        self._terms_are_weighted = True
        if denominator is None and self._defers:
            return value
        factor = self._example_factor() if denominator is None else self._factor_of(denominator)
        if self._defers:  # the whole loss gets the examples' factor in the end
            factor = tf.math.divide_no_nan(factor, self._example_factor())
        return _scale_gradient(value, tf.cast(factor, value.dtype))

    def weight_sum(self, value: tf.Tensor) -> tf.Tensor:
        """The same for a term that is a sum over examples: D_r = 1 and the global term is the ranks' sum."""
        self._terms_are_weighted = True
        factor = tf.cast(self.communicator.world_size, tf.float32)
        if self._defers:
            factor = tf.math.divide_no_nan(factor, self._example_factor())
        return _scale_gradient(value, tf.cast(factor, value.dtype))

    def divide_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Weighs the loss before its gradient is taken, which costs nothing: by D_r, or by 1/p of the mean's 1/N."""
        if not self.weights_losses:
            return loss
        self._is_divided = True
        if self._defers:
            return loss * tf.cast(self._num_examples, loss.dtype)
        return loss / tf.cast(self._predivide_factor, loss.dtype)

    def reduce(self, grads: Sequence[Any]) -> list[Any]:
        """The gradients of the global batch, once `divided`. Sparse ones (of embeddings) stay sparse: their rows are
        gathered.
        """
        grads = list(grads)
        self.has_reduced = True
        self._count([g for g in grads if g is not None])
        if self.aggregation.op == "adasum":
            return self._adasum(grads)
        if self._defers:
            return self._undivided_sums(grads)
        if self._num_examples is not None and not self._terms_are_weighted:  # a custom step with a loss of its own
            grads = [_scaled(g, self._example_factor()) for g in grads]
        if not self._is_divided:  # a custom step that never called scale_loss, or a gradient tape
            grads = [_scaled(g, 1.0 / self._predivide_factor) for g in grads]
        return self.sum_over_ranks(grads, scale=self._predivide_factor / self.communicator.world_size)

    def divided(self, grads: Sequence[Any]) -> list[Any]:
        """What `reduce` returned, divided by what it has left to divide by. A pass over memory, so where XLA compiles
        the update it belongs there. Once per `reduce`: another call changes nothing.
        """
        divisor, self._divisor = self._divisor, None
        return list(grads) if divisor is None else [_scaled(g, 1.0 / divisor) for g in grads]

    def _undivided_sums(self, grads: list[Any]) -> list[Any]:
        """sum_r D_r g_r; the divisor sum_r D_r comes in the same collective."""
        if not self._is_divided:
            grads = [_scaled(g, self._num_examples) for g in grads]
        assert self._num_examples is not None
        *sums, total = self.sum_over_ranks([*grads, self._num_examples[None]], scale=1.0)
        self._divisor = total[0]
        return sums

    def global_moments(self, mean: tf.Tensor, variance: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The mean and the variance of all ranks' entries, from those of each rank's `count` entries; differentiable.

        One collective: every rank fills its row of a table, and the pairwise rule of Chan et al. 1979 merges the rows
        without the cancellation of E[x^2] - E[x]^2. Outside of a train step they stay this rank's own.
        """
        if self._num_examples is None:
            return mean, variance
        num_channels, world_size = mean.shape[0], self.communicator.world_size
        own = tf.concat([mean, variance, [tf.cast(count, mean.dtype)]], 0)
        own_row = tf.one_hot(self.communicator.rank, world_size, dtype=mean.dtype)[:, None] * own[None, :]
        (rows,) = self.communicator.all_reduce_sum([own_row], f"{self.name}.moments{self._num_moments}")
        self._num_moments += 1
        weights = rows[:, -1:] / tf.reduce_sum(rows[:, -1])
        means, variances = rows[:, :num_channels], rows[:, num_channels:-1]
        total_mean = tf.reduce_sum(weights * means, 0)
        return total_mean, tf.reduce_sum(weights * (variances + tf.square(means - total_mean)), 0)

    def sum_over_ranks(self, grads: list[Any], scale: float) -> list[Any]:
        """`scale` times the gradients' sums."""
        dense = [i for i, g in enumerate(grads) if g is not None and not isinstance(g, tf.IndexedSlices)]
        sparse = [i for i, g in enumerate(grads) if isinstance(g, tf.IndexedSlices)]
        for number, group in enumerate(self._groups(grads, dense)):
            sums = self.communicator.all_reduce_sum([grads[i] for i in group], f"{self.name}.{number}", scale)
            for i, total in zip(group, sums, strict=True):
                grads[i] = total
        for i in sparse:
            grads[i] = self._gathered_rows(grads[i], f"{self.name}.rows{i}", scale)
        return grads

    @property
    def _predivide_factor(self) -> float:
        return float(self.aggregation.predivide_factor or self.communicator.world_size)

    def _example_factor(self) -> tf.Tensor:
        if self._factor is None:
            assert self._num_examples is not None
            self._factor = self._factor_of(self._num_examples)
        return self._factor

    def _factor_of(self, denominator: tf.Tensor) -> tf.Tensor:
        """N D_r / sum_s D_s. The collective is tiny and, for examples, runs during the forward pass."""
        name = f"{self.name}.denominator{self._num_factors}"
        self._num_factors += 1
        denominator = tf.cast(denominator, tf.float32)
        (total,) = self.communicator.all_reduce_sum([denominator], name)
        return tf.math.divide_no_nan(denominator * self.communicator.world_size, total)

    def _groups(self, grads: list[Any], dense: list[int]) -> list[list[int]]:
        num_bytes = sum((grads[i].shape.num_elements() or 0) * grads[i].dtype.size for i in dense)
        if not self.aggregation.is_grouped(num_bytes):
            return [[i] for i in dense]
        dtypes = sorted({grads[i].dtype.name for i in dense})  # one collective holds one dtype
        return [[i for i in dense if grads[i].dtype.name == dtype] for dtype in dtypes]

    def _gathered_rows(self, grad: tf.IndexedSlices, name: str, scale: float) -> tf.IndexedSlices:
        values = self.communicator.all_gather(grad.values * tf.cast(scale, grad.values.dtype), name=f"{name}.values")
        indices = self.communicator.all_gather(grad.indices, name=f"{name}.indices")
        return tf.IndexedSlices(values, indices, grad.dense_shape)

    def _adasum(self, grads: list[Any]) -> list[Any]:
        given = [i for i, g in enumerate(grads) if g is not None]
        dense = [tf.convert_to_tensor(grads[i]) for i in given]
        for i, combined in zip(given, self.communicator.all_reduce_adasum(dense, self.name), strict=True):
            grads[i] = combined
        return grads

    def _count(self, grads: Sequence[Any]) -> None:
        if grads and self.num_bytes is not None:
            self.num_bytes.assign_add(tf.add_n([_num_bytes(g) for g in grads]))


class RankLoss:
    """Takes the place of a loss within a compiled model: same value, gradient of the rank's part of the global mean."""

    def __init__(self, loss: Callable[..., tf.Tensor], reduction: GradientReduction) -> None:
        self.loss = loss
        self.reduction = reduction

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        value = self.loss(y_true, y_pred, sample_weight)
        if not self.reduction.weights_losses:  # evaluation
            return value
        if getattr(self.loss, "reduction", None) in ("sum", "none", None):
            return self.reduction.weight_sum(value)
        return self.reduction.weight_term(value, self._denominator(y_pred, sample_weight))

    def _denominator(self, y_pred: Any, sample_weight: Any) -> tf.Tensor | None:
        """What Keras divides this loss by, up to a constant; None: the number of examples."""
        mask = getattr(y_pred, "_keras_mask", None)
        if self.loss.reduction == "mean_with_sample_weight" and sample_weight is not None:  # type: ignore[attr-defined]
            return tf.reduce_sum(apply_mask(sample_weight, mask, "float32", self.loss.reduction))  # type: ignore[attr-defined]
        if mask is not None:
            return tf.reduce_sum(tf.cast(mask, tf.float32))
        if isinstance(y_pred, tf.Tensor) and not y_pred.shape[1:].is_fully_defined():  # ranks may pad differently
            return tf.cast(tf.size(y_pred), tf.float32)
        return None


def use_rank_losses(model: keras.Model, reduction: GradientReduction) -> None:
    """Puts RankLoss around each loss of a compiled model whose losses are built. Idempotent."""
    compiled = model._compile_loss
    if compiled is not None and compiled.built:
        compiled._flat_losses = [
            entry if isinstance(entry.loss, RankLoss) else entry._replace(loss=RankLoss(entry.loss, reduction))
            for entry in compiled._flat_losses
        ]


def _scale_gradient(value: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """`value`, with `factor` times its gradient."""

    @tf.custom_gradient
    def scaled(x: tf.Tensor) -> Any:
        return tf.identity(x), lambda upstream: upstream * factor

    return scaled(value)


def _scaled(grad: Any, factor: Any) -> Any:
    if grad is None:
        return None
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(grad.values * tf.cast(factor, grad.values.dtype), grad.indices, grad.dense_shape)
    return grad * tf.cast(factor, grad.dtype)


def _num_bytes(grad: Any) -> tf.Tensor:
    parts = (grad.values, grad.indices) if isinstance(grad, tf.IndexedSlices) else (grad,)
    return tf.add_n([tf.size(part, out_type=tf.int64) * part.dtype.size for part in parts])
