"""The inspection of a table's file: its columns, its classes, and the [data] section that suits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.data.description import ColumnDescription, describe_column
from shared.data.detection import detect_dialect, detect_notation
from shared.data.readers.csv_files import read_csv
from shared.data.readers.files import read_usable
from shared.data.readers.kinds import COLUMNAR, ENDINGS, check_exists, kind_of
from shared.data.roles import canonical_name, check_is_column, format_names
from shared.data.tables import make_table
from shared.data.values import Notation, as_names
from shared.experiment import DataSection

if TYPE_CHECKING:
    import pandas as pd

LABELS = ("label", "target", "class", "outcome", "y")  # names that a target often has
MAX_SUGGESTED_CLASSES = 20  # more different whole numbers are a regression's targets
MAX_IMBALANCE = 3.0  # times as many examples in the largest class as in the smallest: weigh them


@dataclass(frozen=True)
class Inspection:
    """A file's columns, the examples of each class (largest first), and the keys of [data]."""

    num_examples: int
    columns: list[ColumnDescription]
    keys: dict[str, str]
    classes: dict[str, int] = field(default_factory=dict)

    @property
    def section(self) -> str:
        """The [data] section as TOML."""
        import tomli_w

        return "[data]\n" + tomli_w.dumps(self.keys)


def inspect_file(path: Path, label: str = "") -> Inspection:
    """Reads a CSV, Parquet, Arrow or TFRecord file and suggests the roles of its columns.

    `label`: its target; empty: the first column that has a usual name, else the last. Raises
    ValueError if the file cannot be read, has no such column, or leaves no column to learn from.
    """
    frame, dialect, unusable = _read_frame(path)
    notation = detect_notation(frame)
    names = [str(name) for name in frame.columns]
    label = canonical_name(label) or _default_label(names)
    check_is_column(label, names, "--label", str(path))
    columns = [
        describe_column(column, is_label=name == label, notation=notation)
        for name, column in frame.items()
    ]
    columns += unusable

    # The keys: of the dialect, of the notation, and the columns' roles.
    keys = {"name": str(path), **dialect, **_notation_keys(notation)}
    keys |= _suggest_roles(columns, label)
    classes: dict[str, int] = {}
    if keys.get("task") != "regression":
        classes = _count_classes(as_names(frame[label], notation))
        keys |= _declare_classes(classes)
    if classes and max(classes.values()) > MAX_IMBALANCE * min(classes.values()):
        keys["class_weights"] = "balanced"

    # Whatever is still wrong with the file under these keys is an error now.
    config = DataSection(**keys)  # type: ignore[arg-type]
    make_table(frame, config, str(path), [column.name for column in columns])
    return Inspection(len(frame), columns, keys, classes)


def _read_frame(path: Path) -> tuple[pd.DataFrame, dict[str, str], list[ColumnDescription]]:
    """(columns, the keys of [data] that reading takes, columns that cannot be learnt from).

    Of CSV all columns are text.
    """
    check_exists(path)
    if path.is_dir() or kind_of(path) in COLUMNAR:
        frame, reasons = read_usable(path)
        unusable = [
            ColumnDescription(name, reason, 0, 0, "", f"left out: {reason}")
            for name, reason in reasons.items()
        ]
        return frame, {}, unusable
    if kind_of(path) != "csv":
        endings = [ending for kind in ("csv", *COLUMNAR) for ending in ENDINGS[kind]]
        raise ValueError(f"Tables are in files of the kinds {', '.join(endings)}; received {path}.")
    dialect = detect_dialect(path)
    delimiter = dialect.get("delimiter", ",")
    encoding = dialect.get("encoding", "utf-8")
    return read_csv(path, delimiter, encoding), dialect, []


def _default_label(names: Sequence[str]) -> str:
    """The first column that has a usual name, else the last one."""
    usual = [name for name in names if name.lower() in LABELS]
    return usual[0] if usual else names[-1]


def _notation_keys(notation: Notation) -> dict[str, str]:
    """The keys of [data] that declare a notation, where they are not the defaults."""
    keys = {"decimal": notation.decimal, "thousands": notation.thousands}
    return {key: sign for key, sign in keys.items() if sign != getattr(Notation(), key)}


def _suggest_roles(columns: Sequence[ColumnDescription], label: str) -> dict[str, str]:
    """The keys of [data] that declare roles, where they are not the defaults."""
    keys = {"label": label}
    target = next(column for column in columns if column.name == label)
    if _is_regression(target):
        keys["task"] = "regression"

    # Features are all other columns, but for those that are ignored.
    ids = [column.name for column in columns if column.role == "id"]
    if ids:
        keys["id"] = ids[0]
    ignored = [column.name for column in columns if column.role.startswith("left out")]
    if ignored or len(ids) > 1:
        keys["ignore"] = format_names([*ids[1:], *ignored])

    features = [column for column in columns if column.role in ("number", "categorical")]
    categorical = [column.name for column in features if column.role == "categorical"]
    if categorical:
        keys["categorical"] = format_names(categorical)
    if any(column.missing for column in features):
        keys["missing"] = "fill"
    return keys


def _is_regression(target: ColumnDescription) -> bool:
    """Returns whether numbers are amounts: fractions, or more whole ones than classes would be.

    A few whole numbers are classes, unless some are negative and there are more than two.
    """
    if target.kind != "whole numbers":
        return target.kind == "numbers"
    is_signed = target.example.startswith("-")
    return target.distinct > (2 if is_signed else MAX_SUGGESTED_CLASSES)


def _declare_classes(classes: Iterable[str]) -> dict[str, str]:
    """data.classes, where the classes are whole numbers that are not 0, 1, 2, ... without a hole.

    >>> _declare_classes(["1", "-1"]), _declare_classes(["1", "0"]), _declare_classes(["f", "m"])
    ({'classes': '-1, 1'}, {}, {})
    """
    try:
        numbers = sorted(map(int, classes))
    except ValueError:
        return {}
    if numbers == list(range(len(numbers))):
        return {}
    return {"classes": format_names([str(number) for number in numbers])}


def _count_classes(names: pd.Series[Any]) -> dict[str, int]:
    counts = names.value_counts()
    return {str(name): int(count) for name, count in counts.items()}


def experiment_text(inspection: Inspection, name: str) -> str:
    """Returns a whole experiment for the file as TOML, to begin with."""
    batch_size = _suggest_batch_size(inspection.num_examples)
    return f"""name = "{name}"
seed = 0

{inspection.section}
[model]
name = "mlp"                  # or linear, wide_deep, or your own: "mypackage.models:build"

[optimizer]
name = "adam"
learning_rate = 0.003

[training]
epochs = 60
global_batch_size = {batch_size}
early_stopping_patience = 10  # epochs without a better validation loss
restore_best = true

[federation]
num_rounds = 20
local_batch_size = {batch_size}
"""


def _suggest_batch_size(num_examples: int) -> int:
    """The power of 2 that makes 16 to 31 batches of an epoch, but in 8..256."""
    num_train = math.floor(0.72 * num_examples)  # what the default splits leave
    if num_train <= 16:
        return 8
    exponent = int(math.log2(num_train / 16))
    return 2 ** min(8, max(3, exponent))
