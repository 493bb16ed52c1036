"""A table's rows as a model's inputs and targets: fitted to training rows, then encoded.

`fit_table` makes the schema of a table's rows, `encode_table` applies a schema to rows. Both go by
the same columns in the same order: numbers, then one input for each category.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.dataset import Dataset
from shared.data.roles import parse_names
from shared.data.rows import Rows
from shared.data.schema import Category, Columns, Number, Schema
from shared.data.tables import Table

if TYPE_CHECKING:
    import pandas as pd

MAX_CATEGORIES = 1000  # of a column; more are ids


def fit_table(train: Table) -> Schema:
    """Returns the schema of training rows: statistics of numbers, the categories and classes there.

    Raises ValueError for a column of more than `MAX_CATEGORIES` categories.
    """
    frame, roles = train.frame, train.roles
    target, classes, num_classes = _fit_target(train)
    columns = Columns(
        numbers=tuple(_fit_number(frame[name]) for name in roles.numbers),
        categories=tuple(_fit_category(frame[name], train.source) for name in roles.categories),
        target=target,
        scaled=train.config.scaling != "none",
    )
    shape = (len(columns.inputs),)
    return Schema(
        input_shape=shape,
        num_classes=num_classes,
        target_shape=() if roles.label else shape,
        classes=classes,
        columns=columns,
    )


def encode_table(table: Table, schema: Schema, inputs: Rows | None = None) -> Dataset:
    """Returns a table's rows as arrays, by the schema: (x - mean) / std, and ones for categories.

    `inputs`: where they are encoded in a file already. The targets of a classification are numbers
    of classes, those of a regression scaled like inputs; without a label the inputs are the
    targets.

    | in a row | becomes |
    |---|---|
    | a gap among numbers | the mean of the training rows: 0 where numbers are scaled |
    | a gap among categories | 0 in all inputs of that column |
    | a category that the schema lacks | 0 in all inputs of that column |
    | a number of a column that is constant in training | its difference from the mean: 0 there |
    | a number of a column that is empty in training | itself: mean 0, standard deviation 1 |
    | a class that the schema lacks | a ValueError with its row |
    """
    if schema.columns is None:
        raise ValueError(
            f"{table.source} is a table; received the schema of other data: {schema}. Give all the"
            " same kind."
        )
    x: Any = encode_inputs(table.frame, schema.columns) if inputs is None else inputs
    y = _encode_target(table, schema) if table.roles.label else x
    weight = None
    if table.roles.weight:
        weight = table.frame[table.roles.weight].to_numpy(np.float32)
    return Dataset(x, y, schema.num_classes, sample_weight=weight, groups=table.groups)


def encode_inputs(frame: pd.DataFrame, columns: Columns) -> np.ndarray:
    """Returns a model's inputs, float32 of shape (n, len(columns.inputs)).

    `frame` holds at least these columns, checked. See the table of `encode_table`.
    """
    # Numbers: gaps become the mean, then all are scaled.
    names = [column.name for column in columns.numbers]
    numbers = frame[names].to_numpy(np.float64)
    means = np.array([column.mean for column in columns.numbers])
    numbers = np.where(np.isnan(numbers), means, numbers)
    if columns.scaled:
        stds = np.array([column.std for column in columns.numbers])
        numbers = (numbers - means) / stds

    # Categories: one input for each of the schema's.
    one_hot = [_encode_category(frame[column.name], column) for column in columns.categories]
    inputs: np.ndarray = np.concatenate([numbers, *one_hot], axis=1).astype(np.float32)
    return inputs


def _encode_category(column: pd.Series[Any], category: Category) -> np.ndarray:
    """Bool of shape (n, number of categories): which of them each row has."""
    values = np.array(category.values, object)
    matches: np.ndarray = column.to_numpy()[:, None] == values[None, :]
    return matches


def _encode_target(table: Table, schema: Schema) -> np.ndarray:
    """Float32 numbers or int32 numbers of classes, shape (n,)."""
    label = table.frame[table.roles.label]
    if table.is_regression:
        values = label.to_numpy(np.float64)
        scale = schema.target_scale
        if scale is not None:
            values = (values - scale.mean) / scale.std
        return values.astype(np.float32)

    classes = schema.classes or range(schema.num_classes)
    unseen = label[~label.isin(list(classes))]
    if len(unseen):
        raise ValueError(
            f"{table.source}: the class {unseen.iloc[0]!r} (in {label.index.name}"
            f" {unseen.index[0]}) has no training example. Add some, take that class out, or hold"
            " out less (data.test_fraction, data.validation_fraction)."
        )
    if schema.classes:
        numbers = {name: number for number, name in enumerate(schema.classes)}
        label = label.map(numbers)
    return label.to_numpy(np.int32)


def _fit_target(train: Table) -> tuple[Number | None, tuple[str, ...], int]:
    """(statistics of a regression's targets, names of classes, number of classes)."""
    if not train.roles.label:
        return None, (), 0
    label = train.frame[train.roles.label]
    if train.is_regression:
        return _fit_number(label), (), 0
    declared = tuple(parse_names(train.config.classes))
    if declared:
        return None, declared, len(declared)
    if isinstance(label.iloc[0], str):
        names = tuple(sorted(set(label)))
        return None, names, len(names)
    return None, (), int(label.max()) + 1


def _fit_number(column: pd.Series[Any]) -> Number:
    values = column.to_numpy(np.float64)
    values = values[~np.isnan(values)]
    name = str(column.name)
    if values.size == 0:
        return Number(name, count=0, mean=0.0, variance=0.0)
    return Number(
        name,
        count=int(values.size),
        mean=float(values.mean()),
        variance=float(values.var()),
    )


def _fit_category(column: pd.Series[Any], source: str) -> Category:
    values = sorted(set(column.dropna()))
    if len(values) > MAX_CATEGORIES:
        raise ValueError(
            f"{source}: column {column.name!r} has {len(values)} categories; at most"
            f" {MAX_CATEGORIES} can be learnt from. Is it an id? Then name it in data.id, or leave"
            " it out of data.features."
        )
    return Category(str(column.name), tuple(values))
