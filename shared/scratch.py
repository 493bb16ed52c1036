"""Temporary folders of long-lived programs; the next one removes those of killed ones."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "archipelago-scratch-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Makes a temporary folder for the block; removes those of killed programs first.

    A program holds a lock on its folder, which the kernel releases when the program ends, however
    it does. A process id in the name would not do: programs in other containers have others.
    """
    parent = Path(tempfile.gettempdir())
    _remove_abandoned(parent)

    # It gets the name that other programs look for once it is locked.
    unlocked = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    lock = _lock(unlocked)
    folder = unlocked.rename(parent / unlocked.name.removeprefix("."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Removes the scratch folders that no program has locked."""
    for folder in parent.glob(f"{PREFIX}*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds the lock on a folder; None if another program holds it.

    Also None if the folder is another user's, or gone.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
