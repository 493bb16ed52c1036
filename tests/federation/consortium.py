"""A SuperLink and living silos, as a consortium runs them, for the tests."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from shared.experiment import Experiment
from shared.processes import ProcessGroup, free_ports, wait_until_listening
from tests.federation.processes import MARK, our_processes, toml_file, wait_for
from tests.parallel.launching import BIN, ROOT, environment


@dataclass
class Consortium:
    """A SuperLink, and the living silos that are connected to it."""

    folder: Path
    group: ProcessGroup
    port: int
    data: dict[str, str] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        return str(self.folder)

    def environment(self, **changes: str) -> dict[str, str]:
        return environment(
            FLWR_HOME=str(self.folder), FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.2", **{MARK: self.mark}, **changes
        )

    def start_silo(self, name: str, data: str, *options: str, **changes: str) -> Path:
        """Starts a silo and waits until its worker is ready; returns its log."""
        command = [sys.executable, "-m", "fl_app.silo", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        log = self.folder / f"{name}.log"
        self.group.start(name, [*command, "--silo", name, "--data", data, *options], self.environment(**changes), log)
        assert wait_for(lambda: "the worker is ready" in log.read_text(), 120), log.read_text()
        return log

    @contextmanager
    def another_silo(self, name: str, data: str, *options: str, **changes: str) -> Iterator[Path]:
        """One that leaves the federation at the end."""
        log = self.start_silo(name, data, *options, **changes)
        try:
            yield log
        finally:
            self.group.processes[name].terminate()
            self.group.processes[name].wait()

    def start_run(self, e: Experiment) -> subprocess.Popen:
        path = toml_file(Path(e.run_directory).parent, e)
        command = [BIN / "flwr", "run", ROOT, "here", "--stream", "--run-config", path]
        return subprocess.Popen(
            command, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def worker(self, name: str) -> int:
        """The process id of a silo's worker: a grandchild of ours."""
        silo = self.group.processes[name].pid
        (worker,) = [p for p in our_processes(self.mark, "fl_app.silo.worker") if p.ppid() == silo]
        return worker.pid


@contextmanager
def a_consortium(folder: Path) -> Iterator[Consortium]:
    """Without silos yet."""
    (port,) = free_ports(1)
    (folder / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    with ProcessGroup() as group:
        ours = Consortium(folder, group, port)
        command = [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--disable-runtime-dependency-installation"]
        superlink = group.start("superlink", command, ours.environment(), folder / "superlink.log")
        assert wait_until_listening(port, superlink, 60)
        yield ours
    for process in our_processes(ours.mark):
        process.kill()


def finished(run: subprocess.Popen, timeout_s: float = 240) -> str:
    output, _ = run.communicate(timeout=timeout_s)
    return output


def lines_until(process: subprocess.Popen, text: str) -> str:
    """What the process prints up to the line with this text."""
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} was never printed:\n{''.join(lines)}")


def wait_for_task(worker: int) -> Path:
    """Waits until a worker has a task in hand, and returns its note of it."""
    command = psutil.Process(worker).cmdline()
    file = Path(command[command.index("--task-file") + 1])
    assert wait_for(lambda: file.exists() and '"message": "' in file.read_text() and len(file.read_text()) > 120, 120)
    return file
