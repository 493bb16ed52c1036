"""Checks of columns and targets, value by value; each error names the file, the column and the row.

A column is a pandas Series whose index holds the place of each value in the file, named "line" or
"row". `source` names the file in messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

MAX_CLASSES = 100_000  # more are ids or numbers, not classes


def as_numbers(column: pd.Series[Any], source: str) -> pd.Series[Any]:
    """Returns the column as float64, NaN where it has no value.

    Raises ValueError for text, and for numbers that float32 cannot hold.
    """
    numbers = _numbers_or_nan(column)

    text = column[numbers.isna() & column.notna()]
    if len(text):
        raise ValueError(
            f"{source}: column {column.name!r} must be numeric; received {text.iloc[0]!r} in"
            f" {_place(text)} ({len(text)} such). Fix the values; or, if the column holds"
            " categories, name it in data.categorical; or leave it out of data.features."
        )

    with np.errstate(over="ignore"):
        is_infinite = np.isinf(numbers.astype(np.float32))
    infinite = numbers[is_infinite]
    if len(infinite):
        raise ValueError(
            f"{source}: column {column.name!r} must be finite, below 3e38; received"
            f" {infinite.iloc[0]:g} in {_place(infinite)}. Fix that value."
        )
    return numbers


def as_categories(column: pd.Series[Any]) -> pd.Series[Any]:
    """Returns the names of categories as text; gaps stay gaps."""
    return column.where(column.isna(), column.map(_as_text))


def as_targets(column: pd.Series[Any], task: str, source: str) -> tuple[pd.Series[Any], bool]:
    """Returns (targets, is_regression).

    | data.task | values | targets |
    |---|---|---|
    | regression | numbers | float64 |
    | auto, classification | text alone | names of classes |
    | auto, classification | whole numbers from 0 on | int64 numbers of classes |
    | auto | other numbers | float64, a regression |

    Raises ValueError for anything else, such as numbers and text together. The column has no gaps.
    """
    if task == "regression":
        return as_numbers(column, source), True

    numbers = _numbers_or_nan(column)
    is_text = numbers.isna()
    if is_text.all():
        return column.map(_as_text), False
    if is_text.any():
        text = column[is_text]
        raise ValueError(
            f"{source}: column {column.name!r} mixes numbers and text: {text.iloc[0]!r} in"
            f" {_place(text)} ({len(text)} of {len(column)} are no numbers). Fix the values, or"
            " name all classes by text."
        )

    is_whole = np.mod(numbers, 1) == 0
    if task == "auto" and not is_whole.all():
        return as_numbers(column, source), True
    check_class_numbers(numbers.to_numpy(), source, numbers.index)
    return numbers.astype(np.int64), False


def check_class_numbers(
    targets: np.ndarray, source: str, places: pd.Index[Any] | None = None
) -> None:
    """Raises ValueError unless all targets are whole numbers in [0, MAX_CLASSES).

    `places`: where in the file each of them stands, for the message.
    """
    is_class = (np.mod(targets, 1) == 0) & (targets >= 0) & (targets < MAX_CLASSES)
    if is_class.all():
        return
    wrong = targets[~is_class][0]
    place = "" if places is None else f" in {places.name} {places[~is_class][0]}"
    raise ValueError(
        f"{source}: class targets must be whole numbers from 0 on, below {MAX_CLASSES};"
        f" received {wrong}{place}. Number the classes 0, 1, 2, ..., or set data.task ="
        " 'regression'."
    )


def check_unique_names(names: Sequence[str], source: str) -> None:
    """Raises ValueError if two columns have the same name."""
    repeated = [name for i, name in enumerate(names) if name in names[:i]]
    if repeated:
        raise ValueError(
            f"{source} has two columns of the name {repeated[0]!r}. Give each a name of its own."
        )


def check_complete(column: pd.Series[Any], source: str) -> None:
    """Raises ValueError if the column has a gap."""
    gaps = column[column.isna()]
    if len(gaps):
        raise ValueError(
            f"{source}: column {column.name!r} has no value in {_place(gaps)} ({len(gaps)} such)."
            " Fill the values in, take the rows out, or, for a feature, set data.missing = 'fill'."
        )


def check_weights(weights: pd.Series[Any], source: str) -> None:
    """Raises ValueError for a negative sample weight."""
    negative = weights[weights < 0]
    if len(negative):
        raise ValueError(
            f"{source}: column {weights.name!r} holds weights (data.weight), which must not be"
            f" negative; received {negative.iloc[0]} in {_place(negative)}. Fix that value."
        )


def check_ids(ids: pd.Series[Any], source: str) -> None:
    """Raises ValueError for an id that comes twice."""
    repeated = ids[ids.duplicated()]
    if len(repeated):
        raise ValueError(
            f"{source}: column {ids.name!r} names each example once (data.id); received"
            f" {str(repeated.iloc[0])!r} again in {_place(repeated)}. Take one of the two out."
        )


def _numbers_or_nan(column: pd.Series[Any]) -> pd.Series[Any]:
    import pandas as pd

    return pd.to_numeric(column, errors="coerce").astype(np.float64)


def _place(column: pd.Series[Any]) -> str:
    """The place of the first value, such as "line 7"."""
    return f"{column.index.name} {column.index[0]}"


def _as_text(value: object) -> str:
    """A category's name: 1.0 and 1 are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()
