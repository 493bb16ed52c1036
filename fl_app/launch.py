"""python -m fl_app.launch EXPERIMENT.toml --silos 3: a whole federation on this machine.

A real SuperLink and real silos, each a SuperNode and a worker, as processes on the loopback interface; they run the
experiment to its end and are shut down, whatever happens. The silos' data is the experiment's data set, cut by
[partition]; or each silo brings its own: --silo hospital-a=a.csv --silo hospital-b=b.csv.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import psutil
import tomli_w
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from fl_app.silo.settings import ONE_WORKER, Cluster
from shared.command_line import add_experiment_arguments, experiment_from_arguments
from shared.data import load_examples, split_pool
from shared.data.sources import save_examples
from shared.experiment import Experiment, experiment_from_flat
from shared.processes import (
    ProcessGroup,
    child_environment,
    exit_on_sigterm,
    free_ports,
    is_listening,
    wait_until_listening,
)
from shared.run_record import RunRecord

PROJECT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 60.0
Command: TypeAlias = list[str | Path]
RUN = "flwr run"
NODES = ("worker", "worker-stock-waits", "flower")
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_LOG_LEVEL": "WARNING",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Flower finds these through PATH; its own watch over parents does not reach a process that is busy in C.
FLOWER_CHILDREN = ("flower-superexec", "flwr-serverapp", "flwr-clientapp")


class LaunchError(Exception):
    """The federation did not run to its end."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    exit_on_sigterm()
    scratch = make_scratch()
    try:
        experiment = experiment_from_arguments(options)
        RunRecord(experiment, "flower", "round").check()
        silos = _own_data(options.silo, experiment) or cut_data(experiment, options.silos, scratch)
        cluster = Cluster(options.num_workers)
        federate(experiment, silos, scratch, port=options.port, node=options.node, cluster=cluster)
    except (ValueError, OSError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: everything is shut down; a run that had begun continues with --resume", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


def federate(
    experiment: Experiment,
    silos: dict[str, str],
    scratch: Path,
    port: int = 0,
    node: str = NODES[0],
    cluster: Cluster = ONE_WORKER,
) -> None:
    """Runs the experiment in a federation of `silos` (name: path or name of its data) on this machine.

    `node` says what a silo is: one of NODES; `cluster` which workers each has. Prints the ServerApp's lines as they
    come. Raises LaunchError if the run does not finish.
    """
    if cluster != ONE_WORKER and node == "flower":
        raise ValueError(
            f"A plain flower-supernode has one worker; received --num-workers {cluster.num_workers}. Leave it out, or "
            "--node flower."
        )
    if port and is_listening(port):
        raise ValueError(f"Port {port} is in use on this machine. Choose another with --port, or leave it out.")
    (free_port,) = free_ports(1)
    environment = child_environment(
        **SETTINGS,
        FLWR_HOME=str(scratch / "flwr"),
        PYTHONPATH=os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])),
        PATH=os.pathsep.join([str(_mortal_commands(scratch / "bin")), str(BIN), os.environ.get("PATH", "")]),
    )
    run_config = write_run_config(experiment, silos, scratch)
    result = experiment.run_directory / "result.json"
    before = result.stat().st_mtime_ns if result.is_file() else None  # of the run that this one resumes
    with ProcessGroup() as group:
        address = _start_superlink(group, port or free_port, environment, scratch)
        allowed = [experiment.model.name] if ":" in experiment.model.name else []  # the user is the silos' owner here
        for silo, data in silos.items():
            command = _silo_command(node, silo, data, allowed, address, scratch)
            command += cluster.arguments() if cluster != ONE_WORKER else []
            group.start(f"silo {silo}", command, environment, scratch / "silos" / f"{silo}.log")
        command = [BIN / "flwr", "run", PROJECT, "here", "--stream", "--run-config", run_config]
        run = group.start(RUN, command, environment)
        threading.Thread(target=_end_run_without_federation, args=(group,), daemon=True).start()
        told = _relay(run, experiment.federation.num_rounds)
        run.wait()
        if told or not result.is_file() or result.stat().st_mtime_ns == before:
            raise LaunchError(_why(group, told, scratch))


def make_scratch() -> Path:
    """A temporary folder for the silos' data and logs; also removes those that killed launchers left."""
    for folder in Path(tempfile.gettempdir()).glob("archipelago-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"archipelago-{os.getpid()}-"))


def cut_data(experiment: Experiment, num_silos: int, folder: Path) -> dict[str, str]:
    """Cuts the experiment's data, less the test split, into the silos' files: {silo: path}."""
    from shared.data.partition import partition  # seconds to import: flwr-datasets brings pandas, pyarrow, seaborn

    pool, _ = split_pool(load_examples(experiment.data), experiment.seed, experiment.data.test_fraction)
    silos = {}
    for i, part in enumerate(partition(experiment.partition, pool, num_silos, experiment.seed)):
        silos[f"silo-{i}"] = str(save_examples(folder / f"silo-{i}", part))
    return silos


def write_run_config(experiment: Experiment, silos: dict[str, str], scratch: Path) -> Path:
    """The merged experiment as a file: Flower takes a file or key-value pairs, not both."""
    changes = {"run.directory": str(experiment.run_directory.resolve()), "federation.min_silos": len(silos)}
    merged = experiment_from_flat({**experiment.to_flat(), **changes}, source=f"{len(silos)} silos")
    path = scratch / "experiment.toml"
    path.write_text(merged.to_toml(), encoding="utf-8")
    return path


def _start_superlink(group: ProcessGroup, port: int, environment: dict[str, str], scratch: Path) -> str:
    address = f"127.0.0.1:{port}"
    home = scratch / "flwr"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(f'[superlink.here]\naddress = "{address}"\ninsecure = true\n', encoding="utf-8")
    command: Command = [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--disable-runtime-dependency-installation"]
    superlink = group.start("superlink", command, environment, scratch / "superlink.log")
    if not wait_until_listening(port, superlink, START_TIMEOUT_S):
        raise LaunchError(f"The SuperLink did not start.\n{_tail(scratch / 'superlink.log')}")
    (scratch / "silos").mkdir(exist_ok=True)
    return address


def _silo_command(node: str, silo: str, data: str, allowed: list[str], address: str, scratch: Path) -> Command:
    if node == "flower":
        config = scratch / "silos" / f"{silo}.toml"  # a file: on the command line a path could not hold quotes
        known = {"silo": silo, "data": data, "allow": " ".join(allowed)}
        config.write_text(tomli_w.dumps(known), encoding="utf-8")
        command: Command = [BIN / "flower-supernode", "--insecure", "--superlink", address, "--node-config", config]
        return [*command, "--port", str(free_ports(1)[0])]
    command = [
        sys.executable,
        "-m",
        "fl_app.silo",
        "--insecure",
        "--superlink",
        address,
        "--silo",
        silo,
        "--data",
        data,
    ]
    command += [part for builder in allowed for part in ("--allow", builder)]
    return [*command, "--stock-waits"] if node == "worker-stock-waits" else command


def _mortal_commands(folder: Path) -> Path:
    """A folder of commands that start Flower's own child processes so that they die with their parents."""
    folder.mkdir()
    for name in FLOWER_CHILDREN:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec setpriv --pdeathsig KILL "{BIN / name}" "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    return folder


def _end_run_without_federation(group: ProcessGroup) -> None:
    """Ends `flwr run`, which would wait for ever, when the SuperLink or a SuperNode has ended."""
    while not group.dead():
        time.sleep(0.5)
    group.processes[RUN].terminate()


def _relay(run: "subprocess.Popen[bytes]", num_rounds: int) -> list[str]:
    """Prints the run's lines as they come; returns those in which the server says what is wrong."""
    assert run.stdout is not None
    told = []
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("rounds", total=num_rounds)
        for raw in run.stdout:
            line = raw.decode(errors="replace").rstrip()
            if found := re.match(r"round (\d+)/", line):
                bar.update(task, completed=int(found[1]))
            if line.startswith("error: "):
                told.append(f"server: {line}")
            elif not told:  # after an error come Flower's tracebacks, which say no more
                print(line, flush=True)  # above the bar, on a terminal
    return told


def _why(group: ProcessGroup, server_told: Sequence[str], scratch: Path) -> str:
    """Why a run did not finish: what the server and the silos' logs call errors, else the ends of the logs."""
    ended = [f"  {name} ended by itself" for name in group.dead() if name != RUN]
    told = [f"  {line}" for line in server_told] + ended
    for log in sorted(scratch.rglob("*.log")):
        lines = log.read_text(errors="replace").splitlines()
        told += [f"  {log.stem}: {line}" for line in lines if line.startswith("error:")]
    if told and not ended:
        return "The run did not finish:\n" + "\n".join(dict.fromkeys(told))
    return "\n".join(["The run did not finish.", *told, *(_tail(log) for log in sorted(scratch.rglob("*.log")))])


def _tail(log: Path, num_lines: int = 15) -> str:
    lines = log.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join([f"--- {log.name}", *lines])


def _own_data(assignments: Sequence[str], experiment: Experiment) -> dict[str, str]:
    silos: dict[str, str] = {}
    for assignment in assignments:
        name, equals, data = assignment.partition("=")
        if not (name and equals and data):
            raise ValueError(f"--silo takes NAME=DATA; received {assignment!r}. Example: --silo hospital-a=a.csv")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"A silo's name is made of letters, digits, '.', '_' and '-'; received {name!r}.")
        if name in silos:
            raise ValueError(f"Every silo needs a name of its own; received {name!r} twice.")
        silos[name] = str(Path(data).resolve()) if Path(data).exists() else data
    if experiment.federation.evaluate_on_server and str(Path(experiment.data.name).resolve()) in silos.values():
        raise ValueError(
            f"The server would test on examples that a silo trains on; received data.name = {experiment.data.name!r}, "
            "a silo's own. Name other data to test on, or set federation.evaluate_on_server = false."
        )
    return silos


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fl_app.launch", description=__doc__.partition("\n\n")[2])
    add_experiment_arguments(parser)
    parser.add_argument("--silos", type=int, default=3, metavar="N", help="how many silos share the data (default: 3)")
    parser.add_argument("--silo", action="append", default=[], metavar="NAME=DATA", help="a silo with data of its own")
    parser.add_argument(
        "--node",
        choices=NODES,
        default=NODES[0],
        help="what a silo is: a SuperNode with a living worker (default), the same with Flower's own waits, or a plain "
        "flower-supernode",
    )
    parser.add_argument(
        "--num-workers", type=int, default=1, metavar="N", help="Horovod ranks of each silo (default: 1, no Horovod)"
    )
    parser.add_argument("--port", type=int, default=0, help="the SuperLink's port (default: a free one)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
