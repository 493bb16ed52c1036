"""Tables before encoding: columns as their file holds them, with roles, and checked.

A table is made in three steps: `assign_roles` (see `roles`), `check_columns` of any part of the
rows, `assemble_table` of all of them. `make_table` takes all three; `streaming` checks its columns
chunk by chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from shared.data.checks import (
    as_numbers,
    as_targets,
    check_complete,
    check_ids,
    check_weights,
    number_columns,
)
from shared.data.identifiers import check_no_identifiers
from shared.data.roles import Roles, assign_roles, parse_names
from shared.data.values import Notation, as_names, as_plain
from shared.experiment import DataSection

if TYPE_CHECKING:
    import pandas as pd

# The attribute by which a file of ours states its task: its targets may happen to be whole numbers.
TASK_ATTRIBUTE = "archipelago task"


@dataclass(frozen=True, eq=False)
class Table:
    """Examples as their file holds them, in columns with roles; a schema makes a `Dataset` of them.

    The index of `frame` is the row in the file, from 1 on ("row"), or the line ("line"). `file`
    holds the features where they are not in the frame (data.stream).
    """

    frame: pd.DataFrame
    roles: Roles
    config: DataSection
    source: str
    is_regression: bool
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.frame)

    def take(self, indices: np.ndarray) -> Self:
        """Returns the table of these rows, counted from 0, in this order."""
        return replace(self, frame=self.frame.iloc[indices])

    def sha256(self) -> str:
        """The hash of the examples in their order: equal for equal data."""
        import pandas as pd

        digest = hashlib.sha256(repr(list(self.frame.columns)).encode())
        hashes = pd.util.hash_pandas_object(self.frame, index=False).to_numpy()
        digest.update(hashes.tobytes())
        return digest.hexdigest()

    @property
    def groups(self) -> np.ndarray | None:
        """A number for each example, the same within a group; None without data.group."""
        return _numbered(self.frame[self.roles.group]) if self.roles.group else None

    @property
    def labels(self) -> np.ndarray | None:
        """A number for each example's class; None for a regression."""
        return None if self.is_regression else _numbered(self.frame[self.roles.label])


def make_table(
    frame: pd.DataFrame, config: DataSection, source: str, columns: Sequence[str] = ()
) -> Table:
    """Returns the checked table of the columns that have a role.

    `source` names the file in messages. `columns`: all that it has, if some of those without a
    role are not in `frame`. Raises ValueError, naming column and row.
    """
    if len(frame) == 0:
        raise ValueError(f"{source} holds no examples. Give it at least one.")
    names = columns or [str(name) for name in frame.columns]
    roles = assign_roles(config, names, source)
    checked = check_columns(frame, roles, config, source)
    if not config.features:
        check_no_identifiers(checked, roles, source)
    return assemble_table(checked, roles, config, source)


def check_columns(
    frame: pd.DataFrame, roles: Roles, config: DataSection, source: str
) -> pd.DataFrame:
    """Returns the columns that have a role: numbers as float64, categories as text, no gaps.

    Features may have gaps if data.missing = "fill". Checks each row by itself, so that a table can
    be checked in parts. Raises ValueError, naming column and row.
    """
    import pandas as pd

    notation = Notation.of(config)
    numbers = number_columns(frame[list(roles.numbers)], source, notation)
    columns = {name: as_names(frame[name], notation) for name in roles.categories}
    for name in roles.non_features:
        columns[name] = as_plain(frame[name], notation)
    if roles.weight:
        columns[roles.weight] = as_numbers(frame[roles.weight], source, notation)
        check_weights(columns[roles.weight], source)

    checked = pd.concat([numbers, pd.DataFrame(columns, frame.index)], axis=1)
    checked.attrs = dict(frame.attrs)
    may_have_gaps = set(roles.features if config.missing == "fill" else ())
    for name in checked.columns[checked.isna().any()]:
        if name not in may_have_gaps:
            check_complete(checked[name], frame[name], source)
    return checked


def assemble_table(
    checked: pd.DataFrame, roles: Roles, config: DataSection, source: str, file: Path | None = None
) -> Table:
    """Returns the table of all checked rows: no id twice, and all targets of one kind.

    The task is data.task, or what the file states, or what the targets look like. Changes the
    label's column of `checked`. Raises ValueError, naming column and row.
    """
    if roles.id:
        check_ids(checked[roles.id], source)

    task: str = config.task
    if task == "auto":
        task = checked.attrs.get(TASK_ATTRIBUTE, "auto")

    is_regression = True
    if roles.label:
        raw, classes = checked[roles.label], parse_names(config.classes)
        targets, is_regression = as_targets(raw, task, classes, source, Notation.of(config))
        check_complete(targets, raw, source)
        checked[roles.label] = targets
    return Table(checked, roles, config, source, is_regression, file)


def _numbered(column: pd.Series[Any]) -> np.ndarray:
    """The place of each value among the sorted different values, compared as text."""
    text = column.to_numpy().astype(str)
    numbers: np.ndarray = np.unique(text, return_inverse=True)[1]
    return numbers
