"""Tables in CSV files, read strictly: each error names the line and the column."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from shared.data.checks import check_unique_names
from shared.data.readers.kinds import open_bytes, open_text

if TYPE_CHECKING:
    import pandas as pd

DELIMITERS = ",;\t|"
DECLARATION = re.compile(r"sep=(?P<delimiter>.)", re.IGNORECASE)
MAX_DECLARATION = 16  # characters of a first line that may be one

# pyarrow's messages: they hold the column's number, and the row's where it is known.
BAD_VALUE = re.compile(
    r"In CSV column #(?P<column>\d+): (?:Row #(?P<line>\d+): )?"
    r"CSV conversion error to (?P<type>\w+): (?P<problem>.*)",
    re.DOTALL,
)
BAD_LENGTH = re.compile(
    r"CSV parse error: Row #(?P<line>\d+): Expected (?P<expected>\d+) columns, got (?P<actual>\d+)"
)


def read_csv(
    path: Path, text_columns: Iterable[str] | None, delimiter: str = ",", encoding: str = "utf-8"
) -> pd.DataFrame:
    """Returns the columns of a CSV file with a header; the index "line" counts the header as 1.

    `text_columns` hold text, all others numbers; None: every column is text. No value: NaN or None.
    Empty lines are left out, but counted. Raises ValueError, naming line and column, for duplicate
    columns, rows of other lengths, text among numbers, or another encoding.
    """
    import pyarrow as pa  # a fifth of a second to import, needed only here
    from pyarrow import csv as arrow

    header = read_header(path, delimiter, encoding)
    declared = declared_delimiter(path, encoding)
    num_skipped = int(bool(declared))
    as_text = set(header if text_columns is None else text_columns)
    types = {name: pa.string() if name in as_text else pa.float64() for name in header}

    # With threads an error would not hold the row's number.
    read_options = arrow.ReadOptions(use_threads=False, encoding=encoding, skip_rows=num_skipped)
    parse_options = arrow.ParseOptions(
        delimiter=declared or delimiter, newlines_in_values=True, ignore_empty_lines=False
    )
    convert_options = arrow.ConvertOptions(
        column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    try:
        with open_bytes(path) as file:
            table = arrow.read_csv(file, read_options, parse_options, convert_options)
    except pa.ArrowInvalid as error:
        raise ValueError(_explain(path, header, str(error))) from None
    except (OSError, EOFError) as error:  # of gzip
        raise ValueError(f"{path} cannot be read as CSV: {error}. Is it whole?") from None

    frame = table.to_pandas()
    frame.index += 2 + num_skipped
    frame.index.name = "line"
    return frame.dropna(how="all")


def read_header(path: Path, delimiter: str, encoding: str) -> list[str]:
    """Returns the names of a CSV file's columns.

    Raises ValueError if they cannot be decoded, if two are equal, or if the delimiter does not
    divide them.
    """
    declared = declared_delimiter(path, encoding)
    header = _first_fields(path, declared or delimiter, encoding, int(bool(declared)))
    if not header:
        raise ValueError(f"{path} is empty. A CSV file needs a header line and at least one row.")

    candidates = [candidate for candidate in DELIMITERS if candidate in header[0]]
    if len(header) == 1 and candidates:
        raise ValueError(
            f"{path} has only one column, {header[0]!r}, with {delimiter!r} between columns. "
            f"Set data.delimiter = {candidates[0]!r}."
        )

    check_unique_names(header, str(path))
    return header


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
            fields = next(csv.reader(file, delimiter=delimiter), [])
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
    column = header[int(value["column"])]
    if value["type"] == "string":
        return (
            f"{path}: column {column!r} is not UTF-8 in line {value['line']}. Set data.encoding,"
            " for example 'latin-1'."
        )
    received = value["problem"].removeprefix("invalid value ")
    return (
        f"{path}: column {column!r} must be numeric; received {received} in line {value['line']}."
        " Fix that value; or, if the column holds categories, name it in data.categorical; or"
        " leave it out of data.features."
    )
