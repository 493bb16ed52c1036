"""Arrays in .npz files, and the decision whether targets are classes or numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.checks import check_class_numbers
from shared.data.dataset import Dataset

REQUIRED = ("x", "y")
NUMERIC = (*REQUIRED, "sample_weight", "num_classes", "vocabulary_size", "groups")


def load_npz(path: Path, task: str) -> Dataset:
    """Returns the arrays of an .npz file as a data set.

    | array | shape | meaning |
    |---|---|---|
    | x | (n, ...) | examples |
    | y | (n,), or that of x | targets |
    | sample_weight | (n,) | optional |
    | groups | (n,) | optional; examples of one group belong together |
    | num_classes | () | optional; 0: a regression |
    | vocabulary_size | () | optional; x holds ids below it |
    | classes | (num_classes,) | optional names |

    Raises ValueError, naming the array, if they do not make a data set.
    """
    arrays = _read_arrays(path)
    _check_types(path, arrays)
    _check_shapes(path, arrays)

    vocabulary_size = int(arrays.get("vocabulary_size", np.int64(0)))
    x = arrays["x"].astype(np.int32 if vocabulary_size else np.float32)
    declared = int(arrays["num_classes"]) if "num_classes" in arrays else None
    weight = arrays.get("sample_weight")
    if weight is not None:
        weight = weight.astype(np.float32)
    dataset = dataset_of(x, arrays["y"], task, str(path), declared, weight)

    classes = arrays.get("classes", np.array([], str))
    _check_class_names(path, classes, dataset.num_classes)
    return replace(
        dataset,
        vocabulary_size=vocabulary_size,
        groups=arrays.get("groups"),
        classes=tuple(str(name) for name in classes),
    )


def save_npz(path: Path, dataset: Dataset) -> None:
    """Writes the data set as an .npz file that `load_npz` reads back."""
    arrays: dict[str, Any] = {
        "x": dataset.x,
        "y": dataset.y,
        "num_classes": np.int64(dataset.num_classes),
        "vocabulary_size": np.int64(dataset.vocabulary_size),
    }
    if dataset.sample_weight is not None:
        arrays["sample_weight"] = dataset.sample_weight
    if dataset.groups is not None:
        arrays["groups"] = dataset.groups
    if dataset.classes:
        arrays["classes"] = np.array(dataset.classes)
    np.savez(path, allow_pickle=False, **arrays)


def dataset_of(
    x: np.ndarray,
    y: np.ndarray,
    task: str,
    source: str,
    num_classes: int | None = None,
    weight: np.ndarray | None = None,
) -> Dataset:
    """Returns arrays as a data set whose targets are classes or numbers.

    data.task decides; if it is "auto", then `num_classes` as the file declares it (0: numbers);
    without that, whole numbers are classes. `source` names the file in messages. Raises ValueError
    if there are no examples, or for classes that are no whole numbers from 0 on.
    """
    if len(y) == 0:
        raise ValueError(f"{source} holds no examples. Give it at least one.")

    is_whole = (np.mod(y, 1) == 0).all()
    has_classes = is_whole if num_classes is None else num_classes != 0
    if task == "regression" or (task == "auto" and not has_classes):
        return Dataset(x, y.astype(np.float32), num_classes=0, sample_weight=weight)

    check_class_numbers(y, source)
    num_classes = max(int(y.max()) + 1, num_classes or 0)
    return Dataset(x, y.astype(np.int32), num_classes, sample_weight=weight)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: array for name, array in file.items() if isinstance(array, np.ndarray)}
    except Exception as error:  # damage raises errors of zipfile, zlib or numpy, of many types
        raise ValueError(
            f"{path} cannot be read as an .npz file: {error}. Write it with np.savez(path, x=...,"
            " y=...)."
        ) from None
    if not arrays.keys() >= set(REQUIRED):
        raise ValueError(
            f"{path} must hold the arrays x and y (optional: sample_weight, num_classes, classes,"
            f" groups); received {sorted(arrays) or 'no arrays'}. Write it with np.savez(path,"
            " x=..., y=...)."
        )
    return arrays


def _check_types(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name in NUMERIC:
        if name in arrays and arrays[name].dtype.kind not in "fiub":
            raise ValueError(
                f"{path}: {name} must be numeric; received dtype {arrays[name].dtype}. Encode text"
                " as numbers."
            )


def _check_shapes(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    x, y = arrays["x"], arrays["y"]
    if x.ndim < 2 or (y.ndim != 1 and y.shape != x.shape) or len(x) != len(y):
        raise ValueError(
            f"{path}: x must have shape (n, ...) and y shape (n,) with the same n, or that of x;"
            f" received {x.shape} and {y.shape}."
        )
    optional = {
        "sample_weight": (len(y),),
        "groups": (len(y),),
        "num_classes": (),
        "vocabulary_size": (),
    }
    for name, shape in optional.items():
        if name in arrays and arrays[name].shape != shape:
            raise ValueError(
                f"{path}: {name} must have shape {shape}; received {arrays[name].shape}. Or leave"
                " it out."
            )


def _check_class_names(path: Path, names: np.ndarray, num_classes: int) -> None:
    if names.size == 0:
        return
    is_text = names.dtype.kind == "U"
    if not is_text or names.shape != (num_classes,) or len(set(names)) != len(names):
        raise ValueError(
            f"{path}: classes must be the different names of the {num_classes} classes; received"
            f" {names!r}. Or leave it out."
        )
