"""Linear model: linear regression, or multinomial logistic regression on logits."""

import keras

from shared.data import Schema


def build(schema: Schema) -> keras.Model:
    """y = x W + b, with W of shape (num_features, num_outputs)."""
    inputs = keras.Input(schema.input_shape, name="features")
    x = keras.layers.Flatten(name="flatten")(inputs) if len(schema.input_shape) > 1 else inputs
    return keras.Model(inputs, keras.layers.Dense(schema.num_outputs, name="output")(x), name="linear")
