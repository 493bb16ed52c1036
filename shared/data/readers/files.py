"""Tables in Parquet, Arrow and TFRecord files or folders: whole or in chunks, rows from 1 on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.data.checks import check_unique_names
from shared.data.readers.arrow_columns import column_names, make_frame, make_usable_frame
from shared.data.readers.arrow_files import arrow_chunks, arrow_names, read_arrow
from shared.data.readers.kinds import kind_of, table_parts
from shared.data.readers.parquet_files import parquet_chunks, parquet_names, read_parquet
from shared.data.readers.tfrecord_files import read_tfrecord, tfrecord_chunks, tfrecord_names
from shared.data.roles import canonical_name

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


@dataclass(frozen=True)
class Reader:
    """A kind of file's column names, its columns whole, and its columns in chunks of rows."""

    names: Callable[[Path], list[str]]
    whole: Callable[[Path, Sequence[str]], pa.Table]
    chunks: Callable[[Path, Sequence[str], int], Iterator[pa.Table]]


READERS = {
    "parquet": Reader(parquet_names, read_parquet, parquet_chunks),
    "arrow": Reader(arrow_names, read_arrow, arrow_chunks),
    "tfrecord": Reader(tfrecord_names, read_tfrecord, tfrecord_chunks),
}


def read_names(path: Path) -> list[str]:
    """Returns the names of the columns of a file or folder of the kinds `READERS`.

    Raises ValueError if it cannot be read, for a name that comes twice, and for a folder whose
    parts have other columns.
    """
    parts = table_parts(path)
    names = list(_raw_names(parts[0]))
    for part in parts[1:]:
        others = list(_raw_names(part))
        different = set(names) ^ set(others)
        if different and kind_of(part) != "tfrecord":
            raise ValueError(
                f"{part} and {parts[0]} are parts of one table, but only one of them has the column"
                f" {min(different)!r}. Give all parts the same columns."
            )
        names += [name for name in others if name not in names]
    return sorted(names) if kind_of(parts[0]) == "tfrecord" else names


def read_columnar(path: Path, names: Sequence[str]) -> pd.DataFrame:
    """Returns these columns, and no others; the index "row" counts from 1 on.

    Raises ValueError, naming file and column, for what cannot be read, or is unusable
    (`arrow_columns`).
    """
    frame = make_frame(_read_whole(path, names), names, str(path))
    return _with_row_numbers(frame, first=1)


def read_usable(path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Returns (all usable columns, what each of the others holds), to look at."""
    names = read_names(path)
    frame, reasons = make_usable_frame(_read_whole(path, names), names)
    return _with_row_numbers(frame, first=1), reasons


def iterate_chunks(path: Path, names: Sequence[str], num_rows: int) -> Iterator[pd.DataFrame]:
    """Yields what `read_columnar` reads, at most `num_rows` at a time; the index runs on."""
    first = 1
    for part in table_parts(path):
        raw_names = _raw_names(part)
        wanted = [raw_names.get(name, name) for name in names]
        for chunk in _reader(part).chunks(part, wanted, num_rows):
            if len(chunk):
                frame = make_frame(_renamed(chunk, names), names, str(path))
                yield _with_row_numbers(frame, first)
            first += len(chunk)


def _reader(part: Path) -> Reader:
    return READERS[kind_of(part)]


def _raw_names(part: Path) -> dict[str, str]:
    """A file's columns by their names in the table: each as it stands in the file."""
    raw_names = column_names(_reader(part).names(part))
    names = [canonical_name(name) for name in raw_names]
    check_unique_names(names, str(part))
    return dict(zip(names, raw_names, strict=True))


def _renamed(table: pa.Table, names: Sequence[str]) -> pa.Table:
    renamed = table.rename_columns(list(names))
    return renamed.replace_schema_metadata(table.schema.metadata)


def _read_whole(path: Path, names: Sequence[str]) -> pa.Table:
    import pyarrow as pa

    tables = []
    for part in table_parts(path):
        raw_names = _raw_names(part)
        table = _reader(part).whole(part, [raw_names.get(name, name) for name in names])
        tables.append(_renamed(table, names))
    if len(tables) == 1:
        return tables[0]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"The parts of {path} hold columns of different types: {error}. Write it again."
        ) from None


def _with_row_numbers(frame: pd.DataFrame, first: int) -> pd.DataFrame:
    frame.index = frame.index.__class__(range(first, first + len(frame)), name="row")
    return frame
