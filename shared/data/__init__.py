"""Data: from a user's file to the arrays that a model takes.

Examples pass these stages, in this order:

| stage | function | module | gives |
|---|---|---|---|
| read | `load_examples` | `sources`, through one of `readers/` | `Table` or `Dataset` |
| declare roles | `assign_roles` | `roles` | `Roles`: label, features, weight, group, id |
| check | `make_table` | `tables`, rule by rule in `checks` | `Table`: columns as in the file |
| partition over silos | `partition` | `partition` | the same kind, one part per silo |
| split | `split_pool`, `split_validation` | `splits` | the same kind: train, held out |
| fit | `fit_schema` | `preparation`; a table's rows in `encoding` | `Schema` |
| merge over silos | `merge_schemas` | `schema` | `Schema` of all silos' rows |
| encode | `encode` | `preparation`; a table's rows in `encoding` | `Dataset`: x, y, weights |
| weigh classes | `weigh_classes` | `preparation` | `Dataset` |
| shard over ranks | `shard` | `dataset` | `Dataset` |

`split` runs split, fit, encode and weigh in one call. Arrays, images, text and DNA are a `Dataset`
from the start: there is no role to declare, and their schema is read off the arrays.

Names that are near each other:

* `sources` picks the reader for `data.name`, and holds the built-in sets; `readers/files` are
  tables in files or folders, `readers/kinds` the endings, `readers/arrow_columns` the types of
  columns, `readers/arrays` .npz files, `readers/folders` images and texts by class,
  `readers/texts` and `readers/biosequences` the encoding of text and DNA, `readers/hubs` Keras's
  and Hugging Face's sets.
* `tables` is a table before encoding, `encoding` what turns it into arrays, `dataset` the arrays.
* `schema` is the fitted value; `preparation` the steps that fit and apply it.
* `streaming` handles tables larger than memory; `rows` is the array in a file that it encodes to.
* `splits` holds examples out; `partition` gives each silo its own.
* `inspection` serves `python -m shared.data inspect`, with columns described by `description`.
"""

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
