"""python -m dist_train EXPERIMENT.toml: one process; under `horovodrun -np N`: N ranks."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dist_train.collectives import AgreedError, Communicator, agree, connect
from shared.command_line import add_experiment_arguments, experiment_from_arguments
from shared.experiment import Experiment
from shared.metrics import describe


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dist_train",
        description="Train an experiment in this process, or on the ranks of a cluster: "
        "horovodrun -np 4 python -m dist_train EXPERIMENT.toml",
    )
    add_experiment_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, str(Path.cwd()))  # the user's own models, whichever way Python was started
    communicator = connect()
    say = communicator.on_root(_tell, _silent)
    try:
        result = _train(options, communicator)
    except AgreedError as error:
        say(f"error: {error}")
        return 2
    except (ValueError, OSError) as error:
        print(f"error (rank {communicator.rank}): {error}", file=sys.stderr)
        return 2
    say(result)
    return 0


def _train(options: argparse.Namespace, communicator: Communicator) -> str:
    def load() -> Experiment:
        return experiment_from_arguments(options)

    set_threads(_wanted_threads(load), communicator)  # before anything computes, the agreement included
    experiment = agree(communicator, load)
    from dist_train.trainer import train  # TensorFlow: seconds to import, not for a typo

    result = train(experiment, communicator, verbose=1 if sys.stdout.isatty() else 2)
    return f"{experiment.name}: {describe(result['metrics'])}\nrun record: {experiment.run_directory}"


def set_threads(threads_per_rank: int, communicator: Communicator) -> None:
    """Gives each rank so many threads (0: its share of the cores); ranks that use all cores hinder each other.

    By the variables that TensorFlow reads when it first computes; what the user has set himself stays.
    """
    threads = threads_per_rank or max(1, len(os.sched_getaffinity(0)) // communicator.local_size)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", str(max(2, threads)))  # one computes while one communicates


def _wanted_threads(load: Callable[[], Experiment]) -> int:
    try:
        return load().performance.threads_per_rank
    except (ValueError, OSError):  # told by the agreement that follows, on all ranks together
        return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr if text.startswith("error:") else sys.stdout)


def _silent(text: str) -> None:
    """What the other ranks print."""


if __name__ == "__main__":
    sys.exit(main())
