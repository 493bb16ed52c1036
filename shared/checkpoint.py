"""Checkpoints: named arrays, metadata and the experiment they belong to, in one file.

The file is written atomically. It is a .npz archive of the arrays `NAME/0`, `NAME/1`, ... and of
`header`, the bytes of a JSON object {"experiment": ..., "meta": ...}.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.experiment import Experiment, experiment_from_flat


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after an epoch or a round.

    arrays: lists of arrays by name ("model", "optimizer", ...). meta: JSON values (epoch or round,
    ...).
    """

    arrays: Mapping[str, Sequence[np.ndarray]]
    meta: Mapping[str, Any]


def save_checkpoint(path: Path, experiment: Experiment, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint so that `path` always holds a whole one: the old or the new."""
    header = json.dumps({"experiment": experiment.to_flat(), "meta": dict(checkpoint.meta)})
    members = {"header": np.frombuffer(header.encode(), dtype=np.uint8)}
    for name, arrays in checkpoint.arrays.items():
        for number, array in enumerate(arrays):
            members[f"{name}/{number}"] = array

    # On disk before it takes the name of the old one.
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **members)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, experiment: Experiment, *names: str) -> Checkpoint:
    """Reads a checkpoint that holds at least the arrays of these names.

    Raises ValueError if there is none, or if it belongs to another experiment or runtime.
    """
    header, members = _read(path)
    _check_same_experiment(path, header["experiment"], experiment)

    # Numbers, not the names in the archive, give the order of the arrays of a name.
    arrays: dict[str, list[np.ndarray]] = {}
    for key in sorted(members, key=_name_and_number):
        name, _ = _name_and_number(key)
        arrays.setdefault(name, []).append(members[key])

    if not set(names) <= set(arrays):
        raise ValueError(
            f"The checkpoint {path} was written by another runtime: it holds {sorted(arrays)}, and"
            f" {sorted(names)} are needed. Resume it with the command that began it, or choose"
            " another run directory."
        )
    return Checkpoint(arrays, header["meta"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays by their names in the archive."""
    if not path.is_file():
        raise ValueError(
            f"Nothing to resume: there is no checkpoint at {path}. Run without resume, or name its"
            " run."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            members = dict(file)
        header = json.loads(members.pop("header").tobytes())
        _check_form(header, members)
    # Damage shows as an exception of zipfile, zlib or numpy, of many types.
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}). Delete the run directory to start"
            " over."
        ) from None
    return header, members


def _check_form(header: Any, members: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if a file was not written by `save_checkpoint`."""
    is_header = isinstance(header, dict) and all(
        isinstance(header.get(part), dict) for part in ("experiment", "meta")
    )
    if not is_header:
        raise ValueError("its header is of another kind")
    for key in members:
        name, _, number = key.partition("/")
        if not name or not number.isdecimal():
            raise ValueError(f"it holds {key!r}, where NAME/NUMBER is expected")


def _name_and_number(key: str) -> tuple[str, int]:
    """Splits a name in the archive, so that numbers sort as numbers.

    >>> _name_and_number("model/10")
    ('model', 10)
    """
    name, _, number = key.partition("/")
    return name, int(number)


def _check_same_experiment(
    path: Path, saved_flat: Mapping[str, Any], experiment: Experiment
) -> None:
    """Raises ValueError if a key that decides the course of a run differs."""
    saved = experiment_from_flat(saved_flat, source=str(path)).trajectory()
    current = experiment.trajectory()
    differing = [
        f"{key} is {value!r} here and {saved[key]!r} there"
        for key, value in current.items()
        if saved[key] != value
    ]
    if differing:
        raise ValueError(
            f"The checkpoint {path} belongs to another experiment: {'; '.join(differing)}. "
            "Resume with the experiment.toml that lies beside it, or choose another run directory."
        )
