"""python -m fl_app.launch EXPERIMENT.toml --silos 3: a whole federation on this machine.

A real SuperLink and real silos, each a SuperNode and a worker, as processes on the loopback
interface; they run the experiment to its end and are shut down, whatever happens. The silos' data
is the experiment's data set, partitioned by [partition]; or each silo brings its own: --silo
hospital-a=a.csv --silo hospital-b=b.csv.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fl_app.launch.federation import NODES, LaunchError, federate
from fl_app.launch.silo_data import own_data, partition_data
from fl_app.silo.settings import Cluster
from shared.command_line import add_experiment_arguments, experiment_from_arguments, program
from shared.mlflow_record import end_for_killed_process
from shared.processes import exit_on_sigterm
from shared.run_record import RunRecord
from shared.scratch import scratch_folder

DEFAULT_SILOS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    exit_on_sigterm()
    try:
        with scratch_folder() as scratch:
            _launch(options, scratch)
    except LaunchError as error:
        if error.details:
            print(error.details, file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as interruption:
        print(
            "interrupted: everything is shut down; a run that had begun continues with --resume",
            file=sys.stderr,
        )
        is_sigterm = isinstance(interruption, SystemExit)
        return 128 + (signal.SIGTERM if is_sigterm else signal.SIGINT)
    return 0


def _launch(options: argparse.Namespace, scratch: Path) -> None:
    """Runs the experiment over the silos that the options describe."""
    if options.silo and options.silos is not None:
        raise ValueError(
            "--silos N divides one data set over N silos, and --silo names silos with data of their"
            f" own; received --silos {options.silos} and --silo {options.silo[0]}. Leave one out."
        )
    experiment = experiment_from_arguments(options)
    RunRecord(experiment, "flower", "round").check()

    silos = own_data(options.silo, experiment)
    if not silos:
        num_silos = DEFAULT_SILOS if options.silos is None else options.silos
        silos = partition_data(experiment, num_silos, scratch)
    cluster = Cluster(options.num_workers)
    try:
        federate(experiment, silos, scratch, port=options.port, node=options.node, cluster=cluster)
    except BaseException as error:
        end_for_killed_process(experiment, error)  # the ServerApp goes with the SuperLink, at once
        raise


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("fl_app.launch"), description=(__doc__ or "").partition("\n\n")[2]
    )
    add_experiment_arguments(parser)

    # The silos: how many, or which with data of their own.
    parser.add_argument(
        "--silos",
        type=int,
        metavar="N",
        help=f"how many silos share the data (default: {DEFAULT_SILOS})",
    )
    parser.add_argument(
        "--silo",
        action="append",
        default=[],
        metavar="NAME=DATA",
        help="a silo with data of its own",
    )

    # Their processes.
    parser.add_argument(
        "--node",
        choices=NODES,
        default=NODES[0],
        help=(
            "what a silo is: a SuperNode with a living worker (default), the same with Flower's own"
            " waits, or a plain flower-supernode"
        ),
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=1,
        metavar="N",
        help="Horovod ranks of each silo (default: 1, no Horovod)",
    )
    parser.add_argument(
        "--port", type=int, default=0, help="the SuperLink's port (default: a free one)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
