"""A silo owner's settings, on the command line or in a file: its name, and its workers."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fl_app.border import MAX_NAME_LENGTH
from fl_app.silo.policy import MIN_EXAMPLES, DataPolicy
from shared.data.roles import parse_names
from shared.experiment import parse_toml
from shared.hosts import check_hosts

OnLoss = Literal["restart", "drop"]
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MAX_PORT = 65535


def check_silo_name(name: str) -> None:
    """Raises ValueError for a name that cannot be that of a file too."""
    if not re.fullmatch(NAME, name):
        raise ValueError(
            f"A silo's name is made of letters, digits, '.', '_' and '-'; received {name!r}."
        )
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"A silo's name has at most {MAX_NAME_LENGTH} characters; received {len(name)}, in"
            f" {name[:20]!r}... Choose a shorter one."
        )


def check_address(address: str) -> None:
    """Raises ValueError for what is no HOST:PORT."""
    host, _, port = address.rpartition(":")
    is_port = port.isdecimal() and len(port) <= len(str(MAX_PORT)) and 1 <= int(port) <= MAX_PORT
    if not (host and is_port) or "/" in host:
        raise ValueError(
            f"--superlink names the coordinator as HOST:PORT, the port from 1 to {MAX_PORT};"
            f" received {address!r}. Example: --superlink coordinator.example.org:8000"
        )


@dataclass(frozen=True)
class Cluster:
    """The ranks that share a silo's training. Raises ValueError for what cannot be started."""

    num_workers: int = 1
    hosts: str = ""  # as horovodrun's -H: h1:2,h2:2; none: this one
    on_loss: OnLoss = "restart"  # of a rank, within a task; "drop": give the silo's round up

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(
                f"A silo needs a worker; received --num-workers {self.num_workers}. Choose 1 or"
                " more."
            )
        if self.on_loss not in get_args(OnLoss):
            raise ValueError(
                f"--on-loss is one of {', '.join(get_args(OnLoss))}; received {self.on_loss!r}."
            )
        check_hosts(self.hosts, self.num_workers, "--num-workers")

    def arguments(self) -> list[str]:
        """The command-line options that say the same."""
        return [
            f"--num-workers={self.num_workers}",
            f"--hosts={self.hosts}",
            f"--on-loss={self.on_loss}",
        ]


ONE_WORKER = Cluster()


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `cluster_of` reads."""
    parser.add_argument(
        "--num-workers",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share the silo's training (default: 1)",
    )
    parser.add_argument(
        "--hosts",
        default="",
        metavar="H1:2,H2:2",
        help="where they run (default: all on this host)",
    )
    parser.add_argument(
        "--on-loss",
        default="restart",
        choices=get_args(OnLoss),
        help="of a rank within a round: do the silo's round again (default), or give it up",
    )


def cluster_of(options: argparse.Namespace) -> Cluster:
    return Cluster(options.num_workers, options.hosts, options.on_loss)


def arguments_from_file(path: Path) -> list[str]:
    """The options in a TOML file, whose keys are their names.

    | in the file | on the command line |
    |---|---|
    | num-workers = 4 | --num-workers=4 |
    | insecure = true | --insecure |
    | insecure = false | nothing |
    | allow = ["a:b", "c:d"] | --allow=a:b --allow=c:d |

    Raises ValueError if it is no TOML or has tables, OSError if it cannot be read.
    """
    try:
        settings = parse_toml(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(
            f"{path} must be TOML, such as: num-workers = 4; received something else: {error}"
        ) from None

    arguments = []
    for key, value in settings.items():
        if isinstance(value, dict):
            raise ValueError(
                f"{path} takes options by name, such as num-workers = 4; received the table"
                f" [{key}]."
            )
        for each in value if isinstance(value, list) else [value]:
            if each is True:
                arguments.append(f"--{key}")
            elif each is not False:
                arguments.append(f"--{key}={each}")
    return arguments


def with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the options of their `--config FILE` put before them.

    So the options of the command line have the last word.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    options, arguments = finder.parse_known_args(arguments)
    if not options.config:
        return arguments
    return [*arguments_from_file(options.config), *arguments]


# --- the owner's rules about the data


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `policy_of` reads."""
    group = parser.add_argument_group("what leaves this silo")
    group.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="NAMES",
        help='the columns that experiments may use, as in CSV: "age, sex" (default: all)',
    )
    group.add_argument(
        "--share-values",
        action="append",
        default=[],
        metavar="NAMES",
        help="columns of which single values may leave: categories, and names of classes"
        ' (default: none; "*": all)',
    )
    group.add_argument(
        "--min-examples",
        type=int,
        default=MIN_EXAMPLES,
        metavar="N",
        help=f"nothing leaves that rests on fewer examples (default: {MIN_EXAMPLES})",
    )
    group.add_argument(
        "--cache",
        default="",
        metavar="DIR",
        help="lets experiments stream the data, which keeps an encoded copy of it here",
    )


def policy_of(options: argparse.Namespace) -> DataPolicy:
    """The policy that the options state. Raises ValueError for what cannot be one."""
    return DataPolicy(
        columns=_names(options.columns),
        shared_values=_names(options.share_values),
        min_examples=options.min_examples,
        cache=str(Path(options.cache).resolve()) if options.cache else "",
    )


def _names(lines: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for line in lines for name in parse_names(line))
