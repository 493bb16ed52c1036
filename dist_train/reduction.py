"""Reduction: what is summed over ranks in a train step, and in which groups.

`distribute` gives a model one `GradientReduction`. While TensorFlow traces a train step, `step()`
holds a `Step`: the denominators of that one step (denominators.py says who divides by what) and
what has been reduced in it. Names of collectives are counted per step, so they agree over ranks and
traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import tensorflow as tf

from dist_train.collectives import Communicator
from dist_train.denominators import Denominators
from dist_train.signals import Signals

# Up to so many bytes of gradients all are reduced at once; above, each as soon as the backward pass
# has it.
GROUPED_UP_TO_BYTES = 20_000_000


@dataclass(frozen=True)
class Aggregation:
    """The way in which the ranks' gradients become one.

    op: "average" (the mean over the global batch), or "adasum", which keeps what ranks agree on and
        adds what is orthogonal.
    grouping: reduce all gradients at once, each by itself, or as the model's size suggests.
    predivide_factor: the mean's 1/N is split into 1/p before the sum and p/N after it; N (None)
        divides all before, so that half-precision sums cannot overflow, 1 divides all after, so
        that small gradients do not vanish.
    """

    op: Literal["average", "adasum"] = "average"
    grouping: Literal["auto", "grouped", "per_tensor"] = "auto"
    predivide_factor: float | None = None

    def __post_init__(self) -> None:
        _check_choice("op", self.op, ("average", "adasum"))
        _check_choice("grouping", self.grouping, ("auto", "grouped", "per_tensor"))
        if self.predivide_factor is None:
            return
        if self.predivide_factor <= 0:
            raise ValueError(
                f"predivide_factor must be positive; received {self.predivide_factor}. Leave it out"
                " to divide by the number of ranks before the sum."
            )
        if self.op == "adasum":
            raise ValueError(
                "predivide_factor splits an average; received op='adasum'. Leave one of them out."
            )

    def is_grouped(self, num_bytes: int) -> bool:
        """Returns whether gradients of so many bytes are reduced at once."""
        if self.grouping == "auto":
            return num_bytes <= GROUPED_UP_TO_BYTES
        return self.grouping == "grouped"


class GradientReduction:
    """The reduction of one model's gradients; `current` is the train step that is being traced.

    Outside of a train step `current` is one of no known number of examples: ranks weigh the same.
    """

    def __init__(
        self,
        communicator: Communicator,
        aggregation: Aggregation,
        name: str,
        num_bytes: tf.Variable | None = None,
        signals: Signals | None = None,
    ) -> None:
        self.communicator = communicator
        self.aggregation = aggregation
        self.name = name
        self.num_bytes = num_bytes  # payload that this rank has put into reductions so far
        self.signals = signals  # what else travels with them
        self.current = self._make_step(num_examples=None, is_deferred=False)

    @contextmanager
    def step(self, num_examples: tf.Tensor | None, is_deferred: bool = False) -> Iterator[Step]:
        """Yields the object of one train step on so many examples of this rank.

        `is_deferred`: gradients are divided by the global number of examples after their sum.
        """
        outside = self.current
        self.current = self._make_step(num_examples, is_deferred)
        try:
            yield self.current
        finally:
            self.current = outside

    def denominators(self) -> Denominators:
        """Returns the denominators of the current step."""
        return self.current.denominators

    def _make_step(self, num_examples: tf.Tensor | None, is_deferred: bool) -> Step:
        is_average = self.aggregation.op == "average"
        denominators = Denominators(
            self.communicator,
            self.name,
            float(self.aggregation.predivide_factor or self.communicator.world_size),
            num_examples if is_average else None,
            is_deferred,
        )
        return Step(self, denominators, is_training=num_examples is not None)


class Step:
    """The reductions of one train step, while TensorFlow traces it."""

    def __init__(
        self, reduction: GradientReduction, denominators: Denominators, is_training: bool
    ) -> None:
        self.communicator = reduction.communicator
        self.aggregation = reduction.aggregation
        self.name = reduction.name
        self.num_bytes = reduction.num_bytes
        self.signals = reduction.signals
        self.denominators = denominators
        self.is_training = is_training

        self.has_reduced = False
        self._num_moments = 0  # collectives so far: part of their names

    def reduce(self, grads: Sequence[Any]) -> list[Any]:
        """Returns the gradients of the global batch, still to be divided by `after_sum`.

        Sparse ones (of embeddings) stay sparse: their rows are gathered.
        """
        self.has_reduced = True
        self._count_bytes(grads)
        if self.aggregation.op == "adasum":
            self._exchange_signals()
            return self._adasum(grads)

        denominators = self.denominators
        grads = denominators.before_sum(grads)
        if denominators.sum_scale != 1.0:
            self._exchange_signals()
            return self._sum_over_ranks(grads, denominators.sum_scale)

        # The divisor sum_s D_s and the signals come in the same collective.
        numbers = [denominators.num_examples] if denominators.is_deferred else []
        num_own = len(numbers)
        if self.signals is not None:
            numbers += self.signals.outgoing()
        if not numbers:
            return self._sum_over_ranks(grads, scale=1.0)
        *sums, received = self._sum_over_ranks([*grads, tf.stack(numbers)], scale=1.0)

        totals = tf.unstack(received, num=len(numbers))
        if denominators.is_deferred:
            denominators.total_examples = totals[0]
        if self.signals is not None:
            self.signals.receive(totals[num_own:])
        return sums

    def global_moments(
        self, mean: tf.Tensor, variance: tf.Tensor, count: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns mean and variance over all ranks' entries, from those of each rank's `count`.

        Differentiable. One collective: every rank fills its row of a table, and the pairwise rule
        of Chan et al. 1979 merges the rows without the cancellation of E[x^2] - E[x]^2. Outside of
        a train step they stay this rank's own.
        """
        if not self.is_training:
            return mean, variance

        # A table with a row per rank: means, variances, count.
        world_size = self.communicator.world_size
        own = tf.concat([mean, variance, [tf.cast(count, mean.dtype)]], 0)
        position = tf.one_hot(self.communicator.rank, world_size, dtype=mean.dtype)
        own_row = position[:, None] * own[None, :]
        name = f"{self.name}.moments{self._num_moments}"
        self._num_moments += 1
        (rows,) = self.communicator.all_reduce_sum([own_row], name)

        # Merge its rows.
        num_channels = mean.shape[0]
        means = rows[:, :num_channels]
        variances = rows[:, num_channels:-1]
        weights = rows[:, -1:] / tf.reduce_sum(rows[:, -1])
        total_mean = tf.reduce_sum(weights * means, 0)
        spread = tf.square(means - total_mean)
        return total_mean, tf.reduce_sum(weights * (variances + spread), 0)

    def _exchange_signals(self) -> None:
        """Exchanges the signals by themselves, where the gradients' collective cannot take them."""
        if self.signals is not None:
            sums = self.communicator.all_reduce_sum(self.signals.outgoing(), f"{self.name}.signals")
            self.signals.receive(sums)

    def _sum_over_ranks(self, grads: Sequence[Any], scale: float) -> list[Any]:
        """Returns `scale` times the gradients' sums over ranks."""
        sums = list(grads)
        for number, group in enumerate(self._dense_groups(grads)):
            dense = [grads[i] for i in group]
            totals = self.communicator.all_reduce_sum(dense, f"{self.name}.{number}", scale)
            for i, total in zip(group, totals, strict=True):
                sums[i] = total

        for i, grad in enumerate(grads):
            if isinstance(grad, tf.IndexedSlices):
                sums[i] = self._gather_rows(grad, f"{self.name}.rows{i}", scale)
        return sums

    def _dense_groups(self, grads: Sequence[Any]) -> list[list[int]]:
        """Returns the positions of dense gradients, in the groups that are reduced together."""
        sizes = {
            i: (grad.shape.num_elements() or 0) * grad.dtype.size
            for i, grad in enumerate(grads)
            if grad is not None and not isinstance(grad, tf.IndexedSlices)
        }
        if not self.aggregation.is_grouped(sum(sizes.values())):
            return [[i] for i in sizes]

        dtypes = sorted({grads[i].dtype.name for i in sizes})  # one collective holds one dtype
        return [[i for i in sizes if grads[i].dtype.name == dtype] for dtype in dtypes]

    def _gather_rows(self, grad: tf.IndexedSlices, name: str, scale: float) -> tf.IndexedSlices:
        own_values = grad.values * tf.cast(scale, grad.values.dtype)
        values = self.communicator.all_gather(own_values, name=f"{name}.values")
        indices = self.communicator.all_gather(grad.indices, name=f"{name}.indices")
        return tf.IndexedSlices(values, indices, grad.dense_shape)

    def _adasum(self, grads: Sequence[Any]) -> list[Any]:
        given = [i for i, grad in enumerate(grads) if grad is not None]
        dense = [tf.convert_to_tensor(grads[i]) for i in given]
        combined = self.communicator.all_reduce_adasum(dense, self.name)

        results = list(grads)
        for i, grad in zip(given, combined, strict=True):
            results[i] = grad
        return results

    def _count_bytes(self, grads: Sequence[Any]) -> None:
        given = [grad for grad in grads if grad is not None]
        if given and self.num_bytes is not None:
            self.num_bytes.assign_add(tf.add_n([_num_bytes(grad) for grad in given]))


def _num_bytes(grad: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    parts = (grad.values, grad.indices) if isinstance(grad, tf.IndexedSlices) else (grad,)
    return tf.add_n([tf.size(part, out_type=tf.int64) * part.dtype.size for part in parts])


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; received {value!r}.")
