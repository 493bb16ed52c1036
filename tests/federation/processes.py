"""Real federations for the tests: launched, watched, and cleaned up by a mark in their environment."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import psutil

from shared.experiment import Experiment
from shared.weights import Weights
from tests.parallel.launching import ROOT, environment

MARK = "ARCHIPELAGO_TEST"


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
    """All processes that were started with the mark in their environment, and the words in their command."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and set(words) <= set(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


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
        env=environment(**{MARK: mark}),
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
