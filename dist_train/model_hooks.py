"""Hooks on a model's instance: `fit`, `evaluate`, the train step and the metrics of all ranks."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_train.callbacks import LearningRateWarmup
from dist_train.collectives import Communicator
from dist_train.course import Begin, Course, Follow, Request, tell_other_ranks
from dist_train.denominators import RankLoss
from dist_train.hooks import MODEL_HOOKS, is_distributed
from dist_train.reduction import Aggregation, GradientReduction
from dist_train.variables import bring_together

# Callbacks of Keras that see each batch and never stop the training by it. LambdaCallback and
# TerminateOnNaN may.
OBSERVERS = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.CSVLogger,
    keras.callbacks.History,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.ProgbarLogger,
    keras.callbacks.TensorBoard,
    LearningRateWarmup,
)


def distribute_model(
    model: keras.Model, communicator: Communicator, reduction: GradientReduction
) -> None:
    """Hooks the model's methods on the instance, so that its class, and what is saved, stay."""
    for name in MODEL_HOOKS:
        vars(model).pop(name, None)  # of an earlier compile
    plain_fit = model.fit
    plain_evaluate = model.evaluate
    plain_train_step = model.train_step
    plain_results = model._get_metrics_result_or_logs
    course: Course | None = None  # of the fit that is running, while it does not evaluate

    def fit(*args: Any, **kwargs: Any) -> Any:
        nonlocal course
        assert reduction.signals is not None
        with Course(model, communicator, reduction.signals) as course:
            arguments = inspect.signature(plain_fit).bind(*args, **kwargs).arguments
            return plain_fit(**_fit_arguments(model, course, arguments))

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        nonlocal course
        outer = course
        course = None
        try:
            return plain_evaluate(*args, **kwargs)
        except Exception as error:
            tell_other_ranks(communicator, "an evaluation", error)
            raise
        finally:
            course = outer

    def train_step(data: Any) -> Any:
        _use_rank_losses(model, reduction)  # built by the symbolic step that fit begins with
        is_deferred = _defers_division(model, reduction.aggregation)
        with reduction.step(_num_examples(data), is_deferred) as step:
            logs = plain_train_step(data)
        _check_has_reduced(model, step.has_reduced)
        return logs

    def results(logs: Any) -> Any:
        if course is not None:
            course.end_steps()
        bring_together(model, model.metrics, communicator)
        return plain_results(logs)

    for name, hook in zip(MODEL_HOOKS, (fit, evaluate, train_step, results), strict=True):
        object.__setattr__(model, name, hook)

    # Lets fit build model and optimizer before on_train_begin broadcasts them.
    if model._distribute_strategy is None:
        object.__setattr__(model, "_distribute_strategy", tf.distribute.get_strategy())


# --- fit


def _fit_arguments(model: keras.Model, course: Course, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `fit`, with the callbacks that keep the ranks together.

    The root alone shows progress, and alone keeps backups: what it restores all ranks take.
    """
    if not is_distributed(model):
        raise ValueError(
            "The model was compiled again since distribute(model). Call distribute after each"
            " compile."
        )
    callbacks = arguments.get("callbacks") or []
    if isinstance(callbacks, keras.callbacks.CallbackList):
        raise ValueError(
            "A distributed model's fit takes a list of callbacks; received a CallbackList."
        )
    callbacks = keras.tree.flatten(callbacks)

    backups = [c for c in callbacks if isinstance(c, keras.callbacks.BackupAndRestore)]
    request = Request(
        plan=_plan(model, arguments),
        may_run_out=_may_run_out(arguments),
        watches_batches=any(_watches_batches(callback) for callback in callbacks),
        has_backup=bool(backups),
    )
    kept = course.communicator.on_root(callbacks, [c for c in callbacks if c not in backups])
    return {
        **arguments,
        "callbacks": [Begin(course, request), *kept, Follow(course)],
        "verbose": course.communicator.on_root(arguments.get("verbose", "auto"), 0),
    }


def _plan(model: keras.Model, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns what must be equal on all ranks, by name: the course of fit, and its updates."""
    has_data = arguments.get("validation_data") is not None
    plan = {
        "validates": has_data or bool(arguments.get("validation_split")),
        "validation_freq": arguments.get("validation_freq", 1),
        "epochs": arguments.get("epochs", 1),
        "initial_epoch": arguments.get("initial_epoch", 0),
        "steps_per_execution": model.steps_per_execution,
    }
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    for name, value in vars(optimizer).items():
        is_setting = value is None or isinstance(value, bool | int | float | str)
        if is_setting and not name.startswith("_") and name not in ("name", "built"):
            plan[f"optimizer.{name}"] = value
    return {**plan, "optimizer": type(optimizer).__name__}


def _may_run_out(arguments: dict[str, Any]) -> bool:
    """Returns whether the data may end before the steps that `fit` is asked for."""
    if not arguments.get("steps_per_epoch") and not keras.config.max_steps_per_epoch():
        return False
    x = arguments.get("x")
    return not (isinstance(x, tf.data.Dataset) and x.cardinality() == tf.data.INFINITE_CARDINALITY)


def _watches_batches(callback: keras.callbacks.Callback) -> bool:
    """Returns whether a callback is called at each batch and might stop the training there."""
    names = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")
    is_called = any(not getattr(getattr(callback, name), "_is_default", False) for name in names)
    return is_called and not isinstance(callback, OBSERVERS)


# --- the train step


def _num_examples(data: Any) -> tf.Tensor:
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    first_input = keras.tree.flatten(x)[0]
    return tf.shape(first_input)[0]


def _use_rank_losses(model: keras.Model, reduction: GradientReduction) -> None:
    """Puts RankLoss around each loss of a compiled model whose losses are built. Idempotent."""
    compiled = model._compile_loss
    if compiled is None or not compiled.built:
        return
    compiled._flat_losses = [
        entry
        if isinstance(entry.loss, RankLoss)
        else entry._replace(loss=RankLoss(entry.loss, reduction.denominators))
        for entry in compiled._flat_losses
    ]


def _defers_division(model: keras.Model, aggregation: Aggregation) -> bool:
    """Returns whether gradients may be divided after their sum.

    They may in one group, which nothing scales, checks or accumulates before.
    """
    optimizer = model.optimizer
    num_bytes = sum(int(np.prod(variable.shape)) * 4 for variable in model.trainable_variables)
    is_plain = aggregation.op == "average" and aggregation.predivide_factor is None
    is_scaled = (
        isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        or optimizer.loss_scale_factor is not None
    )
    accumulates = bool(optimizer.gradient_accumulation_steps)
    return aggregation.is_grouped(num_bytes) and is_plain and not is_scaled and not accumulates


def _check_has_reduced(model: keras.Model, has_reduced: bool) -> None:
    """Raises RuntimeError if a train step took no gradients through the hooked optimizer."""
    # An eager step that only accumulates reduces nothing.
    accumulates = tf.executing_eagerly() and model.optimizer.gradient_accumulation_steps
    if not has_reduced and not accumulates:
        raise RuntimeError(
            "This train step took no gradients through the compiled optimizer, so they stayed"
            " local. Apply them with self.optimizer; for optimizers of your own write a loop"
            " with hvk.DistributedGradientTape."
        )
