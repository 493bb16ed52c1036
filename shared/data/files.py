"""Tables in files: CSV, Parquet and TFRecord, read strictly into columns. What is wrong is named with its row."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.experiment import nearest_names

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

BAD_VALUE = re.compile(r"In CSV column #(\d+): (?:Row #(\d+): )?CSV conversion error to (\w+): (.*)", re.DOTALL)
DELIMITERS = ",;\t|"


def read_csv(
    path: Path, text_columns: Iterable[str] | None, delimiter: str = ",", encoding: str = "utf-8"
) -> pd.DataFrame:
    """The columns of a CSV file with a header, indexed by line (the header is line 1; empty lines are left out).

    `text_columns` hold text, all others numbers; None: every column is text. No value: NaN or None. Raises ValueError,
    naming line and column, for duplicate columns, rows of other lengths, text among numbers, or another encoding.
    """
    import pyarrow as pa  # a fifth of a second to import, needed only here
    from pyarrow import csv as arrow

    header = read_header(path, delimiter, encoding)
    as_text = set(header if text_columns is None else text_columns)
    types = {name: pa.string() if name in as_text else pa.float64() for name in header}
    try:
        table = arrow.read_csv(
            path,
            arrow.ReadOptions(use_threads=False, encoding=encoding),  # with threads rows have no numbers
            arrow.ParseOptions(delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False),
            arrow.ConvertOptions(column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(_explain(path, header, delimiter, str(error))) from None
    frame = table.to_pandas()
    frame.index += 2
    frame.index.name = "line"
    return frame.dropna(how="all")


def read_header(path: Path, delimiter: str, encoding: str) -> list[str]:
    """The names of a CSV file's columns. Raises ValueError if they cannot be read or told apart."""
    python_name = "utf-8-sig" if encoding == "utf-8" else encoding
    try:  # what cannot be decoded further down is the reader's to tell, with its line
        with path.open(encoding=python_name, errors="surrogateescape", newline="") as file:
            header = next(csv.reader(file, delimiter=delimiter), [])
        "".join(header).encode("utf-8")
    except (UnicodeError, LookupError) as error:
        raise ValueError(f"{path} is not in the encoding {encoding!r}: {error}. Set data.encoding.") from None
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}.") from None
    if not header:
        raise ValueError(f"{path} is empty. A CSV file needs a header line and at least one row.")
    others = [other for other in DELIMITERS if other in header[0]]
    if len(header) == 1 and others:
        raise ValueError(
            f"{path} has only one column, {header[0]!r}, with {delimiter!r} between columns. "
            f"Set data.delimiter = {others[0]!r}."
        )
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    if twice:
        raise ValueError(f"{path} has two columns of the name {twice[0]!r}. Give each a name of its own.")
    return header


def _explain(path: Path, header: list[str], delimiter: str, message: str) -> str:
    if found := BAD_VALUE.match(message):
        column, line, kind, problem = header[int(found[1])], found[2], found[3], found[4]
        if kind == "string":
            return f"{path}: column {column!r} is not UTF-8 in line {line}. Set data.encoding, for example 'latin-1'."
        value = problem.removeprefix("invalid value ")
        return (
            f"{path}: column {column!r} must be numeric; received {value} in line {line}. Mend that value; or, if the "
            "column holds categories, name it in data.categorical; or leave it out of data.features."
        )
    if found := re.match(r"CSV parse error: Row #(\d+): Expected (\d+) columns, got (\d+)", message):
        return f"{path}: line {found[1]} has {found[3]} fields where the header has {found[2]}. Mend that line."
    return f"{path} cannot be read as CSV: {message}."


def read_parquet(path: Path) -> pd.DataFrame:
    """The columns of a Parquet file, indexed by row from 1 on. Raises ValueError if it cannot be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    _check_columns(path, table.schema)
    return _numbered(table.to_pandas())


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read as a Parquet file: {str(error).splitlines()[0]} Is it whole? Write it again."
    )


def _check_columns(path: Path, schema: pa.Schema) -> None:
    import pyarrow as pa

    twice = [name for i, name in enumerate(schema.names) if name in schema.names[:i]]
    if twice:
        raise ValueError(f"{path} has two columns of the name {twice[0]!r}. Give each a name of its own.")
    nested = [field.name for field in schema if pa.types.is_nested(field.type)]
    if nested:
        raise ValueError(f"{path}: column {nested[0]!r} holds lists or records; a table holds one value in each place.")


def read_tfrecord(path: Path) -> pd.DataFrame:
    """The features of a TFRecord file of tf.train.Example, one value each, as columns, indexed by record from 1 on."""
    import pandas as pd

    return _numbered(pd.DataFrame([*_records(path)]))


def _records(path: Path) -> Iterator[dict[str, object]]:
    import tensorflow as tf

    count = size = 0
    try:
        for record in map(bytes, tf.data.TFRecordDataset(str(path)).as_numpy_iterator()):
            count += 1
            size += len(record) + 16  # its length and two checksums
            yield _values(path, count, record)
        problem = "" if size == path.stat().st_size else "the last one is cut off"  # TensorFlow takes that for the end
    except tf.errors.OpError as error:
        problem = str(error.message)
    if problem:
        raise ValueError(f"{path} cannot be read as a TFRecord file beyond record {count}: {problem}. Write it again.")


def iterate_chunks(path: Path, num_rows: int) -> Iterator[pd.DataFrame]:
    """What `READERS` read of a Parquet or TFRecord file, so many rows at a time; the index goes on over all of them."""
    import pandas as pd

    first = 1
    if path.suffix == ".parquet":
        chunks = _parquet_chunks(path, num_rows)
    else:
        records = _records(path)
        parts = iter(lambda: [*itertools.islice(records, num_rows)], [])
        chunks = (pd.DataFrame(rows) for rows in parts)
    for chunk in chunks:
        yield _numbered(chunk, first)
        first += len(chunk)


def _parquet_chunks(path: Path, num_rows: int) -> Iterator[pd.DataFrame]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            _check_columns(path, file.schema_arrow)
            for batch in file.iter_batches(num_rows, use_threads=False):
                yield pa.Table.from_batches([batch], file.schema_arrow).to_pandas()
                pa.default_memory_pool().release_unused()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _values(path: Path, number: int, record: bytes) -> dict[str, object]:
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    try:
        features = tf.train.Example.FromString(record).features.feature
    except DecodeError:
        raise ValueError(f"{path}: record {number} is no tf.train.Example. Write it again.") from None
    values: dict[str, object] = {}
    for name, feature in sorted(features.items()):  # a map has no order
        found = list(getattr(feature, feature.WhichOneof("kind") or "float_list").value)
        if len(found) > 1:
            raise ValueError(f"{path}: record {number} has {len(found)} values of {name!r}; a table holds one each.")
        values[name] = None if not found else found[0].decode() if isinstance(found[0], bytes) else found[0]
    return values


def _numbered(frame: pd.DataFrame, first: int = 1) -> pd.DataFrame:
    frame.index = frame.index.__class__(range(first, first + len(frame)), name="row")
    return frame


def write_tfrecord(path: Path, frame: pd.DataFrame) -> None:
    """Writes columns of numbers and text as tf.train.Example, which `read_tfrecord` reads back."""
    import tensorflow as tf

    def feature(value: object) -> tf.train.Feature:
        if isinstance(value, str):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))
        if isinstance(value, (int, np.integer)):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in frame.to_dict("records"):
            features = tf.train.Features(feature={str(name): feature(value) for name, value in row.items()})
            writer.write(tf.train.Example(features=features).SerializeToString())


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {".parquet": read_parquet, ".tfrecord": read_tfrecord}


def check_exists(path: Path) -> None:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        nearest = ", ".join(nearest_names(path.name, beside)[:3])
        hint = f"Nearest in that folder: {nearest}." if beside else f"That folder holds no {path.suffix} file."
        raise ValueError(f"No data file at {path}. {hint} Set data.name.")
