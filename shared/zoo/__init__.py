"""The model zoo: a registry of builders and the user's own by dotted path.

A builder is a function `build(schema, **options) -> keras.Model`: from the data's schema to a Keras
model that outputs logits (classification) or one number (regression).
"""

import importlib
import inspect
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from shared.data import Schema
from shared.experiment import ModelSection, nearest_names, parse_toml
from shared.seeding import seed_for
from shared.zoo import autoencoder, cnn, conv1d, linear, mlp, resnet, transformer, wide_deep
from shared.zoo.adapters import enable_adapters, merge_adapters
from shared.zoo.own import (
    check_outlives_training,
    is_own,
    load_saved_weights,
    make_saveable,
    make_variables,
)

Builder = Callable[..., keras.Model]

MODELS: dict[str, Builder] = {
    "linear": linear.build,
    "mlp": mlp.build,
    "cnn": cnn.build,
    "wide_deep": wide_deep.build,
    "resnet": resnet.build,
    "conv1d": conv1d.build,
    "transformer_lm": transformer.build_language_model,
    "transformer_classifier": transformer.build_classifier,
    "autoencoder": autoencoder.build,
}
# Sizes by name: model.options = 'preset = "small"'; further options have the last word.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet": resnet.PRESETS,
    "conv1d": conv1d.PRESETS,
    "transformer_lm": transformer.PRESETS,
    "transformer_classifier": transformer.PRESETS,
    "autoencoder": autoencoder.PRESETS,
}


def build_model(config: ModelSection, schema: Schema, seed: int) -> keras.Model:
    """Builds the model that `config` names.

    Its weights are determined by the seed, or are those of `config.initial`. `config.precision` is
    the policy of all layers but the output. With `config.adapter` only adapters are trainable.

    Sets Keras's global seed, because the initialisers of a user's own model draw from it. Raises
    ValueError for an unknown name, options the builder does not take, or initial weights of other
    shapes.
    """
    builder = find_builder(config.name)
    options = _with_preset(config.name, parse_options(config.options))
    _check_options(config.name, builder, options)

    keras.utils.set_random_seed(seed_for(seed, "initial weights"))
    model = _call(builder, options, config, schema)
    if is_own(config.name) or not model.built:
        make_variables(model, schema, config.name)
        make_saveable(model)

    if config.initial:
        load_initial_weights(model, Path(config.initial))
    if config.adapter == "lora":
        keras.utils.set_random_seed(seed_for(seed, "adapters"))
        enable_adapters(model, config.adapter_rank)
    return model


def check_own_model(config: ModelSection, schema: Schema) -> None:
    """Raises ValueError if the user's own model would not outlive its training.

    It is built twice, saved and restored. Does nothing for the zoo's. Sets Keras's global seed.
    """
    if is_own(config.name):
        plain = config.model_copy(update={"adapter": "none", "initial": ""})
        first, second = (build_model(plain, schema, seed) for seed in (0, 1))
        check_outlives_training(first, second, config.name)


def saved_model(config: ModelSection, schema: Schema, path: Path) -> keras.Model:
    """Returns the model that a run has saved, in float32 and without adapters.

    The user's own is built again, as its classes may not be registered with Keras. Raises
    ValueError, TypeError or OSError if the file cannot be read.
    """
    if not is_own(config.name) and config.precision == "float32":
        return keras.models.load_model(path, compile=False)

    # Other engines round bfloat16 in other places, so float32.
    plain = config.model_copy(update={"precision": "float32", "adapter": "none", "initial": ""})
    model = build_model(plain, schema, seed=0)
    load_saved_weights(model, path)
    return model


def _call(
    builder: Builder, options: dict[str, Any], config: ModelSection, schema: Schema
) -> keras.Model:
    """Calls the builder under the policy of `config.precision`."""
    policy_before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(config.precision)
        model = builder(schema, **options)
    except TypeError as error:
        if not options:
            raise
        raise ValueError(
            f"model.options = {config.options!r} does not suit {config.name!r}: {error}."
        ) from error
    finally:
        keras.config.set_dtype_policy(policy_before)

    if not isinstance(model, keras.Model):
        raise ValueError(
            f"model.name = {config.name!r} must return a keras.Model; received"
            f" {type(model).__name__}."
        )
    return model


def without_adapters(model: keras.Model, config: ModelSection, schema: Schema) -> keras.Model:
    """The model as it is, or, if it has adapters, a plain one into which they are merged."""
    if config.adapter == "none":
        return model
    plain = config.model_copy(update={"adapter": "none", "initial": ""})
    return merge_adapters(model, build_model(plain, schema, seed=0))


def _with_preset(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Replaces the option "preset" of a model of the zoo by the options that it stands for.

    A user's own builder may have an option of that name.
    """
    preset = options.get("preset")
    if preset is None or name not in MODELS:
        return options

    presets = PRESETS.get(name, {})
    if preset not in presets:
        raise ValueError(
            f"model.options: {name!r} has no preset {preset!r}. It has:"
            f" {', '.join(presets) or 'none'}. Or leave it out."
        )
    further = {key: value for key, value in options.items() if key != "preset"}
    return {**presets[preset], **further}


def find_builder(name: str) -> Builder:
    """Returns the builder of a zoo entry, or the function at 'package.module:function'."""
    if ":" not in name:
        if name not in MODELS:
            raise ValueError(
                f"model.name must be a zoo entry or 'package.module:function'; received {name!r}. "
                f"Nearest: {', '.join(nearest_names(name, MODELS))}."
            )
        return MODELS[name]

    # The user's own.
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model.name = {name!r}: no module {error.name!r} can be imported. Run from the folder"
            " that holds it, or add that folder to PYTHONPATH."
        ) from None

    builder = getattr(module, function_name, None)
    if not callable(builder):
        functions = [n for n, member in vars(module).items() if inspect.isfunction(member)]
        nearest = ", ".join(nearest_names(function_name, functions))
        raise ValueError(
            f"model.name = {name!r}: {module_name} has no function {function_name!r}. "
            f"Nearest: {nearest or 'it has none'}."
        )
    return builder


def parse_options(
    text: str, key: str = "model.options", example: str = "units = [64, 32]"
) -> dict[str, Any]:
    """Reads TOML text, the value of an experiment's key, into keyword arguments.

    >>> parse_options("units = [64, 32]")
    {'units': [64, 32]}
    """
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ValueError(
            f"{key} must be TOML text like {example!r}; received {text!r} ({error})."
        ) from None


def load_initial_weights(model: keras.Model, path: Path) -> None:
    """Sets the model's weights to those of a .keras file.

    Raises ValueError unless every shape agrees.
    """
    if not path.is_file():
        raise ValueError(f"model.initial names no file: {path}.")
    try:
        weights = _weights_in(path, model)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"model.initial = {str(path)!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from None

    received = [array.shape for array in weights]
    expected = [array.shape for array in model.get_weights()]
    if received != expected:
        raise ValueError(
            f"model.initial = {str(path)!r} has other weights than the model:"
            f" {_difference(received, expected)}. Use the same model.name and model.options as the"
            " file was trained with."
        )
    model.set_weights(weights)


def _weights_in(path: Path, model: keras.Model) -> list[np.ndarray]:
    """The weights in a .keras file; if Keras does not know its classes, by their places in `model`.

    In the second case the model's weights are set.
    """
    weights: list[np.ndarray]
    try:
        weights = keras.models.load_model(path, compile=False).get_weights()
    except (ValueError, TypeError):
        if not zipfile.is_zipfile(path):
            raise
        load_saved_weights(model, path)
        weights = model.get_weights()
    return weights


def _difference(received: list[tuple[int, ...]], expected: list[tuple[int, ...]]) -> str:
    """Says how two unequal lists of shapes differ.

    >>> _difference([(4, 2), (2,)], [(4, 3)])
    '2 arrays against 1; the first that differs is number 0, received [(4, 2)], expected [(4, 3)]'
    """
    at = 0
    while received[at : at + 1] == expected[at : at + 1]:
        at += 1
    return (
        f"{len(received)} arrays against {len(expected)}; the first that differs is number {at},"
        f" received {received[at : at + 1]}, expected {expected[at : at + 1]}"
    )


def _check_options(name: str, builder: Builder, options: dict[str, Any]) -> None:
    parameters = list(inspect.signature(builder).parameters.values())[1:]  # after the schema
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    names = [parameter.name for parameter in parameters]
    for option in options:
        if option not in names:
            nearest = ", ".join(nearest_names(option, names))
            raise ValueError(
                f"model.options: {name!r} takes no option {option!r}. It takes:"
                f" {', '.join(names) or 'none'}; nearest: {nearest or 'none'}."
            )
