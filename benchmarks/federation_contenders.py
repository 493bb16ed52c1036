"""The contenders of the federated benchmark: starting a federation, and the times of its rounds.

All train the same model on the same silos' data and evaluate at the silos in each round. Everything
is on the loopback interface, and ends with this process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks import distributed
from benchmarks.contest import ContenderError
from benchmarks.distributed import BIN
from benchmarks.environments import pinned_python
from benchmarks.federation_workload import (
    BATCH_SIZE,
    EVALUATED_SHARE,
    LEARNING_RATE,
    SIZES,
    read_marks,
    seconds_per_round,
    silo_path,
    write_silos,
)
from shared.processes import ProcessGroup, free_ports, wait_until_listening
from shared.run_record import read_metrics

START_TIMEOUT_S = 60.0
TIMEOUT_S = 600.0  # of a whole federation
POLL_S = 0.1
STOCK_APP = Path(__file__).with_name("flower_stock")
NVFLARE_ENVIRONMENT, NVFLARE_PINS = ".venv-nvflare", "nvflare.txt"
# Processes too are in a namespace of their own: those of NVFlare leave their parents, but end with
# the namespace.
UNSHARE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
LOOPBACK_UP = ("sh", "-c", 'ip link set lo up && exec "$@"', "sh")


@dataclass(frozen=True)
class Case:
    """The number of silos, and the size of the model (see SIZES)."""

    num_silos: int
    size: str

    def __str__(self) -> str:
        return f"{self.num_silos} silos, {self.size}"


@dataclass(frozen=True)
class Federation:
    """One federation of one contender, which writes to `folder` alone: an absolute path."""

    case: Case
    num_rounds: int  # that are measured; another comes before them
    folder: Path

    @property
    def silos(self) -> list[Path]:
        return [silo_path(self.folder / "data", i) for i in range(self.case.num_silos)]

    @property
    def marks(self) -> Path:
        return self.folder / "marks"


@dataclass(frozen=True)
class Contender:
    """One system to measure.

    start: starts the processes of a federation. marks: the times in seconds at which its rounds
    ended, and the first began.
    """

    start: Callable[[ProcessGroup, Federation], None]
    marks: Callable[[Federation], list[float]] = lambda federation: read_marks(federation.marks)


def measure(
    contender: Contender, federation: Federation, timeout_s: float = TIMEOUT_S
) -> list[float]:
    """Runs a federation and returns the seconds of each round but the first.

    Raises ContenderError if a process ends, or the time is up, before all rounds are done.
    """
    write_silos(federation.folder / "data", federation.case.num_silos)
    num_marks = federation.num_rounds + 2
    deadline = time.monotonic() + timeout_s
    with ProcessGroup() as group:
        contender.start(group, federation)
        while True:
            ended = group.dead()  # before the marks: what a process wrote before its end counts
            marks = contender.marks(federation)
            if len(marks) >= num_marks:
                return seconds_per_round(marks[:num_marks])

            num_rounds = max(len(marks) - 1, 0)
            progress = f"{num_rounds} of {num_marks - 1} rounds: see {federation.folder}/*.log"
            if ended:
                raise ContenderError(f"{', '.join(ended)} ended after {progress}")
            if time.monotonic() > deadline:
                raise ContenderError(f"{timeout_s:.0f} s were enough for {progress}")
            time.sleep(POLL_S)


def environment(folder: Path) -> dict[str, str]:
    """The common environment of all contenders, with folders of their own for their files."""
    common = {
        name: value
        for name, value in distributed.environment({}).items()
        if not name.startswith(("FLWR_", "NVFLARE_"))
    }
    places = {"FLWR_HOME": str(folder / "flwr"), "NVFLARE_POC_WORKSPACE": str(folder / "poc")}
    return {**common, **places, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


# --- ours


def start_ours(node: str, group: ProcessGroup, federation: Federation) -> None:
    """`node`: what a silo runs, as fl_app.launch names it."""
    settings = experiment(federation.case.size, federation.num_rounds + 1)
    command = launch_command(settings, federation.folder, node)
    for silo in federation.silos:
        command += ["--silo", f"{silo.stem}={silo}"]
    group.start("launch", command, environment(federation.folder), federation.folder / "launch.log")


def launch_command(settings: Mapping[str, Any], folder: Path, node: str) -> list[str | Path]:
    """The command for a federation of ours; its silos are to be added."""
    path = folder / "experiment.toml"
    path.write_text(tomli_w.dumps(settings), encoding="utf-8")
    return [
        BIN / "python",
        "-m",
        "fl_app.launch",
        path,
        "--node",
        node,
        "--run-dir",
        folder / "run",
    ]


def experiment(size: str, num_rounds: int) -> dict[str, Any]:
    return {
        "name": "benchmark",
        "data": {"name": "digits", "validation_fraction": EVALUATED_SHARE},
        "model": {"name": "mlp", "options": f"units = {list(SIZES[size])}"},
        "optimizer": {"name": "adam", "learning_rate": LEARNING_RATE},
        "federation": {
            "num_rounds": num_rounds,
            "local_batch_size": BATCH_SIZE,
            "evaluate_on_server": False,
        },
    }


def marks_of_ours(federation: Federation) -> list[float]:
    return [row["seconds"] for row in read_metrics(federation.folder / "run")]


# --- Flower as it comes


def start_flower_stock(group: ProcessGroup, federation: Federation) -> None:
    """The app of its template on a SuperLink and SuperNodes, with all of Flower's own waits."""
    variables = environment(federation.folder)
    address = start_superlink(group, federation.folder, variables)
    ports = free_ports(len(federation.silos))
    for silo, port in zip(federation.silos, ports, strict=True):
        node: list[str | Path] = [BIN / "flower-supernode", "--insecure", "--superlink", address]
        node += ["--port", str(port), "--node-config", f'data="{silo}"']
        group.start(silo.stem, node, variables, federation.folder / f"{silo.stem}.log")

    run_config = {
        "num-server-rounds": federation.num_rounds + 1,
        "num-nodes": federation.case.num_silos,
        "size": federation.case.size,
        "marks": str(federation.marks),
    }
    start_run(group, federation.folder, variables, STOCK_APP, run_config)


def start_superlink(group: ProcessGroup, folder: Path, variables: Mapping[str, str]) -> str:
    """Starts a SuperLink, which `start_run` finds; returns its address."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    home = Path(variables["FLWR_HOME"])
    home.mkdir(parents=True)
    config = {"superlink": {"here": {"address": address, "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(config))

    command: list[str | Path] = [BIN / "flower-superlink", "--insecure"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # Else it would download the app's packages for each run.
    command += ["--disable-runtime-dependency-installation"]
    superlink = group.start("superlink", command, variables, folder / "superlink.log")
    if not wait_until_listening(port, superlink, START_TIMEOUT_S):
        raise ContenderError(f"the SuperLink did not start: see {folder}/superlink.log")
    return address


def start_run(
    group: ProcessGroup,
    folder: Path,
    variables: Mapping[str, str],
    app: Path,
    run_config: Mapping[str, Any],
) -> None:
    path = folder / "run-config.toml"
    path.write_text(tomli_w.dumps(run_config), encoding="utf-8")
    command: list[str | Path] = [BIN / "flwr", "run", app, "here", "--stream", "--run-config", path]
    group.start("flwr run", command, variables, folder / "run.log")


# --- NVFlare


def start_nvflare(is_tuned: bool, group: ProcessGroup, federation: Federation) -> None:
    """Its POC mode in a network of its own.

    Its servers listen on all interfaces, on fixed ports.
    """
    python = pinned_python(NVFLARE_ENVIRONMENT, NVFLARE_PINS)
    variables = environment(federation.folder)
    variables |= {
        "HOME": str(federation.folder),
        "PATH": f"{python.parent}{os.pathsep}{variables['PATH']}",
    }
    command = loopback_only([python, "-m", "benchmarks.nvflare_job"])
    command += ["--silos", str(federation.case.num_silos), "--size", federation.case.size]
    command += ["--rounds", str(federation.num_rounds + 2)]  # a mark is the beginning of a round
    command += ["--data", (federation.folder / "data"), "--marks", federation.marks]
    command += ["--tuned"] if is_tuned else []
    group.start("nvflare", command, variables, federation.folder / "nvflare.log")


def loopback_only(command: list[str | Path]) -> list[str | Path]:
    """The command in a network that has only a loopback interface of its own.

    All processes that it starts end with it.
    """
    become_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    return [*UNSHARE, *become_root, *LOOPBACK_UP, *command]


CONTENDERS = {
    "ours": Contender(partial(start_ours, "worker"), marks_of_ours),
    "ours_stock_waits": Contender(partial(start_ours, "worker-stock-waits"), marks_of_ours),
    "ours_stock_node": Contender(partial(start_ours, "flower"), marks_of_ours),
    "flower_stock": Contender(start_flower_stock),
    "nvflare": Contender(partial(start_nvflare, False)),
    "nvflare_tuned": Contender(partial(start_nvflare, True)),
}
