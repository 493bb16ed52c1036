"""Linear model: linear regression, or multinomial logistic regression on logits."""

import keras

from shared.data import Schema


def build(schema: Schema) -> keras.Model:
    """y = x W + b, with W of shape (num_features, num_outputs)."""
    if schema.target_shape or schema.vocabulary_size:
        raise ValueError(
            f"The linear takes numbers and one target per example; received {schema}. See"
            " docs/how-to-models.md."
        )

    inputs = keras.Input(schema.input_shape, name="features")
    x = inputs
    if len(schema.input_shape) > 1:
        x = keras.layers.Flatten(name="flatten")(x)
    outputs = keras.layers.Dense(schema.num_outputs, dtype="float32", name="output")(x)
    return keras.Model(inputs, outputs, name="linear")
