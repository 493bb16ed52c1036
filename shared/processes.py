"""Child processes that end with us: on exit, on an error, on Ctrl-C or SIGTERM, and when we are killed outright."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Self

import psutil

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ENDING = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 5.0  # between asking and killing


class ProcessGroup:
    """Starts processes and, as a context manager, ends them with all their descendants.

    If this process is killed outright (SIGKILL), the kernel ends the children (Linux: PR_SET_PDEATHSIG).
    """

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: dict[str, Path] = {}

    def __enter__(self) -> Self:
        self._previous_handler = exit_on_sigterm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ignored = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
        try:
            self.stop()
        finally:
            signal.signal(signal.SIGINT, ignored[signal.SIGINT])
            signal.signal(signal.SIGTERM, self._previous_handler)

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        log: Path | None = None,
        inherits_output: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Starts a command in a session of its own; its output goes to the log, to where ours goes, or to a pipe.

        A name that has ended may be used again.
        """
        output: IO[bytes] | int | None = log.open("wb") if log else None if inherits_output else subprocess.PIPE
        # an interrupt amid a fork would be lost, as Python ignores exceptions of what it runs there, or lose the child
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if inherits_output else subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C reaches us alone: we end the others in order
                preexec_fn=_end_with_parent,
            )
            self.processes[name] = process
        finally:
            if output is not None and not isinstance(output, int):
                output.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        if log:
            self.logs[name] = log
        return process

    def dead(self) -> list[str]:
        """The names of the processes that have ended."""
        return [name for name, process in self.processes.items() if process.poll() is not None]

    def stop(self) -> None:
        """Asks all processes and their descendants to end, and kills those that have not after a grace period."""
        alive: list[psutil.Process] = []
        for process in self.processes.values():
            try:
                parent = psutil.Process(process.pid)
                alive += [parent, *parent.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        for each in alive:
            _signal(each, signal.SIGTERM)
        _, stubborn = psutil.wait_procs(alive, timeout=GRACE_S)
        for each in stubborn:
            _signal(each, signal.SIGKILL)
        psutil.wait_procs(stubborn, timeout=GRACE_S)
        for process in self.processes.values():
            process.wait()


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _end_with_parent() -> None:
    """In the child, before it becomes the command. SIGKILL: a child that is busy shutting down must not outlive us."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


_LIBC = ctypes.CDLL(None)  # this process's own libc; looked up here, as little as possible may happen after a fork


def exit_on_sigterm() -> Any:
    """From now on SIGTERM ends this process as an exception does, through every `finally`. Returns the old handler."""
    return signal.signal(signal.SIGTERM, _raise_exit)


def _raise_exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def free_ports(count: int) -> list[int]:
    """Ports on the loopback interface that were free a moment ago, all different."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def is_listening(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_listening(port: int, process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Waits until something listens on the port; False if the process ends or the time is up first."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        if is_listening(port):
            return True
        time.sleep(0.05)
    return False


def child_environment(**changes: str) -> dict[str, str]:
    """Our environment with changes, with bytecode caching on: some shells switch it off, which triples start-up."""
    environment = {**os.environ, **changes}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment
