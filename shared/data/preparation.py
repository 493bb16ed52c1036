"""Examples to a model's inputs: split, fitted to the training examples alone, encoded, weighed.

For both kinds of examples: a `Table` is encoded by `encoding` (from its file, by `streaming`), a
`Dataset` already holds arrays.
"""

from dataclasses import dataclass, replace

import numpy as np

from shared.data.dataset import Dataset
from shared.data.encoding import encode_table, fit_table
from shared.data.schema import Schema, merge_schemas
from shared.data.splits import split_pool, split_validation
from shared.data.streaming import encoded_rows, iterate_table
from shared.data.tables import Table
from shared.experiment import DataSection


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
    example is left to train on, or if a class occurs in held-out examples alone.
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
    return Splits(
        schema=schema,
        train=weigh_classes(encode(train, schema), schema),
        validation=encode(validation, schema),
        test=encode(test, schema),
    )


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
