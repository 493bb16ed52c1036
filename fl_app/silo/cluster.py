"""A silo that is a Horovod cluster: the bridge between the federation and the ranks.

The silo's worker holds a `ClusterWorkbench` in the place of a `Workbench`: tasks come in as ever,
and the ranks of a living `horovodrun` job do the training, data-parallel. This module is also what
each rank runs.
"""

import os
import sys
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dist_train.job import (
    Communicator,
    JobLost,
    RankJob,
    agree,
    broadcast_unless_equal,
    check_same_examples,
    compile_for_ranks,
    prepare_rank,
    serve,
)
from fl_app.failures import SiloFailure
from fl_app.messages import LocalResult, Task, TrainingRequest
from fl_app.silo.data import check_schema
from fl_app.silo.policy import SiloSettings
from fl_app.silo.settings import Cluster
from fl_app.silo.training import LocalTrainer, Ranks
from fl_app.silo.workbench import KeptSilos, Workbench
from shared.experiment import Experiment
from shared.state import NO_STATE, State
from shared.weights import Weights

MAX_RESTARTS = 3  # for one task


@dataclass(frozen=True)
class Work:
    """A task as all ranks get it: without its arrays, which go to the root alone."""

    task: Task
    settings: SiloSettings
    experiment: Experiment
    has_state: bool


@dataclass(frozen=True)
class RootWork:
    """The part of a task that goes to the root, which broadcasts it."""

    weights: Weights
    state: State


class ClusterWorkbench:
    """A `Bench` whose tasks the ranks of a job do. A context manager: the job ends with it.

    If a rank is lost within a task, the job is restarted and the task done again from the same
    weights and state, which ends as if nothing had happened; with on_loss = "drop" the task fails,
    and only the next one has the new ranks. Raises SiloFailure with the reason where a task cannot
    be done, and ValueError where it is refused or fails by itself.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.load = KeptSilos()  # for the roll call, which needs no ranks
        self._job = RankJob(__spec__.name, cluster.num_workers, cluster.hosts)

    def __enter__(self) -> Self:
        self._job.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._job.__exit__(kind, error, trace)

    def start(self) -> None:
        """Starts the ranks. Raises JobLost if they do not come."""
        self._job.start()
        print(f"the cluster is ready: {self._job}", flush=True)

    def restart_if_lost(self) -> None:
        """Restarts the ranks if one was lost while there was nothing to do."""
        try:
            self._job.check()
        except JobLost as error:
            self._restart(error)

    def run(
        self, task: Task, settings: SiloSettings, experiment: Experiment, state: State
    ) -> tuple[LocalResult, State]:
        # What the owner's rules forbid, or is no message for this silo, does not reach the ranks.
        schema = TrainingRequest.from_task(task).schema
        check_schema(schema, self.load(settings, experiment).schema)

        work = Work(replace(task, arrays=()), settings, experiment, has_state=bool(state))
        for_root = RootWork(list(task.arrays), state)

        self.restart_if_lost()  # a rank lost before the task is not lost within it
        for restarts in range(MAX_RESTARTS + 1):
            try:
                answer: tuple[LocalResult, State] = self._job.call(work, for_root)
                return answer
            except JobLost as error:
                lost = error
                if self.cluster.on_loss == "drop" or restarts == MAX_RESTARTS:
                    break
                self._restart(error)
        raise SiloFailure(f"its cluster lost ranks while it did this task: {lost}") from None

    def _restart(self, lost: JobLost) -> None:
        print(f"warning: {lost}; the cluster is restarted", file=sys.stderr, flush=True)
        try:
            self._job.start()
        except JobLost as error:
            raise SiloFailure(f"its cluster cannot be started: {error}") from None
        print("the cluster is ready again", flush=True)


# --- in each rank


class RankWorkbench:
    """The bench of one rank, kept from call to call."""

    def __init__(self) -> None:
        self._bench: Workbench | None = None
        self._digest = lru_cache(maxsize=2)(lambda silo: silo.train.sha256())

    def answer(
        self, communicator: Communicator, work: Work, for_root: RootWork | None
    ) -> tuple[LocalResult, State] | None:
        """Does a task, all ranks together; returns the result and the new state on the root."""
        bench = self._bench_of(communicator)
        silo = agree(communicator, lambda: bench.load(work.settings, work.experiment))
        check_same_examples(communicator, self._digest(silo))

        # All ranks compile the same model; the root's weights, refused if of other shapes, and its
        # state become those of all.
        schema = TrainingRequest.from_task(work.task).schema
        trainer, _ = agree(
            communicator, lambda: bench.prepare(schema, work.settings, work.experiment)
        )
        model = trainer.model
        agree(communicator, lambda: _set_weights(trainer, for_root.weights) if for_root else None)
        weights = broadcast_unless_equal(communicator, model.get_weights())
        state = for_root.state if for_root else NO_STATE
        if work.has_state:
            state = communicator.broadcast_object(state)

        task = replace(work.task, arrays=weights)
        answer = bench.run(task, work.settings, work.experiment, state)
        return communicator.on_root(answer, None)

    def _bench_of(self, communicator: Communicator) -> Workbench:
        if self._bench is None:
            compile_here = partial(_compile, communicator)
            self._bench = Workbench(Ranks(communicator.rank, communicator.world_size, compile_here))
        return self._bench


def _set_weights(trainer: LocalTrainer, weights: Weights) -> None:
    trainer.check_weights(weights)
    trainer.model.set_weights(weights)


def _compile(communicator: Communicator, *arguments: Any) -> None:
    compile_for_ranks(*arguments, communicator)


def main() -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, str(Path.cwd()))  # the user's own models
    try:
        prepare_rank()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    import shared.training  # noqa: F401  (now, not in the first round)

    serve(RankWorkbench().answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
