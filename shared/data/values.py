"""How text stands for values: numbers in the notation of a country, codes for gaps, names.

| in a field | is |
|---|---|
| blanks around a text | not part of it |
| nothing, or one of `GAPS` or `data.missing_codes` | a gap |
| one of `NUMBER_GAPS`, where numbers are wanted | a gap |
| `1,5` with data.decimal = "," | the number 1.5 |
| `1.234,5` with data.thousands = "." too | the number 1234.5 |
| text in another Unicode form (NFD, as macOS writes names) | the same text in NFC |
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from shared.data.roles import parse_names
from shared.experiment import DataSection

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

# Those of pandas, but for "None", which is a category where people mean "none".
GAPS = (
    *("", "NA", "N/A", "n/a", "#N/A", "#N/A N/A", "#NA", "<NA>", "NaN", "nan", "-NaN", "-nan"),
    *("NULL", "null", "?", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
)
NUMBER_GAPS = ("-", "--", ".", "..", "None", "none")  # names of categories, elsewhere
THOUSANDS = {" ": " \u00a0\u202f", "'": "'\u2019"}  # signs that are written for the one declared
MINUS_SIGN = "\u2212"  # as spreadsheets and papers write it


@dataclass(frozen=True)
class Notation:
    """The signs by which a file's text stands for numbers and gaps, as [data] declares them."""

    decimal: str = "."
    thousands: str = ""
    missing_codes: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: DataSection) -> Self:
        return cls(config.decimal, config.thousands, tuple(parse_names(config.missing_codes)))

    @property
    def is_default(self) -> bool:
        return self == Notation()

    @cached_property
    def gap_numbers(self) -> list[float]:
        """The codes that are numbers, such as 999."""
        return [float(code) for code in self.missing_codes if _is_number(code)]

    @cached_property
    def pattern(self) -> str:
        """A regular expression of the numbers in this notation."""
        digits = r"\d+"
        if self.thousands:
            sign = f"[{re.escape(THOUSANDS.get(self.thousands, self.thousands))}]"
            digits = rf"(\d+|\d{{1,3}}({sign}\d{{3}})+)"
        point = re.escape(self.decimal)
        size = rf"({digits}({point}\d*)?|{point}\d+)"
        return rf"^[+-]?({size}([eE][+-]?\d+)?|(?i:inf|infinity))$"


def text_of(column: pd.Series[Any]) -> pa.Array | None:
    """Returns a column of text as Arrow's; None if it holds anything else."""
    import pandas as pd
    import pyarrow as pa

    if column.dtype.kind in "fiub" or not pd.api.types.is_string_dtype(column):
        return None
    text = pa.array(column, pa.large_string(), from_pandas=True)
    return text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text


def clean(text: pa.Array, codes: tuple[str, ...]) -> pa.Array:
    """Returns text without blanks around it, in NFC, with null for every one of the codes."""
    import pyarrow as pa
    from pyarrow import compute

    trimmed = compute.utf8_trim_whitespace(text)
    if not compute.all(compute.string_is_ascii(trimmed)).as_py():
        trimmed = compute.utf8_normalize(trimmed, form="NFC")
    is_gap = compute.is_in(trimmed, value_set=pa.array(codes, pa.large_string()))
    return compute.if_else(is_gap, pa.scalar(None, pa.large_string()), trimmed)


def parse_numbers(text: pa.Array, notation: Notation) -> tuple[np.ndarray, np.ndarray]:
    """Returns (float64 numbers, which of the values are no numbers), each of shape (n,).

    NaN stands for a gap, and for what is no number.
    """
    import pyarrow as pa

    if notation.is_default:
        try:
            numbers = _as_float64(text)
        except pa.ArrowInvalid:
            pass  # blanks, codes or words: field by field
        else:
            return numbers, np.zeros(len(numbers), bool)
    return _parse_cleaned(clean(text, (*GAPS, *NUMBER_GAPS, *notation.missing_codes)), notation)


def _parse_cleaned(text: pa.Array, notation: Notation) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa
    from pyarrow import compute

    text = compute.replace_substring(text, MINUS_SIGN, "-")
    is_number = compute.match_substring_regex(text, notation.pattern)
    is_text = compute.fill_null(compute.invert(is_number), False)
    if not compute.any(is_number).as_py():
        return np.full(len(text), np.nan), is_text.to_numpy(zero_copy_only=False)

    numerals = compute.if_else(is_text, pa.scalar(None, pa.large_string()), text)
    for sign in THOUSANDS.get(notation.thousands, notation.thousands):
        numerals = compute.replace_substring(numerals, sign, "")
    if notation.decimal != ".":
        numerals = compute.replace_substring(numerals, notation.decimal, ".")
    numerals = compute.utf8_ltrim(numerals, "+")

    numbers = _as_float64(numerals)
    if notation.gap_numbers:
        numbers = np.where(np.isin(numbers, notation.gap_numbers), np.nan, numbers)
    return numbers, is_text.to_numpy(zero_copy_only=False)


def _as_float64(text: pa.Array) -> np.ndarray:
    """Raises ArrowInvalid for what Arrow does not read as a number."""
    import pyarrow as pa

    numbers: np.ndarray = text.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return numbers


def as_names(column: pd.Series[Any], notation: Notation) -> pd.Series[Any]:
    """Returns the values as text, by which categories and classes are named; gaps stay gaps.

    1.0 and 1 are the same.
    """
    import pandas as pd

    text = text_of(column)
    if text is not None:
        cleaned = clean(text, (*GAPS, *notation.missing_codes))
        return pd.Series(cleaned.to_pandas().array, column.index, name=column.name)

    names = {value: _as_name(value) for value in column.dropna().unique()}
    gaps = [value for value, name in names.items() if name in notation.missing_codes]
    values = column.mask(column.isin(gaps)) if gaps else column
    return values.map(names).astype("str")


def as_plain(column: pd.Series[Any], notation: Notation) -> pd.Series[Any]:
    """Returns a column of text as its names, any other as it is."""
    return column if text_of(column) is None else as_names(column, notation)


def explain_text(value: str) -> str:
    """Returns what text among numbers may be, and the remedy: two sentences.

    >>> explain_text("21,5")
    "It looks like a decimal comma: set data.decimal = ','."
    >>> explain_text("5 mg")
    'It has a unit: write the number alone.'
    """
    value = value.strip()
    for pattern, explanation in (
        (
            r"[+-]?\d{1,3},\d{3}",
            "Its comma may be a decimal sign or one of thousands: set data.decimal or"
            " data.thousands to ','.",
        ),
        (r"[+-]?\d+,\d+", "It looks like a decimal comma: set data.decimal = ','."),
        (
            r"[+-]?\d{1,3}(\.\d{3})+(,\d+)?",
            "It looks like thousands with points: set data.thousands = '.' and data.decimal = ','.",
        ),
        (
            r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?",
            "It looks like thousands with commas: set data.thousands = ','.",
        ),
        (
            r"[+-]?\d{1,3}([ '\u2019\u00a0\u202f]\d{3})+([.,]\d+)?",
            "It looks like thousands with a sign between them: set data.thousands to it.",
        ),
        (
            r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}([ T].*)?",
            "It looks like a date: write days as a number, or leave the column out (data.ignore).",
        ),
        (r"[^\w.,+-]{0,2}[+-]?[\d.,]+\s*[^\d\s]+", "It has a unit: write the number alone."),
        (r"[^\d\s]{1,3}\s*[+-]?[\d.,]+", "It has a unit: write the number alone."),
    ):
        if re.fullmatch(pattern, value):
            return explanation
    return (
        "Fix the values; or, if the column holds categories, name it in data.categorical; or, if"
        " the text stands for a gap, in data.missing_codes; or leave the column out (data.ignore)."
    )


def _as_name(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return unicodedata.normalize("NFC", str(value)).strip()


def _is_number(code: str) -> bool:
    try:
        float(code)
    except ValueError:
        return False
    return True
