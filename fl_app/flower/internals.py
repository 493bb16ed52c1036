"""The check that the installed Flower has the private names that we use.

Five modules use more of Flower than its public interface. Each lists those names in a table
`INTERNALS` beside their use, and the table is checked before the first use. Where a name is gone or
takes other parameters, the caller says so and falls back on Flower as it is; so these names are
imported within functions:

| table | what it is for | without it |
|---|---|---|
| `supernode.INTERNALS` | short waits in a SuperNode | it polls for messages every 3 s |
| `node_tasks.INTERNALS` | a worker that lives on | each task starts a process, for seconds |
| `grid.INTERNALS` | short waits for announced replies | a reply may wait for 1 s |
| `memory.INTERNALS` | received arrays joined at once | they take three times their size |
| `randomness.INTERNALS` | Flower's own random draws kept apart | initial weights may vary |
"""

import importlib
import inspect
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import TypeAlias

# By module and name: the parameters by which the name is called here.
Internals: TypeAlias = Mapping[tuple[str, str], tuple[str, ...]]

# Between attempts to get an object that is announced but not stored yet; Flower's first is 1 s.
FIRST_BACKOFF_S = 0.02
LONGEST_BACKOFF_S = 1.0


def missing_internals(needed: Internals) -> list[str]:
    """The names that this Flower lacks, or that take other parameters: one phrase for each."""
    missing = []
    for (module_name, name), parameters in needed.items():
        try:
            value = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError):
            missing.append(f"{module_name}.{name}")
            continue

        if not parameters:
            continue
        accepted = inspect.signature(value).parameters
        if not set(parameters) <= set(accepted):
            missing.append(f"{module_name}.{name}({', '.join(parameters)})")
    return missing


def shorten_backoff(module: ModuleType, name: str) -> None:
    """Makes the module's function of that name retry after 0.02 s at first, and 1 s at most.

    The function is one of Flower's that get objects by retries; a second call changes nothing.
    """
    function = getattr(module, name)
    plain = getattr(function, "func", function)  # Flower's own, if it is shortened already
    shortened = partial(plain, initial_backoff=FIRST_BACKOFF_S, backoff_cap=LONGEST_BACKOFF_S)
    vars(module)[name] = shortened
