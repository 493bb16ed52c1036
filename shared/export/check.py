"""The check of an export: drawn examples, through the file and through the run's model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.data import Schema
from shared.data.encoding import encode_inputs
from shared.data.schema import Columns
from shared.export.formats import Format, Inputs
from shared.export.serving import scaled_target
from shared.seeding import rng_for

if TYPE_CHECKING:
    import keras

NUM_CHECKED = 32
GAP_SHARE = 0.1  # of numbers
UNKNOWN = "\0unknown"  # no category of anyone's


def largest_difference(form: Format, path: Path, model: keras.Model, schema: Schema) -> float:
    """The largest difference between the file's predictions and the model's.

    In probabilities, or in standard deviations of the label; infinite if shapes differ.
    """
    inputs, x = _draw(schema, form)
    expected, unit = _expected(model, schema, x)
    received = np.asarray(form.predict(path, inputs))
    if received.shape != expected.shape:
        return np.inf
    return float(np.abs(received - expected).max() / unit)


def _draw(schema: Schema, form: Format) -> tuple[Inputs, np.ndarray]:
    """Examples as the exported model takes them, and as the run's model does."""
    rng = rng_for(0, "export")
    if schema.columns is not None:
        return _draw_table(schema.columns, form, rng)

    shape = (NUM_CHECKED, *schema.input_shape)
    if schema.vocabulary_size:
        x = rng.integers(schema.vocabulary_size, size=shape).astype(schema.input_dtype)
    else:
        x = rng.normal(size=shape).astype(schema.input_dtype)
    return {"x": x}, x


def _draw_table(
    columns: Columns, form: Format, rng: np.random.Generator
) -> tuple[Inputs, np.ndarray]:
    import pandas as pd

    inputs = {}
    frame = pd.DataFrame(index=range(NUM_CHECKED))

    # Numbers like those of training, with gaps.
    if columns.numbers:
        drawn = [rng.normal(column.mean, column.std, NUM_CHECKED) for column in columns.numbers]
        numbers = np.stack(drawn, axis=1)
        numbers[rng.random(numbers.shape) < GAP_SHARE] = np.nan
        inputs["numbers"] = numbers.astype(form.number_dtype)
        names = [column.name for column in columns.numbers]
        frame[names] = inputs["numbers"].astype(np.float64)

    # Categories by index, and one that no column has, by -1.
    if columns.categories:
        indices = [
            rng.integers(-1, len(column.values), NUM_CHECKED) for column in columns.categories
        ]
        for column, of_column in zip(columns.categories, indices, strict=True):
            values = np.array([*column.values, UNKNOWN], object)
            frame[column.name] = values[of_column]
        names = [column.name for column in columns.categories]
        if form.takes_names:
            inputs["categories"] = frame[names].to_numpy().astype(str)
        else:
            inputs["categories"] = np.stack(indices, axis=1).astype(form.category_dtype)
    return inputs, encode_inputs(frame, columns)


def _expected(model: keras.Model, schema: Schema, x: np.ndarray) -> tuple[np.ndarray, float]:
    """The run's model's predictions in the data's units, and the unit of differences."""
    outputs = np.asarray(model.predict(x, batch_size=len(x), verbose=0), np.float64)
    target = scaled_target(schema)
    if schema.num_classes:
        powers = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True), 1.0
    if target is None:
        return outputs, 1.0
    return outputs * target.std + target.mean, target.std
