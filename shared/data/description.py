"""Descriptions of a table's columns: type, gaps, values, and the role that suits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.checks import numbers_or_nan
from shared.data.identifiers import row_number_reason
from shared.data.values import GAPS, NUMBER_GAPS, Notation, as_names, text_of

if TYPE_CHECKING:
    import pandas as pd

MAX_KINDS_OF_TEXT = 50  # different texts beyond which a column is no set of categories
MAX_STRAY_SHARE = 0.05  # of text among numbers, below which the text is taken for mistakes
MAX_LOOKED_AT = 1000  # different texts by which their form is told
SENTINELS = (-9999.0, -999.0, -99.0, -9.0, 99.0, 999.0, 9999.0)  # codes of gaps, in many files

DATE = re.compile(r"\d{1,4}([-./])\d{1,2}\1\d{1,4}([ T].*)?")
MEASURE = re.compile(
    r"(?P<before>[^\w\s.,+-]{0,3}|[A-Z]{3}\s)\s*[+-]?[\d.,]*\d[\d.,]*\s*(?P<after>[^\d\s.,+-]*)"
)


@dataclass(frozen=True)
class ColumnDescription:
    """A column of a file, described.

    `kind`: whole numbers, numbers, text, empty. `codes`: the texts that stand for its gaps.
    `example`: the range of numbers, the commonest texts. `role`, that [data] gives it: label,
    number, categorical, id, or "left out: " and why. `note`: what a reader should look at.
    """

    name: str
    kind: str
    missing: int
    distinct: int
    example: str
    role: str
    codes: str = ""
    note: str = ""


def describe_column(
    column: pd.Series[Any], is_label: bool, notation: Notation
) -> ColumnDescription:
    """Returns the column's description; a label has that role unless it is empty."""
    name = str(column.name)
    numbers, is_text = numbers_or_nan(column, notation)
    if is_text.any():
        described = _describe_text(name, as_names(column, notation), int(is_text.sum()))
    else:
        described = _describe_numbers(name, numbers)
    codes = _codes(column, bool(is_text.any())) if described.missing else ""
    role = "label" if is_label and described.kind != "empty" else described.role
    return ColumnDescription(
        name=name,
        kind=described.kind,
        missing=described.missing,
        distinct=described.distinct,
        example=described.example,
        role=role,
        codes=codes,
        note=described.note,
    )


def _describe_numbers(name: str, numbers: np.ndarray) -> ColumnDescription:
    values = np.sort(numbers[~np.isnan(numbers)])
    missing = len(numbers) - len(values)
    if len(values) == 0:
        return ColumnDescription(name, "empty", missing, 0, "", "left out: empty")

    is_whole = bool((np.mod(values, 1) == 0).all())
    distinct = 1 + int(np.count_nonzero(np.diff(values)))
    role = "number"
    if distinct == 1:
        role = "left out: always the same"
    elif is_whole and distinct == len(numbers):
        reason = row_number_reason(numbers, name)
        role = "id" if reason == "an identifier" else f"left out: {reason}" if reason else role
    return ColumnDescription(
        name=name,
        kind="whole numbers" if is_whole else "numbers",
        missing=missing,
        distinct=distinct,
        example=f"{values[0]:g} to {values[-1]:g}",
        role=role,
        note=_note_sentinel(values),
    )


def _note_sentinel(values: np.ndarray) -> str:
    """A remark on a repeated 999 or the like that lies far from all other (sorted) values."""
    for end, code in ((0, values[0]), (-1, values[-1])):
        others = values[values != code]
        count = len(values) - len(others)
        if code not in SENTINELS or count < 2 or len(others) < 2:
            continue
        nearest = others[end]
        if abs(code - nearest) > others[-1] - others[0]:
            return f'{code:g} in {count} rows: a gap? Then missing_codes = "{code:g}"'
    return ""


def _describe_text(name: str, values: pd.Series[Any], num_text: int) -> ColumnDescription:
    """The description of values, as names, of which `num_text` are no numbers."""
    counts = values.value_counts()
    num_values, distinct = int(counts.sum()), len(counts)
    kind = "text"
    if num_text < num_values:
        kind = f"text in {num_text} of {num_values} rows, else numbers"

    role = "categorical"
    form = _form(list(counts.index[:MAX_LOOKED_AT]))
    if num_text < MAX_STRAY_SHARE * num_values:
        role = "left out: fix its text"
    elif form:
        role = f"left out: {form}"
    elif distinct == len(values) and _are_short(counts.index[:MAX_LOOKED_AT]):
        role = "id"
    elif distinct > min(MAX_KINDS_OF_TEXT, len(values) / 2):
        role = f"left out: text of {distinct} kinds"
    return ColumnDescription(
        name=name,
        kind=kind,
        missing=len(values) - num_values,
        distinct=distinct,
        example=", ".join(counts.index[:3])[:40],
        role=role,
    )


def _are_short(texts: Iterable[str]) -> bool:
    """Whether texts are a code or a name, of two words at most, and no sentences."""
    return all(text.count(" ") < 2 for text in texts)


def _form(texts: list[str]) -> str:
    """What texts are that are no categories: dates, or numbers written with something else.

    >>> _form(["31.12.2024", "01.01.2025"]), _form(["5 mg", "7 mg"]), _form(["5 mg", "7 g"])
    ('dates', "numbers with 'mg': write the number alone", '')
    >>> _form(["1,234", "2,345"])
    'numbers with commas: decimal signs (data.decimal), or of thousands (data.thousands)?'
    """
    if all(DATE.fullmatch(text) for text in texts):
        return "dates"
    found = [MEASURE.fullmatch(text) for text in texts]
    measures = [match for match in found if match]
    signs = {(match["before"], match["after"]) for match in measures}
    if len(measures) < len(texts) or len(signs) != 1:
        return ""
    before, after = signs.pop()
    if not (before or after):
        return (
            "numbers with commas: decimal signs (data.decimal), or of thousands (data.thousands)?"
        )
    return f"numbers with {(before or after)!r}: write the number alone"


def _codes(column: pd.Series[Any], is_text: bool) -> str:
    """The texts that stand for gaps in a column, but for the empty one."""
    from pyarrow import compute

    text = text_of(column)
    if text is None:
        return ""
    known = GAPS if is_text else (*GAPS, *NUMBER_GAPS)
    trimmed = compute.utf8_trim_whitespace(text)
    occurring = set(compute.unique(trimmed).to_pylist()) & set(known)
    return ", ".join(sorted(occurring - {""}))
