"""Tables larger than memory: read in chunks, encoded once into a file, read from there by rows.

Only targets, weights, ids and groups are in memory. Training sees the same batches as with
everything in memory; a rank reads the rows of its own part of each batch, and no others.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.encoding import encode_inputs
from shared.data.identifiers import check_no_identifiers
from shared.data.readers.files import iterate_chunks, read_names
from shared.data.readers.kinds import table_parts
from shared.data.roles import assign_roles
from shared.data.rows import Rows
from shared.data.schema import Columns
from shared.data.tables import Table, assemble_table, check_columns
from shared.experiment import DataSection

if TYPE_CHECKING:
    import pandas as pd

CHUNK_ROWS = 65_536
NUM_COPIES = 3  # of an encoded table that stay: so many seeds take turns without writing anew
VERSION = 2  # of the encoded file's format; a file of another one is not read


def stream_table(path: Path, config: DataSection) -> Table:
    """Returns a table whose features stay in its file, checked chunk by chunk.

    Raises ValueError as `make_table` does.
    """
    import pandas as pd

    source = str(path)
    parts: list[pd.DataFrame] = []
    attributes: dict[Any, Any] = {}
    roles = assign_roles(config, read_names(path), source)
    for chunk in iterate_chunks(path, roles.used, CHUNK_ROWS):
        attributes = attributes or dict(chunk.attrs)
        checked = check_columns(chunk, roles, config, source)
        if not (parts or config.features):
            check_no_identifiers(checked, roles, source)
        parts.append(checked[roles.non_features])
    if not parts:
        raise ValueError(f"{path} holds no examples. Give it at least one.")

    frame = pd.concat(parts)
    frame.attrs = attributes
    return assemble_table(frame, roles, config, source, file=path)


def iterate_table(table: Table) -> Iterator[Table]:
    """Yields the table in parts that are in memory, in the order of the file.

    A table in memory is its own only part, in its own order.
    """
    if table.file is None:
        yield table
        return

    rows = table.frame.sort_index()
    start = 0
    for chunk in iterate_chunks(table.file, table.roles.used, CHUNK_ROWS):
        stop = int(rows.index.searchsorted(chunk.index[-1], side="right"))
        if stop > start:
            yield _with_features(table, rows.iloc[start:stop], chunk)
        start = stop


def _with_features(table: Table, rows: pd.DataFrame, chunk: pd.DataFrame) -> Table:
    """The table of these rows in memory; their features are in the chunk."""
    places = rows.index.to_numpy() - chunk.index[0]
    checked = check_columns(chunk.iloc[places], table.roles, table.config, table.source)
    frame = checked[table.roles.features].join(rows)
    return Table(frame, table.roles, table.config, table.source, table.is_regression)


def encoded_rows(table: Table, columns: Columns) -> Rows:
    """Returns a model's inputs for each row of a streamed table.

    They are in a file, which is written if there is none yet for this version of the table's file
    and these columns (each seed has others). Of the copies of one table the `NUM_COPIES` used last
    stay, and none of an earlier version. Raises ValueError if it cannot be written.
    """
    from filelock import FileLock

    assert table.file is not None
    folder = Path(table.config.cache) if table.config.cache else table.file.parent / ".encoded"
    table_stem = folder / f"{table.file.stem}-{_key(str(table.file.resolve()))}"
    version = _key(_file_version(table.file))
    data = Path(f"{table_stem}-{version}-{_key((VERSION, table.roles, columns))}.f32")
    notes = data.with_suffix(".json")  # written last: the data is whole if they are there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{table_stem}.lock"):  # ranks of one host write it once
            if not notes.is_file():
                _write_encoded(table, columns, data, notes)
            _remove_copies(table_stem, version, data)
            written = json.loads(notes.read_text(encoding="utf-8"))
            stored = np.memmap(data, np.float32, "r", shape=tuple(written["shape"]))
    except OSError as error:
        raise ValueError(
            f"With data.stream the encoded features of {table.file} are kept in a file, which could"
            f" not be written: {error}. Set data.cache to a directory with room for it, or make"
            " room for it in that one."
        ) from None

    indices = table.frame.index.to_numpy(np.int64) - 1  # the index counts rows from 1 on
    return Rows(stored, indices, written["sha256"])


def _file_version(path: Path) -> list[tuple[str, int, int]]:
    """Another one for each version of the file, or of a part of the folder."""
    stats = [(part.name, part.stat()) for part in table_parts(path)]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in stats]


def _key(identity: object) -> str:
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def _remove_copies(table_stem: Path, version: str, data: Path) -> None:
    """Removes copies of earlier versions of a table, and all but the last used of this one.

    A process that has a copy open keeps reading it.
    """
    data.with_suffix(".json").touch()  # its time is that of the last use
    copies = list(table_stem.parent.glob(f"{glob.escape(table_stem.name)}-*.f32"))
    current = [copy for copy in copies if copy.name.startswith(f"{table_stem.name}-{version}-")]
    current.sort(key=_last_use)
    for copy in set(copies) - set(current[-NUM_COPIES:]):
        copy.with_suffix(".json").unlink(missing_ok=True)  # first: it vouches for the data
        copy.unlink()


def _last_use(copy: Path) -> int:
    notes = copy.with_suffix(".json")
    return notes.stat().st_mtime_ns if notes.is_file() else 0  # 0: its writer was killed


def _write_encoded(table: Table, columns: Columns, data: Path, notes: Path) -> None:
    """Writes the inputs of all rows of the table's file, then their shape and hash as notes."""
    assert table.file is not None
    digest = hashlib.sha256()
    num_rows = 0
    data.touch(mode=0o600)  # as confidential as what it is made from
    with data.open("wb") as file:
        for chunk in iterate_chunks(table.file, table.roles.used, CHUNK_ROWS):
            checked = check_columns(chunk, table.roles, table.config, table.source)
            content = encode_inputs(checked, columns).tobytes()
            digest.update(content)
            file.write(content)
            num_rows += len(chunk)

    written = {"shape": [num_rows, len(columns.inputs)], "sha256": digest.hexdigest()}
    temporary = notes.with_name(notes.name + ".partial")
    temporary.write_text(json.dumps(written) + "\n", encoding="utf-8")
    temporary.replace(notes)
