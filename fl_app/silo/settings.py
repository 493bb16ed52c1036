"""What a silo's owner sets for its workers: on the command line, or in a file of the silo's own."""

import argparse
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

OnLoss = Literal["restart", "drop"]
HOST = r"[A-Za-z0-9][A-Za-z0-9._-]*:[1-9][0-9]*"


@dataclass(frozen=True)
class Cluster:
    """The ranks that share a silo's training. Raises ValueError for what cannot be started."""

    num_workers: int = 1
    hosts: str = ""  # as horovodrun's -H: h1:2,h2:2; none: this one
    on_loss: OnLoss = "restart"  # of a rank, within a task: do it again, or give the silo's round up

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"A silo needs a worker; received --num-workers {self.num_workers}. Choose 1 or more.")
        if self.on_loss not in get_args(OnLoss):
            raise ValueError(f"--on-loss is one of {', '.join(get_args(OnLoss))}; received {self.on_loss!r}.")
        if not self.hosts:
            return
        if not re.fullmatch(f"{HOST}(,{HOST})*", self.hosts):
            raise ValueError(
                f"--hosts lists hosts and how many workers each takes, as in h1:2,h2:2; received {self.hosts!r}."
            )
        if self.num_workers == 1:
            raise ValueError(f"--hosts is for several workers; received {self.hosts} and one. Set --num-workers.")
        room = sum(int(host.partition(":")[2]) for host in self.hosts.split(","))
        if room < self.num_workers:
            raise ValueError(
                f"The hosts must have room for all workers; received --hosts {self.hosts}, room for {room}, and "
                f"--num-workers {self.num_workers}. Lower --num-workers or name more hosts."
            )

    def arguments(self) -> list[str]:
        """The options that say the same."""
        return ["--num-workers", str(self.num_workers), "--hosts", self.hosts, "--on-loss", self.on_loss]


ONE_WORKER = Cluster()


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-workers", type=int, default=1, metavar="N", help="ranks that share the silo's training (default: 1)"
    )
    parser.add_argument("--hosts", default="", metavar="H1:2,H2:2", help="where they run (default: all on this host)")
    parser.add_argument(
        "--on-loss",
        default="restart",
        choices=get_args(OnLoss),
        help="of a rank within a round: do the silo's round again (default), or give it up",
    )


def cluster_of(options: argparse.Namespace) -> Cluster:
    return Cluster(options.num_workers, options.hosts, options.on_loss)


def arguments_from_file(path: Path) -> list[str]:
    """The options in a TOML file, whose keys are their names. Raises ValueError, or OSError, if it cannot be read.

    num-workers = 4 becomes --num-workers 4, insecure = true --insecure, and a list an option for each of its entries.
    """
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be TOML, such as: num-workers = 4; received something else: {error}") from None
    arguments = []
    for key, value in settings.items():
        if isinstance(value, dict):
            raise ValueError(f"{path} takes options by name, such as num-workers = 4; received the table [{key}].")
        for each in value if isinstance(value, list) else [value]:
            arguments += [f"--{key}"] if each is True else [] if each is False else [f"--{key}={each}"]
    return arguments


def with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments, with what `--config FILE` among them holds before all others, so that these have the last word."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    found, others = finder.parse_known_args(arguments)
    return [*arguments_from_file(found.config), *others] if found.config else others
