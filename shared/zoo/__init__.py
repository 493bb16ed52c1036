"""The model zoo: a registry of builders and the user's own by dotted path.

A builder is a function `build(schema, **options) -> keras.Model`: from the data's schema to a Keras
model that outputs logits (classification) or one number (regression).
"""

import importlib
import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from shared.data import Schema
from shared.experiment import ModelSection, nearest_names
from shared.seeding import seed_for
from shared.zoo import autoencoder, cnn, conv1d, linear, mlp, resnet, transformer, wide_deep
from shared.zoo.adapters import enable_adapters, merge_adapters

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
    """Builds the model that `config` names, with fresh weights determined by the seed or those of `config.initial`.

    `config.precision` is the policy of all layers but the output; `config.adapter` leaves adapters alone to train. Sets
    Keras's global seed, because the initialisers of a user's own model draw from it. Raises ValueError for an unknown
    name, options the builder does not take, or initial weights of other shapes.
    """
    builder = find_builder(config.name)
    options = _with_preset(config.name, parse_options(config.options))
    _check_options(config.name, builder, options)
    keras.utils.set_random_seed(seed_for(seed, "initial weights"))
    default = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(config.precision)
        model = builder(schema, **options)
    except TypeError as error:
        if not options:
            raise
        raise ValueError(f"model.options = {config.options!r} does not suit {config.name!r}: {error}.") from error
    finally:
        keras.config.set_dtype_policy(default)
    if not isinstance(model, keras.Model):
        raise ValueError(f"model.name = {config.name!r} must return a keras.Model; received {type(model).__name__}.")
    if not model.built:
        model.build((None, *schema.input_shape))
    if config.initial:
        load_initial_weights(model, Path(config.initial))
    if config.adapter == "lora":
        keras.utils.set_random_seed(seed_for(seed, "adapters"))
        enable_adapters(model, config.adapter_rank)
    return model


def without_adapters(model: keras.Model, config: ModelSection, schema: Schema) -> keras.Model:
    """The model as it is, or, if it has adapters, a plain one into which they are merged."""
    if config.adapter == "none":
        return model
    plain = config.model_copy(update={"adapter": "none", "initial": ""})
    return merge_adapters(model, build_model(plain, schema, seed=0))


def _with_preset(name: str, options: dict[str, Any]) -> dict[str, Any]:
    preset = options.get("preset")
    if preset is None or name not in MODELS:  # a builder of the user's own may have an option of that name
        return options
    known = PRESETS.get(name, {})
    if preset not in known:
        raise ValueError(
            f"model.options: {name!r} has no preset {preset!r}. It has: {', '.join(known) or 'none'}. Or leave it out."
        )
    return {**known[preset], **{key: value for key, value in options.items() if key != "preset"}}


def find_builder(name: str) -> Builder:
    if ":" not in name:
        if name not in MODELS:
            raise ValueError(
                f"model.name must be a zoo entry or 'package.module:function'; received {name!r}. "
                f"Nearest: {', '.join(nearest_names(name, MODELS))}."
            )
        return MODELS[name]
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model.name = {name!r}: no module {error.name!r} can be imported. Run from the folder that holds it, or "
            "add that folder to PYTHONPATH."
        ) from None
    builder = getattr(module, function_name, None)
    if not callable(builder):
        functions = [n for n, member in vars(module).items() if inspect.isfunction(member)]
        raise ValueError(
            f"model.name = {name!r}: {module_name} has no function {function_name!r}. "
            f"Nearest: {', '.join(nearest_names(function_name, functions)) or 'it has none'}."
        )
    return builder


def parse_options(text: str, key: str = "model.options", example: str = "units = [64, 32]") -> dict[str, Any]:
    """Reads TOML text, the value of an experiment's key, into keyword arguments.

    >>> parse_options("units = [64, 32]")
    {'units': [64, 32]}
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{key} must be TOML text like {example!r}; received {text!r} ({error}).") from None


def load_initial_weights(model: keras.Model, path: Path) -> None:
    """Sets the model's weights to those of a .keras file. Raises ValueError unless every shape agrees."""
    if not path.is_file():
        raise ValueError(f"model.initial names no file: {path}.")
    try:
        weights = keras.models.load_model(path, compile=False).get_weights()
    except (ValueError, OSError, TypeError) as error:
        raise ValueError(f"model.initial = {str(path)!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    received, expected = [w.shape for w in weights], [w.shape for w in model.get_weights()]
    if received != expected:
        at = next(i for i in range(len(expected) + 1) if received[i : i + 1] != expected[i : i + 1])
        raise ValueError(
            f"model.initial = {str(path)!r} has other weights than the model: {len(received)} arrays against "
            f"{len(expected)}; the first that differs is number {at}, received {received[at : at + 1]}, expected "
            f"{expected[at : at + 1]}. Use the same model.name and model.options as the file was trained with."
        )
    model.set_weights(weights)


def _check_options(name: str, builder: Builder, options: dict[str, Any]) -> None:
    parameters = list(inspect.signature(builder).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    for option in options:
        if option not in known:
            raise ValueError(
                f"model.options: {name!r} takes no option {option!r}. "
                f"It takes: {', '.join(known) or 'none'}; nearest: {', '.join(nearest_names(option, known)) or 'none'}."
            )
