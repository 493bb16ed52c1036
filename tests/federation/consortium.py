"""A SuperLink and living silos, as a consortium runs them, for the tests."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fl_app.launch import partition_data
from fl_app.server.rounds import run_federation
from shared.experiment import Experiment, experiment_from_flat
from shared.processes import ProcessGroup, free_ports, wait_until_listening
from shared.run_record import RunRecord
from tests.federation.processes import MARK, QUICK, our_processes, toml_file, wait_for
from tests.local_exchange import exchange_of_files
from tests.parallel.launching import BIN, ROOT, environment

# What the silos' data is cut by: unevenly, so that a mean without weights would show.
UNEVEN_WINE = {
    "name": "consortium",
    "seed": 3,
    "data.name": "wine",
    "model.name": "mlp",
    "model.options": "units = [8]",
    "partition.kind": "dirichlet",
    "partition.dirichlet_alpha": 1.0,
    "federation.num_rounds": 2,
    "federation.min_silos": 2,
    "federation.local_batch_size": 16,
    "federation.evaluate_on_server": False,
}
PLAIN: tuple[str, ...] = ()
CLUSTER = ("--num-workers", "2")


def experiment(run: Path, **changes: object) -> Experiment:
    return experiment_from_flat({**UNEVEN_WINE, "run.directory": str(run), **changes})


@dataclass
class Consortium:
    """A SuperLink, and the living silos that are connected to it.

    `data` holds the shares of silo-0 and silo-1; a silo of another name has all of wine.
    """

    folder: Path
    group: ProcessGroup
    port: int
    data: dict[str, str]
    options: dict[str, Sequence[str]] = field(default_factory=dict)  # each silo's, when it started

    @property
    def mark(self) -> str:
        return str(self.folder)

    def environment(self, **changes: str) -> dict[str, str]:
        return environment(FLWR_HOME=str(self.folder), **{MARK: self.mark}, **QUICK, **changes)

    # --- silos

    def gather(self, silos: Mapping[str, Sequence[str]]) -> None:
        """Has exactly these silos take part, {name: options}: ends others, starts those missing."""
        lost = {name for name in self.options if not self.is_running(name)}
        for name in set(self.options) - lost:
            if self.options[name] != silos.get(name):
                self.end_silo(name)

        missing = [name for name in silos if not self.is_running(name)]
        for name in missing:
            self.start_silo(name, self.data.get(name, "wine"), *silos[name])

        for name in missing:
            self.wait_until_ready(name)
        if lost:  # the SuperLink counts on a silo that was killed until it misses its heartbeats
            self.options = dict(silos)
            assert wait_for(lambda: self.num_online() == len(silos), 60)

    def start_silo(self, name: str, data: str, *options: str, **changes: str) -> Path:
        """Starts a silo and returns its log. `changes`: of its environment."""
        command = [sys.executable, "-m", "fl_app.silo", "--insecure"]
        command += ["--superlink", f"127.0.0.1:{self.port}", "--silo", name, "--data", data]
        command += ["--min-examples", "1"]
        self.options[name] = options
        self.group.start(name, [*command, *options], self.environment(**changes), self.log(name))
        return self.log(name)

    def wait_until_ready(self, name: str) -> None:
        log = self.log(name)
        assert wait_for(lambda: "the worker is ready" in log.read_text(), 120), log.read_text()

    def num_online(self) -> int:
        """How many silos the SuperLink takes for connected."""
        command = [BIN / "flwr", "supernode", "list", "here"]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True)
        return done.stdout.count("online")

    def end_silo(self, name: str) -> None:
        del self.options[name]
        self.group.processes[name].terminate()
        self.group.processes[name].wait()

    @contextmanager
    def guests(self, *names: str) -> Iterator[None]:
        """Waits until these silos, which were started, are ready; ends them afterwards."""
        try:
            for name in names:
                self.wait_until_ready(name)
            yield
        finally:
            for name in names:
                self.end_silo(name)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def is_running(self, name: str) -> bool:
        return name in self.group.processes and self.group.processes[name].poll() is None

    def processes_of(self, name: str, *words: str) -> list[psutil.Process]:
        """The silo's processes and their descendants that have these words in their command."""
        silo = psutil.Process(self.group.processes[name].pid)
        marked = our_processes(self.mark, *words)
        return [process for process in [silo, *silo.children(recursive=True)] if process in marked]

    def worker(self, name: str) -> int:
        """The process id of a silo's worker."""
        (worker,) = self.processes_of(name, "fl_app.flower.worker")
        return worker.pid

    # --- runs

    def start_run(self, e: Experiment) -> subprocess.Popen:
        path = toml_file(Path(e.run_directory).parent, e)
        command = [BIN / "flwr", "run", ROOT, "here", "--stream", "--run-config", path]
        return subprocess.Popen(
            command,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run_here(self, e: Experiment) -> None:
        """Runs the experiment with the same silos in this process, each in one process, without
        Flower.
        """
        run_federation(e, exchange_of_files(e, self.data), RunRecord(e, "flower", "round"))


@contextmanager
def a_consortium(folder: Path) -> Iterator[Consortium]:
    """Without silos yet."""
    (port,) = free_ports(1)
    (folder / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    data = partition_data(experiment(folder / "unused"), 2, folder)
    with ProcessGroup() as group:
        ours = Consortium(folder, group, port, data)
        command = [
            BIN / "flower-superlink",
            "--insecure",
            "--disable-runtime-dependency-installation",
        ]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        superlink = group.start("superlink", command, ours.environment(), folder / "superlink.log")
        assert wait_until_listening(port, superlink, 60)
        yield ours
    for process in our_processes(ours.mark):
        process.kill()


def wait_for_task(worker: int) -> Path:
    """Waits until a worker has a training task in hand, and returns its note of it."""
    command = psutil.Process(worker).cmdline()
    note = Path(command[command.index("--task-file") + 1])
    assert wait_for(lambda: _is_training(note), 120)
    return note


def _is_training(note: Path) -> bool:
    try:
        return b"train".hex() in note.read_text()  # the type of its message
    except FileNotFoundError:
        return False
