"""Tables larger than memory: read in chunks, encoded once into a file, and read from there by rows.

Only targets, weights and groups are in memory. Training sees the same batches as with everything in memory; a rank
reads the rows of its own part of each batch, and no others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.files import iterate_chunks
from shared.data.rows import Rows
from shared.data.schema import Columns
from shared.data.tables import Roles, Table, assign_roles, check_columns, encode_inputs, finish_table
from shared.experiment import DataSection

CHUNK_ROWS = 65_536
VERSION = 1  # of what is written; another one is not read
STREAMED = (".parquet", ".tfrecord")


def stream_table(path: Path, config: DataSection) -> Table:
    """A table whose features stay in its file; checked as `make_table` does, chunk by chunk."""
    import pandas as pd

    kept: list[pd.DataFrame] = []
    attributes: dict[Any, Any] = {}
    roles = None
    for chunk in iterate_chunks(path, CHUNK_ROWS):
        attributes = attributes or dict(chunk.attrs)
        roles = assign_roles(config, list(map(str, chunk.columns)), str(path))
        checked = check_columns(chunk, roles, config, str(path))
        kept.append(checked[[name for name in roles.used if name not in (*roles.numbers, *roles.categories)]])
    if roles is None:
        raise ValueError(f"{path} holds no examples. Give it at least one.")
    frame = pd.concat(kept)
    frame.attrs = attributes
    return finish_table(frame, roles, config, str(path), path)


def iterate_table(table: Table) -> Iterator[Table]:
    """The table in parts that are in memory; one that is in memory is its own only part."""
    if table.file is None:
        yield table
        return
    known = table.frame.sort_index()
    stop = 0
    for chunk in iterate_chunks(table.file, CHUNK_ROWS):
        start, stop = stop, int(known.index.searchsorted(chunk.index[-1], side="right"))
        if stop > start:
            here = known.iloc[start:stop]
            rows = chunk.iloc[here.index.to_numpy() - chunk.index[0]]
            checked = check_columns(rows, table.roles, table.config, table.source)
            features = checked[[*table.roles.numbers, *table.roles.categories]]
            yield Table(features.join(here), table.roles, table.config, table.source, table.is_regression)


def encoded_rows(table: Table, columns: Columns) -> Rows:
    """A model's inputs for each row of the table, in a file that is written if it is not there yet."""
    from filelock import FileLock

    assert table.file is not None
    stem = _cache_file(table.file, table.config, columns)
    data, notes = Path(f"{stem}.f32"), Path(f"{stem}.json")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{stem}.lock"):  # ranks of one host write it once
            if not notes.is_file():
                _write(table.file, table.roles, table.config, table.source, columns, data, notes)
    except OSError as error:
        raise ValueError(
            f"With data.stream the encoded features of {table.file} are kept in a file, which could not be written: "
            f"{error}. Set data.cache to a directory with room for it, or make room for it in that one."
        ) from None
    found = json.loads(notes.read_text(encoding="utf-8"))
    stored = np.memmap(data, np.float32, "r", shape=tuple(found["shape"]))
    return Rows(stored, table.frame.index.to_numpy(np.int64) - 1, found["sha256"])


def _cache_file(path: Path, config: DataSection, columns: Columns) -> Path:
    """Another for each version of the file, and each way to encode it."""
    stat = path.stat()
    identity = repr((VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, columns))
    folder = Path(config.cache) if config.cache else path.parent / ".encoded"
    return folder / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _write(
    path: Path, roles: Roles, config: DataSection, source: str, columns: Columns, data: Path, notes: Path
) -> None:
    digest, num_rows = hashlib.sha256(), 0
    data.touch(mode=0o600)  # as confidential as what it is made from
    with data.open("wb") as file:
        for chunk in iterate_chunks(path, CHUNK_ROWS):
            x = encode_inputs(check_columns(chunk, roles, config, source), columns)
            digest.update(x.tobytes())
            file.write(x.tobytes())
            num_rows += len(x)
    shape = [num_rows, len(columns.inputs)]
    temporary = notes.with_name(notes.name + ".partial")
    temporary.write_text(json.dumps({"shape": shape, "sha256": digest.hexdigest()}) + "\n", encoding="utf-8")
    temporary.replace(notes)
