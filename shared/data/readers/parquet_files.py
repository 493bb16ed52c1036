"""Tables in Parquet files, whole or in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def parquet_names(path: Path) -> list[str]:
    """Returns the names of a Parquet file's columns. Raises ValueError if it cannot be read."""
    from pyarrow import parquet

    with _explained(path):
        return list(parquet.read_schema(path).names)


def read_parquet(path: Path, names: Sequence[str]) -> pa.Table:
    """Returns these columns of a Parquet file. Raises ValueError if it cannot be read."""
    from pyarrow import parquet

    with _explained(path), parquet.ParquetFile(path) as file:
        return _select(file.read(list(names)), names)


def parquet_chunks(path: Path, names: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
    """Yields these columns of at most `num_rows` rows at a time, and gives back their memory."""
    import pyarrow as pa
    from pyarrow import parquet

    with _explained(path), parquet.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(num_rows, columns=list(names), use_threads=False):
            yield _select(pa.Table.from_batches([batch]), names)
            pa.default_memory_pool().release_unused()


def _select(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """These columns: Parquet takes "a" for "a.b" too."""
    return table.select(list(names))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raises ValueError, with the file, for what Arrow cannot read."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as a Parquet file: {lines[0]} Is it whole? Write it again."
        ) from None
