"""Keeps a silo's SuperNode and its worker alive, and answers for a worker that died on a task."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_app.flower_internals import EXECUTOR, WAITS, Task, TaskWithdrawn, message_from_bytes, missing_internals
from fl_app.silo.settings import Cluster
from fl_app.silo.task_file import TaskFile
from shared.processes import ProcessGroup, child_environment, free_ports, wait_until_listening

BIN = Path(sys.executable).parent
NODE, WORKER = "SuperNode", "worker"
START_TIMEOUT_S = 120.0
LOOK_S = 0.2  # between looks at the processes
MAX_IDLE_DEATHS = 3  # of the worker in a row, without a task that would explain them
HEALTHY_S = 600.0  # a worker that has lived for so long starts the row anew
SETTINGS = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}


class SiloError(Exception):
    """The silo cannot take part any longer."""


@dataclass(frozen=True)
class Supervisor:
    """A silo's processes. `supernode`: the arguments of flower-supernode but those about its own API and apps."""

    silo: str
    supernode: Sequence[str]
    scratch: Path
    cluster: Cluster
    stock_waits: bool = False  # leave the SuperNode's waits as Flower has them

    def run(self) -> None:
        """Never returns. Raises SiloError when the SuperNode ends, or the worker dies again and again for no task."""
        (port,) = free_ports(1)
        with ProcessGroup() as group:
            missing = missing_internals(EXECUTOR)
            if missing and self.cluster.num_workers > 1:
                raise SiloError(f"this Flower has no {', '.join(missing)}: a silo can have one worker only")
            if missing:
                _warn(f"this Flower has no {', '.join(missing)}: each task starts a process, which takes seconds")
                node = self._start_node(group, port, "subprocess")
                code = node.wait()
            else:
                node = self._start_node(group, port, "process")
                code = self._attend(group, node, f"127.0.0.1:{port}")
        raise SiloError(
            f"the SuperNode of silo {self.silo} {_how_it_ended(code)}. Its lines above say why; if not, the SuperLink "
            "was started anew, or turned it away because this machine's clock differs from the coordinator's."
        )

    def _attend(self, group: ProcessGroup, node: "subprocess.Popen[bytes]", runtime_api: str) -> int:
        """Replaces the worker whenever it dies, until the SuperNode ends; returns how that ended."""
        file, idle_deaths = TaskFile(self.scratch / "task.json"), 0
        worker, born = self._start_worker(group, runtime_api, file), time.monotonic()
        while node.poll() is None:
            if worker.poll() is not None:
                ended = _how_it_ended(worker.returncode)
                idle_deaths = 0 if file.read() or time.monotonic() - born > HEALTHY_S else idle_deaths + 1
                if idle_deaths == MAX_IDLE_DEATHS:
                    raise SiloError(f"the worker of silo {self.silo} {ended}, {idle_deaths} times in a row.")
                _warn(f"the worker of silo {self.silo} {ended}; it is started anew")
                _answer_for_the_dead(file, runtime_api, f"the silo's worker {ended} while it did this task")
                worker, born = self._start_worker(group, runtime_api, file), time.monotonic()
            time.sleep(LOOK_S)
        return node.returncode

    def _start_node(self, group: ProcessGroup, port: int, isolation: str) -> "subprocess.Popen[bytes]":
        missing = [] if self.stock_waits else missing_internals(WAITS)
        if missing:
            _warn(f"this Flower has no {', '.join(missing)}: its SuperNode looks for messages every 3 s only")
        is_stock = self.stock_waits or bool(missing)
        program: list[str | Path] = (
            [BIN / "flower-supernode"] if is_stock else [sys.executable, "-m", "fl_app.silo.supernode"]
        )
        command = [*program, *self.supernode, "--isolation", isolation, "--port", str(port)]
        node = group.start(NODE, command, _environment(), inherits_output=True)
        if not wait_until_listening(port, node, START_TIMEOUT_S):
            raise SiloError(f"the SuperNode of silo {self.silo} did not start. Its lines above say why.")
        print(
            f"silo {self.silo}: the SuperNode is running and calls the coordinator; Ctrl-C to leave the federation",
            flush=True,
        )
        return node

    def _start_worker(self, group: ProcessGroup, runtime_api: str, file: TaskFile) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "fl_app.silo.worker", "--runtime-api", runtime_api]
        command += ["--task-file", str(file.path), *self.cluster.arguments()]
        return group.start(WORKER, command, _environment(), inherits_output=True)


def _answer_for_the_dead(file: TaskFile, runtime_api: str, reason: str) -> None:
    """Answers the task that a worker left behind with an error, so that the server knows at once."""
    left = file.read()
    if left is None:
        return
    token, message = left
    task = Task(runtime_api, token)
    try:
        task.fail(message_from_bytes(message) if message else task.pull()[0], reason)
    except TaskWithdrawn as error:
        _warn(f"its task needs no answer any more: {error}")
    finally:
        task.close()
        file.clear()


def _how_it_ended(code: int) -> str:
    """
    >>> _how_it_ended(-9), _how_it_ended(1)
    ('was ended by SIGKILL', 'ended with status 1')
    """
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _environment() -> dict[str, str]:
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")), "127.0.0.1"]))
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])  # where Flower looks for its own commands
    return child_environment(**SETTINGS, PATH=path, NO_PROXY=direct, no_proxy=direct)  # the worker's way to its node


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
