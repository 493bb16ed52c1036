"""Checks of columns and targets, value by value; each error names the file, the column and the row.

A column is a pandas Series whose index holds the place of each value in the file, named "line" or
"row". `source` names the file in messages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.values import Notation, as_names, explain_text, parse_numbers, text_of

if TYPE_CHECKING:
    import pandas as pd

MAX_CLASSES = 100_000  # more are ids or numbers, not classes


def as_numbers(column: pd.Series[Any], source: str, notation: Notation) -> pd.Series[Any]:
    """Returns the column as float64, NaN where it has no value.

    Raises ValueError for text that is no number in this notation, and for numbers that float32
    cannot hold.
    """
    import pandas as pd

    numbers, is_text = numbers_or_nan(column, notation)
    if is_text.any():
        text = column[is_text]
        raise ValueError(
            f"{source}: column {column.name!r} must be numeric; received {text.iloc[0]!r} in"
            f" {_place(text)} ({len(text)} such). {explain_text(str(text.iloc[0]))}"
        )

    with np.errstate(over="ignore"):
        is_infinite = np.isinf(numbers.astype(np.float32))
    if is_infinite.any():
        infinite = column[is_infinite]
        raise ValueError(
            f"{source}: column {column.name!r} must be finite, below 3e38; received"
            f" {infinite.iloc[0]} in {_place(infinite)}. Fix that value."
        )
    return pd.Series(numbers, column.index, name=column.name)


def number_columns(frame: pd.DataFrame, source: str, notation: Notation) -> pd.DataFrame:
    """Returns all columns as float64, by `as_numbers`, of which a table may have 100,000."""
    import pandas as pd

    is_plain = (frame.dtypes == np.float64).all() and not notation.gap_numbers
    if is_plain:
        with np.errstate(over="ignore"):
            is_plain = not np.isinf(frame.to_numpy(np.float32)).any()
    if is_plain:
        return frame
    columns = {str(name): as_numbers(column, source, notation) for name, column in frame.items()}
    return pd.DataFrame(columns, frame.index)


def as_targets(
    column: pd.Series[Any], task: str, classes: Collection[str], source: str, notation: Notation
) -> tuple[pd.Series[Any], bool]:
    """Returns (targets, is_regression).

    `classes`: the names of all classes, if data.classes declares them.

    | data.task | values | targets |
    |---|---|---|
    | regression | numbers | float64 |
    | auto, classification | one of `classes`, if they are declared | names of classes |
    | auto, classification | text alone | names of classes |
    | auto, classification | whole numbers from 0 on | int64 numbers of classes |
    | auto | other numbers | float64, a regression |

    Raises ValueError for anything else, such as numbers and text together. The column has no gaps.
    """
    import pandas as pd

    if task == "regression":
        return as_numbers(column, source, notation), True
    if classes:
        return _as_declared(column, classes, source, notation), False

    numbers, is_text = numbers_or_nan(column, notation)
    if is_text.all():
        return as_names(column, notation), False
    if is_text.any():
        text = column[is_text]
        raise ValueError(
            f"{source}: column {column.name!r} mixes numbers and text: {text.iloc[0]!r} in"
            f" {_place(text)} ({len(text)} of {len(column)} are no numbers). Fix the values, or"
            " name all classes by text, or list them in data.classes."
        )

    with np.errstate(invalid="ignore"):  # infinity is refused below
        is_whole = np.mod(numbers, 1) == 0
    if task == "auto" and not is_whole.all():
        return as_numbers(column, source, notation), True
    check_class_numbers(numbers, source, column.index)
    return pd.Series(numbers.astype(np.int64), column.index, name=column.name), False


def _as_declared(
    column: pd.Series[Any], classes: Collection[str], source: str, notation: Notation
) -> pd.Series[Any]:
    """The names of the classes. Raises ValueError for one that is not declared."""
    import pandas as pd

    names = as_names(column, notation)
    numbers, is_text = numbers_or_nan(column, notation)
    if not is_text.any():
        as_series = pd.Series(numbers, column.index, name=column.name)
        names = as_names(as_series, notation)  # 1.0 and 01 are 1
    others = names[~names.isin(list(classes))]
    if len(others):
        raise ValueError(
            f"{source}: column {column.name!r} holds the classes that data.classes lists; received"
            f" {others.iloc[0]!r} in {_place(others)} ({len(others)} such). Add it to data.classes,"
            " or fix the values."
        )
    return names


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
    known: set[str] = set()
    for name in names:
        if name in known:
            raise ValueError(
                f"{source} has two columns of the name {name!r}. Give each a name of its own."
            )
        known.add(name)


def check_complete(column: pd.Series[Any], raw: pd.Series[Any], source: str) -> None:
    """Raises ValueError if the column has a gap. `raw`: the column as it is in the file."""
    is_gap = column.isna()
    if not is_gap.any():
        return
    gaps = raw[is_gap]
    code = "" if gaps.isna().iloc[0] else str(gaps.iloc[0])
    received = f"{code!r} stands for none; " if code.strip() else ""
    raise ValueError(
        f"{source}: column {column.name!r} has no value in {_place(gaps)} ({received}{len(gaps)}"
        " such). Fill the values in, take the rows out, or, for a feature, set data.missing ="
        " 'fill'."
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


def numbers_or_nan(column: pd.Series[Any], notation: Notation) -> tuple[np.ndarray, np.ndarray]:
    """Returns (float64 numbers, NaN where there is none; which values are text), of shape (n,)."""
    import pandas as pd

    if column.dtype == np.float64:
        numbers = column.to_numpy()
        is_text = np.zeros(len(numbers), bool)
    else:
        text = text_of(column)
        if text is not None:
            return parse_numbers(text, notation)
        numbers = pd.to_numeric(column, errors="coerce").astype(np.float64).to_numpy()
        is_text = np.isnan(numbers) & column.notna().to_numpy()

    if notation.gap_numbers:
        numbers = np.where(np.isin(numbers, notation.gap_numbers), np.nan, numbers)
    return numbers, is_text


def _place(column: pd.Series[Any]) -> str:
    """The place of the first value, such as "line 7"."""
    return f"{column.index.name} {column.index[0]}"
