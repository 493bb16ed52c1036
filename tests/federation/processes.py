"""Real federations for the tests: launched, watched, and cleaned up by a mark in their
environment.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import keras
import psutil

from shared.experiment import Experiment
from shared.weights import Weights
from tests.parallel.launching import ROOT, environment

MARK = "ARCHIPELAGO_TEST"
QUICK = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}  # s, instead of 1, for each app that starts


def toml_file(folder: Path, e: Experiment) -> Path:
    path = folder / "experiment.toml"
    path.write_text(e.to_toml())
    return path


def final_weights(run: Path) -> Weights:
    return keras.models.load_model(run / "model.keras").get_weights()


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def our_processes(mark: str, *words: str) -> list[psutil.Process]:
    """All processes that were started with the mark in their environment, and the words in their
    command.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and set(words) <= set(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def is_living(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def living(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if is_living(process)]


def all_gone(processes: Sequence[psutil.Process], within_s: float) -> bool:
    return wait_for(lambda: not living(processes), within_s)


def wait_for(condition: Callable[[], object], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def start(mark: str, module: str, *arguments: object) -> subprocess.Popen:
    """Starts `python -m MODULE ARGUMENTS...` as on a terminal, wherever the tests run."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**{MARK: mark, **QUICK}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@contextmanager
def cleaned_up(mark: str) -> Iterator[None]:
    """Ends whatever of the mark's processes is left behind."""
    try:
        yield
    finally:
        for process in our_processes(mark):
            process.kill()


# Not `communicate`: it does not see what reading a line has put into the stream's buffer.
def finished(process: subprocess.Popen, timeout_s: float = 240) -> str:
    """What the process still prints until it ends; one that takes longer is killed, and told."""
    with _killed_after(process, timeout_s) as killed:
        output = process.stdout.read()
        process.wait()
    assert not killed.is_set(), f"it did not end within {timeout_s} s:\n{output}"
    return output


def lines_until(process: subprocess.Popen, text: str, timeout_s: float = 240) -> str:
    """What the process prints up to the line with this text."""
    lines: list[str] = []
    with _killed_after(process, timeout_s):
        for line in process.stdout:
            lines.append(line)
            if text in line:
                return "".join(lines)
    raise AssertionError(f"{text!r} was never printed:\n{''.join(lines)}")


@contextmanager
def _killed_after(process: subprocess.Popen, timeout_s: float) -> Iterator[threading.Event]:
    """Kills the process if the block takes longer, and sets the event."""
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        process.kill()

    timer = threading.Timer(timeout_s, kill)
    timer.start()
    try:
        yield killed
    finally:
        timer.cancel()
