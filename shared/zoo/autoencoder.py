"""Autoencoder: a code of few numbers from which the input is restored.

Hinton and Salakhutdinov 2006, doi:10.1126/science.1127647.
"""

import math
from collections.abc import Sequence

import keras

from shared.data import Schema

PRESETS = {"tiny": {"units": [16], "code_size": 4}, "small": {"units": [128, 64], "code_size": 16}}


def build(
    schema: Schema, units: Sequence[int] = (64,), code_size: int = 8, activation: str = "relu"
) -> keras.Model:
    """Dense layers of the given widths down to a code, and the same up again.

    The code is the layer "code".
    """
    if schema.target_shape != schema.input_shape or schema.num_classes:
        raise ValueError(
            f"The autoencoder's targets are its inputs; received {schema}. Set data.task ="
            " 'reconstruction'."
        )

    # Down.
    inputs = keras.Input(schema.input_shape, name="features")
    x = inputs
    if len(schema.input_shape) > 1:
        x = keras.layers.Flatten(name="flatten")(x)
    for i, width in enumerate(units):
        x = keras.layers.Dense(width, activation=activation, name=f"encoder{i}")(x)
    x = keras.layers.Dense(code_size, name="code")(x)

    # Up.
    for i, width in enumerate(reversed(units)):
        x = keras.layers.Dense(width, activation=activation, name=f"decoder{i}")(x)
    x = keras.layers.Dense(math.prod(schema.input_shape), dtype="float32", name="output")(x)
    x = keras.layers.Reshape(schema.input_shape, dtype="float32", name="reconstruction")(x)
    return keras.Model(inputs, x, name="autoencoder")
