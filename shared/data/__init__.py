"""Data: the examples, where they come from, how they are split, and which silo owns which."""

from shared.data.dataset import Dataset, Schema, Splits, shard, split, split_pool
from shared.data.sources import BUILTIN_SETS, load_dataset

__all__ = ["BUILTIN_SETS", "Dataset", "Schema", "Splits", "load_dataset", "shard", "split", "split_pool"]
