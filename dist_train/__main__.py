"""python -m dist_train EXPERIMENT.toml: one process; under `horovodrun -np N`: N ranks."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dist_train.collectives import AgreedError, Communicator, agree, connect, place_on_host
from dist_train.resources import prepare_process, use_own_gpu
from shared.command_line import add_experiment_arguments, experiment_from_arguments
from shared.experiment import Experiment, PerformanceSection
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
    wanted = _wanted(lambda: experiment_from_arguments(options))
    local_rank, local_size = place_on_host()
    prepare_process(local_rank, local_size, wanted.threads_per_rank, wanted.pin_ranks)
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
    experiment = agree(communicator, lambda: experiment_from_arguments(options))
    from dist_train.trainer import train  # TensorFlow: seconds to import, not for a typo

    agree(communicator, lambda: use_own_gpu(communicator.local_rank, communicator.local_size))
    result = train(experiment, communicator, verbose=1 if sys.stdout.isatty() else 2)
    return f"{experiment.name}: {describe(result['metrics'])}\nrun record: {experiment.run_directory}"


def _wanted(load: Callable[[], Experiment]) -> PerformanceSection:
    try:
        return load().performance
    except (ValueError, OSError):  # told by the agreement that follows, on all ranks together
        return PerformanceSection()


def _tell(text: str) -> None:
    print(text, file=sys.stderr if text.startswith("error:") else sys.stdout)


def _silent(text: str) -> None:
    """What the other ranks print."""


if __name__ == "__main__":
    sys.exit(main())
