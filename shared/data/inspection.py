"""What a file of a table holds, and the [data] section that suits it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.files import DELIMITERS, READERS, check_exists, read_csv
from shared.data.tables import MAX_CLASSES, make_table
from shared.experiment import DataSection, nearest_names

if TYPE_CHECKING:
    import pandas as pd

LABELS = ("label", "target", "class", "outcome", "y")  # names that a target often has
MANY = 50  # different texts beyond which a column is no set of categories
FEW = 20  # different whole numbers up to which a target is a set of classes
UNEVEN = 3.0  # times as many examples in the largest class as in the smallest: weigh them


@dataclass(frozen=True)
class Column:
    """A column of a file, described."""

    name: str
    kind: str  # whole numbers, numbers, text, empty
    missing: int
    distinct: int
    example: str  # the range of numbers, the commonest texts
    role: str = "number"  # what [data] makes of it: label, number, categorical, id, or left out with the reason


@dataclass(frozen=True)
class Inspection:
    """What a file holds: its columns, the examples of each class, and the keys of [data] that suit it."""

    num_examples: int
    columns: list[Column]
    keys: dict[str, str]
    classes: dict[str, int] = field(default_factory=dict)

    @property
    def section(self) -> str:
        """The [data] section as TOML."""
        import tomli_w

        return "[data]\n" + tomli_w.dumps(self.keys)


def inspect_file(path: Path, label: str = "") -> Inspection:
    """Reads a CSV, Parquet or TFRecord file and suggests roles. `label` is its target; empty: by name, else the last.

    Raises ValueError if it cannot be read, has no such column, or if no column is left to learn from.
    """
    check_exists(path)
    if path.suffix != ".csv" and path.suffix not in READERS:
        raise ValueError(f"Tables are in files of the kinds .csv, {', '.join(READERS)}; received {path}.")
    keys = {"name": str(path)}
    if path.suffix == ".csv":
        keys |= _dialect(path)
        frame = read_csv(path, None, keys.get("delimiter", ","), keys.get("encoding", "utf-8"))
    else:
        frame = READERS[path.suffix](path)
    names = [str(name) for name in frame.columns]
    if label and label not in names:
        raise ValueError(
            f"{path} has no column {label!r} (--label); its columns are {', '.join(map(repr, names))}. "
            f"Nearest: {', '.join(nearest_names(label, names)[:3])}."
        )
    label = label or next((name for name in names if name.lower() in LABELS), names[-1])
    columns = [_described(frame[name], name == label) for name in names]
    keys |= _suggested(columns, label, frame)
    classes = {} if keys.get("task") == "regression" else _balance(frame[label])
    if classes and max(classes.values()) > UNEVEN * min(classes.values()):
        keys["class_weights"] = "balanced"
    _check(path, frame, keys)
    return Inspection(len(frame), columns, keys, classes)


def _dialect(path: Path) -> dict[str, str]:
    """The encoding and the delimiter of a CSV file, where they are not UTF-8 and the comma."""
    content, keys = path.read_bytes(), {}
    encoding = "utf-8"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = keys["encoding"] = "utf-16"
    else:
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            encoding = keys["encoding"] = "latin-1"
    header = content.decode(encoding).removeprefix("\ufeff").partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)  # the first of them, if the header has none
    return keys if delimiter == "," else keys | {"delimiter": delimiter}


def _described(column: pd.Series[Any], is_label: bool) -> Column:
    import pandas as pd

    present = column.dropna()
    if present.map(lambda value: isinstance(value, str)).all():
        present = present.str.strip()
    numbers = pd.to_numeric(present, errors="coerce")
    name, missing, distinct = str(column.name), int(column.isna().sum()), int(present.nunique())

    def described(kind: str, example: str, role: str) -> Column:
        return Column(name, kind, missing, distinct, example, role)

    if present.empty:
        return described("empty", "", "left out: empty")
    if numbers.notna().all():
        whole = bool((np.mod(numbers, 1) == 0).all())
        role = "label" if is_label else "number"
        if distinct == 1 and not is_label:
            role = "left out: always the same"
        elif whole and distinct == len(column) and _is_called_id(name):
            role = "id"
        return described("whole numbers" if whole else "numbers", f"{numbers.min():g} to {numbers.max():g}", role)
    commonest = ", ".join(f"{value}" for value in present.value_counts().index[:3])
    num_text = int(numbers.isna().sum())
    kind = "text" if num_text == len(present) else f"text in {num_text} of {len(present)} rows, else numbers"
    role = "label" if is_label else _role_of_text(distinct, len(column), num_text < 0.05 * len(present))
    return described(kind, commonest[:40], role)


def _is_called_id(name: str) -> bool:
    return name.lower() in ("id", "index", "row", "key") or name.lower().endswith(("_id", " id"))


def _role_of_text(distinct: int, num_examples: int, is_stray: bool) -> str:
    if is_stray:
        return "left out: mend its text"
    if distinct == num_examples:
        return "id"
    if distinct > min(MANY, num_examples / 2):
        return f"left out: text of {distinct} kinds"
    return "categorical"


def _suggested(columns: Sequence[Column], label: str, frame: pd.DataFrame) -> dict[str, str]:
    keys = {"label": label}
    of_role: dict[str, list[str]] = {}
    for column in columns:
        of_role.setdefault(column.role.partition(":")[0], []).append(column.name)
    target = next(column for column in columns if column.name == label)
    if target.kind == "numbers" or (target.kind == "whole numbers" and not _are_classes(frame[label], target)):
        keys["task"] = "regression"
    ids = of_role.get("id", [])
    features = [column.name for column in columns if column.role in ("number", "categorical")]
    if "left out" in of_role or len(ids) > 1:
        keys["features"] = _as_names(features)
    elif ids:
        keys["id"] = ids[0]
    if "categorical" in of_role:
        keys["categorical"] = _as_names(of_role["categorical"])
    if any(column.missing for column in columns if column.name in features):
        keys["missing"] = "fill"
    return keys


def _are_classes(column: pd.Series[Any], target: Column) -> bool:
    import pandas as pd

    numbers = pd.to_numeric(column.dropna())
    return target.distinct <= FEW and bool(numbers.min() >= 0) and bool(numbers.max() < MAX_CLASSES)


def _as_names(names: Sequence[str]) -> str:
    """The inverse of `parse_names`.

    >>> _as_names(["age", "sex, at birth"])
    'age, "sex, at birth"'
    """
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    quoted = next(csv.reader([line.getvalue()]))
    return ", ".join(f'"{name}"' if "," in name or '"' in name else name for name in quoted)


def _balance(column: pd.Series[Any]) -> dict[str, int]:
    counts = column.dropna().map(str).str.strip().value_counts()
    return {str(name): int(count) for name, count in counts.items()}


def _check(path: Path, frame: pd.DataFrame, keys: dict[str, str]) -> None:
    """That the section suits the file: what is still wrong with it is told now."""
    config = DataSection(**keys)  # type: ignore[arg-type]
    make_table(frame, config, str(path))


def experiment_text(found: Inspection, name: str) -> str:
    """A whole experiment for the file, to begin with."""
    num_train = max(1, math.floor(0.72 * found.num_examples))
    batch_size = 2 ** min(8, max(3, int(math.log2(num_train / 16)))) if num_train > 16 else 8
    return f"""name = "{name}"
seed = 0

{found.section}
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
