"""State that a method keeps from round to round: named parts of arrays, in one file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

State: TypeAlias = Mapping[str, Sequence[np.ndarray]]

NO_STATE: State = {}


def save_state(path: Path, state: State) -> None:
    """Writes the state so that `path` always holds a whole one: the old or the new.

    Parts keep their names, order of arrays, shapes and dtypes.
    """
    members = {f"{name}/{i}": a for name, arrays in state.items() for i, a in enumerate(arrays)}
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **members)
    temporary.replace(path)


def load_state(path: Path) -> State:
    """Reads what `save_state` wrote. A part without arrays is not kept."""
    state: dict[str, list[np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as members:
        for key in members.files:  # in the order in which they were written
            name = key.rpartition("/")[0]
            state.setdefault(name, []).append(members[key])
    return state
