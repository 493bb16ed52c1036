"""The arguments that every command on an experiment takes, and quiet for what libraries log."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.experiment import Experiment


def program(module: str) -> str:
    """The name under which the user called a command: archipelago NAME, or python -m MODULE."""
    called = (
        Path(sys.argv[0]).name == "archipelago" or Path(sys.argv[0]).parent.name == "archipelago"
    )
    return f"archipelago {sys.argv[1]}" if called and sys.argv[1:] else f"python -m {module}"


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the experiment file, --set, --run-dir and --resume."""
    parser.add_argument(
        "experiment", help="the experiment file, for example experiments/digits_cnn.toml"
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key",
    )
    parser.add_argument(
        "--run-dir", metavar="DIR", help="where the run record goes (default: runs/NAME)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in that directory from its checkpoint",
    )


def experiment_from_arguments(options: argparse.Namespace) -> Experiment:
    """The experiment that the arguments describe. Raises ValueError for what the user can fix."""
    from shared.experiment import load_experiment  # not for a command without an experiment

    return load_experiment(
        options.experiment,
        options.overrides,
        run_directory=options.run_dir,
        resume=options.resume,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what the block writes to standard output and error, its C++ libraries' lines too."""
    sys.stdout.flush()
    sys.stderr.flush()
    streams = (1, 2)
    kept = [os.dup(stream) for stream in streams]

    with tempfile.TemporaryFile("w") as unread:
        for stream in streams:
            os.dup2(unread.fileno(), stream)
        try:
            with contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
                yield
        finally:
            for stream, copy in zip(streams, kept, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
