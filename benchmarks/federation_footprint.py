"""The footprint of a federation of ours: the server's memory, and processor time while it waits.

SuperLink, ServerApp and, where it is measured, the silo are the real ones. The other silos are
stand-ins (federation_standin.py): dozens of real ones would not fit on the machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.contest import ContenderError
from benchmarks.distributed import ROOT
from benchmarks.federation_contenders import (
    POLL_S,
    TIMEOUT_S,
    environment,
    experiment,
    start_run,
    start_superlink,
)
from benchmarks.federation_workload import write_silos
from fl_app.launch.federation import SETTINGS
from shared.processes import ProcessGroup
from shared.run_record import read_metrics

SERVER_APP = "flwr-serverapp"
MEMORY_SIZE, MEMORY_ROUNDS = "5MB", 2
EXAMPLES_PER_STAND_IN = 16
SETTLE_S, IDLE_S = 25.0, 30.0  # our waits grow for 20 s


def server_memory(num_silos: int, folder: Path) -> float:
    """The peak memory of the ServerApp's process in MB, in rounds with that many replies.

    A reply has 5 MB.
    """
    silos = write_silos(folder / "data", num_silos, EXAMPLES_PER_STAND_IN)
    settings = _settings(num_silos, MEMORY_ROUNDS, folder)
    settings["federation"]["evaluate_on_silos"] = False
    result, peak_kb = folder / "run" / "result.json", 0

    def is_done() -> bool:
        nonlocal peak_kb
        peak_kb = max([peak_kb, *map(peak_memory_kb, _server_apps(group))])
        return result.is_file()

    with ProcessGroup() as group:
        _start_server(group, folder, settings, stand_ins=silos, num_answers=1 + MEMORY_ROUNDS)
        _wait(is_done, group, folder)
    return peak_kb / 1024


def idle_cpu(folder: Path, settle_s: float = SETTLE_S, idle_s: float = IDLE_S) -> dict[str, float]:
    """The cores that a silo and the server use while both wait for another silo.

    Returns {"silo": ..., "server": ...}. All processes count: SuperNode, worker and their
    supervisor; SuperLink, its executor and the ServerApp.
    """
    own, other = write_silos(folder / "data", 2)
    with ProcessGroup() as group:
        # The other answers the roll call and the first round, but not the second.
        settings = _settings(2, 2, folder)
        address = _start_server(group, folder, settings, stand_ins=[other], num_answers=2)
        command: list[str | Path] = [sys.executable, "-m", "fl_app.silo", "--insecure"]
        command += ["--superlink", address, "--silo", "own", "--data", own]
        silo = group.start("silo", command, _variables(folder), folder / "silo.log")
        _wait(lambda: len(read_metrics(folder / "run")) == 2, group, folder)
        time.sleep(settle_s)

        # Processor time of both process trees, over a while in which nothing is to happen.
        roots = {"silo": silo.pid, "server": group.processes["superlink"].pid}
        before = {name: cpu_seconds(pid) for name, pid in roots.items()}
        started = time.monotonic()
        time.sleep(idle_s)
        used = {name: spent(before[name], cpu_seconds(pid)) for name, pid in roots.items()}
        seconds = time.monotonic() - started
        if group.dead() or len(read_metrics(folder / "run")) != 2:
            raise ContenderError(f"something happened while nothing was to: see {folder}/*.log")
    return {name: cpu_s / seconds for name, cpu_s in used.items()}


def peak_memory_kb(process: psutil.Process) -> int:
    """The high-water mark of a process's resident memory; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next(
        (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0
    )


def cpu_seconds(pid: int) -> dict[int, float]:
    """The seconds on processors of a process and its descendants, by process."""
    root = psutil.Process(pid)
    spent_by = {}
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        spent_by[process.pid] = times.user + times.system
    return spent_by


def spent(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """The seconds between two readings, including those of processes that have come since.

    >>> spent({1: 2.0, 2: 5.0}, {1: 3.0, 3: 0.5})
    1.5
    """
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def _settings(num_silos: int, num_rounds: int, folder: Path) -> dict[str, Any]:
    settings = experiment(MEMORY_SIZE, num_rounds)
    settings["federation"]["min_silos"] = num_silos
    return {**settings, "run": {"directory": str(folder / "run")}}


def _variables(folder: Path) -> dict[str, str]:
    return {**environment(folder), **SETTINGS}


def _start_server(
    group: ProcessGroup,
    folder: Path,
    settings: Mapping[str, Any],
    stand_ins: Sequence[Path],
    num_answers: int,
) -> str:
    """Starts SuperLink, stand-ins and the run; returns the SuperLink's address."""
    variables = _variables(folder)
    address = start_superlink(group, folder, variables)
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.federation_standin", address]
    command += [*stand_ins, "--answers", str(num_answers)]
    group.start("stand-ins", command, variables, folder / "stand-ins.log")
    start_run(group, folder, variables, ROOT, settings)
    return address


def _server_apps(group: ProcessGroup) -> list[psutil.Process]:
    superlink = psutil.Process(group.processes["superlink"].pid)
    return [
        process for process in superlink.children(recursive=True) if SERVER_APP in _command(process)
    ]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _wait(is_done: Callable[[], bool], group: ProcessGroup, folder: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_done():
        ended = group.dead()
        if ended:
            raise ContenderError(f"{', '.join(ended)} ended too early: see {folder}/*.log")
        if time.monotonic() > deadline:
            raise ContenderError(f"was not done after {TIMEOUT_S:.0f} s: see {folder}/*.log")
        time.sleep(POLL_S)
