"""python -m dist_train EXPERIMENT.toml: one process; under `horovodrun -np N`: N ranks."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_train.agreement import AgreedError, agree
from dist_train.collectives import Communicator, connect
from dist_train.rendezvous import place_on_host
from dist_train.resources import prepare_process, use_own_gpu
from shared.command_line import add_experiment_arguments, experiment_from_arguments, program
from shared.experiment import PerformanceSection
from shared.metrics import describe


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("dist_train"),
        description=(
            "Train an experiment in this process, or on the ranks of a cluster: "
            "horovodrun -np 4 python -m dist_train EXPERIMENT.toml"
        ),
    )
    add_experiment_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, str(Path.cwd()))  # the user's own models, whichever way Python was started

    # The rank's share of its host, before anything starts threads.
    performance = _performance_section(options)
    local_rank, local_size = place_on_host()
    prepare_process(local_rank, local_size, performance.threads_per_rank, performance.pin_ranks)

    communicator = connect()
    report = communicator.on_root(_print, _print_nothing)
    try:
        summary = _train(options, communicator)
    except AgreedError as error:
        report(f"error: {error}")
        return 2
    except (ValueError, OSError) as error:
        print(f"error (rank {communicator.rank}): {error}", file=sys.stderr)
        return 2
    report(summary)
    return 0


def _train(options: argparse.Namespace, communicator: Communicator) -> str:
    """Trains the experiment on all ranks; returns the lines that sum up the result."""
    experiment = agree(communicator, lambda: experiment_from_arguments(options))
    from dist_train.trainer import train  # TensorFlow: seconds to import, not for a typo

    agree(communicator, lambda: use_own_gpu(communicator.local_rank, communicator.local_size))
    verbose = 1 if sys.stdout.isatty() else 2
    result = train(experiment, communicator, verbose)
    metrics = describe(result["metrics"])
    return f"{experiment.name}: {metrics}\nrun record: {experiment.run_directory}"


def _performance_section(options: argparse.Namespace) -> PerformanceSection:
    """Returns the experiment's section; the defaults if the experiment cannot be read.

    The mistake is then reported by the agreement that follows, on all ranks together.
    """
    try:
        return experiment_from_arguments(options).performance
    except (ValueError, OSError):
        return PerformanceSection()


def _print(text: str) -> None:
    print(text, file=sys.stderr if text.startswith("error:") else sys.stdout)


def _print_nothing(text: str) -> None:
    """Stands for `_print` on the other ranks."""


if __name__ == "__main__":
    sys.exit(main())
