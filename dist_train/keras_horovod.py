"""Keras 3 on Horovod: `distribute(model)` after `compile`, then plain `model.fit`. Usable alone in a user's script.

    import dist_train.keras_horovod as hvk

    hvk.init()
    model.compile(...)
    hvk.distribute(model)
    model.fit(...)                      # under: horovodrun -np 4 python script.py

What `distribute` changes, on this model only (files saved from it name the plain Keras classes):

* The optimizer's class becomes a subclass of itself that reduces the gradients over ranks after unscaling and
  accumulation, before clipping and weight decay. Horovod's own wrapper overrides methods that Keras 3 never calls, so
  that gradients silently stay local (horovod issue 4290).
* Each term of the loss gets the gradient of its part of the mean over the whole global batch (gradients.py), also
  where the ranks' parts differ in size, in weights or in masked entries.
* `fit` first checks that all ranks run the same number of steps, then gives every rank the root's variables; only the
  root shows progress.
* Epoch metrics are those of the union of the ranks' examples: the metrics' states are summed, not the means averaged.
  So `evaluate` is something that all ranks do together: never call it on the root alone.
* BatchNormalization normalises with its rank's statistics, whose moving averages are averaged over ranks at the end of
  each epoch; with sync_batch_norm=True it uses those of the global batch.

For a loop of one's own: DistributedGradientTape and broadcast_variables.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src import api_export
from keras.src.saving import object_registration

from dist_train.callbacks import AverageLogs, LearningRateSchedule, LearningRateWarmup, Synchronise
from dist_train.collectives import Communicator, broadcast_unless_equal, connect, place_on_host
from dist_train.gradients import Aggregation, GradientReduction, use_rank_losses
from dist_train.resources import prepare_process, use_own_gpu

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

# Methods of Keras that the adapter hooks. A Keras without one of them would leave gradients local: refuse it.
OPTIMIZER_HOOKS = ("apply", "scale_loss", "_clip_gradients", "_backend_update_step")
MODEL_HOOKS = ("fit", "train_step", "_get_metrics_result_or_logs")
MODEL_INTERNALS = ("_distribute_strategy", "_compile_loss")
# XLA makes one pass over memory of an update's ten, but takes longer to compile the more variables there are.
MAX_COMPILED_VARIABLES = 300

_communicator: Communicator | None = None
_distributed_classes: dict[tuple[type, type], type] = {}
_ids = itertools.count()  # of distributed models: the same on all ranks, which distribute in the same order


def init(threads_per_rank: int = 0, pin: bool = True) -> Communicator:
    """Joins the Horovod job (or stays alone, if no launcher started this process) and returns the communicator.

    Gives the rank its share of the host before: threads (0: its share of the cores), cores of its own if `pin`, a GPU
    of its own where there are some. Call it before TensorFlow computes anything.
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
    """Makes `model.fit` train on all ranks as one process would on the global batch; returns the same model.

    Call it on every rank after `compile`. With one rank it changes nothing. `compile_update`: run the optimizer's
    update through XLA; None: for Keras's own optimizers on CPUs. Guarantees: after each step the weights are bit-equal
    on all ranks. Raises ValueError if the model is not compiled, asks for XLA or for what this build of Horovod
    cannot do, and RuntimeError if this Keras lacks a method that the adapter hooks.
    """
    communicator = _given(communicator, "distribute(model)")
    aggregation = aggregation or Aggregation()
    if not model.compiled:
        raise ValueError("distribute(model) takes a compiled model; this one is not. Call model.compile(...) first.")
    if communicator.world_size == 1 or hasattr(model.optimizer, "_archipelago"):
        return model
    _check(aggregation, communicator)
    _switch_off_xla(model)
    _check_hooks(model)
    num_bytes = tf.Variable(0, dtype=tf.int64, trainable=False)
    reduction = GradientReduction(communicator, aggregation, f"gradients{next(_ids)}", num_bytes)
    _distribute_optimizer(model.optimizer, reduction, compile_update)
    _distribute_model(model, communicator, reduction)
    if sync_batch_norm:
        _synchronise_batch_norm(model, reduction)
    return model


class DistributedGradientTape(tf.GradientTape):
    """A gradient tape for loops of one's own: `gradient` returns the gradients of the global batch.

        with hvk.DistributedGradientTape() as tape:
            loss = loss_function(y, model(x, training=True))
        grads = tape.gradient(loss, model.trainable_variables, num_examples=len(x))
        optimizer.apply_gradients(zip(grads, model.trainable_variables))

    With num_examples the mean over ranks is weighted by it: the gradient of the mean over all examples. Without, all
    ranks weigh the same. Start with `broadcast_variables`, and do not `distribute` the model as well.
    """

    def __init__(
        self,
        *args: Any,
        communicator: Communicator | None = None,
        aggregation: Aggregation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._ranks = _given(communicator, "DistributedGradientTape")
        self._aggregation = aggregation or Aggregation()
        _check(self._aggregation, self._ranks)

    def gradient(self, target: Any, sources: Any, *args: Any, num_examples: Any = None, **kwargs: Any) -> Any:
        """As tf.GradientTape.gradient, reduced over ranks. All ranks must call it in the same order."""
        grads = super().gradient(target, sources, *args, **kwargs)
        if self._ranks.world_size == 1:
            return grads
        flat = keras.tree.flatten(sources)
        paths = ",".join(f"{getattr(v, 'path', getattr(v, 'name', ''))}{tuple(v.shape)}" for v in flat)
        name = f"tape.{hashlib.sha256(paths.encode()).hexdigest()[:12]}"  # equal on all ranks, other for other sources
        reduction = GradientReduction(self._ranks, self._aggregation, name)
        flat_grads = grads if isinstance(grads, list | tuple) else [grads]
        if num_examples is None:
            reduced = reduction.reduce(flat_grads)
        else:
            with reduction.step(num_examples):
                reduced = reduction.reduce(flat_grads)
        return type(grads)(reduced) if isinstance(grads, list | tuple) else reduced[0]


class _ReduceBeforeClipping:
    """Mixed into an optimizer's class. Reduces after unscaling and accumulation, before clipping and weight decay."""

    _archipelago: GradientReduction

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        return super().scale_loss(self._archipelago.divide_loss(loss))  # type: ignore[misc]

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        clip = super()._clip_gradients  # type: ignore[misc]
        reduced = self._archipelago.reduce(grads)
        is_kerass = clip.__func__ is keras.optimizers.Optimizer._clip_gradients
        clips = not is_kerass or any((self.clipnorm, self.global_clipnorm, self.clipvalue))  # type: ignore[attr-defined]
        if clips or not _compiles_update(self, grads):  # else the update divides
            reduced = self._archipelago.divided(reduced)
        return clip(reduced)


class _ReduceBeforeFiniteCheck:
    """For LossScaleOptimizer: an overflow on one rank must send all ranks down the same branch."""

    _archipelago: GradientReduction

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        return super().scale_loss(self._archipelago.divide_loss(loss))  # type: ignore[misc]

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        return super().apply(self._archipelago.reduce(grads), trainable_variables)  # type: ignore[misc]


class _CompileUpdate:
    """Mixed into an optimizer's class: the update of all variables as one XLA program."""

    _max_compiled_variables: int
    _reduction: GradientReduction

    def _backend_update_step(self, grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        def update() -> None:
            step = super(_CompileUpdate, self)._backend_update_step  # type: ignore[misc]
            step(self._reduction.divided(grads), trainable_variables, learning_rate)

        if _compiles_update(self, grads):
            tf.function(update, jit_compile=True, autograph=False)()
        else:
            update()


class _GlobalMoments:
    """Mixed into a BatchNormalization's class: the statistics of the global batch."""

    _archipelago: GradientReduction

    def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        mean, variance = super()._moments(inputs, mask)  # type: ignore[misc]
        count = tf.size(inputs) / tf.size(mean) if mask is None else tf.reduce_sum(tf.cast(mask, tf.float32))
        return self._archipelago.global_moments(mean, variance, count)


def broadcast_variables(
    model: keras.Model, communicator: Communicator | None = None, optimizer: keras.optimizers.Optimizer | None = None
) -> None:
    """Gives every rank the root's model and optimizer variables. Random layers keep their own state on each rank.

    `optimizer` is the compiled one, or that of a loop of one's own. Variables travel only if ranks differ in them.
    Raises ValueError on all ranks if they have built different models.
    """
    communicator = _given(communicator, "broadcast_variables")
    optimizer = optimizer or model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    variables = [v for v in (*model.variables, *optimizer.variables) if not _is_random_state(v)]
    arrays = [np.asarray(v) for v in variables]
    for variable, own, array in zip(variables, arrays, broadcast_unless_equal(communicator, arrays), strict=True):
        if array is not own:
            variable.assign(array)


def bytes_sent(model: keras.Model) -> int:
    """Payload that this rank has put into the model's gradient reductions since `distribute`; 0 with one rank."""
    reduction = getattr(model.optimizer, "_archipelago", None)
    return int(reduction.num_bytes.numpy()) if reduction else 0


def _given(communicator: Communicator | None, who: str) -> Communicator:
    found = communicator or _communicator
    if found is None:
        raise ValueError(f"{who} needs a communicator; received none. Call hvk.init() first, on every rank.")
    return found


def _check(aggregation: Aggregation, communicator: Communicator) -> None:
    if aggregation.op == "adasum" and (reason := communicator.why_no_adasum()):
        raise ValueError(reason)


def _distribute_optimizer(
    optimizer: keras.optimizers.Optimizer, reduction: GradientReduction, compile_update: bool | None
) -> None:
    inner = getattr(optimizer, "inner_optimizer", None)
    if compile_update is None:  # one of the user's own may do what XLA cannot
        is_kerass = type(inner or optimizer).__module__.startswith("keras.")
        max_compiled = MAX_COMPILED_VARIABLES if is_kerass and not tf.config.list_physical_devices("GPU") else 0
    else:
        max_compiled = sys.maxsize if compile_update else 0
    _swap_class(inner or optimizer, _CompileUpdate, _max_compiled_variables=max_compiled, _reduction=reduction)
    hook = _ReduceBeforeClipping if inner is None else _ReduceBeforeFiniteCheck
    _swap_class(optimizer, hook, _archipelago=reduction)


def _compiles_update(optimizer: Any, grads: Sequence[Any]) -> bool:
    return len(grads) <= optimizer._max_compiled_variables and not tf.executing_eagerly()


def _swap_class(thing: Any, mixin: type, **attributes: Any) -> None:
    """Makes the object's class a subclass of itself with `mixin` in front, which Keras saves as the plain class."""
    for name, value in attributes.items():
        object.__setattr__(thing, name, value)  # past Keras's tracking: no part of the object's state
    if isinstance(thing, mixin):  # a layer of a model that was compiled and distributed before
        return
    plain = type(thing)
    if (mixin, plain) not in _distributed_classes:
        namespace = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        distributed = type(plain.__name__, (mixin, plain), namespace)
        public_name = api_export.get_name_from_symbol(plain)
        if public_name is not None:  # only this direction: loading by name must find the plain class
            api_export.REGISTERED_OBJS_TO_NAMES[distributed] = public_name
        registered_name = object_registration.get_registered_name(plain)
        if registered_name != plain.__name__:
            object_registration.GLOBAL_CUSTOM_NAMES[distributed] = registered_name
        _distributed_classes[mixin, plain] = distributed
    thing.__class__ = _distributed_classes[mixin, plain]


def _distribute_model(model: keras.Model, communicator: Communicator, reduction: GradientReduction) -> None:
    """Hooks the model's methods on the instance, so that its class, and what is saved of it, stays as it is."""
    for name in MODEL_HOOKS:
        vars(model).pop(name, None)  # of an earlier compile
    plain_fit, plain_train_step, plain_results = model.fit, model.train_step, model._get_metrics_result_or_logs

    def fit(*args: Any, **kwargs: Any) -> Any:
        if not hasattr(model.optimizer, "_archipelago"):
            raise ValueError("The model was compiled anew since distribute(model). Call distribute after each compile.")
        given = inspect.signature(plain_fit).bind(*args, **kwargs).arguments
        callbacks = given.get("callbacks") or []
        if isinstance(callbacks, keras.callbacks.CallbackList):
            raise ValueError("A distributed model's fit takes a list of callbacks; received a CallbackList.")
        callbacks = [callbacks] if isinstance(callbacks, keras.callbacks.Callback) else list(callbacks)
        validates = given.get("validation_data") is not None or bool(given.get("validation_split"))
        synchronise = Synchronise(communicator, validates, lambda model: broadcast_variables(model, communicator))
        given["callbacks"] = [synchronise, *callbacks]
        given["verbose"] = communicator.on_root(given.get("verbose", "auto"), 0)
        return plain_fit(**given)

    def train_step(data: Any) -> Any:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        use_rank_losses(model, reduction)  # built by the symbolic step that fit begins with
        with reduction.step(tf.shape(keras.tree.flatten(x)[0])[0], _defers(model, reduction.aggregation)):
            logs = plain_train_step(data)
        if not reduction.has_reduced and not (tf.executing_eagerly() and model.optimizer.gradient_accumulation_steps):
            raise RuntimeError(
                "This train step took no gradients through the compiled optimizer, so they stayed local. Apply them "
                "with self.optimizer; for optimizers of your own write a loop with hvk.DistributedGradientTape."
            )
        return logs

    def results(logs: Any) -> Any:
        _sum_metric_states(model.metrics, communicator)
        _average_batch_statistics(model, communicator)
        return plain_results(logs)

    for name, hook in zip(MODEL_HOOKS, (fit, train_step, results), strict=True):
        object.__setattr__(model, name, hook)
    if model._distribute_strategy is None:  # lets fit build model and optimizer before on_train_begin broadcasts them
        object.__setattr__(model, "_distribute_strategy", tf.distribute.get_strategy())


def _defers(model: keras.Model, aggregation: Aggregation) -> bool:
    """Whether gradients may be divided after their sum: one group, which nothing scales, checks or adds up before."""
    optimizer = model.optimizer
    num_bytes = sum(int(np.prod(v.shape)) * 4 for v in model.trainable_variables)
    is_plain = aggregation.op == "average" and aggregation.predivide_factor is None
    is_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor is not None
    return (
        aggregation.is_grouped(num_bytes) and is_plain and not is_scaled and not optimizer.gradient_accumulation_steps
    )


def _synchronise_batch_norm(model: keras.Model, reduction: GradientReduction) -> None:
    for layer in _batch_norms(model):
        _swap_class(layer, _GlobalMoments, _archipelago=reduction)


def _batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def _average_batch_statistics(model: keras.Model, communicator: Communicator) -> None:
    """Makes the moving statistics of batch normalisation the mean over ranks: each has seen its own part."""
    variables = [v for layer in _batch_norms(model) for v in layer.non_trainable_variables]
    if variables:
        by_rank = communicator.all_gather_object([np.asarray(v) for v in variables])
        for variable, *values in zip(variables, *by_rank, strict=True):
            variable.assign(np.mean(values, axis=0, dtype=np.float64))


def _sum_metric_states(metrics: Sequence[keras.metrics.Metric], communicator: Communicator) -> None:
    """Sums the metrics' states over ranks: right for every metric whose state is made of sums, as Keras's own are."""
    variables = [variable for metric in metrics for variable in metric.variables]
    states = communicator.all_gather_object([np.asarray(v) for v in variables])
    for variable, *by_rank in zip(variables, *states, strict=True):
        variable.assign(np.sum(by_rank, axis=0, dtype=by_rank[0].dtype))


def _switch_off_xla(model: keras.Model) -> None:
    if model.jit_compile:
        told = (
            "XLA cannot hold a collective; received jit_compile=True. Compile with jit_compile=False: the optimizer's "
            "update goes through XLA all the same (compile_update)."
        )
        if not tf.config.list_physical_devices("GPU"):
            raise ValueError(told)
        warnings.warn(told, stacklevel=3)  # there Keras's default "auto" has become True as well
    model.jit_compile = False


def _check_hooks(model: keras.Model) -> None:
    missing = [name for name in OPTIMIZER_HOOKS if not hasattr(model.optimizer, name)]
    missing += [name for name in (*MODEL_HOOKS, *MODEL_INTERNALS) if not hasattr(model, name)]
    if missing:
        raise RuntimeError(
            f"Keras {keras.__version__} lacks {', '.join(missing)}, which the adapter relies on: gradients would stay "
            "local. Install the pinned Keras (make setup)."
        )


def _is_random_state(variable: Any) -> bool:
    return variable.path.endswith("seed_generator_state")
