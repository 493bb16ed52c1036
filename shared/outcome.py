"""The behaviour of a trained model on held-out examples, for the result and the report."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from shared.data import Schema
from shared.zoo.transformer import generate

PROMPT_BYTES = 24
SAMPLE_BYTES = 200
TEMPERATURE = 0.7


def outcome(
    model: keras.Model, batches: tf.data.Dataset, schema: Schema, seed: int
) -> dict[str, Any]:
    """Returns what can be shown of a model beyond its metrics, under one key or none.

    | model                     | key         | value                                          |
    |---------------------------|-------------|------------------------------------------------|
    | one class per example     | `confusion` | counts[i][j]: examples of class i taken for j  |
    | language model            | `sample`    | the first bytes of an example, and how it goes |
    |                           |             | on from them                                   |
    | any other                 | none        |                                                |

    The diagonal's share of the sum of the counts is the accuracy.
    """
    if schema.task == "classification" and not schema.target_shape:
        return {"confusion": _confusion(model, batches, schema)}
    if schema.vocabulary_size and schema.target_shape == schema.input_shape:
        return {"sample": _sample(model, batches, seed)}
    return {}


def _confusion(model: keras.Model, batches: tf.data.Dataset, schema: Schema) -> dict[str, Any]:
    counts = np.zeros((schema.num_classes, schema.num_classes), np.int64)
    for x, y, *_ in batches:
        predicted = model.predict_on_batch(x).argmax(axis=-1)
        np.add.at(counts, (y.numpy(), predicted), 1)

    names = schema.classes or map(str, range(schema.num_classes))
    return {"classes": list(names), "counts": counts.tolist()}


def _sample(model: keras.Model, batches: tf.data.Dataset, seed: int) -> dict[str, str]:
    x, *_ = next(iter(batches))
    first_ids = x.numpy()[0, :PROMPT_BYTES]
    prompt = bytes(first_ids.tolist())
    text = generate(model, prompt, SAMPLE_BYTES, seed, TEMPERATURE)
    return {"prompt": prompt.decode(errors="replace"), "text": text.decode(errors="replace")}
