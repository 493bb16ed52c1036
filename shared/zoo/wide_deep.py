"""Wide and deep model for tables, with embeddings (Cheng et al. 2016, arXiv:1606.07792).

Every column is turned into the id of a bucket. The wide part is linear in the columns and has one
weight per bucket; the deep part embeds the buckets and runs dense layers over embeddings and
columns.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from shared.data import Schema

LIMIT = 3.0  # numeric buckets cover [-LIMIT, LIMIT], in standard deviations


def build(
    schema: Schema,
    embedding_dim: int = 4,
    units: Sequence[int] = (32, 16),
    num_buckets: int = 16,
    categorical_columns: Sequence[int] = (),
) -> keras.Model:
    """Logits = wide(x) + deep(x).

    Numeric columns fall into `num_buckets` equal buckets over [-3, 3] (standard deviations; the
    outer two are open). `categorical_columns` already hold whole numbers in 0 .. num_buckets - 1;
    others count as the nearest of them.
    """
    _check(schema, categorical_columns)
    (num_columns,) = schema.input_shape
    num_ids = num_columns * num_buckets
    inputs = keras.Input(schema.input_shape, name="columns")
    to_ids = BucketIds(num_buckets, list(categorical_columns), dtype="float32", name="bucket_ids")
    ids = to_ids(inputs)

    # Wide: a weight per bucket, which begin at 0, and a linear layer.
    bucket_weights = keras.layers.Embedding(
        num_ids, schema.num_outputs, embeddings_initializer="zeros", name="wide"
    )
    wide_buckets = bucket_weights(ids)
    wide = keras.layers.Dense(schema.num_outputs, dtype="float32", name="wide_linear")(inputs)

    # Deep: dense layers over the embeddings of the buckets and the columns.
    embedded = keras.layers.Embedding(num_ids, embedding_dim, name="deep_embedding")(ids)
    flat = keras.layers.Flatten(name="flatten")(embedded)
    deep = keras.layers.Concatenate(name="deep_input")([flat, inputs])
    for i, width in enumerate(units):
        deep = keras.layers.Dense(width, activation="relu", name=f"deep{i}")(deep)
    deep = keras.layers.Dense(schema.num_outputs, dtype="float32", name="deep_output")(deep)

    wide_mean = keras.layers.GlobalAveragePooling1D(dtype="float32", name="wide_mean")(wide_buckets)
    outputs = keras.layers.Add(dtype="float32", name="output")([wide, wide_mean, deep])
    return keras.Model(inputs, outputs, name="wide_deep")


def _check(schema: Schema, categorical_columns: Sequence[int]) -> None:
    if len(schema.input_shape) != 1 or schema.target_shape or schema.vocabulary_size:
        raise ValueError(
            "wide_deep takes tables, one row per example; received examples of"
            f" {schema.input_shape}."
        )
    (num_columns,) = schema.input_shape
    outside = [column for column in categorical_columns if not 0 <= column < num_columns]
    if outside:
        raise ValueError(
            f"categorical_columns must lie in 0..{num_columns - 1}; received {outside}."
        )


@keras.saving.register_keras_serializable("archipelago")
class BucketIds(keras.layers.Layer):
    """Columns (batch, d) to bucket ids (batch, d); column j has the ids from j * num_buckets on."""

    def __init__(self, num_buckets: int, categorical_columns: list[int], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.num_buckets = num_buckets
        self.categorical_columns = categorical_columns

    def call(self, inputs: Any) -> Any:
        num_columns = inputs.shape[-1]
        is_category = np.isin(np.arange(num_columns), self.categorical_columns)
        buckets_per_unit = self.num_buckets / (2 * LIMIT)
        numeric = (inputs + LIMIT) * buckets_per_unit
        bucket = keras.ops.floor(keras.ops.where(is_category, keras.ops.round(inputs), numeric))
        bucket = keras.ops.clip(bucket, 0, self.num_buckets - 1)

        first_ids = np.arange(num_columns, dtype="int32") * self.num_buckets
        return keras.ops.cast(bucket, "int32") + first_ids

    def get_config(self) -> dict[str, object]:
        own = {"num_buckets": self.num_buckets, "categorical_columns": self.categorical_columns}
        return {**super().get_config(), **own}
