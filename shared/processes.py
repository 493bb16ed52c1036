"""Child processes that end with this one, however it ends.

On exit, on an error, on Ctrl-C or SIGTERM, and when it is killed outright. Ports on the loopback
interface, which the children talk through.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

import psutil

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ENDING = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 5.0  # between SIGTERM and SIGKILL

# This process's own libc. Loaded here, because as little as possible may happen after a fork.
LIBC = ctypes.CDLL(None)


class ProcessGroup:
    """Starts processes and, as a context manager, ends them with all their descendants.

    If this process is killed outright (SIGKILL), the kernel ends the children (Linux:
    PR_SET_PDEATHSIG). `processes` and `logs` are by the names that they were started with.
    """

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: dict[str, Path] = {}

    def __enter__(self) -> Self:
        self._previous_handler = exit_on_sigterm()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A second Ctrl-C must not interrupt the ending of the others.
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self.stop()
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
            signal.signal(signal.SIGTERM, self._previous_handler)

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        log: Path | None = None,
        inherits_output: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Starts a command in a session of its own.

        Its output goes to `log`; without one to where this process's goes (`inherits_output`), or
        to a pipe. The name of a process that has ended may be used again.
        """
        output: IO[bytes] | int | None
        if log:
            output = log.open("wb")
        elif inherits_output:
            output = None
        else:
            output = subprocess.PIPE

        # An interrupt amid a fork would be lost, as Python ignores exceptions of what it runs
        # there, or lose the child.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if inherits_output else subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
                preexec_fn=partial(_end_with_parent, mask),
            )
            self.processes[name] = process
        finally:
            if output is not None and not isinstance(output, int):
                output.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        if log:
            self.logs[name] = log
        return process

    def dead(self) -> list[str]:
        """The names of the processes that have ended."""
        return [name for name, process in self.processes.items() if process.poll() is not None]

    def stop(self) -> None:
        """Ends all processes and their descendants: SIGTERM, and SIGKILL after a grace period."""
        alive: list[psutil.Process] = []
        for started in self.processes.values():
            try:
                parent = psutil.Process(started.pid)
                alive += [parent, *parent.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue

        for process in alive:
            _signal(process, signal.SIGTERM)
        _, stubborn = psutil.wait_procs(alive, timeout=GRACE_S)

        for process in stubborn:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(stubborn, timeout=GRACE_S)

        # Reaps the children themselves.
        for started in self.processes.values():
            started.wait()


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _end_with_parent(mask: set[int | signal.Signals]) -> None:
    """Runs in the child before it becomes the command: the kernel shall kill it with its parent.

    The child blocks the signals of the mask, its parent's, as every child does.

    SIGKILL, because a child that is busy shutting down must not outlive the parent either.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def exit_on_sigterm() -> Any:
    """Makes SIGTERM end this process as an exception does, through every `finally`.

    Returns the handler that there was.
    """
    return signal.signal(signal.SIGTERM, _raise_exit)


def _raise_exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def free_ports(count: int) -> list[int]:
    """Ports on the loopback interface that were free a moment ago, all different."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]
    finally:
        for bound in sockets:
            bound.close()


def is_listening(port: int) -> bool:
    """Returns True if a process accepts connections on this port of the loopback interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_listening(port: int, process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Waits until something listens on the port.

    Returns False if the process ends or the time is up first.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        if is_listening(port):
            return True
        time.sleep(0.05)
    return False


def child_environment(**changes: str) -> dict[str, str]:
    """Returns this process's environment with changes.

    Bytecode is cached: some shells switch that off, which triples start-up.
    """
    environment = {**os.environ, **changes}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def direct_on_loopback() -> dict[str, str]:
    """The variables by which no proxy stands between processes of this machine."""
    no_proxy = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    direct = ",".join(filter(None, [no_proxy, "127.0.0.1", "localhost"]))
    return {"NO_PROXY": direct, "no_proxy": direct}


def ending(status: int) -> str:
    """How a process with this exit status has ended.

    >>> ending(-9), ending(1)
    ('was ended by SIGKILL', 'ended with status 1')
    """
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
