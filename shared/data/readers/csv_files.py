"""Tables in CSV files, read strictly: each error names the line and the column."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.data.checks import check_unique_names
from shared.data.identifiers import UNNAMED
from shared.data.readers.kinds import open_bytes, open_text
from shared.data.roles import canonical_name

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

DELIMITERS = ",;\t|"
DECLARATION = re.compile(r"sep=(?P<delimiter>.)", re.IGNORECASE)
MAX_DECLARATION = 16  # characters of a first line that may be one
BLOCK_BYTES = 1 << 20  # of a file that are read at once; no row may be longer
HEADERS_PER_BLOCK = 32  # at least: of 100,000 columns each block costs memory
MAX_BLOCK_BYTES = 1 << 30

# pyarrow's messages: they hold the column's number, and the row's where it is known.
BAD_VALUE = re.compile(
    r"In CSV column #(?P<column>\d+): (?:Row #(?P<line>\d+): )?"
    r"CSV conversion error to string: (?P<problem>.*)",
    re.DOTALL,
)
BAD_LENGTH = re.compile(
    r"CSV parse error: Row #(?P<line>\d+): Expected (?P<expected>\d+) columns, got (?P<actual>\d+)"
)
TOO_LONG = "straddling object straddles two block boundaries"


def read_csv(
    path: Path,
    delimiter: str = ",",
    encoding: str = "utf-8",
    numeric: Collection[str] | None = None,
) -> pd.DataFrame:
    """Returns the columns of a CSV file with a header as text, exactly as it stands there.

    Those of `numeric` (None: of all) that hold plain numbers and empty fields alone are float64.
    The index "line" counts the header as 1. Empty lines are left out, but counted. Raises
    ValueError, naming line and column, for duplicate columns, rows of other lengths, or another
    encoding.
    """
    import pyarrow as pa  # a fifth of a second to import, needed only here

    encoding = actual_encoding(path, encoding)
    header = read_header(path, delimiter, encoding)
    declared = declared_delimiter(path, encoding)
    num_skipped = int(bool(declared))
    try:
        table = _parse(path, header, declared or delimiter, encoding, num_skipped)
    except pa.ArrowInvalid as error:
        raise ValueError(_explain(path, header, str(error))) from None
    except (OSError, EOFError) as error:  # of gzip
        raise ValueError(f"{path} cannot be read as CSV: {error}. Is it whole?") from None

    is_filled = _filled_rows(table)
    wanted = set(header if numeric is None else numeric)
    columns = [
        _plain_numbers(column) if name in wanted else column
        for name, column in zip(header, table.columns, strict=True)
    ]
    frame = pa.table(columns, header).to_pandas()
    frame.index += 2 + num_skipped
    frame.index.name = "line"
    return frame if is_filled.all() else frame[is_filled]


def _parse(
    path: Path, header: list[str], delimiter: str, encoding: str, num_skipped: int
) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv as arrow

    parse_options = arrow.ParseOptions(
        delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False
    )
    convert_options = arrow.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
    )
    block_bytes = max(BLOCK_BYTES, HEADERS_PER_BLOCK * sum(map(len, header)))
    while True:
        # With threads an error would not hold the row's number.
        read_options = arrow.ReadOptions(
            use_threads=False,
            encoding=encoding,
            skip_rows=num_skipped,
            column_names=header,
            skip_rows_after_names=1,  # the header, which may be of several lines
            block_size=block_bytes,
        )
        try:
            with open_bytes(path) as file:
                return arrow.read_csv(file, read_options, parse_options, convert_options)
        except pa.ArrowInvalid as error:
            is_too_long = TOO_LONG in str(error) and block_bytes < MAX_BLOCK_BYTES
            if not is_too_long:
                raise
            block_bytes *= 8


def _filled_rows(table: pa.Table) -> np.ndarray:
    """Which rows hold any text: bool of shape (n,)."""
    from pyarrow import compute

    is_filled = np.zeros(len(table), bool)
    for column in table.columns:
        if is_filled.all():
            break
        is_filled |= compute.not_equal(column, "").to_numpy()
    return is_filled


def _plain_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as float64, where Arrow reads all of it so; else as it is."""
    import pyarrow as pa
    from pyarrow import compute

    is_empty = compute.equal(column, "")
    if compute.any(is_empty).as_py():
        filled = compute.if_else(is_empty, pa.scalar(None, pa.string()), column)
    else:
        filled = column
    try:
        return filled.cast(pa.float64())
    except pa.ArrowInvalid:
        return column


def read_header(path: Path, delimiter: str, encoding: str) -> list[str]:
    """Returns the names of a CSV file's columns, "Unnamed: 0" and so on where there is none.

    Raises ValueError if they cannot be decoded, if two are equal, or if the delimiter does not
    divide them.
    """
    encoding = actual_encoding(path, encoding)
    declared = declared_delimiter(path, encoding)
    fields = _first_fields(path, declared or delimiter, encoding, int(bool(declared)))
    header = [canonical_name(field) for field in fields]
    if not any(header):
        raise ValueError(f"{path} is empty. A CSV file needs a header line and at least one row.")

    candidates = [candidate for candidate in DELIMITERS if candidate in header[0]]
    if len(header) == 1 and candidates:
        raise ValueError(
            f"{path} has only one column, {header[0]!r}, with {delimiter!r} between columns. "
            f"Set data.delimiter = {candidates[0]!r}."
        )

    header = [name or f"{UNNAMED}{place}" for place, name in enumerate(header)]
    check_unique_names(header, str(path))
    return header


def actual_encoding(path: Path, encoding: str) -> str:
    """Returns the encoding that a mark at the file's start states (UTF-16), else the given one."""
    try:
        with open_bytes(path) as file:
            start = file.read(len(codecs.BOM_UTF16_LE))
    except (OSError, EOFError):
        return encoding  # read_header says what is wrong
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else encoding


def declared_delimiter(path: Path, encoding: str) -> str:
    """Returns X of a first line "sep=X", which Excel reads and writes; empty if it is another."""
    codec = "utf-8-sig" if encoding == "utf-8" else encoding
    try:
        with open_text(path, codec, errors="replace") as file:
            line = file.readline(MAX_DECLARATION).strip('\r\n"')
    except (LookupError, UnicodeError, OSError, EOFError):
        return ""  # read_header says what is wrong
    found = DECLARATION.fullmatch(line)
    return found["delimiter"] if found else ""


def _first_fields(path: Path, delimiter: str, encoding: str, num_skipped: int) -> list[str]:
    codec = "utf-8-sig" if encoding == "utf-8" else encoding
    try:
        # Bytes further down that cannot be decoded are read_csv's to report, with their line.
        with open_text(path, codec, errors="surrogateescape") as file:
            for _ in range(num_skipped):
                file.readline()
            lines = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            fields = next(lines, [])
        "".join(fields).encode("utf-8")  # fails where a byte of the header was escaped
    except (UnicodeError, LookupError) as error:
        raise ValueError(
            f"{path} is not in the encoding {encoding!r}: {error}. Set data.encoding."
        ) from None
    except (csv.Error, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}.") from None
    return fields


def _explain(path: Path, header: list[str], message: str) -> str:
    """Our sentence for a message of pyarrow."""
    length = BAD_LENGTH.match(message)
    if length:
        return (
            f"{path}: line {length['line']} has {length['actual']} fields where the header has"
            f" {length['expected']}. Fix that line."
        )

    value = BAD_VALUE.match(message)
    if value is None:
        return f"{path} cannot be read as CSV: {message}."
    return (
        f"{path}: column {header[int(value['column'])]!r} is not UTF-8 in line {value['line']}. Set"
        " data.encoding, for example 'latin-1'."
    )
