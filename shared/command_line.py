"""The arguments that every command on an experiment takes."""

import argparse

from shared.experiment import Experiment, Scalar, load_experiment


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="the experiment file, for example experiments/digits_cnn.toml")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="where the run record goes (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue the run in that directory from its checkpoint")


def experiment_from_arguments(options: argparse.Namespace) -> Experiment:
    """The experiment that the arguments describe. Raises ValueError for what the user can mend."""
    run: dict[str, Scalar] = {"resume": True} if options.resume else {}
    run |= {"directory": options.run_dir} if options.run_dir else {}
    return load_experiment(options.experiment, options.overrides, **run)
