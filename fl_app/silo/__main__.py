"""python -m fl_app.silo: takes part in a federation, with one silo's data.

Starts a Flower SuperNode, which talks to the coordinator's SuperLink, and one worker, which does
its tasks in a living process: data, model and compiled step are kept from round to round. The data
stays here; the worker runs the code that is installed here. A worker that dies is restarted, and
the task that it died on is answered with an error.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from fl_app.silo.settings import (
    add_cluster_arguments,
    add_policy_arguments,
    check_address,
    check_silo_name,
    cluster_of,
    policy_of,
    with_config,
)
from fl_app.silo.supervisor import SiloError, Supervisor
from shared.command_line import program
from shared.data.readers.hubs import is_on_hub
from shared.data.sources import BUILTIN_SETS
from shared.processes import exit_on_sigterm
from shared.scratch import scratch_folder


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parse(with_config(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    exit_on_sigterm()
    try:
        check_options(options)
        cluster = cluster_of(options)
        with scratch_folder() as scratch:
            node = supernode_arguments(options, scratch)
            Supervisor(options.silo, node, scratch, cluster, options.stock_waits).run()
    except (ValueError, OSError, SiloError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"silo {options.silo} has left the federation", file=sys.stderr)
        return 130
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for mistakes that can be found before anything is started."""
    check_silo_name(options.silo)
    check_address(options.superlink)
    if not _is_data(options.data):
        raise ValueError(
            "--data names a file, a folder with examples or a built-in set"
            f" ({', '.join(BUILTIN_SETS)}); received {options.data!r}, which is none of these."
            " Check the path."
        )
    if not options.insecure and not options.root_certificates:
        raise ValueError(
            "The connection to the coordinator needs TLS: --root-certificates ca.crt, its"
            " certificate authority; received neither that nor --insecure, which is for trials on"
            " one machine."
        )
    cluster_of(options)
    policy_of(options)
    for file in (options.root_certificates, options.auth_supernode_private_key):
        if file and not Path(file).is_file():
            raise ValueError(f"There is no file {file}. Check the path.")


def _is_data(name: str) -> bool:
    """True for a built-in set, one on a hub, a file, or a folder that is not empty."""
    if not name:
        return False
    if name in BUILTIN_SETS or is_on_hub(name):
        return True
    path = Path(name)
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def supernode_arguments(options: argparse.Namespace, scratch: Path) -> list[str]:
    """The options of flower-supernode: where to connect, and the settings of the silo's app."""
    source = options.data
    if source not in BUILTIN_SETS and Path(source).exists():
        source = str(Path(source).resolve())

    # A file: on the command line a path could not hold quotes.
    node_config = {
        "silo": options.silo,
        "data": source,
        "allow": " ".join(options.allow),
        "state": str(scratch / "state"),
        **policy_of(options).to_node_config(),
    }
    path = scratch / "node_config.toml"
    path.write_text(tomli_w.dumps(node_config), encoding="utf-8")

    connection = ["--insecure"]
    if not options.insecure:
        connection = ["--root-certificates", options.root_certificates]
    if options.auth_supernode_private_key:
        connection += ["--auth-supernode-private-key", options.auth_supernode_private_key]
    return ["--superlink", options.superlink, *connection, "--node-config", str(path)]


class _PrintVersion(argparse.Action):
    """Prints the hash of the code that all parties must have alike; computed only if asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fl_app.flower.fab import installed_digest

        print(installed_digest()[:16])
        parser.exit()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    title, _, text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog=program("fl_app.silo"), description=text, epilog=title)

    # The silo: where it connects, its name, its data.
    parser.add_argument(
        "--superlink", required=True, metavar="HOST:PORT", help="the coordinator's SuperLink"
    )
    parser.add_argument(
        "--silo",
        required=True,
        metavar="NAME",
        help="this silo's name, its identity in the federation",
    )
    parser.add_argument(
        "--data", required=True, metavar="FILE", help=".csv or .npz, or the name of a built-in set"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE.MODULE:FUNCTION",
        help="a model builder that experiments may name; without it only the zoo's",
    )

    # The connection to the coordinator.
    parser.add_argument(
        "--root-certificates",
        metavar="FILE",
        help="of the coordinator's certificate authority (TLS)",
    )
    parser.add_argument(
        "--auth-supernode-private-key",
        metavar="FILE",
        help="this silo's key, if the SuperLink asks",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="no TLS: for trials on one machine only"
    )

    # The owner's rules, its workers, and the rest.
    add_policy_arguments(parser)
    add_cluster_arguments(parser)
    parser.add_argument(
        "--config", metavar="FILE.toml", help="these options by name: num-workers = 4"
    )
    parser.add_argument(
        "--version",
        action=_PrintVersion,
        nargs=0,
        help="print the hash of the installed app, and exit",
    )
    parser.add_argument(
        "--stock-waits", action="store_true", help="leave the SuperNode's waits as Flower has them"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
