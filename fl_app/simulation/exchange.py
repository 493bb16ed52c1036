"""An exchange within one process: tasks are done by function calls, one after the other."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping

from fl_app.exchange import Roster, Traffic
from fl_app.failures import Failure, SiloFailure
from fl_app.messages import Answer, Reply, SiloEntry, Task
from fl_app.silo.data import Silo
from fl_app.silo.handlers import Site, handle
from fl_app.silo.policy import SiloSettings
from fl_app.silo.workbench import Workbench
from shared.experiment import Experiment
from shared.weights import num_bytes

Responder = Callable[[str, Task], Answer | Failure]  # (silo, task) -> its reply


class InProcessExchange:
    """Implements `Exchange`: each task is answered by `respond` when its reply is asked for.

    Replies come in the order of the tasks.
    """

    def __init__(self, entries: Iterable[SiloEntry], respond: Responder) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._respond = respond
        self._tasks: deque[tuple[str, Task]] = deque()
        self.traffic = Traffic()

    def silos(self) -> Roster:
        return Roster(self._entries)

    def post(self, tasks: Mapping[str, Task], timeout_s: float) -> None:
        for silo, task in tasks.items():
            self._tasks.append((silo, task))
            self._count(num_bytes(task.arrays))

    def next(self, timeout_s: float) -> Reply | None:
        if not self._tasks:
            return None
        silo, task = self._tasks.popleft()
        reply = self._respond(silo, task)
        if isinstance(reply, Answer):
            self._count(num_bytes(reply.arrays))
        return silo, reply

    def withdraw(self) -> None:
        self._tasks.clear()

    def _count(self, sent_bytes: int) -> None:
        self.traffic = Traffic(self.traffic.num_bytes + sent_bytes, self.traffic.seconds)


def exchange_of_silos(
    experiment: Experiment, silos: Iterable[Silo], state_folder: str = ""
) -> InProcessExchange:
    """An exchange with silos that really train, in this process, on the examples they are given.

    All share one workbench, which compiles the experiment's model once. `state_folder` is where
    methods with state keep it, a folder for each silo.
    """
    by_name = {silo.name: silo for silo in silos}
    bench = Workbench(load=lambda settings, _: by_name[settings.name], num_kept=len(by_name))

    def respond(name: str, task: Task) -> Answer | Failure:
        folder = f"{state_folder}/{name}" if state_folder else ""
        settings = SiloSettings(name, source="", state_folder=folder, allowed_builders=allowed)
        try:
            return handle(task, Site(settings, experiment, bench))
        except (ValueError, SiloFailure) as error:
            return Failure(str(error))

    allowed = (experiment.model.name,)  # the user is the silos' owner here
    return InProcessExchange([silo.entry() for silo in by_name.values()], respond)
