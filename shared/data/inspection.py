"""The inspection of a table's file: its columns, its classes, and the [data] section that suits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.data.checks import MAX_CLASSES
from shared.data.description import ColumnDescription, describe_column, detect_dialect
from shared.data.readers.csv_files import read_csv
from shared.data.readers.files import read_usable
from shared.data.readers.kinds import COLUMNAR, ENDINGS, check_exists, kind_of
from shared.data.roles import check_is_column, format_names
from shared.data.tables import make_table
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
    names = [str(name) for name in frame.columns]
    label = label or _default_label(names)
    check_is_column(label, names, "--label", str(path))
    columns = [describe_column(frame[name], is_label=name == label) for name in names]
    columns += unusable

    keys = {"name": str(path), **dialect, **_suggest_roles(columns, label, frame)}
    classes: dict[str, int] = {}
    if keys.get("task") != "regression":
        classes = _count_classes(frame[label])
    if classes and max(classes.values()) > MAX_IMBALANCE * min(classes.values()):
        keys["class_weights"] = "balanced"

    # Whatever is still wrong with the file under these keys is an error now.
    config = DataSection(**keys)  # type: ignore[arg-type]
    make_table(frame, config, str(path))
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
    return read_csv(path, None, delimiter, encoding), dialect, []


def _default_label(names: Sequence[str]) -> str:
    """The first column that has a usual name, else the last one."""
    usual = [name for name in names if name.lower() in LABELS]
    return usual[0] if usual else names[-1]


def _suggest_roles(
    columns: Sequence[ColumnDescription], label: str, frame: pd.DataFrame
) -> dict[str, str]:
    """The keys of [data] that declare roles, where they are not the defaults."""
    keys = {"label": label}
    target = next(column for column in columns if column.name == label)
    if _is_regression(target, frame[label]):
        keys["task"] = "regression"

    # Features are all other columns, unless some are left out.
    ids = [column.name for column in columns if column.role == "id"]
    features = [column for column in columns if column.role in ("number", "categorical")]
    any_left_out = any(column.role.startswith("left out") for column in columns)
    if any_left_out or len(ids) > 1:
        keys["features"] = format_names([column.name for column in features])
    elif ids:
        keys["id"] = ids[0]

    categorical = [column.name for column in features if column.role == "categorical"]
    if categorical:
        keys["categorical"] = format_names(categorical)
    if any(column.missing for column in features):
        keys["missing"] = "fill"
    return keys


def _is_regression(target: ColumnDescription, values: pd.Series[Any]) -> bool:
    """Returns whether numbers are amounts; a few different whole ones from 0 on are classes."""
    import pandas as pd

    if target.kind != "whole numbers":
        return target.kind == "numbers"
    numbers = pd.to_numeric(values.dropna())
    are_classes = (
        target.distinct <= MAX_SUGGESTED_CLASSES
        and numbers.min() >= 0
        and numbers.max() < MAX_CLASSES
    )
    return not are_classes


def _count_classes(column: pd.Series[Any]) -> dict[str, int]:
    counts = column.dropna().map(str).str.strip().value_counts()
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
