"""The user's own models: built whole, and known to outlive their training before it begins.

Keras reads back only those classes and functions of a saved model that are registered. A run asks
for less: its model is built again by its builder, and the saved weights are put into it.
"""

from __future__ import annotations

import re
import tempfile
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np

from shared.data import Schema

GUIDE = "docs/how-to-models.md, 'Your own layers'"

# Around the reason in an error of Keras's.
BEFORE = (".call().\n\n", "Error encountered:\n\n")
AFTER = ("Arguments received", "Example:", "Please implement")
TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")
MAX_LENGTH = 300
SKIPS = "Skipping nested container"  # how a warning of Keras's begins


def is_own(name: str) -> bool:
    """Returns True for 'package.module:function', False for an entry of the zoo."""
    return ":" in name


def make_variables(model: keras.Model, schema: Schema, name: str) -> None:
    """Has a model make all its variables: inputs of the data's kind go through it, as symbols.

    A subclass of keras.Model without `build` makes them in its first call, and an optimizer knows
    only those that there are before. Raises ValueError if the model cannot take such inputs.
    """
    inputs = keras.Input(schema.input_shape, dtype=schema.input_dtype)
    try:
        outputs = model(inputs)
        model(inputs, training=True)
    except Exception as error:  # of the user's own code
        raise ValueError(
            f"model.name = {name!r} must return a model that takes batches of"
            f" {schema.input_dtype} of shape {(None, *schema.input_shape)}; received one that fails"
            f" on them{_place(error)}: {describe_error(error)}. Correct it ({GUIDE})."
        ) from error

    if not keras.backend.is_keras_tensor(outputs):
        raise ValueError(
            f"model.name = {name!r} must return a model with one output; received one that gives a"
            f" {type(outputs).__name__}. Have it return one tensor ({GUIDE})."
        )


def make_saveable(model: keras.Model) -> None:
    """Has Keras save layers without `get_config` too, whose arguments it cannot keep.

    Every subclass of keras.Model with an argument is one. A run does without the arguments, as it
    builds the model again; keras.models.load_model alone needs them.
    """
    for layer in reversed([*model._flatten_layers()]):  # inner ones first
        try:
            layer.get_config()
        except NotImplementedError:
            layer._auto_config = SimpleNamespace(config={})
        except Exception:  # of the user's own: reported when the model is saved
            continue


def check_outlives_training(first: keras.Model, second: keras.Model, name: str) -> None:
    """Raises ValueError unless the first model's saved weights can be put into the second.

    Both are of one builder. What the check finds would else show after the last epoch, with the
    training lost.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.keras"
        try:
            first.save(path)
        except OSError:  # a full disk
            raise
        except Exception as error:
            raise ValueError(
                f"model.name = {name!r} must return a model that Keras can save; received one that"
                f" it cannot: {describe_error(error)}. Have get_config() return numbers, texts and"
                f" lists of them, or leave it out ({GUIDE})."
            ) from error

        try:
            load_saved_weights(second, path)
            is_equal = _equal(first.get_weights(), second.get_weights())
            reason = "other weights than the saved ones"
        except Exception as error:
            is_equal = False
            reason = describe_error(error)

    if not is_equal:
        raise ValueError(
            f"model.name = {name!r} must return the same model each time it is called, with all its"
            f" variables in layers that Keras finds; received one whose saved weights cannot be"
            f" read back: {reason}. Keep layers in attributes, lists or dicts ({GUIDE})."
        )


def load_saved_weights(model: keras.Model, path: Path) -> None:
    """Sets the model's weights to those in a .keras file of the same model.

    Raises ValueError if they are another model's, TypeError, KeyError or OSError if the file cannot
    be read.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=SKIPS)
        try:
            model.load_weights(path)
        except UserWarning:  # Keras would leave layers as they are
            raise ValueError("the file has other layers, or other shapes, than the model") from None


def describe_error(error: Exception) -> str:
    """An error in one line: its type and what it says, without what Keras adds around it.

    >>> describe_error(TypeError("Exception encountered when calling A.call().\\n\\nno x"))
    'TypeError: no x'
    """
    text = TERMINAL_CODES.sub("", str(error))
    for heading in BEFORE:
        _, _, text = text.rpartition(heading)
    for heading in AFTER:
        text, _, _ = text.partition(heading)

    in_one_line = " ".join(text.split()).rstrip(".")
    if len(in_one_line) > MAX_LENGTH:
        in_one_line = f"{in_one_line[:MAX_LENGTH]}..."
    return f"{type(error).__name__}: {in_one_line}"


def _place(error: Exception) -> str:
    """The line of the user's code in which the error was raised, to find it without a traceback."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and frame.filename != __file__
    ]
    return f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(one, other) for one, other in zip(first, second, strict=True)
    )
