"""Checkpoints: arrays, a little metadata and the experiment they belong to, in one file that is written atomically."""

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
    """arrays: named lists of arrays ("model", "optimizer", ...). meta: JSON values (epoch or round, ...)."""

    arrays: Mapping[str, Sequence[np.ndarray]]
    meta: Mapping[str, Any]


def save_checkpoint(path: Path, experiment: Experiment, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint so that `path` always holds a whole one: the old or the new."""
    members = {f"{name}/{i}": a for name, arrays in checkpoint.arrays.items() for i, a in enumerate(arrays)}
    header = json.dumps({"experiment": experiment.to_flat(), "meta": dict(checkpoint.meta)})
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, header=np.frombuffer(header.encode(), dtype=np.uint8), **members)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, experiment: Experiment, *names: str) -> Checkpoint:
    """Reads a checkpoint that holds at least the named groups of arrays.

    Raises ValueError if there is none, or if it belongs to another experiment or runtime.
    """
    if not path.is_file():
        raise ValueError(f"Nothing to resume: there is no checkpoint at {path}. Run without resume, or name its run.")
    try:
        with np.load(path, allow_pickle=False) as file:
            members = dict(file)
        header = json.loads(members.pop("header").tobytes())
    except Exception as error:  # damage shows as an exception of zipfile, zlib or numpy, of many types
        raise ValueError(
            f"{path} is not a readable checkpoint ({error}). Delete the run directory to start over."
        ) from None
    _check_same_experiment(path, header["experiment"], experiment)
    arrays: dict[str, list[np.ndarray]] = {}
    for key in sorted(members, key=lambda key: (key.partition("/")[0], int(key.partition("/")[2]))):
        arrays.setdefault(key.partition("/")[0], []).append(members[key])
    if not set(names) <= set(arrays):
        raise ValueError(
            f"The checkpoint {path} was written by another runtime: it holds {sorted(arrays)}, and {sorted(names)} are "
            "needed. Resume it with the command that began it, or choose another run directory."
        )
    return Checkpoint(arrays, header["meta"])


def _check_same_experiment(path: Path, saved_flat: Mapping[str, Any], experiment: Experiment) -> None:
    saved, mine = experiment_from_flat(saved_flat, source=str(path)).trajectory(), experiment.trajectory()
    differing = [f"{key} is {mine[key]!r} here and {saved[key]!r} there" for key in mine if saved[key] != mine[key]]
    if differing:
        raise ValueError(
            f"The checkpoint {path} belongs to another experiment: {'; '.join(differing)}. "
            "Resume with the experiment.toml that lies beside it, or choose another run directory."
        )
