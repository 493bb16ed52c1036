"""Columns of Arrow types as the columns of a table; every type has a stated treatment.

| Arrow type | treatment |
|---|---|
| int8 to uint64, float16 to float64 | numbers; NaN is a gap |
| decimal | numbers, as float64 |
| bool | numbers 0 and 1; as categories False and True |
| string, large_string, string_view | text |
| binary | text where it is UTF-8, else unusable |
| dictionary, run-end encoded | as its values |
| date, timestamp | numbers: days since 1970-01-01, of a timestamp with zone in UTC |
| time, duration | numbers: days |
| null | gaps |
| list, struct, map, union | unusable |
| an extension type, and any other | as its storage; unusable |

An unusable column is refused by name if it has a role, else left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

UNNAMED_INDEX = "__index_level_"  # pandas' name in a file for an index that has none
NANOSECONDS_PER_DAY = 86_400 * 10**9
PER_DAY = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000, "ns": NANOSECONDS_PER_DAY}


class Unusable(Exception):
    """A column that cannot be in a table; its text says what it holds."""


def column_names(names: Sequence[str]) -> list[str]:
    """Returns the names of a table's columns, without those of an index that has no name."""
    return [name for name in names if not name.startswith(UNNAMED_INDEX)]


def make_frame(table: pa.Table, names: Sequence[str], source: str) -> pd.DataFrame:
    """Returns these columns of an Arrow table. Raises ValueError for one that is unusable."""
    frame, reasons = make_usable_frame(table, names)
    for name, reason in reasons.items():
        raise ValueError(
            f"{source}: column {name!r} holds {reason}; a table holds one number or text in each"
            " place. Leave it out: name the columns to learn from in data.features."
        )
    return frame


def make_usable_frame(table: pa.Table, names: Sequence[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """Returns (usable columns, what each of the others holds)."""
    import pandas as pd

    columns: dict[str, pd.Series] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            columns[name] = _as_plain(table[name]).to_pandas()
        except Unusable as reason:
            reasons[name] = str(reason)
    frame = pd.DataFrame(columns, index=pd.RangeIndex(table.num_rows))

    metadata = table.schema.metadata or {}
    frame.attrs = {
        key.decode(): value.decode()
        for key, value in metadata.items()
        if key.startswith(b"archipelago")
    }
    return frame, reasons


def _as_plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as integers, float64, booleans or text, by the table above."""
    import pyarrow as pa
    from pyarrow import compute, types

    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        storage = [chunk.storage for chunk in column.chunks]
        return _as_plain(pa.chunked_array(storage, kind.storage_type))
    if types.is_dictionary(kind):
        return _as_plain(column.cast(kind.value_type))
    if types.is_run_end_encoded(kind):
        return _as_plain(compute.run_end_decode(column))

    if types.is_integer(kind):
        return _as_exact_numbers(column)
    if types.is_floating(kind) or types.is_decimal(kind):
        return column.cast(pa.float64())
    if types.is_boolean(kind) or types.is_null(kind):
        return column
    if types.is_temporal(kind) and not types.is_interval(kind):
        return _as_days(column)
    if _is_string(kind):
        return column.cast(pa.large_string())
    if _is_binary(kind):
        return _as_text(column)
    raise Unusable("lists or records" if types.is_nested(kind) else f"values of the type {kind}")


def _as_exact_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Integers; with gaps as float64 unless one is too large for it (2^53)."""
    import pyarrow as pa

    if column.null_count == 0:
        return column
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        return column.cast(pa.string())  # text is read as numbers where numbers are wanted


def _as_days(column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa
    from pyarrow import compute, types

    kind = column.type
    if types.is_date32(kind):
        days = column.cast(pa.int32())
        return days.cast(pa.float64())
    unit = "ms" if types.is_date64(kind) else kind.unit
    if types.is_time32(kind):
        column = column.cast(pa.int32())
    counts = column.cast(pa.int64())
    return compute.divide(counts.cast(pa.float64(), safe=False), float(PER_DAY[unit]))


def _is_string(kind: pa.DataType) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    from pyarrow import types

    is_variable = types.is_binary(kind) or types.is_large_binary(kind)
    return is_variable or types.is_binary_view(kind) or types.is_fixed_size_binary(kind)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa

    try:
        return column.cast(pa.large_binary()).cast(pa.large_string())
    except pa.ArrowInvalid:
        raise Unusable("bytes that are no UTF-8 text") from None
