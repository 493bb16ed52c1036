"""Starts real ranks for the tests: a script of this folder, or a command, under `horovodrun`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def environment(**changes: str) -> dict[str, str]:
    ours = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    ours["PATH"] = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    ours |= {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # containers have only root
    ours.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**ours, **changes}


def run_ranks(
    num_ranks: int,
    *command: object,
    cwd: Path = ROOT,
    timeout_s: float = 300.0,
    launcher: str = "--gloo",
) -> subprocess.CompletedProcess[str]:
    """Runs `python COMMAND...` on so many ranks; one rank is a plain process, without Horovod."""
    horovodrun = [str(BIN / "horovodrun"), launcher, "-np", str(num_ranks)] if num_ranks > 1 else []
    return subprocess.run(
        [*horovodrun, sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(),
        timeout=timeout_s,
        capture_output=True,
        text=True,
        check=False,
    )
