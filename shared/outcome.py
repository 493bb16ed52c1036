"""What a trained model does, shown on held-out examples: for the result and the report."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from shared.data import Schema
from shared.zoo.transformer import generate

PROMPT_BYTES, SAMPLE_BYTES, TEMPERATURE = 24, 200, 0.7


def outcome(model: keras.Model, batches: tf.data.Dataset, schema: Schema, seed: int) -> dict[str, Any]:
    """`confusion` where each example has one class, `sample` of a language model's text, otherwise nothing.

    confusion: counts[i][j] examples of class i were taken for class j; the diagonal's share of the sum is the accuracy.
    sample: the first bytes of the first example, and how the model goes on.
    """
    if schema.task == "classification" and not schema.target_shape:
        return {"confusion": _confusion(model, batches, schema)}
    if schema.vocabulary_size and schema.target_shape == schema.input_shape:
        return {"sample": _sample(model, batches, seed)}
    return {}


def _confusion(model: keras.Model, batches: tf.data.Dataset, schema: Schema) -> dict[str, Any]:
    counts = np.zeros((schema.num_classes, schema.num_classes), np.int64)
    for x, y, *_ in batches:
        np.add.at(counts, (y.numpy(), model.predict_on_batch(x).argmax(axis=-1)), 1)
    return {"classes": list(schema.classes or map(str, range(schema.num_classes))), "counts": counts.tolist()}


def _sample(model: keras.Model, batches: tf.data.Dataset, seed: int) -> dict[str, str]:
    x, *_ = next(iter(batches))
    prompt = bytes(x.numpy()[0, :PROMPT_BYTES].tolist())
    text = generate(model, prompt, SAMPLE_BYTES, seed, TEMPERATURE)
    return {"prompt": prompt.decode(errors="replace"), "text": text.decode(errors="replace")}
