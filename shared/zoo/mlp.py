"""Multilayer perceptron."""

from collections.abc import Sequence

import keras

from shared.data import Schema


def build(
    schema: Schema,
    units: Sequence[int] = (64, 32),
    activation: str = "relu",
    dropout_rate: float = 0.0,
) -> keras.Model:
    """Dense layers of the given widths, each with activation and dropout, then a linear output."""
    if schema.target_shape or schema.vocabulary_size:
        raise ValueError(
            f"The mlp takes numbers and one target per example; received {schema}. See"
            " docs/how-to-models.md."
        )

    inputs = keras.Input(schema.input_shape, name="features")
    x = inputs
    if len(schema.input_shape) > 1:
        x = keras.layers.Flatten(name="flatten")(x)
    for i, width in enumerate(units):
        x = keras.layers.Dense(width, activation=activation, name=f"dense{i}")(x)
        if dropout_rate > 0:
            x = keras.layers.Dropout(dropout_rate, name=f"dropout{i}")(x)

    outputs = keras.layers.Dense(schema.num_outputs, dtype="float32", name="output")(x)
    return keras.Model(inputs, outputs, name="mlp")
