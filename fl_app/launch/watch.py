"""The watch over the processes that a run needs: `flwr run` alone would wait for them in vain."""

import subprocess
import threading
import time
from pathlib import Path

import psutil

from shared.processes import ProcessGroup, ending

POLL_S = 0.5
GRACE_S = 5.0  # for the run to end by itself: the last lines of its ServerApp are under way

# The commands that the SuperLink starts, and what users call them.
OWN_COMMANDS = {
    "flwr-serverapp": "the ServerApp",
    "flower-superexec": "the SuperLink's executor",
}


class Watch:
    """Watches from a thread, and ends the run when another process has ended.

    `run` is the run's name in the group; in the folder `pids` the commands that the SuperLink
    starts have noted their process ids, each under its name.
    """

    def __init__(self, group: ProcessGroup, run: str, pids: Path) -> None:
        self.group = group
        self.run = run
        self.pids = pids

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def ended_processes(self) -> dict[str, str]:
        """How each process of the group but the run has ended, by its name."""
        return {
            name: ending(self.group.processes[name].returncode)
            for name in self.group.dead()
            if name != self.run
        }

    def ended_commands(self) -> dict[str, str]:
        """The same of the processes that the SuperLink has started; only that they have ended."""
        return {
            title: "has ended"
            for command, title in OWN_COMMANDS.items()
            if (self.pids / command).is_file() and _has_ended(self.pids / command)
        }

    def _watch(self) -> None:
        while not self.group.dead() and not self.ended_commands():
            time.sleep(POLL_S)

        run = self.group.processes[self.run]
        try:
            run.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            run.terminate()


def _has_ended(note: Path) -> bool:
    """True if the process whose id is in the file has ended."""
    text = note.read_text()
    if not text.endswith("\n"):  # it is being written
        return False
    try:
        return psutil.Process(int(text)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
