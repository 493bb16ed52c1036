"""Where examples come from: scikit-learn's real sets, and the user's own NPZ and CSV files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.data.dataset import Dataset
from shared.experiment import DataSection, nearest_names

if TYPE_CHECKING:
    import pandas as pd

MAX_CLASSES = 100_000  # more are ids or numbers, not classes


def _sklearn_table(name: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn import datasets  # half a second to import, needed only here

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return x, y


def _standardised(x: np.ndarray) -> np.ndarray:
    return ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)


def _digits() -> Dataset:
    x, y = _sklearn_table("digits")
    return Dataset((x / 16.0).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32), num_classes=10)


def _classes(name: str) -> Dataset:
    x, y = _sklearn_table(name)
    return Dataset(_standardised(x), y.astype(np.int32), num_classes=int(y.max()) + 1)


def _diabetes() -> Dataset:
    x, y = _sklearn_table("diabetes")
    # scikit-learn ships the features centred, with norm 1 per column; as standard deviations they suit SGD
    return Dataset(_standardised(x), _standardised(y), num_classes=0)


BUILTIN_SETS: dict[str, Callable[[], Dataset]] = {
    "digits": _digits,
    "breast_cancer": lambda: _classes("breast_cancer"),
    "wine": lambda: _classes("wine"),
    "diabetes": _diabetes,
}


def load_dataset(config: DataSection) -> Dataset:
    """Loads the data set that `config.name` names: a built-in set, an .npz file or a .csv file.

    The features of built-in tables are standardised over the whole table, digits' pixels scaled to [0, 1], diabetes'
    target standardised; the user's own files are taken as they are. Raises ValueError when the data cannot be used.
    """
    path = Path(config.name)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity, and what becomes it, is refused by _checked
        if config.name in BUILTIN_SETS:
            dataset = BUILTIN_SETS[config.name]()
        elif path.suffix == ".npz":
            dataset = _load_npz(path, config.task)
        elif path.suffix == ".csv":
            dataset = _load_csv(path, config.label, config.task)
        else:
            raise ValueError(
                f"data.name must be a built-in set or the path of an .npz or .csv file; received {config.name!r}. "
                f"Nearest: {', '.join(nearest_names(config.name, BUILTIN_SETS))}."
            )
    return _checked(dataset, config)


def _load_npz(path: Path, task: str) -> Dataset:
    _check_exists(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: array for name, array in file.items() if isinstance(array, np.ndarray)}
    except Exception as error:  # damage shows as an exception of zipfile, zlib or numpy, of many types
        raise ValueError(
            f"{path} cannot be read as an .npz file: {error}. Write it with np.savez(path, x=..., y=...)."
        ) from None
    missing = {"x", "y"} - set(arrays)
    if missing:
        raise ValueError(
            f"{path} must hold the arrays x and y (optional: sample_weight, num_classes); received "
            f"{sorted(arrays) or 'no arrays'}. Write it with np.savez(path, x=..., y=...)."
        )
    x, y = arrays["x"], arrays["y"]
    for name in {"x", "y", "sample_weight", "num_classes"} & set(arrays):
        if arrays[name].dtype.kind not in "fiub":
            raise ValueError(
                f"{path}: {name} must be numeric; received dtype {arrays[name].dtype}. Encode text as numbers."
            )
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(
            f"{path}: x must have shape (n, ...) and y shape (n,) with the same n; received {x.shape} and {y.shape}."
        )
    for name, shape in (("sample_weight", y.shape), ("num_classes", ())):
        if name in arrays and arrays[name].shape != shape:
            raise ValueError(f"{path}: {name} must have shape {shape}; received {arrays[name].shape}. Or leave it out.")
    weight = arrays.get("sample_weight")
    declared = int(arrays["num_classes"]) if "num_classes" in arrays else None
    return _dataset(
        x.astype(np.float32), y, task, str(path), declared, None if weight is None else weight.astype(np.float32)
    )


def _load_csv(path: Path, label: str, task: str) -> Dataset:
    import pandas as pd  # half a second to import, needed only here

    _check_exists(path)
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            table = pd.read_csv(path, index_col=False)  # else the first fields of too long rows would be row names
    except pd.errors.ParserWarning:
        raise ValueError(f"{path}: its rows have more fields than its header. Name every column there.") from None
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty. A CSV file needs a header line and at least one row.") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as CSV: {str(error).strip()}.") from None
    if label not in table.columns:
        raise ValueError(
            f"{path} has no label column {label!r}; its columns are {', '.join(map(repr, table.columns))}. "
            "Name the target with data.label."
        )
    for column in table.columns:
        _check_numeric(table[column], pd.to_numeric(table[column], errors="coerce"), path)
    features = table.drop(columns=label)
    if features.shape[1] == 0:
        raise ValueError(f"{path} has only the label column {label!r}. Add at least one feature column.")
    return _dataset(features.to_numpy(np.float32), table[label].to_numpy(np.float64), task, str(path), None, None)


def _check_numeric(column: pd.Series, numbers: pd.Series, path: Path) -> None:
    """Refuses text and gaps; `numbers` is the column with NaN where it is not a number."""
    text = np.flatnonzero(numbers.isna() & column.notna())
    if text.size:
        raise ValueError(
            f"{path}: column {column.name!r} must be numeric; received {column.iloc[text[0]]!r} in line "
            f"{text[0] + 2} ({text.size} such rows). Encode text as numbers, or take the column out."
        )
    gaps = np.flatnonzero(column.isna())
    if gaps.size:
        raise ValueError(
            f"{path}: column {column.name!r} has no value in line {gaps[0] + 2} ({gaps.size} such rows). "
            "Fill the missing values in, or take the rows out."
        )


def _check_exists(path: Path) -> None:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        nearest = ", ".join(nearest_names(path.name, beside)[:3])
        hint = f"Nearest in that folder: {nearest}." if beside else f"That folder holds no {path.suffix} file."
        raise ValueError(f"No data file at {path}. {hint} Set data.name.")


def _dataset(
    x: np.ndarray, y: np.ndarray, task: str, source: str, declared: int | None, weight: np.ndarray | None
) -> Dataset:
    """Decides between classes and numbers: `task`, else what the file declares, else whole targets are classes."""
    if len(y) == 0:
        raise ValueError(f"{source} holds no examples. Give it at least one.")
    is_whole = np.mod(y, 1) == 0
    has_classes = declared != 0 if declared is not None else is_whole.all()
    if task == "regression" or (task == "auto" and not has_classes):
        return Dataset(x, y.astype(np.float32), num_classes=0, sample_weight=weight)
    wrong = y[~(is_whole & (y >= 0) & (y < MAX_CLASSES))]
    if wrong.size:
        raise ValueError(
            f"{source}: class targets must be whole numbers from 0 on, below {MAX_CLASSES}; received {wrong[0]}. "
            "Number the classes 0, 1, 2, ..., or set data.task = 'regression'."
        )
    num_classes = max(int(y.max()) + 1, declared or 0)
    return Dataset(x, y.astype(np.int32), num_classes, sample_weight=weight)


def _checked(dataset: Dataset, config: DataSection) -> Dataset:
    if (config.task == "regression" and dataset.num_classes) or (
        config.task == "classification" and not dataset.num_classes
    ):
        raise ValueError(
            f"data.task = {config.task!r} does not fit {config.name}, whose targets are of {dataset.schema.task}. "
            "Set data.task = 'auto'."
        )
    if not (np.isfinite(dataset.x).all() and np.isfinite(dataset.y).all()):
        raise ValueError(
            f"{config.name} holds values that are not finite (NaN or infinity). Fill them in or remove them."
        )
    weight = dataset.sample_weight
    if weight is not None and not (np.isfinite(weight) & (weight >= 0)).all():
        raise ValueError(f"{config.name}: sample_weight must be finite and not negative. Mend the weights.")
    return dataset


def save_npz(path: Path, dataset: Dataset) -> None:
    """Writes the data set as an .npz file that `load_dataset` reads back."""
    weight = {} if dataset.sample_weight is None else {"sample_weight": dataset.sample_weight}
    np.savez(path, allow_pickle=False, x=dataset.x, y=dataset.y, num_classes=np.int64(dataset.num_classes), **weight)
