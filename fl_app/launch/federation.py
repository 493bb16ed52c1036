"""Runs an experiment in a federation of processes on this machine, and ends them all after it."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import tomli_w

from fl_app.launch.output import explain, how_to_go_on, relay, tail
from fl_app.launch.watch import OWN_COMMANDS, Watch
from fl_app.silo.policy import OPEN, DataPolicy
from fl_app.silo.settings import MAX_PORT, ONE_WORKER, Cluster
from shared.data.roles import format_names
from shared.experiment import Experiment, experiment_from_flat
from shared.processes import (
    ProcessGroup,
    child_environment,
    direct_on_loopback,
    free_ports,
    is_listening,
    wait_until_listening,
)

PROJECT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 60.0
RUN = "flwr run"
NODES = ("worker", "worker-stock-waits", "flower")
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_LOG_LEVEL": "WARNING",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Flower finds these through PATH; its own watch over parents does not reach a process that is busy
# in C.
FLOWER_CHILDREN = (*OWN_COMMANDS, "flwr-clientapp")
PIDS = "ARCHIPELAGO_PIDS"  # the variable that names the folder where they note their process ids

Command: TypeAlias = list[str | Path]


class LaunchError(Exception):
    """The federation did not run to its end. `details`: the ends of logs, to be shown before."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


def federate(
    experiment: Experiment,
    silos: dict[str, str],
    scratch: Path,
    port: int = 0,
    node: str = NODES[0],
    cluster: Cluster = ONE_WORKER,
) -> None:
    """Runs the experiment in a federation of `silos` (name: path or name of its data) on this
    machine.

    `node` says what a silo is: one of NODES; `cluster` which workers each has. Prints the
    ServerApp's lines as they come. Raises LaunchError if the run does not finish.
    """
    if cluster != ONE_WORKER and node == "flower":
        raise ValueError(
            "A plain flower-supernode has one worker; received --num-workers"
            f" {cluster.num_workers}. Leave it out, or --node flower."
        )
    if not 0 <= port <= MAX_PORT:
        raise ValueError(
            f"A port is a number from 1 to {MAX_PORT}; received --port {port}. Choose another, or"
            " leave it out."
        )
    if port and is_listening(port):
        raise ValueError(
            f"Port {port} is in use on this machine. Choose another with --port, or leave it out."
        )

    port = port or free_ports(1)[0]
    environment = _environment(scratch)
    run_config = write_run_config(experiment, silos, scratch)
    result = experiment.run_directory / "result.json"
    earlier_result_ns = _modified_ns(result)  # of the run that this one resumes

    with ProcessGroup() as group:
        address = _start_superlink(group, port, environment, scratch)

        # The silos. The user is their owner here, and allows what the experiment asks for.
        builder = experiment.model.name if ":" in experiment.model.name else ""
        policy = _open_policy(experiment, scratch)
        for silo, data in silos.items():
            if node == "flower":
                command = _stock_node_command(silo, data, builder, policy, address, scratch)
            else:
                command = _silo_command(silo, data, builder, policy, address)
                command += cluster.arguments()
                command += ["--stock-waits"] if node == "worker-stock-waits" else []
            group.start(f"silo {silo}", command, environment, scratch / "silos" / f"{silo}.log")

        # The run, to its end.
        command = [BIN / "flwr", "run", PROJECT, "here", "--stream", "--run-config", run_config]
        run = group.start(RUN, command, environment)
        watch = Watch(group, RUN, scratch / "pids")
        watch.start()
        errors = relay(run, experiment.federation.num_rounds)
        run.wait()
        if errors or _modified_ns(result) in (None, earlier_result_ns):
            endings = watch.ended_processes()
            if not errors:  # else the ServerApp has ended because of them
                endings |= watch.ended_commands()
            reasons, details = explain(endings, errors, group.logs)
            raise LaunchError(f"{reasons}\n{how_to_go_on(experiment)}", details)


def write_run_config(experiment: Experiment, silos: dict[str, str], scratch: Path) -> Path:
    """Writes the merged experiment to a file: Flower takes a file or key-value pairs, not both."""
    changes = {
        "run.directory": str(experiment.run_directory.resolve()),
        "federation.min_silos": len(silos),
    }
    merged = experiment_from_flat({**experiment.to_flat(), **changes}, source=f"{len(silos)} silos")
    path = scratch / "experiment.toml"
    path.write_text(merged.to_toml(), encoding="utf-8")
    return path


def _open_policy(experiment: Experiment, scratch: Path) -> DataPolicy:
    """Lets everything leave a silo that the experiment asks for."""
    cache = experiment.data.cache or str(scratch / "encoded")
    return replace(OPEN, cache=cache)


def _modified_ns(file: Path) -> int | None:
    """The time of the file's last change; None if there is no such file."""
    return file.stat().st_mtime_ns if file.is_file() else None


# --- the processes


def _environment(scratch: Path) -> dict[str, str]:
    """The variables of all processes: Flower's settings, our modules and its commands."""
    modules = [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    programs = [str(_mortal_commands(scratch / "bin")), str(BIN), os.environ.get("PATH", "")]
    return child_environment(
        **SETTINGS,
        **direct_on_loopback(),
        FLWR_HOME=str(scratch / "flwr"),
        PYTHONPATH=os.pathsep.join(filter(None, modules)),
        PATH=os.pathsep.join(programs),
    )


def _mortal_commands(folder: Path) -> Path:
    """A folder of commands that start Flower's own child processes so that they die with their
    parents, and note their process ids where a variable names a folder for them.
    """
    folder.mkdir()
    for name in FLOWER_CHILDREN:
        script = folder / name
        note = f'[ -z "${PIDS}" ] || echo $$ > "${PIDS}/{name}"'
        command = f'exec setpriv --pdeathsig KILL "{BIN / name}" "$@"'
        script.write_text(f"#!/bin/sh\n{note}\n{command}\n", encoding="utf-8")
        script.chmod(0o755)
    return folder


def _start_superlink(
    group: ProcessGroup, port: int, environment: dict[str, str], scratch: Path
) -> str:
    """Starts the coordinator's SuperLink, waits until it listens; returns its address."""
    address = f"127.0.0.1:{port}"
    home = scratch / "flwr"
    home.mkdir(exist_ok=True)
    config = f'[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    (home / "config.toml").write_text(config, encoding="utf-8")

    command: Command = [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--disable-runtime-dependency-installation"]
    log = scratch / "superlink.log"
    pids = scratch / "pids"
    pids.mkdir()
    superlink = group.start("the SuperLink", command, {**environment, PIDS: str(pids)}, log)
    if not wait_until_listening(port, superlink, START_TIMEOUT_S):
        raise LaunchError("The SuperLink did not start; the end of its log says why.", tail(log))
    (scratch / "silos").mkdir(exist_ok=True)
    return address


def _silo_command(silo: str, data: str, builder: str, policy: DataPolicy, address: str) -> Command:
    """The command of a silo of ours: a SuperNode and a worker that lives on."""
    command: Command = [sys.executable, "-m", "fl_app.silo", "--insecure", "--superlink", address]
    command += ["--silo", silo, "--data", data]
    command += ["--share-values", format_names(policy.shared_values)]
    command += ["--min-examples", str(policy.min_examples)]
    command += ["--cache", policy.cache] if policy.cache else []
    return [*command, "--allow", builder] if builder else command


def _stock_node_command(
    silo: str, data: str, builder: str, policy: DataPolicy, address: str, scratch: Path
) -> Command:
    """The command of a plain flower-supernode, which starts a process for each task."""
    # A file: on the command line a path could not hold quotes.
    folder = scratch / "silos"
    state = str(folder / f"{silo}-state")
    own = {"silo": silo, "data": data, "allow": builder, "state": state}
    node_config = {**own, **policy.to_node_config()}
    path = folder / f"{silo}.toml"
    path.write_text(tomli_w.dumps(node_config), encoding="utf-8")

    command: Command = [BIN / "flower-supernode", "--insecure", "--superlink", address]
    command += ["--node-config", path, "--port", str(free_ports(1)[0])]
    return command
