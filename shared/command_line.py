"""The arguments that every command on an experiment takes."""

import argparse
import sys
from pathlib import Path

from shared.experiment import Experiment, load_experiment


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
    return load_experiment(
        options.experiment,
        options.overrides,
        run_directory=options.run_dir,
        resume=options.resume,
    )
