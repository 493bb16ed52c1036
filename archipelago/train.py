"""archipelago train EXPERIMENT.toml [--ranks N]: in this process, or on N ranks by horovodrun."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.hosts import check_hosts

LAUNCHER = "horovodrun"


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; with several ranks this process becomes horovodrun."""
    from dist_train.__main__ import main as train_here

    options, rest = _parse(arguments)
    if options.ranks == 1 and not options.hosts:
        return train_here(rest)
    try:
        command = launch_command(options.ranks, options.hosts, rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    os.execv(command[0], command)


def launch_command(ranks: int, hosts: str, arguments: Sequence[str]) -> list[str]:
    """The command that trains on these ranks, over Gloo.

    Raises ValueError if Horovod is not installed, or the hosts have no room for the ranks.
    """
    if ranks < 1:
        raise ValueError(f"A training has one rank or more; received --ranks {ranks}.")
    check_hosts(hosts, ranks, "--ranks")
    program = Path(sys.executable).parent / LAUNCHER
    if not program.is_file():
        raise ValueError(
            f"Several ranks need Horovod; {program} is not there. Run make setup, which builds it."
        )
    where = ["-H", hosts] if hosts else []
    command = [str(program), "--gloo", "-np", str(ranks), *where]
    return [*command, sys.executable, "-m", "dist_train", *arguments]


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="archipelago train",
        description=(
            "Train an experiment in one process, or on Horovod ranks. All other options are those"
            " of python -m dist_train: --set SECTION.KEY=VALUE, --run-dir DIR, --resume."
        ),
        epilog="Example: archipelago train experiments/digits_cnn.toml --ranks 2 --run-dir runs/a",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="how many ranks (default: 1, no Horovod)"
    )
    parser.add_argument(
        "--hosts",
        default="",
        metavar="H1:2,H2:2",
        help="where they run, and how many on each host (default: all on this one)",
    )
    parser.add_argument("experiment", help="the experiment file")
    options, rest = parser.parse_known_args(arguments)
    return options, [options.experiment, *rest]


if __name__ == "__main__":
    sys.exit(main())
