"""python -m fl_app.silo: takes part in a federation, with one silo's data.

Starts a Flower SuperNode, which talks to the coordinator's SuperLink, and one worker, which does its tasks in a living
process: data, model and compiled step stay warm from round to round. The data stays here; the worker runs the code that
is installed here. A worker that dies is started anew, and the task that it died on is answered with an error.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from fl_app.silo.settings import add_cluster_arguments, cluster_of, with_config
from fl_app.silo.supervisor import SiloError, Supervisor
from shared.data.hubs import is_on_hub
from shared.data.sources import BUILTIN_SETS
from shared.processes import exit_on_sigterm

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = _parse(with_config(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    exit_on_sigterm()
    scratch = Path(tempfile.mkdtemp(prefix=f"archipelago-{os.getpid()}-"))
    try:
        check_options(options)
        node = supernode_arguments(options, scratch)
        Supervisor(options.silo, node, scratch, cluster_of(options), options.stock_waits).run()
    except (ValueError, OSError, SiloError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"silo {options.silo} has left the federation", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for what is known to be wrong before anything is started."""
    if not re.fullmatch(NAME, options.silo):
        raise ValueError(f"A silo's name is made of letters, digits, '.', '_' and '-'; received {options.silo!r}.")
    is_known = options.data in BUILTIN_SETS or is_on_hub(options.data)
    if not options.data or not (is_known or _holds_something(Path(options.data))):
        raise ValueError(
            f"--data names a file, a folder with examples or a built-in set ({', '.join(BUILTIN_SETS)}); received "
            f"{options.data!r}, which is none of these. Check the path."
        )
    if not options.insecure and not options.root_certificates:
        raise ValueError(
            "The connection to the coordinator needs TLS: --root-certificates ca.crt, its certificate authority; "
            "received neither that nor --insecure, which is for trials on one machine."
        )
    cluster_of(options)
    for file in filter(None, (options.root_certificates, options.auth_supernode_private_key)):
        if not Path(file).is_file():
            raise ValueError(f"There is no file {file}. Check the path.")


def _holds_something(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def supernode_arguments(options: argparse.Namespace, scratch: Path) -> list[str]:
    """The options of flower-supernode that say where to connect, and what the silo's app must know."""
    source = (
        str(Path(options.data).resolve())
        if Path(options.data).exists() and options.data not in BUILTIN_SETS
        else options.data
    )
    known = {"silo": options.silo, "data": source, "allow": " ".join(options.allow)}
    config = scratch / "node_config.toml"  # a file: on the command line a path could not hold quotes
    config.write_text(tomli_w.dumps(known), encoding="utf-8")
    connection = ["--insecure"] if options.insecure else ["--root-certificates", options.root_certificates]
    if options.auth_supernode_private_key:
        connection += ["--auth-supernode-private-key", options.auth_supernode_private_key]
    return ["--superlink", options.superlink, *connection, "--node-config", str(config)]


class _PrintVersion(argparse.Action):
    """What all parties must have alike: worked out only if it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fl_app.silo.worker import installed_digest  # brings Flower

        print(installed_digest()[:16])
        parser.exit()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    title, _, text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m fl_app.silo", description=text, epilog=title)
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT", help="the coordinator's SuperLink")
    parser.add_argument(
        "--silo", required=True, metavar="NAME", help="this silo's name, its identity in the federation"
    )
    parser.add_argument("--data", required=True, metavar="FILE", help=".csv or .npz, or the name of a built-in set")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE.MODULE:FUNCTION",
        help="a model builder that experiments may name; without it only the zoo's",
    )
    parser.add_argument("--root-certificates", metavar="FILE", help="of the coordinator's certificate authority (TLS)")
    parser.add_argument("--auth-supernode-private-key", metavar="FILE", help="this silo's key, if the SuperLink asks")
    parser.add_argument("--insecure", action="store_true", help="no TLS: for trials on one machine only")
    add_cluster_arguments(parser)
    parser.add_argument("--config", metavar="FILE.toml", help="these options by name: num-workers = 4")
    parser.add_argument(
        "--version", action=_PrintVersion, nargs=0, help="print the hash of the installed app, and exit"
    )
    parser.add_argument("--stock-waits", action="store_true", help="leave the SuperNode's waits as Flower has them")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
