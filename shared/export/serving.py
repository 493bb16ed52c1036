"""The served model: the run's model between the data as it is and answers in its units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data import Schema
from shared.data.schema import Category, Columns, Number
from shared.export.formats import Format

if TYPE_CHECKING:
    import keras


def serving_model(model: keras.Model, schema: Schema, form: Format) -> keras.Model:
    """Wraps the model, in Keras's own layers alone.

    Inputs: "x", or of a table "numbers" and "categories". Output: probabilities of classes, or
    numbers in the label's unit.
    """
    import keras

    columns = schema.columns
    if columns is None:
        inputs = {"x": keras.Input(schema.input_shape, dtype=schema.input_dtype, name="x")}
        outputs = model(inputs["x"])
    else:
        inputs = _column_inputs(columns, form)
        outputs = model(_encoded(columns, inputs))

    target = scaled_target(schema)
    if schema.num_classes:
        outputs = keras.layers.Softmax(dtype="float32", name="probabilities")(outputs)
    elif target:
        outputs = outputs * target.std + target.mean
    return keras.Model(inputs, outputs, name="served")


def scaled_target(schema: Schema) -> Number | None:
    """The label's column if the model predicts it in standard deviations from its mean."""
    columns = schema.columns
    return columns.target if columns and columns.scaled else None


def _column_inputs(columns: Columns, form: Format) -> dict[str, Any]:
    import keras

    inputs = {}
    if columns.numbers:
        shape = (len(columns.numbers),)
        inputs["numbers"] = keras.Input(shape, dtype=form.number_dtype, name="numbers")
    if columns.categories:
        shape = (len(columns.categories),)
        inputs["categories"] = keras.Input(shape, dtype=form.category_dtype, name="categories")
    return inputs


def _encoded(columns: Columns, inputs: dict[str, Any]) -> Any:
    """The model's inputs from the columns: `shared.data.encoding.encode_inputs`, in Keras."""
    from keras import ops

    parts = []
    if columns.numbers:
        parts.append(_encoded_numbers(columns, inputs["numbers"]))
    for i, column in enumerate(columns.categories):
        values = inputs["categories"][:, i : i + 1]
        parts.append(_one_hot(column, values, f"category{i}"))
    return ops.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _encoded_numbers(columns: Columns, numbers: Any) -> Any:
    """Gaps become the mean; then (x - mean) / std, if the model takes scaled numbers."""
    from keras import ops

    means = np.array([[column.mean for column in columns.numbers]], numbers.dtype)
    numbers = ops.where(ops.isnan(numbers), means, numbers)
    if columns.scaled:
        stds = np.array([[column.std for column in columns.numbers]], numbers.dtype)
        numbers = (numbers - means) / stds
    return ops.cast(numbers, "float32")


def _one_hot(column: Category, values: Any, name: str) -> Any:
    """A 0 or 1 for each of the column's categories; zeros for any other."""
    from keras import layers, ops

    if values.dtype == "string":
        lookup = layers.StringLookup(vocabulary=list(column.values), num_oov_indices=1, name=name)
        values = ops.cast(lookup(values), "int32") - 1  # the first index is of any other name
    indices = np.arange(len(column.values), dtype=np.int32)[None]
    return ops.cast(ops.equal(values, indices), "float32")


def describe(schema: Schema, form: Format) -> dict[str, Any]:
    """The inputs and the output of the exported model, as JSON."""
    return {"inputs": _describe_inputs(schema, form), "output": _describe_output(schema)}


def _describe_inputs(schema: Schema, form: Format) -> dict[str, Any]:
    columns = schema.columns
    if columns is None:
        return {"x": {"dtype": schema.input_dtype, "shape": [None, *schema.input_shape]}}

    inputs: dict[str, Any] = {}
    if columns.numbers:
        names = [column.name for column in columns.numbers]
        inputs["numbers"] = {"dtype": form.number_dtype, "columns": names, "missing": "NaN"}
    if columns.categories:
        inputs["categories"] = {
            "dtype": form.category_dtype,
            "columns": {column.name: list(column.values) for column in columns.categories},
            "holds": "names" if form.takes_names else "indices of the names, -1 for any other",
        }
    return inputs


def _describe_output(schema: Schema) -> dict[str, Any]:
    if schema.num_classes:
        names = schema.classes or map(str, range(schema.num_classes))
        return {"holds": "probabilities", "classes": list(names)}
    return {"holds": "numbers", "shape": [None, *(schema.target_shape or (1,))]}
