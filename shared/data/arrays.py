"""Arrays as data sets: .npz files, and what makes targets classes or numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from shared.data.dataset import Dataset
from shared.data.tables import MAX_CLASSES


def load_npz(path: Path, task: str) -> Dataset:
    """The arrays of an .npz file as a data set. Raises ValueError, naming the array, if they do not make one."""
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
            f"{path} must hold the arrays x and y (optional: sample_weight, num_classes, classes, groups); received "
            f"{sorted(arrays) or 'no arrays'}. Write it with np.savez(path, x=..., y=...)."
        )
    x, y = arrays["x"], arrays["y"]
    for name in {"x", "y", "sample_weight", "num_classes", "vocabulary_size", "groups"} & set(arrays):
        if arrays[name].dtype.kind not in "fiub":
            raise ValueError(
                f"{path}: {name} must be numeric; received dtype {arrays[name].dtype}. Encode text as numbers."
            )
    ids = int(arrays.get("vocabulary_size", np.int64(0)))
    if x.ndim < 2 or (y.ndim != 1 and y.shape != x.shape) or len(x) != len(y):
        raise ValueError(
            f"{path}: x must have shape (n, ...) and y shape (n,) with the same n, or that of x; received "
            f"{x.shape} and {y.shape}."
        )
    of_each = (len(y),)
    for name, shape in (("sample_weight", of_each), ("groups", of_each), ("num_classes", ()), ("vocabulary_size", ())):
        if name in arrays and arrays[name].shape != shape:
            raise ValueError(f"{path}: {name} must have shape {shape}; received {arrays[name].shape}. Or leave it out.")
    weight = arrays.get("sample_weight")
    declared = int(arrays["num_classes"]) if "num_classes" in arrays else None
    weight = None if weight is None else weight.astype(np.float32)
    dataset = dataset_of(x.astype(np.int32 if ids else np.float32), y, task, str(path), declared, weight)
    names = arrays.get("classes", np.array([], str))
    is_named = names.dtype.kind == "U" and names.shape == (dataset.num_classes,) and len(set(names)) == len(names)
    if names.size and not is_named:
        raise ValueError(
            f"{path}: classes must be the different names of the {dataset.num_classes} classes; received {names!r}. "
            "Or leave it out."
        )
    return replace(dataset, vocabulary_size=ids, groups=arrays.get("groups"), classes=tuple(map(str, names)))


def dataset_of(
    x: np.ndarray,
    y: np.ndarray,
    task: str,
    source: str,
    declared: int | None = None,
    weight: np.ndarray | None = None,
) -> Dataset:
    """Decides between classes and numbers by `task`, else what the file declares, else whole targets are classes."""
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


def save_npz(path: Path, dataset: Dataset) -> None:
    """Writes the data set as an .npz file that `load_examples` reads back."""
    weight = {} if dataset.sample_weight is None else {"sample_weight": dataset.sample_weight}
    sizes = {name: np.int64(getattr(dataset, name)) for name in ("num_classes", "vocabulary_size")}
    groups = {} if dataset.groups is None else {"groups": dataset.groups}
    classes = {"classes": np.array(dataset.classes)} if dataset.classes else {}
    np.savez(path, allow_pickle=False, x=dataset.x, y=dataset.y, **sizes, **weight, **groups, **classes)
