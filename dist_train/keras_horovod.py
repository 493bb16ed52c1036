"""Keras 3 on Horovod: `distribute(model)` after `compile`, then plain `model.fit`. Usable alone in a user's script.

    import dist_train.keras_horovod as hvk

    hvk.init()
    model.compile(...)
    hvk.distribute(model)
    model.fit(...)                      # under: horovodrun -np 4 python script.py

What `distribute` changes, on this model only (files saved from it name the plain Keras classes):

* The optimizer's class becomes a subclass of itself that averages the gradients over ranks after unscaling and
  accumulation, before clipping and weight decay. Horovod's own wrapper overrides methods that Keras 3 never calls, so
  that gradients silently stay local (horovod issue 4290).
* The loss is multiplied by D_r N / sum_r D_r before the gradient is taken, where D_r is the denominator of rank r's
  mean: its number of examples, or their weights or unmasked entries where Keras divides by those. The average over
  ranks is then the gradient of the mean over the whole global batch, also where the ranks' parts differ in size.
* `fit` first checks that all ranks run the same number of steps, then gives every rank the root's variables; only the
  root shows progress.
* Epoch metrics are those of the union of the ranks' examples: the metrics' states are summed, not the means averaged.
  So `evaluate` is something that all ranks do together: never call it on the root alone.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src import api_export
from keras.src.saving import object_registration

from dist_train.collectives import AgreedError, Communicator, connect

# Methods of Keras that the adapter hooks. A Keras without one of them would leave gradients local: refuse it.
OPTIMIZER_HOOKS = ("apply", "scale_loss", "_clip_gradients")
MODEL_HOOKS = ("fit", "train_step", "compute_loss", "_get_metrics_result_or_logs")

_communicator: Communicator | None = None
_distributed_classes: dict[type, type] = {}
_ids = itertools.count()  # of distributed models: the same on all ranks, which distribute in the same order


def init() -> Communicator:
    """Joins the Horovod job (or stays alone, if no launcher started this process) and returns the communicator."""
    global _communicator
    _communicator = connect()
    return _communicator


def distribute(model: keras.Model, communicator: Communicator | None = None) -> keras.Model:
    """Makes `model.fit` train on all ranks as one process would on the global batch; returns the same model.

    Call it on every rank after `compile`. With one rank it changes nothing. Guarantees: after each step the weights are
    bit-equal on all ranks. Raises ValueError if the model is not compiled or asks for XLA, and RuntimeError if this
    Keras lacks a method that the adapter hooks.
    """
    communicator = communicator or _communicator
    if communicator is None:
        raise ValueError("distribute(model) needs a communicator; received none. Call hvk.init() first, on every rank.")
    if not model.compiled:
        raise ValueError("distribute(model) takes a compiled model; this one is not. Call model.compile(...) first.")
    if communicator.world_size == 1 or hasattr(model.optimizer, "_archipelago"):
        return model
    if model.jit_compile is True:
        raise ValueError("XLA cannot hold a collective; received jit_compile=True. Compile with jit_compile=False.")
    model.jit_compile = False
    _check_hooks(model)
    reduction = GradientReduction(communicator, name=f"gradients{next(_ids)}")
    _distribute_optimizer(model.optimizer, reduction)
    _distribute_model(model, communicator, reduction)
    return model


class GradientReduction:
    """The reduction of one model's gradients, and the denominators that weight it.

    The state below lives while TensorFlow traces one train step: `train_step` sets the denominator, `compute_loss` may
    refine it, `scale_loss` puts the factor into the loss, and `reduce` averages (and applies the factor itself if a
    custom train step did not call `scale_loss`).
    """

    def __init__(self, communicator: Communicator, name: str) -> None:
        self.communicator = communicator
        self.name = name
        self._bytes = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._denominator: tf.Tensor | None = None
        self._factor_in_loss = False

    @property
    def bytes_sent(self) -> int:
        """Payload that this rank has put into gradient reductions so far."""
        return int(self._bytes.numpy())

    def start_step(self, num_examples: tf.Tensor) -> None:
        self._denominator = tf.cast(num_examples, tf.float32)
        self._factor_in_loss = False

    def refine_denominator(self, denominator: tf.Tensor) -> None:
        self._denominator = tf.cast(denominator, tf.float32)

    def factor(self) -> tf.Tensor:
        """D_r N / sum_r D_r."""
        assert self._denominator is not None
        total = self.communicator.all_reduce_sum(self._denominator, name=f"{self.name}.denominator")
        return tf.math.divide_no_nan(self._denominator * self.communicator.world_size, total)

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        if self._denominator is None:  # not within a train step: nothing to weight
            return loss
        self._factor_in_loss = True
        return loss * tf.cast(self.factor(), loss.dtype)

    def reduce(self, grads: Sequence[Any]) -> list[Any]:
        """The mean of the gradients over ranks. Sparse ones (of embeddings) stay sparse: their rows are gathered."""
        grads = list(grads)
        if self._denominator is not None and not self._factor_in_loss:
            factor = self.factor()
            grads = [_scaled(g, factor) for g in grads]
        self._denominator = None
        dense = [i for i, g in enumerate(grads) if g is not None and not isinstance(g, tf.IndexedSlices)]
        sparse = [i for i, g in enumerate(grads) if isinstance(g, tf.IndexedSlices)]
        self._bytes.assign_add(tf.add_n([_num_bytes(grads[i]) for i in (*dense, *sparse)]))
        means = self.communicator.all_reduce_mean([grads[i] for i in dense], name=self.name) if dense else []
        for i, mean in zip(dense, means, strict=True):
            grads[i] = mean
        for i in sparse:
            grads[i] = self._mean_of_rows(grads[i], f"{self.name}.rows{i}")
        return grads

    def _mean_of_rows(self, grad: tf.IndexedSlices, name: str) -> tf.IndexedSlices:
        values = self.communicator.all_gather(grad.values, name=f"{name}.values")
        indices = self.communicator.all_gather(grad.indices, name=f"{name}.indices")
        return tf.IndexedSlices(values / self.communicator.world_size, indices, grad.dense_shape)


class _ReduceBeforeClipping:
    """Mixed into an optimizer's class. Reduces after unscaling and accumulation, before clipping and weight decay."""

    _archipelago: GradientReduction

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        return super().scale_loss(self._archipelago.scale_loss(loss))  # type: ignore[misc]

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        return super()._clip_gradients(self._archipelago.reduce(grads))  # type: ignore[misc]


class _ReduceBeforeFiniteCheck:
    """For LossScaleOptimizer: an overflow on one rank must send all ranks down the same branch."""

    _archipelago: GradientReduction

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        return super().scale_loss(self._archipelago.scale_loss(loss))  # type: ignore[misc]

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        return super().apply(self._archipelago.reduce(grads), trainable_variables)  # type: ignore[misc]


class _Synchronise(keras.callbacks.Callback):
    """At the start of `fit`: equal steps on all ranks, then the root's variables on all ranks."""

    def __init__(self, communicator: Communicator, validates: bool) -> None:
        super().__init__()
        self.communicator = communicator
        self.validates = validates

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
        broadcast_variables(self.model, self.communicator)


def broadcast_variables(model: keras.Model, communicator: Communicator) -> None:
    """Gives every rank the root's model and optimizer variables. Random layers keep their own state on each rank."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = [v for v in (*model.variables, *model.optimizer.variables) if not _is_random_state(v)]
    arrays = [np.asarray(v) for v in variables]
    for variable, array in zip(variables, communicator.broadcast_arrays(arrays), strict=True):
        variable.assign(array)


def bytes_sent(model: keras.Model) -> int:
    """Payload that this rank has put into the model's gradient reductions since `distribute`; 0 with one rank."""
    reduction = getattr(model.optimizer, "_archipelago", None)
    return reduction.bytes_sent if reduction else 0


def _distribute_optimizer(optimizer: keras.optimizers.Optimizer, reduction: GradientReduction) -> None:
    """Swaps the optimizer's class for a subclass that Keras saves under the plain class's name."""
    plain = type(optimizer)
    if plain not in _distributed_classes:
        is_loss_scale = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        hook = _ReduceBeforeFiniteCheck if is_loss_scale else _ReduceBeforeClipping
        namespace = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        distributed = type(plain.__name__, (hook, plain), namespace)
        public_name = api_export.get_name_from_symbol(plain)
        if public_name is not None:  # only this direction: loading by name must find the plain class
            api_export.REGISTERED_OBJS_TO_NAMES[distributed] = public_name
        registered_name = object_registration.get_registered_name(plain)
        if registered_name != plain.__name__:
            object_registration.GLOBAL_CUSTOM_NAMES[distributed] = registered_name
        _distributed_classes[plain] = distributed
    optimizer.__class__ = _distributed_classes[plain]
    object.__setattr__(optimizer, "_archipelago", reduction)  # past Keras's tracking: no part of the optimizer's state


def _distribute_model(model: keras.Model, communicator: Communicator, reduction: GradientReduction) -> None:
    """Hooks the model's methods on the instance, so that its class, and what is saved of it, stays as it is."""
    for name in MODEL_HOOKS:
        vars(model).pop(name, None)  # of an earlier compile
    plain_fit, plain_train_step = model.fit, model.train_step
    plain_compute_loss, plain_results = model.compute_loss, model._get_metrics_result_or_logs

    def fit(*args: Any, **kwargs: Any) -> Any:
        if not hasattr(model.optimizer, "_archipelago"):
            raise ValueError("The model was compiled anew since distribute(model). Call distribute after each compile.")
        given = inspect.signature(plain_fit).bind(*args, **kwargs).arguments
        callbacks = given.get("callbacks") or []
        if isinstance(callbacks, keras.callbacks.CallbackList):
            raise ValueError("A distributed model's fit takes a list of callbacks; received a CallbackList.")
        callbacks = [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else list(callbacks)
        validates = given.get("validation_data") is not None or bool(given.get("validation_split"))
        given["callbacks"] = [_Synchronise(communicator, validates), *callbacks]
        given["verbose"] = communicator.on_root(given.get("verbose", "auto"), 0)
        return plain_fit(**given)

    def train_step(data: Any) -> Any:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        reduction.start_step(tf.shape(keras.tree.flatten(x)[0])[0])
        return plain_train_step(data)

    def compute_loss(
        x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        denominator = _loss_denominator(model, y_pred, sample_weight) if training else None
        if denominator is not None:
            reduction.refine_denominator(denominator)
        extra = {"training": training} if model._compute_loss_has_training_arg else {}
        return plain_compute_loss(x, y, y_pred, sample_weight, **extra)

    def results(logs: Any) -> Any:
        _sum_metric_states(model.metrics, communicator)
        return plain_results(logs)

    for name, hook in zip(MODEL_HOOKS, (fit, train_step, compute_loss, results), strict=True):
        object.__setattr__(model, name, hook)
    if model._distribute_strategy is None:  # lets fit build model and optimizer before on_train_begin broadcasts them
        object.__setattr__(model, "_distribute_strategy", tf.distribute.get_strategy())


def _loss_denominator(model: keras.Model, y_pred: Any, sample_weight: Any) -> tf.Tensor | None:
    """What Keras divides the loss by, where that is not the number of examples; None where it is.

    Masked entries do not count, and the reduction "mean_with_sample_weight" counts weights. Several outputs have one
    denominator each, which one factor cannot express: refused when they are not the number of examples.
    """
    masks = [getattr(output, "_keras_mask", None) for output in keras.tree.flatten(y_pred)]
    losses = [loss for loss in keras.tree.flatten(model.loss) if isinstance(loss, keras.losses.Loss)]
    by_weight = any(loss.reduction == "mean_with_sample_weight" for loss in losses) and sample_weight is not None
    if all(mask is None for mask in masks) and not by_weight:
        return None
    if len(masks) > 1 or (by_weight and masks[0] is not None):
        raise ValueError(
            "Ranks cannot agree on one denominator for several outputs with masks or mean_with_sample_weight, or for "
            "both at once. Use the reduction 'sum_over_batch_size' and put the mask into sample_weight."
        )
    if by_weight:
        return tf.reduce_sum(tf.cast(keras.tree.flatten(sample_weight)[0], tf.float32))
    return tf.reduce_sum(tf.cast(masks[0], tf.float32))


def _sum_metric_states(metrics: Sequence[keras.metrics.Metric], communicator: Communicator) -> None:
    """Sums the metrics' states over ranks: right for every metric whose state is made of sums, as Keras's own are."""
    variables = [variable for metric in metrics for variable in metric.variables]
    states = communicator.all_gather_object([np.asarray(v) for v in variables])
    for variable, *by_rank in zip(variables, *states, strict=True):
        variable.assign(np.sum(by_rank, axis=0, dtype=by_rank[0].dtype))


def _check_hooks(model: keras.Model) -> None:
    missing = [name for name in OPTIMIZER_HOOKS if not hasattr(model.optimizer, name)]
    missing += [name for name in (*MODEL_HOOKS, "_distribute_strategy") if not hasattr(model, name)]
    if missing:
        raise RuntimeError(
            f"Keras {keras.__version__} lacks {', '.join(missing)}, which the adapter relies on: gradients would stay "
            "local. Install the pinned Keras (make setup)."
        )


def _is_random_state(variable: Any) -> bool:
    return variable.path.endswith("seed_generator_state")


def _scaled(grad: Any, factor: tf.Tensor) -> Any:
    if grad is None:
        return None
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(grad.values * tf.cast(factor, grad.values.dtype), grad.indices, grad.dense_shape)
    return grad * tf.cast(factor, grad.dtype)


def _num_bytes(grad: Any) -> tf.Tensor:
    parts = (grad.values, grad.indices) if isinstance(grad, tf.IndexedSlices) else (grad,)
    return tf.add_n([tf.size(part, out_type=tf.int64) * part.dtype.size for part in parts])
