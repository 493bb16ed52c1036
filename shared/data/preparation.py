"""From examples to a model's inputs: fitted to the training examples alone, applied to all."""

from dataclasses import dataclass, replace

import numpy as np

from shared.data.dataset import Dataset
from shared.data.schema import Schema, merge_schemas
from shared.data.splits import split_pool, split_validation
from shared.data.streaming import encoded_rows, iterate_table
from shared.data.tables import Table, encode_table, fit_table
from shared.experiment import DataSection


@dataclass(frozen=True)
class Splits:
    """Train, validation and test examples: a disjoint cover of the data set, ready for a model of the schema."""

    schema: Schema
    train: Dataset
    validation: Dataset
    test: Dataset


def split(examples: Table | Dataset, config: DataSection, seed: int) -> Splits:
    """Splits, determined by the seed, encoded by what the training examples say.

    `validation_fraction` is of the pool that the test split leaves. Raises ValueError if a class occurs in what is held
    out and in no training example.
    """
    pool, test = split_pool(examples, seed, config.test_fraction)
    train, validation = split_validation(pool, seed, config.validation_fraction)
    if len(train) == 0:
        raise ValueError(
            f"Of {len(examples)} examples none is left to train on; received data.test_fraction = "
            f"{config.test_fraction:g} and data.validation_fraction = {config.validation_fraction:g}. Lower them."
        )
    schema = fit_schema(train, config)
    _check_classes(examples, train)
    ready = encode(train, schema)
    return Splits(schema, weigh_classes(ready, schema), encode(validation, schema), encode(test, schema))


def fit_schema(train: Table | Dataset, config: DataSection) -> Schema:
    """What training examples say of the data."""
    schema = _fit_parts(train) if isinstance(train, Table) else train.schema
    if config.class_weights == "none":
        return schema
    labels = encode(train, schema).labels
    if labels is None:
        raise ValueError(
            f"data.class_weights = {config.class_weights!r} needs one class per example; received {schema}. "
            "Set data.class_weights = 'none'."
        )
    counts = np.bincount(labels, minlength=schema.num_classes)
    return replace(schema, class_counts=tuple(map(int, counts)))


def _fit_parts(train: Table) -> Schema:
    return merge_schemas({str(i): fit_table(part) for i, part in enumerate(iterate_table(train))})


def encode(examples: Table | Dataset, schema: Schema) -> Dataset:
    """The examples as arrays, with the classes of the schema, of which they may lack some."""
    if isinstance(examples, Table):
        rows = encoded_rows(examples, schema.columns) if examples.file and schema.columns else None
        return encode_table(examples, schema, rows)
    if examples.classes != schema.classes:
        numbers = np.array([schema.classes.index(name) for name in examples.classes], np.int32)
        examples = replace(examples, y=numbers[examples.y], classes=schema.classes)
    return replace(examples, num_classes=schema.num_classes)


def weigh_classes(train: Dataset, schema: Schema) -> Dataset:
    """Training examples with weights by which all classes count the same: n / (C n_c) for each of class c.

    n, n_c: of the schema's training examples, C: the classes that occur in them. As they are, where the schema counts
    none.
    """
    if not schema.class_counts:
        return train
    counts = np.array(schema.class_counts, np.float64)
    of_class = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    own = 1.0 if train.sample_weight is None else train.sample_weight
    return replace(train, sample_weight=(own * of_class[train.y]).astype(np.float32))


def _check_classes(examples: Table | Dataset, train: Table | Dataset) -> None:
    if isinstance(examples, Table):
        return  # its own encoding tells it, with the row
    everywhere, trained = examples.labels, train.labels
    if everywhere is None or trained is None:
        return
    if missing := sorted(set(np.unique(everywhere)) - set(np.unique(trained))):
        name = examples.classes[missing[0]] if examples.classes else missing[0]
        raise ValueError(
            f"The class {name!r} has no training example, only some that are held out. Add some, take that class out, "
            "or hold out less (data.test_fraction, data.validation_fraction)."
        )
