"""Keeps a silo's SuperNode and its worker alive, and answers for a worker that died on a task."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_app.flower import node_tasks, supernode
from fl_app.flower.internals import missing_internals
from fl_app.flower.node_tasks import NodeTask, TaskWithdrawn, message_from_bytes
from fl_app.silo.settings import Cluster
from fl_app.silo.task_file import TaskFile
from shared.processes import (
    ProcessGroup,
    child_environment,
    direct_on_loopback,
    ending,
    free_ports,
    wait_until_listening,
)

BIN = Path(sys.executable).parent
NODE = "SuperNode"
WORKER = "worker"
START_TIMEOUT_S = 120.0
POLL_S = 0.2  # between polls of the processes
MAX_IDLE_DEATHS = 3  # of the worker in a row, without a task that would explain them
HEALTHY_S = 600.0  # after a life of so long, a worker's death is the first in a row
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


class SiloError(Exception):
    """The silo cannot take part any longer."""


@dataclass(frozen=True)
class Supervisor:
    """A silo's processes: a SuperNode and a worker.

    `supernode`: the arguments of flower-supernode but those about its own API and apps.
    """

    silo: str
    supernode: Sequence[str]
    scratch: Path
    cluster: Cluster
    stock_waits: bool = False  # leave the SuperNode's waits as Flower has them

    def run(self) -> None:
        """Runs the silo; never returns.

        Raises SiloError when the SuperNode ends, or the worker dies again and again for no task.
        """
        missing = missing_internals(node_tasks.INTERNALS)
        if missing and self.cluster.num_workers > 1:
            raise SiloError(
                f"this Flower has no {', '.join(missing)}: a silo can have one worker only"
            )
        if missing:
            _warn(
                f"this Flower has no {', '.join(missing)}: each task starts a process, which"
                " takes seconds"
            )

        (port,) = free_ports(1)
        with ProcessGroup() as group:
            if missing:
                status = self._start_node(group, port, isolation="subprocess").wait()
            else:
                node = self._start_node(group, port, isolation="process")
                status = self._attend(group, node, f"127.0.0.1:{port}")
        raise SiloError(
            f"the SuperNode of silo {self.silo} {ending(status)}. Its lines above say why; if"
            " not, the SuperLink was restarted, or turned it away because this machine's clock"
            " differs from the coordinator's."
        )

    def _attend(
        self, group: ProcessGroup, node: "subprocess.Popen[bytes]", runtime_api: str
    ) -> int:
        """Restarts the worker whenever it dies, until the SuperNode ends; returns its status."""
        file = TaskFile(self.scratch / "task.json")
        idle_deaths = 0
        worker = self._start_worker(group, runtime_api, file)
        started_s = time.monotonic()
        while node.poll() is None:
            if worker.poll() is None:
                time.sleep(POLL_S)
                continue

            # A task, or a long life, explains a death; some in a row without either do not stop.
            how = ending(worker.returncode)
            was_healthy = time.monotonic() - started_s > HEALTHY_S
            idle_deaths = 0 if file.read() or was_healthy else idle_deaths + 1
            if idle_deaths == MAX_IDLE_DEATHS:
                raise SiloError(
                    f"the worker of silo {self.silo} {how}, {idle_deaths} times in a row."
                )

            _warn(f"the worker of silo {self.silo} {how}; it is restarted")
            _fail_task(file, runtime_api, f"the silo's worker {how} while it did this task")
            worker = self._start_worker(group, runtime_api, file)
            started_s = time.monotonic()
        return node.returncode

    def _start_node(
        self, group: ProcessGroup, port: int, isolation: str
    ) -> "subprocess.Popen[bytes]":
        """Starts the SuperNode and waits for its runtime API on the port.

        `isolation`: Flower's word for who runs the tasks, the SuperNode ("subprocess") or a program
        beside it ("process").
        """
        missing = [] if self.stock_waits else missing_internals(supernode.INTERNALS)
        if missing:
            _warn(
                f"this Flower has no {', '.join(missing)}: its SuperNode polls for messages every"
                " 3 s only"
            )
        program: list[str | Path] = [sys.executable, "-m", "fl_app.flower.supernode"]
        if self.stock_waits or missing:
            program = [BIN / "flower-supernode"]
        command = [*program, *self.supernode, "--isolation", isolation, "--port", str(port)]

        node = group.start(NODE, command, _environment(), inherits_output=True)
        if not wait_until_listening(port, node, START_TIMEOUT_S):
            raise SiloError(
                f"the SuperNode of silo {self.silo} did not start. Its lines above say why."
            )
        print(
            f"silo {self.silo}: the SuperNode is running and calls the coordinator; Ctrl-C to leave"
            " the federation",
            flush=True,
        )
        return node

    def _start_worker(
        self, group: ProcessGroup, runtime_api: str, file: TaskFile
    ) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "fl_app.flower.worker", "--runtime-api", runtime_api]
        command += ["--task-file", str(file.path), *self.cluster.arguments()]
        return group.start(WORKER, command, _environment(), inherits_output=True)


def _fail_task(file: TaskFile, runtime_api: str, reason: str) -> None:
    """Answers the task that a dead worker left with an error, so that the server knows at once."""
    note = file.read()
    if note is None:
        return
    token, header = note
    task = NodeTask(runtime_api, token)
    try:
        message = message_from_bytes(header) if header else task.pull()[0]
        task.fail(message, reason)
    except TaskWithdrawn as error:
        _warn(f"its task needs no answer any more: {error}")
    finally:
        task.close()
        file.clear()


def _environment() -> dict[str, str]:
    """The variables of the silo's processes: Flower finds its own commands on the PATH, and no
    proxy stands between the worker and its node.
    """
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    return child_environment(**SETTINGS, **direct_on_loopback(), PATH=path)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
