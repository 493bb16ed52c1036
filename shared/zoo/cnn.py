"""Small convolutional network for images."""

from collections.abc import Sequence

import keras

from shared.data import Schema


def build(
    schema: Schema, filters: Sequence[int] = (16, 32), kernel_size: int = 3, units: int = 64, dropout_rate: float = 0.0
) -> keras.Model:
    """One block of convolution, ReLU and 2 x 2 max-pooling per entry of `filters`, a dense layer, a linear output.

    Raises ValueError if the input is no image (height, width, channels), or too small for so many poolings.
    """
    if len(schema.input_shape) != 3 or schema.target_shape:
        raise ValueError(f"The cnn takes images (height, width, channels); received examples of {schema.input_shape}.")
    if min(schema.input_shape[:2]) < 2 ** len(filters):
        raise ValueError(
            f"The cnn halves the image {len(filters)} times; received images of {schema.input_shape}. "
            "Shorten model.options 'filters'."
        )
    inputs = x = keras.Input(schema.input_shape, name="image")
    for i, width in enumerate(filters):
        x = keras.layers.Conv2D(width, kernel_size, padding="same", activation="relu", name=f"conv{i}")(x)
        x = keras.layers.MaxPooling2D(name=f"pool{i}")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(units, activation="relu", name="dense")(x)
    if dropout_rate > 0:
        x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    return keras.Model(inputs, keras.layers.Dense(schema.num_outputs, dtype="float32", name="output")(x), name="cnn")
