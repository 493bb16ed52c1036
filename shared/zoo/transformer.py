"""Transformers over ids (Vaswani et al. 2017, arXiv:1706.03762): a language model and a classifier.

Normalisation comes before attention and mlp (Xiong et al. 2020, arXiv:2002.04745), positions are
learnt.
"""

from typing import Any

import keras
import numpy as np

from shared.data import Schema
from shared.seeding import rng_for

PRESETS = {
    "tiny": {"dim": 32, "num_heads": 2, "num_layers": 1},
    "small": {"dim": 128, "num_heads": 4, "num_layers": 4},
    "base": {"dim": 256, "num_heads": 8, "num_layers": 6},
}


def build_language_model(
    schema: Schema,
    dim: int = 64,
    num_heads: int = 4,
    num_layers: int = 2,
    dropout_rate: float = 0.0,
) -> keras.Model:
    """Logits of the next id at each of T places, from the ids up to there.

    Shapes: ids (T,) to logits (T, num_classes).
    """
    targets_each_place = schema.target_shape == schema.input_shape and schema.num_classes
    if not schema.vocabulary_size or not targets_each_place:
        raise ValueError(
            f"The transformer_lm takes ids (length,) and a class at each place; received {schema}. "
            "Take transformer_classifier for one class per example."
        )

    inputs = keras.Input(schema.input_shape, dtype="int32", name="ids")
    x = _embedded(inputs, schema, dim)
    for i in range(num_layers):
        x = _block(x, i, num_heads, dropout_rate, causal=True)
    x = keras.layers.LayerNormalization(name="final_norm")(x)
    outputs = keras.layers.Dense(schema.num_classes, dtype="float32", name="output")(x)
    return keras.Model(inputs, outputs, name="transformer_lm")


def build_classifier(
    schema: Schema,
    dim: int = 64,
    num_heads: int = 4,
    num_layers: int = 2,
    dropout_rate: float = 0.0,
) -> keras.Model:
    """Logits from the mean over all places but padding.

    Padding is the vocabulary's last id; nothing attends to it.
    """
    if not schema.vocabulary_size or len(schema.input_shape) != 1 or schema.target_shape:
        raise ValueError(
            "The transformer_classifier takes ids (length,) and one target per example; received"
            f" {schema}. For tables take mlp, for images cnn or resnet, for sequences of numbers"
            " conv1d."
        )

    inputs = keras.Input(schema.input_shape, dtype="int32", name="ids")
    present = keras.ops.not_equal(inputs, schema.vocabulary_size - 1)
    attended = keras.ops.expand_dims(present, 1)
    x = _embedded(inputs, schema, dim)
    for i in range(num_layers):
        x = _block(x, i, num_heads, dropout_rate, mask=attended)
    x = keras.layers.LayerNormalization(name="final_norm")(x)

    # The mean in float32: bfloat16 cannot count beyond 256.
    x = keras.ops.cast(x, "float32")
    is_present = keras.ops.cast(keras.ops.expand_dims(present, -1), "float32")
    num_present = keras.ops.maximum(keras.ops.sum(is_present, axis=1), 1.0)
    mean = keras.ops.sum(x * is_present, axis=1) / num_present
    outputs = keras.layers.Dense(schema.num_outputs, dtype="float32", name="output")(mean)
    return keras.Model(inputs, outputs, name="transformer_classifier")


def generate(
    model: keras.Model, prompt: bytes, num_bytes: int, seed: int, temperature: float = 1.0
) -> bytes:
    """Continues a prompt byte by byte, each drawn from softmax(logits / temperature).

    Temperature 0 takes the likeliest. The model gets the last T bytes, T its input's length. Raises
    ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError(
            "A language model continues a prompt; received an empty one. Give it at least one byte."
        )
    rng = rng_for(seed, "generation")
    text = list(prompt)
    for _ in range(num_bytes):
        logits = _next_logits(model, text)
        if temperature == 0:
            text.append(int(logits.argmax()))
        else:
            powers = np.exp((logits - logits.max()) / temperature)
            text.append(int(rng.choice(len(powers), p=powers / powers.sum())))
    return bytes(text[len(prompt) :])


def _next_logits(model: keras.Model, text: list[int]) -> np.ndarray:
    """The logits of the byte that follows a text, float64."""
    (length,) = model.input_shape[1:]
    window = text[-length:]
    ids = np.zeros((1, length), np.int32)
    ids[0, : len(window)] = window  # what follows the last byte does not change its logits
    logits = np.asarray(model.predict_on_batch(ids))[0, len(window) - 1]
    return logits.astype(np.float64)


def _embedded(ids: Any, schema: Schema, dim: int) -> Any:
    x = keras.layers.Embedding(schema.vocabulary_size, dim, name="embedding")(ids)
    return Positions(name="positions")(x)


def _block(
    x: Any, i: int, num_heads: int, dropout_rate: float, causal: bool = False, mask: Any = None
) -> Any:
    """x + attention(norm(x)), then x + mlp(norm(x)), the mlp four times as wide."""
    dim = x.shape[-1]
    if dim % num_heads:
        raise ValueError(
            f"model.options: num_heads must divide dim; received {num_heads} and {dim}."
        )

    attention = keras.layers.MultiHeadAttention(
        num_heads, dim // num_heads, dropout=dropout_rate, name=f"attention{i}"
    )
    y = keras.layers.LayerNormalization(name=f"attention_norm{i}")(x)
    y = attention(y, y, use_causal_mask=causal, attention_mask=mask)
    x = keras.layers.Add(name=f"attention_add{i}")([x, y])

    y = keras.layers.LayerNormalization(name=f"mlp_norm{i}")(x)
    y = keras.layers.Dense(4 * dim, activation="gelu", name=f"mlp_up{i}")(y)
    y = keras.layers.Dense(dim, name=f"mlp_down{i}")(y)
    if dropout_rate > 0:
        y = keras.layers.Dropout(dropout_rate, name=f"dropout{i}")(y)
    return keras.layers.Add(name=f"mlp_add{i}")([x, y])


@keras.saving.register_keras_serializable("archipelago")
class Positions(keras.layers.Layer):
    """Adds to (batch, T, dim) a learnt vector for each of the T places."""

    def build(self, input_shape: Any) -> None:
        initializer = keras.initializers.RandomNormal(0.0, 0.02)
        self.vectors = self.add_weight(input_shape[1:], initializer=initializer, name="vectors")

    def call(self, inputs: Any) -> Any:
        return inputs + keras.ops.cast(self.vectors, inputs.dtype)
