"""Tables in TFRecord files of tf.train.Example: one value of a feature in a record, or none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.readers.kinds import is_gzipped, unpacked_size

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import tensorflow as tf

FRAME_BYTES = 16  # of each record in a file: its length and two checksums

Features = Mapping[str, Any]  # the tf.train.Feature of each name
Values = list[Any]  # of a feature in a record: int, float or bytes


def tfrecord_names(path: Path) -> list[str]:
    """Returns the names of all features that any record has, sorted: a record may lack some.

    Raises ValueError if the file cannot be read.
    """
    names: set[str] = set()
    for features in _iterate_records(path):
        names.update(features)
    if not names:
        raise ValueError(f"{path} holds no examples. Give it at least one.")
    return sorted(names)


def read_tfrecord(path: Path, names: Sequence[str]) -> pa.Table:
    """Returns these features of all records. Raises ValueError if the file cannot be read."""
    records = [_select(features, names) for features in _iterate_records(path)]
    return _make_table(records, names)


def tfrecord_chunks(path: Path, names: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
    """Yields these features of at most `num_rows` records at a time."""
    records = (_select(features, names) for features in _iterate_records(path))
    while chunk := list(itertools.islice(records, num_rows)):
        yield _make_table(chunk, names)


def write_tfrecord(path: Path, frame: pd.DataFrame) -> None:
    """Writes columns of numbers and text as tf.train.Example, which `read_tfrecord` reads back."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in frame.to_dict("records"):
            features = {str(name): _as_feature(value) for name, value in row.items()}
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())


def _as_feature(value: object) -> tf.train.Feature:
    import tensorflow as tf

    if value is None or value != value:  # a gap: None or NaN
        return tf.train.Feature()
    if isinstance(value, str):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))
    if isinstance(value, (int, np.integer)):
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
    return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))


def _iterate_records(path: Path) -> Iterator[Features]:
    """The features of each record, by name. Raises ValueError for a damaged or cut off file."""
    import tensorflow as tf

    compression = "GZIP" if is_gzipped(path) else ""
    num_records = 0
    num_bytes = 0
    try:
        records = tf.data.TFRecordDataset(str(path), compression)
        for record in records.as_numpy_iterator():
            num_records += 1
            num_bytes += len(record) + FRAME_BYTES
            yield _parse_record(path, num_records, bytes(record))
        size = unpacked_size(path)
    except tf.errors.OpError as error:
        raise _unreadable(path, num_records, str(error.message)) from None
    except (EOFError, OSError) as error:  # of gzip
        raise _unreadable(path, num_records, str(error)) from None

    # TensorFlow takes a record that is cut off for the end of the file.
    if num_bytes != size:
        raise _unreadable(path, num_records, "the last one is cut off")


def _parse_record(path: Path, number: int, record: bytes) -> Features:
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    try:
        features: Features = tf.train.Example.FromString(record).features.feature
    except DecodeError:
        raise ValueError(
            f"{path}: record {number} is no tf.train.Example. Write it again."
        ) from None
    return features


def _select(features: Features, names: Sequence[str]) -> list[Values]:
    """The values of each feature; none where the record lacks it."""
    return [_values(features[name]) if name in features else [] for name in names]


def _values(feature: tf.train.Feature) -> Values:
    kind = feature.WhichOneof("kind") or "float_list"
    return list(getattr(feature, kind).value)


def _make_table(records: Sequence[Sequence[Values]], names: Sequence[str]) -> pa.Table:
    """A column for each name: of single values and gaps, or of lists if a record has several."""
    import pyarrow as pa

    columns = {}
    for place, name in enumerate(names):
        values = [record[place] for record in records]
        columns[name] = _make_column(values)
    return pa.table(columns)


def _make_column(values: Sequence[Values]) -> pa.Array:
    import pyarrow as pa

    if any(len(several) > 1 for several in values):
        return pa.array([[str(value) for value in several] for several in values])

    singles = [several[0] if several else None for several in values]
    types = {type(value) for value in singles if value is not None}
    if types == {int, float}:
        return pa.array(singles, pa.float64())
    if len(types) > 1:  # text in some records, numbers in others
        singles = [_as_text(value) for value in singles]
    return pa.array(singles)


def _as_text(value: object) -> object:
    if value != value:  # NaN
        return None
    return str(value).encode() if isinstance(value, (int, float)) else value


def _unreadable(path: Path, num_records: int, reason: str) -> ValueError:
    return ValueError(
        f"{path} cannot be read as a TFRecord file beyond record {num_records}: {reason}. Write it"
        " again."
    )
