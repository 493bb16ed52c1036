"""Tables in Arrow's own files: Feather, and the stream and file of its IPC format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def arrow_names(path: Path) -> list[str]:
    """Returns the names of an Arrow file's columns. Raises ValueError if it cannot be read."""
    with _opened(path) as (schema, _):
        return list(schema.names)


def read_arrow(path: Path, names: Sequence[str]) -> pa.Table:
    """Returns these columns of an Arrow file. Raises ValueError if it cannot be read."""
    import pyarrow as pa

    with _opened(path) as (schema, batches):
        return pa.Table.from_batches(batches, schema).select(list(names))


def arrow_chunks(path: Path, names: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
    """Yields these columns of at most `num_rows` rows at a time."""
    import pyarrow as pa

    with _opened(path) as (schema, batches):
        for batch in batches:
            table = pa.Table.from_batches([batch], schema).select(list(names))
            for start in range(0, len(table), num_rows):
                yield table.slice(start, num_rows)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """(schema, record batches). Raises ValueError for what Arrow cannot read."""
    import pyarrow as pa
    from pyarrow import ipc

    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.size() > 6 and source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                reader = ipc.open_file(source)
                count = reader.num_record_batches
                yield reader.schema, (reader.get_batch(i) for i in range(count))
            else:
                stream = ipc.open_stream(source)
                yield stream.schema, iter(stream)
    except (pa.ArrowException, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path} cannot be read as an Arrow file: {lines[0]} Is it whole? Write it again."
        ) from None
