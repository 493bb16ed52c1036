"""Descriptions of a table's columns, and of the dialect of a CSV file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.readers.csv_files import DELIMITERS, declared_delimiter
from shared.data.readers.kinds import open_bytes

if TYPE_CHECKING:
    import pandas as pd

IDS = ("id", "index", "row", "key")  # names that an id often has
ID_ENDINGS = ("_id", " id")
MAX_KINDS_OF_TEXT = 50  # different texts beyond which a column is no set of categories
MAX_STRAY_SHARE = 0.05  # of text among numbers, below which the text is taken for mistakes


@dataclass(frozen=True)
class ColumnDescription:
    """A column of a file, described.

    `kind`: whole numbers, numbers, text, empty. `example`: the range of numbers, the commonest
    texts. `role`, that [data] gives it: label, number, categorical, id, or "left out: " and why.
    """

    name: str
    kind: str
    missing: int
    distinct: int
    example: str
    role: str


def describe_column(column: pd.Series[Any], is_label: bool) -> ColumnDescription:
    """Returns the column's description; a label has that role unless it is empty."""
    import pandas as pd

    values = column.dropna()
    if len(values) and all(isinstance(value, str) for value in values):
        values = values.str.strip()
    numbers = pd.to_numeric(values, errors="coerce")

    if values.empty:
        kind, example, role = "empty", "", "left out: empty"
    elif numbers.notna().all():
        kind, example, role = _describe_numbers(numbers, str(column.name), len(column))
    else:
        num_text = int(numbers.isna().sum())
        kind, example, role = _describe_text(values, num_text, len(column))

    return ColumnDescription(
        name=str(column.name),
        kind=kind,
        missing=int(column.isna().sum()),
        distinct=int(values.nunique()),
        example=example,
        role="label" if is_label and len(values) else role,
    )


def _describe_numbers(
    numbers: pd.Series[Any], name: str, num_examples: int
) -> tuple[str, str, str]:
    """(kind, example, role)."""
    is_whole = bool((np.mod(numbers, 1) == 0).all())
    kind = "whole numbers" if is_whole else "numbers"
    example = f"{numbers.min():g} to {numbers.max():g}"

    num_distinct = numbers.nunique()
    is_called_id = name.lower() in IDS or name.lower().endswith(ID_ENDINGS)
    role = "number"
    if num_distinct == 1:
        role = "left out: always the same"
    elif is_called_id and is_whole and num_distinct == num_examples:
        role = "id"
    return kind, example, role


def _describe_text(
    values: pd.Series[Any], num_text: int, num_examples: int
) -> tuple[str, str, str]:
    """(kind, example, role) of values of which `num_text` are no numbers."""
    kind = "text"
    if num_text < len(values):
        kind = f"text in {num_text} of {len(values)} rows, else numbers"
    commonest = values.value_counts().index[:3]
    example = ", ".join(str(value) for value in commonest)

    num_distinct = values.nunique()
    role = "categorical"
    if num_text < MAX_STRAY_SHARE * len(values):
        role = "left out: fix its text"
    elif num_distinct == num_examples:
        role = "id"
    elif num_distinct > min(MAX_KINDS_OF_TEXT, num_examples / 2):
        role = f"left out: text of {num_distinct} kinds"
    return kind, example[:40], role


def detect_dialect(path: Path) -> dict[str, str]:
    """Returns data.encoding and data.delimiter of a CSV file, where they are not UTF-8 and ","."""
    with open_bytes(path) as file:
        content = file.read()
    dialect: dict[str, str] = {}

    encoding = _detect_encoding(content)
    if encoding != "utf-8":
        dialect["encoding"] = encoding

    header = content.decode(encoding).removeprefix("\ufeff").partition("\n")[0]
    delimiter = declared_delimiter(path, encoding)
    delimiter = delimiter or max(DELIMITERS, key=header.count)  # "," if the header has none
    if delimiter != ",":
        dialect["delimiter"] = delimiter
    return dialect


def _detect_encoding(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"
