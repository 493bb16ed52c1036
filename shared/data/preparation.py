"""Examples to a model's inputs: split, fitted to the training examples alone, encoded, weighed.

For both kinds of examples: a `Table` is encoded by `encoding` (from its file, by `streaming`), a
`Dataset` already holds arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shared.data.dataset import Dataset
from shared.data.encoding import encode_table, fit_table
from shared.data.roles import format_names
from shared.data.schema import Schema, merge_schemas
from shared.data.splits import split_pool, split_validation
from shared.data.streaming import encoded_rows, iterate_table
from shared.data.tables import Table
from shared.experiment import DataSection

MAX_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class Splits:
    """Train, validation and test examples: a disjoint cover, encoded by `schema`."""

    schema: Schema
    train: Dataset
    validation: Dataset
    test: Dataset


def split(examples: Table | Dataset, config: DataSection, seed: int) -> Splits:
    """Returns the splits that the seed draws, encoded by a schema of the training examples.

    `validation_fraction` is of the pool that the test split leaves. Raises ValueError if no
    example is left to train on, if a class occurs in held-out examples alone, if all training
    examples are of one class, and if most numbers of classes are those of no example.
    """
    pool, test = split_pool(examples, seed, config.test_fraction)
    train, validation = split_validation(pool, seed, config.validation_fraction)
    if len(train) == 0:
        raise ValueError(
            f"Of {len(examples)} examples none is left to train on; received data.test_fraction ="
            f" {config.test_fraction:g} and data.validation_fraction ="
            f" {config.validation_fraction:g}. Lower them."
        )
    schema = fit_schema(train, config)
    _check_held_out_classes(examples, train)
    _check_class_numbers(examples)
    splits = Splits(
        schema=schema,
        train=weigh_classes(encode(train, schema), schema),
        validation=encode(validation, schema),
        test=encode(test, schema),
    )
    _check_some_classes(train, config)
    return splits


def fit_schema(train: Table | Dataset, config: DataSection) -> Schema:
    """Returns the schema of training examples, with class counts if data.class_weights is set.

    Raises ValueError if classes are to be weighed where examples have no single class.
    """
    schema = _fit_in_parts(train) if isinstance(train, Table) else train.schema
    if config.class_weights == "none":
        return schema
    labels = encode(train, schema).labels
    if labels is None:
        raise ValueError(
            f"data.class_weights = {config.class_weights!r} needs one class per example; received"
            f" {schema}. Set data.class_weights = 'none'."
        )
    counts = np.bincount(labels, minlength=schema.num_classes)
    return replace(schema, class_counts=tuple(counts.tolist()))


def _fit_in_parts(train: Table) -> Schema:
    """The schema of a table that need not fit in memory: the sum over its parts."""
    parts = enumerate(iterate_table(train))
    return merge_schemas({str(i): fit_table(part) for i, part in parts})


def encode(examples: Table | Dataset, schema: Schema) -> Dataset:
    """Returns the examples as arrays, with the classes of the schema; they may lack some of them.

    A streamed table's inputs stay in a file. Raises ValueError for a class that the schema lacks.
    """
    if isinstance(examples, Table):
        inputs = None
        if examples.file and schema.columns:
            inputs = encoded_rows(examples, schema.columns)
        return encode_table(examples, schema, inputs)

    # Named classes are numbered by the schema's list of them.
    if examples.classes != schema.classes:
        numbers = np.array([schema.classes.index(name) for name in examples.classes], np.int32)
        examples = replace(examples, y=numbers[examples.y], classes=schema.classes)
    return replace(examples, num_classes=schema.num_classes)


def weigh_classes(train: Dataset, schema: Schema) -> Dataset:
    """Returns training examples with weights by which all classes count the same.

    An example of class c weighs its own weight times n / (C n_c). n, n_c: training examples that
    the schema counts, in all and of class c; C: the classes that occur in them. A schema without
    counts changes nothing.
    """
    if not schema.class_counts:
        return train
    counts = np.array(schema.class_counts, np.float64)
    num_occurring = np.count_nonzero(counts)
    class_weights = counts.sum() / (num_occurring * np.maximum(counts, 1))
    own_weights = 1.0 if train.sample_weight is None else train.sample_weight
    weights = own_weights * class_weights[train.y]
    return replace(train, sample_weight=weights.astype(np.float32))


def _check_held_out_classes(examples: Table | Dataset, train: Table | Dataset) -> None:
    """Raises ValueError for a class of the examples that no training example has.

    Not of tables: their encoding finds such a class, with its row.
    """
    if isinstance(examples, Table) or examples.labels is None or train.labels is None:
        return
    missing = np.setdiff1d(examples.labels, train.labels)
    if missing.size:
        number = int(missing[0])
        name = examples.classes[number] if examples.classes else number
        raise ValueError(
            f"The class {name!r} has no training example, only some that are held out. Add some,"
            " take that class out, or hold out less (data.test_fraction,"
            " data.validation_fraction)."
        )


def _check_class_numbers(examples: Table | Dataset) -> None:
    """Raises ValueError if a table's classes are numbers, but not 0, 1, 2, ... with few holes.

    Each hole would be an output of the model: labels 1 and 2 make three, years 2,021.
    """
    if not isinstance(examples, Table) or examples.is_regression or not examples.roles.label:
        return
    label = examples.frame[examples.roles.label].to_numpy()
    if label.dtype.kind != "i":
        return  # they have names
    numbers = np.unique(label)
    num_holes = int(numbers[-1]) + 1 - len(numbers)
    if numbers[0] == 0 and num_holes <= len(numbers):
        return
    listed = format_names([str(number) for number in numbers[:MAX_CLASSES_SHOWN]])
    more = ", ..." if len(numbers) > MAX_CLASSES_SHOWN else ""
    raise ValueError(
        f"{examples.source}: classes that are numbers are 0, 1, 2, ..., each an output of the"
        f" model; received {listed}{more} in column {examples.roles.label!r}. If they are classes,"
        f" set data.classes = '{listed}'; if amounts, data.task = 'regression'."
    )


def _check_some_classes(train: Table | Dataset, config: DataSection) -> None:
    """Raises ValueError if all training examples are of one class."""
    labels = None if config.task == "reconstruction" else train.labels
    if labels is None or len(np.unique(labels)) > 1:
        return
    raise ValueError(
        f"All {len(train)} training examples of {config.name} are of one class, from which nothing"
        " can be learnt. Add examples of others, or name another column in data.label."
    )
