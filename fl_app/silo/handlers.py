"""The handlers of a silo: one for each kind of task, and the silo's own rules before all.

Knows nothing of Flower: the worker, the simulation and the tests call `handle`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fl_app.border import printable_line, understood
from fl_app.failures import MessageError
from fl_app.messages import (
    DESCRIBE,
    EVALUATE,
    INFORM,
    TRAIN,
    Answer,
    LocalResult,
    Task,
    TrainingRequest,
)
from fl_app.silo.policy import SiloSettings, check_task
from fl_app.silo.state_store import StateStore
from fl_app.silo.workbench import Bench
from shared.experiment import Experiment
from shared.metrics import describe
from shared.state import NO_STATE


@dataclass(frozen=True)
class Site:
    """One silo in one run: its own settings, the experiment, and where its tasks are computed."""

    settings: SiloSettings
    experiment: Experiment
    bench: Bench

    @property
    def states(self) -> StateStore:
        folder = self.settings.state_folder
        return StateStore(Path(folder) if folder else None)


Handler = Callable[[Task, Site], Answer]


def handle(task: Task, site: Site) -> Answer:
    """Does the task. Raises ValueError, whose text may quote data, or MessageError or SiloFailure,
    whose texts do not.
    """
    check_task(task, site.experiment, site.settings)
    if task.kind not in HANDLERS:
        raise MessageError(
            f"a task {task.kind!r}, where a task is one of {', '.join(HANDLERS)}. Install the same"
            " version of Archipelago on both sides"
        )
    return HANDLERS[task.kind](task, site)


def introduce(task: Task, site: Site) -> Answer:
    """The silo's name, schema and number of training examples."""
    return site.bench.load(site.settings, site.experiment).entry().to_answer()


def inform(task: Task, site: Site) -> Answer:
    """Tells the silo's owner what the coordinator has to say: why a run goes on without it."""
    with understood("a task 'inform'"):
        reason = printable_line(task.body["reason"])
    name = site.settings.name
    print(f"silo {name}: the coordinator leaves it out of this run: {reason}", flush=True)
    return Answer()


def train(task: Task, site: Site) -> Answer:
    """Trains from the task's weights and from the silo's own state; proposes the state after it."""
    acknowledged_round = TrainingRequest.from_task(task).acknowledged_round
    state = site.states.load(task.run, acknowledged_round)

    result, state = site.bench.run(task, site.settings, site.experiment, state)
    site.states.propose(task.run, task.round, state)
    _report(site, task, result)
    return result.to_answer()


def evaluate(task: Task, site: Site) -> Answer:
    """Evaluates the task's weights on the silo's validation examples."""
    result, _ = site.bench.run(task, site.settings, site.experiment, NO_STATE)
    return result.to_answer()


HANDLERS: Mapping[str, Handler] = {
    DESCRIBE: introduce,
    INFORM: inform,
    TRAIN: train,
    EVALUATE: evaluate,
}


def _report(site: Site, task: Task, result: LocalResult) -> None:
    metrics = describe({"train": result.train, "validation": result.validation})
    print(
        f"silo {site.settings.name}: round {task.round}: {metrics}, {result.num_examples} examples"
        f" in {result.seconds:.2f} s",
        flush=True,
    )
