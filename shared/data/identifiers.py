"""Columns that tell rows apart, from which a model would learn the order of a file: row numbers,
and identifiers of examples.

| column | is |
|---|---|
| whole numbers 0, 1, 2, ... or 1, 2, 3, ... down the file | a row number, whatever its name is |
| different whole numbers in a column without a name (`Unnamed: 0`) | a row number |
| different whole numbers, and a name like PassengerId, patient_id, idx, nr | an identifier |
| a different text of one or two words in each row | an identifier |
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from shared.data.roles import Roles

if TYPE_CHECKING:
    import pandas as pd

NUM_LOOKED_AT = 1000  # rows that tell fractions from whole numbers at little cost
MIN_ROWS = 30  # below, numbers that happen to be different say nothing, as at a small silo
UNNAMED = "Unnamed: "  # pandas' name, and ours, for a column that has none; its place follows
WORDS = (
    *("id", "ids", "idx", "index", "nr", "no", "key", "pk", "row", "rownum", "rownumber", "rowid"),
    *("uid", "uuid", "guid", "identifier", "number", "num", "mrn", "serial"),
)
# A word of a name: "Passenger" and "Id" of PassengerId, "ID" of patientID, "no" of "Sample no.".
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
GLUED = re.compile(
    r"(patient|passenger|customer|client|user|subject|person|sample|case|record|order|visit|member"
    r"|account|product|item|loan|policy|study|participant|employee|student|transaction)"
    r"s?(id|idx|nr|no|num|number|key)"
)


def row_number_reason(values: np.ndarray, name: str) -> str:
    """Returns what a column of numbers is if it tells rows apart; empty if it does not.

    `values`: float64, shape (n,), in the order of the file, NaN for gaps.
    """
    if len(values) < MIN_ROWS or not _are_different_whole(values):
        return ""
    if values[0] in (0, 1) and (np.diff(values) == 1).all():
        return "row numbers"
    if name.startswith(UNNAMED):
        return "row numbers without a name"
    return "an identifier" if is_called_identifier(name) else ""


def is_called_identifier(name: str) -> bool:
    """Returns whether the name is one that identifiers have.

    >>> [is_called_identifier(name) for name in ("PassengerId", "patientID", "idx", "Lfd. Nr.")]
    [True, True, True, True]
    >>> [is_called_identifier(name) for name in ("acid", "humid", "number of rooms", "Nature")]
    [False, False, False, False]
    """
    words = [word.lower() for word in WORD.findall(name)]
    if not words:
        return False
    return words[-1] in WORDS or words == ["id"] or bool(GLUED.fullmatch(words[-1]))


def check_no_identifiers(frame: pd.DataFrame, roles: Roles, source: str) -> None:
    """Raises ValueError for a feature that tells rows apart, where no one has named it as such.

    `frame`: the first rows of a file, or all, checked; its features are all the columns without
    another role. To learn from such a column all the same, list data.features.
    """
    values = frame[list(roles.numbers)].to_numpy()
    is_whole = (np.mod(values[:NUM_LOOKED_AT], 1) == 0).all(axis=0)
    for place in np.flatnonzero(is_whole):
        name = roles.numbers[place]
        reason = row_number_reason(values[:, place], name)
        if reason:
            raise ValueError(
                f"{source}: column {name!r} holds {reason}, from which a model would learn the"
                f" order of the file. Set data.ignore = {name!r}, or data.id; or list what to"
                " learn from in data.features."
            )


def _are_different_whole(values: np.ndarray) -> bool:
    if not (np.mod(values, 1) == 0).all():  # False for a gap too
        return False
    return len(np.unique(values)) == len(values)
