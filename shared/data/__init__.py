"""Data: the examples, where they come from, how they are split, and which silo owns which."""

from shared.data.dataset import Dataset, shard
from shared.data.preparation import Splits, encode, fit_schema, split, weigh_classes
from shared.data.schema import Schema
from shared.data.sources import BUILTIN_SETS, load_dataset, load_examples
from shared.data.splits import split_pool
from shared.data.tables import Table

__all__ = [
    "BUILTIN_SETS",
    "Dataset",
    "Schema",
    "Splits",
    "Table",
    "encode",
    "fit_schema",
    "load_dataset",
    "load_examples",
    "shard",
    "split",
    "split_pool",
    "weigh_classes",
]
