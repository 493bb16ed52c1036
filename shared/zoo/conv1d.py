"""One-dimensional convolutions over a sequence, as for motifs in DNA.

Alipanahi et al. 2015, doi:10.1038/nbt.3300.
"""

from collections.abc import Sequence

import keras

from shared.data import Schema

PRESETS = {
    "tiny": {"filters": [16], "kernel_size": 7, "units": 16},
    "small": {"filters": [32, 64], "kernel_size": 9, "units": 64},
}


def build(
    schema: Schema,
    filters: Sequence[int] = (32, 64),
    kernel_size: int = 9,
    units: int = 32,
    embedding_dim: int = 16,
    dropout_rate: float = 0.0,
) -> keras.Model:
    """Blocks of convolution, ReLU and pooling by 2, the maximum over places, a dense layer.

    One block per entry of `filters`. Takes numbers (T, channels), or ids (T,), which are embedded.
    """
    num_axes = 1 if schema.vocabulary_size else 2
    if len(schema.input_shape) != num_axes or schema.target_shape:
        raise ValueError(
            "The conv1d takes sequences of numbers (length, channels) or of ids (length,);"
            f" received {schema}. For tables take mlp, for images cnn or resnet."
        )
    if schema.input_shape[0] < 2 ** len(filters):
        raise ValueError(
            f"The conv1d halves the sequence {len(filters)} times; received sequences of"
            f" {schema.input_shape[0]}. Shorten model.options 'filters'."
        )

    inputs = keras.Input(schema.input_shape, dtype=schema.input_dtype, name="sequence")
    x = inputs
    if schema.vocabulary_size:
        x = keras.layers.Embedding(schema.vocabulary_size, embedding_dim, name="embedding")(x)
    for i, width in enumerate(filters):
        convolution = keras.layers.Conv1D(
            width, kernel_size, padding="same", activation="relu", name=f"conv{i}"
        )
        x = convolution(x)
        x = keras.layers.MaxPooling1D(name=f"pool{i}")(x)

    x = keras.layers.GlobalMaxPooling1D(name="maximum")(x)
    x = keras.layers.Dense(units, activation="relu", name="dense")(x)
    if dropout_rate > 0:
        x = keras.layers.Dropout(dropout_rate, name="dropout")(x)
    outputs = keras.layers.Dense(schema.num_outputs, dtype="float32", name="output")(x)
    return keras.Model(inputs, outputs, name="conv1d")
