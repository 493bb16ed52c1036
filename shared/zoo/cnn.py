"""Small convolutional network for images."""

from collections.abc import Sequence

import keras

from shared.data import Schema


def build(
    schema: Schema,
    filters: Sequence[int] = (16, 32),
    kernel_size: int = 3,
    units: int = 64,
    dropout_rate: float = 0.0,
) -> keras.Model:
    """Blocks of convolution, ReLU and 2 x 2 max-pooling, then a dense layer and a linear output.

    One block per entry of `filters`. Raises ValueError if the input is no image (height, width,
    channels), or too small for so many poolings.
    """
    if len(schema.input_shape) != 3 or schema.target_shape:
        raise ValueError(
            "The cnn takes images (height, width, channels); received examples of"
            f" {schema.input_shape}."
        )
    if min(schema.input_shape[:2]) < 2 ** len(filters):
        raise ValueError(
            f"The cnn halves the image {len(filters)} times; received images of"
            f" {schema.input_shape}. Shorten model.options 'filters'."
        )

    inputs = keras.Input(schema.input_shape, name="image")
    x = inputs
    for i, width in enumerate(filters):
        convolution = keras.layers.Conv2D(
            width, kernel_size, padding="same", activation="relu", name=f"conv{i}"
        )
        x = convolution(x)
        x = keras.layers.MaxPooling2D(name=f"pool{i}")(x)

    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(units, activation="relu", name="dense")(x)
    if dropout_rate > 0:
        x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    outputs = keras.layers.Dense(schema.num_outputs, dtype="float32", name="output")(x)
    return keras.Model(inputs, outputs, name="cnn")
