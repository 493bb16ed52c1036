"""make demo: the digits CNN trained three ways on the same data, then a table and a report page.

In one process, on two Horovod ranks, and in a real federation of three silos whose classes are
unevenly spread.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shared.processes import ProcessGroup, child_environment
from shared.report import terminal_table, write_report

EXPERIMENT = "experiments/digits_cnn.toml"
FOLDER = Path("runs/demo")
BIN = Path(sys.executable).parent

RUNTIMES: dict[str, tuple[str, list[str]]] = {
    "one_process": ("in one process", [str(BIN / "python"), "-m", "dist_train"]),
    "horovod": (
        "on two Horovod ranks",
        [str(BIN / "horovodrun"), "--gloo", "-np", "2", str(BIN / "python"), "-m", "dist_train"],
    ),
    "federation": (
        "in a federation of three silos with uneven classes",
        [str(BIN / "python"), "-m", "fl_app.launch", "--silos", "3"],
    ),
}


def main() -> int:
    console = Console()
    if not console.is_terminal:
        console.width = 100  # a log file cuts nothing off
    shutil.rmtree(FOLDER, ignore_errors=True)

    # One run after the other; the first that fails ends the demo.
    for number, (name, (where, command)) in enumerate(RUNTIMES.items(), start=1):
        console.rule(f"{number}/{len(RUNTIMES)}: {EXPERIMENT} {where}")
        status = _run([*command, EXPERIMENT, "--run-dir", str(FOLDER / name)])
        if status != 0:
            console.print(
                f"error: the run {where} ended with status {status}; its lines above say why",
                style="red",
            )
            return 1

    runs = [FOLDER / name for name in RUNTIMES]
    page = FOLDER / "report.html"
    write_report(runs, page)
    console.print(terminal_table(runs))
    console.print(f"The same runs side by side, with their curves: {page}")
    return 0


def _run(command: Sequence[str]) -> int:
    """Runs a command to its end and prints its lines; it ends with this process."""
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    environment = child_environment(PATH=path, TF_CPP_MIN_LOG_LEVEL="3")
    started = time.monotonic()
    with ProcessGroup() as group:
        process = group.start(command[0], command, environment)
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            if not any(noise in text for noise in NOISE):
                print(text, flush=True)
        status = process.wait()
    print(f"({time.monotonic() - started:.0f} s)", flush=True)
    return status


# Notices that TensorFlow writes to stderr before any setting can reach it.
NOISE = (
    "cpu_feature_guard",
    "absl::InitializeLog",
    "To enable the following instructions",
    "Memory patch applied",
)


if __name__ == "__main__":
    sys.exit(main())
