"""Hooks into Keras's private parts, by which a compiled model trains on all ranks.

An optimizer, and a layer that is synchronised, gets a subclass of its own class with a mixin in
front (`_swap_class`); `fit`, `train_step` and metrics are hooked on the model's instance
(model_hooks.py). So only this one object is changed, and files that are saved from it name the
plain Keras classes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src import api_export
from keras.src.saving import object_registration

from dist_train.reduction import GradientReduction
from dist_train.variables import batch_norms

# The parts of Keras that the hooks rely on. Without one of them gradients would stay local: refuse.
OPTIMIZER_HOOKS = ("apply", "scale_loss", "_clip_gradients", "_backend_update_step")
MODEL_HOOKS = ("fit", "evaluate", "train_step", "_get_metrics_result_or_logs")
MODEL_INTERNALS = ("_distribute_strategy", "_compile_loss", "_initial_epoch", "stop_training")

# XLA makes one pass over memory of an update's ten, but takes longer to compile the more variables
# there are.
MAX_COMPILED_VARIABLES = 300

_distributed_classes: dict[tuple[type, type], type] = {}


def check_hooks(model: keras.Model) -> None:
    """Raises RuntimeError if this Keras lacks one of the parts that the hooks rely on."""
    missing = [name for name in OPTIMIZER_HOOKS if not hasattr(model.optimizer, name)]
    missing += [name for name in (*MODEL_HOOKS, *MODEL_INTERNALS) if not hasattr(model, name)]
    if missing:
        raise RuntimeError(
            f"Keras {keras.__version__} lacks {', '.join(missing)}, which the adapter relies on:"
            " gradients would stay local. Install the pinned Keras (make setup)."
        )


def switch_off_xla(model: keras.Model) -> None:
    """Switches off XLA for the train step.

    Raises ValueError if the user asked for it: on hosts with a GPU, where Keras's default asks for
    it too, only warns.
    """
    if model.jit_compile:
        message = (
            "XLA cannot hold a collective; received jit_compile=True. Compile with"
            " jit_compile=False: the optimizer's update goes through XLA all the same"
            " (compile_update)."
        )
        if not tf.config.list_physical_devices("GPU"):
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)  # blames the line that calls distribute
    model.jit_compile = False


def is_distributed(model: keras.Model) -> bool:
    """Returns whether the model's optimizer reduces gradients over ranks."""
    return hasattr(model.optimizer, "_archipelago")


def reduction_of(model: keras.Model) -> GradientReduction | None:
    """Returns the reduction of a distributed model; None for another."""
    return getattr(model.optimizer, "_archipelago", None)


# --- the optimizer


def distribute_optimizer(
    optimizer: keras.optimizers.Optimizer, reduction: GradientReduction, compile_update: bool | None
) -> None:
    """Makes the optimizer reduce gradients; compiles its update as `distribute` says."""
    inner = getattr(optimizer, "inner_optimizer", None)
    updater = inner or optimizer
    max_compiled = _max_compiled_variables(updater, compile_update)
    _swap_class(updater, _CompileUpdate, _max_compiled_variables=max_compiled, _reduction=reduction)

    hook = _ReduceBeforeClipping if inner is None else _ReduceBeforeFiniteCheck
    _swap_class(optimizer, hook, _archipelago=reduction)


def _max_compiled_variables(
    optimizer: keras.optimizers.Optimizer, compile_update: bool | None
) -> int:
    if compile_update is not None:
        return sys.maxsize if compile_update else 0
    is_of_keras = type(optimizer).__module__.startswith("keras.")  # a user's may need more than XLA
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    return MAX_COMPILED_VARIABLES if is_of_keras and not on_gpu else 0


def _compiles_update(optimizer: Any, grads: Sequence[Any]) -> bool:
    return len(grads) <= optimizer._max_compiled_variables and not tf.executing_eagerly()


class _DivideLoss:
    """Mixed into an optimizer's class: divides the loss before its gradients are taken."""

    _archipelago: GradientReduction

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        divided = self._archipelago.denominators().divide_loss(loss)
        return super().scale_loss(divided)  # type: ignore[misc]


class _ReduceBeforeClipping(_DivideLoss):
    """Reduces gradients after unscaling and accumulation, before clipping and weight decay."""

    def _clip_gradients(self, grads: Sequence[Any]) -> Any:
        clip = super()._clip_gradients  # type: ignore[misc]
        step = self._archipelago.current
        reduced = step.reduce(grads)

        # Where nothing clips and XLA compiles the update, the update divides.
        is_of_keras = clip.__func__ is keras.optimizers.Optimizer._clip_gradients
        limits = (self.clipnorm, self.global_clipnorm, self.clipvalue)  # type: ignore[attr-defined]
        clips = not is_of_keras or any(limits)
        if clips or not _compiles_update(self, grads):
            reduced = step.denominators.after_sum(reduced)
        return clip(reduced)


class _ReduceBeforeFiniteCheck(_DivideLoss):
    """For LossScaleOptimizer: an overflow on one rank must send all ranks down the same branch."""

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> Any:
        reduced = self._archipelago.current.reduce(grads)
        return super().apply(reduced, trainable_variables)  # type: ignore[misc]


class _CompileUpdate:
    """Mixed into an optimizer's class: the update of all variables as one XLA program."""

    _max_compiled_variables: int
    _reduction: GradientReduction

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        update_step = super()._backend_update_step  # type: ignore[misc]

        def update() -> None:
            divided = self._reduction.denominators().after_sum(grads)
            update_step(divided, trainable_variables, learning_rate)

        if _compiles_update(self, grads):
            tf.function(update, jit_compile=True, autograph=False)()
        else:
            update()


# --- batch normalisation


class _GlobalMoments:
    """Mixed into a BatchNormalization's class: the statistics of the global batch."""

    _archipelago: GradientReduction

    def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        mean, variance = super()._moments(inputs, mask)  # type: ignore[misc]
        if mask is None:
            count = tf.size(inputs) / tf.size(mean)
        else:
            count = tf.reduce_sum(tf.cast(mask, tf.float32))
        return self._archipelago.current.global_moments(mean, variance, count)


def synchronise_batch_norm(model: keras.Model, reduction: GradientReduction) -> None:
    """Makes all BatchNormalization layers use the statistics of the global batch."""
    for layer in batch_norms(model):
        _swap_class(layer, _GlobalMoments, _archipelago=reduction)


# --- classes


def _swap_class(target: Any, mixin: type, **attributes: Any) -> None:
    """Makes the object's class a subclass of itself with `mixin` in front."""
    for name, value in attributes.items():
        object.__setattr__(target, name, value)  # past Keras's tracking: no part of its state

    # A layer of a model that was compiled and distributed before has its mixin.
    if isinstance(target, mixin):
        return

    key = (mixin, type(target))
    if key not in _distributed_classes:
        _distributed_classes[key] = _distributed_class(*key)
    target.__class__ = _distributed_classes[key]


def _distributed_class(mixin: type, plain: type) -> type:
    """Returns a subclass that Keras saves as the plain class."""
    namespace = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    distributed = type(plain.__name__, (mixin, plain), namespace)

    # Only this direction, from class to name: loading by name must give the plain class.
    public_name = api_export.get_name_from_symbol(plain)
    if public_name is not None:
        api_export.REGISTERED_OBJS_TO_NAMES[distributed] = public_name
    registered_name = object_registration.get_registered_name(plain)
    if registered_name != plain.__name__:
        object_registration.GLOBAL_CUSTOM_NAMES[distributed] = registered_name
    return distributed
