"""Keras 3 on Horovod: `distribute(model)` after `compile`, then plain `model.fit`. Usable alone in
a user's script.

    import dist_train.keras_horovod as hvk

    hvk.init()
    model.compile(...)
    hvk.distribute(model)
    model.fit(...)                      # under: horovodrun -np 4 python script.py

Changes by `distribute`, on this model only (files saved from it name the plain Keras classes):

* The optimizer's class becomes a subclass of itself that reduces the gradients over ranks after
  unscaling and accumulation, before clipping and weight decay. Horovod's own wrapper overrides
  methods that Keras 3 never calls, so that gradients silently stay local (horovod issue 4290).
* Each term of the loss gets the gradient of its part of the mean over the whole global batch
  (denominators.py), also where the ranks' parts differ in size, in weights or in masked entries.
* `fit` first checks that all ranks run the same number of steps, then gives every rank the root's
  variables; only the root shows progress.
* Epoch metrics are those of the union of the ranks' examples: the metrics' states are summed, not
  the means averaged. So `evaluate` is something that all ranks do together: never call it on the
  root alone.
* BatchNormalization normalises with its rank's statistics, whose moving averages are averaged over
  ranks at the end of each epoch; with sync_batch_norm=True it uses those of the global batch.

For a loop of one's own: DistributedGradientTape and broadcast_variables. The hooks into Keras's
private parts are in hooks.py.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import keras
import tensorflow as tf

from dist_train.callbacks import (
    AverageLogs,
    LearningRateSchedule,
    LearningRateWarmup,
    note_compiled_rate,
)
from dist_train.collectives import Communicator, connect
from dist_train.hooks import (
    check_hooks,
    distribute_optimizer,
    is_distributed,
    reduction_of,
    switch_off_xla,
    synchronise_batch_norm,
)
from dist_train.model_hooks import distribute_model
from dist_train.reduction import Aggregation, GradientReduction
from dist_train.rendezvous import place_on_host
from dist_train.resources import prepare_process, use_own_gpu
from dist_train.signals import Signals
from dist_train.variables import broadcast_from_root

__all__ = [
    "Aggregation",
    "AverageLogs",
    "DistributedGradientTape",
    "LearningRateSchedule",
    "LearningRateWarmup",
    "broadcast_variables",
    "bytes_sent",
    "distribute",
    "init",
]

_communicator: Communicator | None = None

# Of distributed models: the same on all ranks, which distribute in the same order.
_model_numbers = itertools.count()


def init(threads_per_rank: int = 0, pin: bool = True) -> Communicator:
    """Joins the Horovod job and returns its communicator; without a launcher, the local one.

    First gives the rank its share of the host: threads (0: its share of the cores), cores of its
    own if `pin`, a GPU of its own where there are some. Call it before TensorFlow computes
    anything.
    """
    global _communicator
    local_rank, local_size = place_on_host()
    prepare_process(local_rank, local_size, threads_per_rank, pin)
    use_own_gpu(local_rank, local_size)
    _communicator = connect()
    return _communicator


def distribute(
    model: keras.Model,
    communicator: Communicator | None = None,
    *,
    aggregation: Aggregation | None = None,
    sync_batch_norm: bool = False,
    compile_update: bool | None = None,
) -> keras.Model:
    """Makes `model.fit` train on all ranks as one process would on the global batch.

    Call it on every rank after `compile`; it returns the same model. With one rank it changes
    nothing. `compile_update`: run the optimizer's update through XLA; None: for Keras's own
    optimizers on CPUs. Guarantees: after each step the weights are bit-equal on all ranks. Raises
    ValueError if the model is not compiled, asks for XLA or for something that this build of
    Horovod cannot do, and RuntimeError if this Keras lacks a method that the hooks rely on.
    """
    communicator = _communicator_for("distribute(model)", communicator)
    aggregation = aggregation or Aggregation()
    if not model.compiled:
        raise ValueError(
            "distribute(model) takes a compiled model; this one is not. Call model.compile(...)"
            " first."
        )
    note_compiled_rate(model)
    if communicator.world_size == 1 or is_distributed(model):
        return model

    # Refuse before anything is changed.
    _check_aggregation(aggregation, communicator)
    switch_off_xla(model)
    check_hooks(model)

    num_bytes = tf.Variable(0, dtype=tf.int64, trainable=False)
    name = f"gradients{next(_model_numbers)}"
    signals = Signals(communicator, model.optimizer)
    reduction = GradientReduction(communicator, aggregation, name, num_bytes, signals)
    distribute_optimizer(model.optimizer, reduction, compile_update)
    distribute_model(model, communicator, reduction)
    if sync_batch_norm:
        synchronise_batch_norm(model, reduction)
    return model


class DistributedGradientTape(tf.GradientTape):
    """A gradient tape for loops of one's own: `gradient` returns the gradients of the global batch.

        with hvk.DistributedGradientTape() as tape:
            loss = loss_function(y, model(x, training=True))
        grads = tape.gradient(loss, model.trainable_variables, num_examples=len(x))
        optimizer.apply_gradients(zip(grads, model.trainable_variables))

    With num_examples the mean over ranks is weighted by it: the gradient of the mean over all
    examples. Without, all ranks weigh the same. Start with `broadcast_variables`, and do not
    `distribute` the model as well.
    """

    def __init__(
        self,
        *args: Any,
        communicator: Communicator | None = None,
        aggregation: Aggregation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._ranks = _communicator_for("DistributedGradientTape", communicator)
        self._aggregation = aggregation or Aggregation()
        _check_aggregation(self._aggregation, self._ranks)

    def gradient(
        self, target: Any, sources: Any, *args: Any, num_examples: Any = None, **kwargs: Any
    ) -> Any:
        """Returns tf.GradientTape.gradient, reduced over ranks.

        All ranks must call it in the same order.
        """
        grads = super().gradient(target, sources, *args, **kwargs)
        if self._ranks.world_size == 1:
            return grads

        flat_grads = tf.nest.flatten(grads)
        reduction = GradientReduction(self._ranks, self._aggregation, _name_for(sources))
        with reduction.step(num_examples) as step:
            reduced = step.reduce(flat_grads)
        return tf.nest.pack_sequence_as(grads, reduced)


def broadcast_variables(
    model: keras.Model,
    communicator: Communicator | None = None,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> None:
    """Gives every rank the root's model and optimizer variables.

    Random layers keep their own state. `optimizer` is the compiled one, or that of a loop of one's
    own. Variables travel only if ranks differ in them. Raises ValueError on all ranks if they have
    built different models.
    """
    communicator = _communicator_for("broadcast_variables", communicator)
    broadcast_from_root(communicator, model, optimizer or model.optimizer)


def bytes_sent(model: keras.Model) -> int:
    """Returns the payload that this rank has put into the model's gradient reductions.

    Counted since `distribute`; 0 with one rank.
    """
    reduction = reduction_of(model)
    if reduction is None or reduction.num_bytes is None:
        return 0
    return int(reduction.num_bytes.numpy())


def _communicator_for(caller: str, given: Communicator | None) -> Communicator:
    communicator = given or _communicator
    if communicator is None:
        raise ValueError(
            f"{caller} needs a communicator; received none. Call hvk.init() first, on every rank."
        )
    return communicator


def _check_aggregation(aggregation: Aggregation, communicator: Communicator) -> None:
    if aggregation.op != "adasum":
        return
    reason = communicator.why_no_adasum()
    if reason:
        raise ValueError(reason)


def _name_for(sources: Any) -> str:
    """Returns a name that is equal on all ranks, and another one for other sources."""
    paths = ",".join(
        f"{getattr(source, 'path', getattr(source, 'name', ''))}{tuple(source.shape)}"
        for source in keras.tree.flatten(sources)
    )
    return f"tape.{hashlib.sha256(paths.encode()).hexdigest()[:12]}"
