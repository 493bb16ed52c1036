"""A silo that is a Horovod cluster: the bridge between the federation and the ranks.

The silo's worker holds a `ClusterWorkbench` in the place of a `Workbench`: tasks come in as ever, and the ranks of a
living `horovodrun` job do the training, data-parallel. This module is also what each rank runs.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dist_train.launch import (
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
from fl_app.local_training import LocalResult, Ranks, Silo, SiloFailure, Workbench, prepare_trainer
from fl_app.silo.settings import Cluster
from shared.data import Schema
from shared.experiment import Experiment
from shared.weights import Weights

MAX_RESTARTS = 3  # for one task


@dataclass(frozen=True)
class Work:
    """A task as the ranks get it; the weights go to the root alone."""

    node_config: dict[str, Any]
    schema: Schema
    experiment: Experiment
    round_number: int | None  # None: only judge the weights
    evaluate: bool


class ClusterWorkbench:
    """A `Workbench` whose tasks the ranks of a job do. A context manager: the job ends with it.

    If a rank is lost within a task, the job is started anew and the task done again from the same weights, which ends
    as if nothing had happened; with on_loss = "drop" the task fails, and only the next one has the new ranks. Raises
    SiloFailure with the reason where a task cannot be done, and ValueError where it is refused or fails by itself.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._job = RankJob(__spec__.name, cluster.num_workers, cluster.hosts)
        self._own = Workbench()  # for the roll call, which needs no ranks
        self._node_config: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._job.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._job.__exit__(kind, error, trace)

    def start(self) -> None:
        """Starts the ranks. Raises JobLost if they do not come."""
        self._job.start()
        print(f"the cluster is ready: {self._job}", flush=True)

    def mend(self) -> None:
        """Starts the ranks anew if one was lost while there was nothing to do."""
        try:
            self._job.check()
        except JobLost as error:
            self._restart(error)

    def silo(self, node_config: Mapping[str, Any], experiment: Experiment) -> Silo:
        self._node_config = dict(node_config)
        return self._own.silo(node_config, experiment)

    def evaluate(self, silo: Silo, schema: Schema, experiment: Experiment, weights: Weights) -> LocalResult:
        return self._do(Work(self._node_config, schema, experiment, None, evaluate=True), weights)

    def train(
        self, silo: Silo, schema: Schema, experiment: Experiment, weights: Weights, round_number: int, evaluate: bool
    ) -> LocalResult:
        return self._do(Work(self._node_config, schema, experiment, round_number, evaluate), weights)

    def _do(self, work: Work, weights: Weights) -> LocalResult:
        self.mend()  # what was lost before the task is not lost within it
        for restarts in range(MAX_RESTARTS + 1):
            try:
                result: LocalResult = self._job.call(work, weights)
                return result
            except JobLost as error:
                lost = error
                if self.cluster.on_loss == "drop" or restarts == MAX_RESTARTS:
                    break
                self._restart(error)
        raise SiloFailure(f"its cluster lost ranks while it did this task: {lost}") from None

    def _restart(self, lost: JobLost) -> None:
        print(f"warning: {lost}; the cluster is started anew", file=sys.stderr, flush=True)
        try:
            self._job.start()
        except JobLost as error:
            raise SiloFailure(f"its cluster cannot be started: {error}") from None
        print("the cluster is ready again", flush=True)


# --- in each rank


class RankWorkbench:
    """What a rank keeps warm from call to call."""

    def __init__(self) -> None:
        self._bench: Workbench | None = None
        self._digest = lru_cache(maxsize=2)(lambda silo: silo.train.sha256())

    def answer(self, communicator: Communicator, work: Work, weights: Weights | None) -> LocalResult | None:
        """All ranks together: the task's result on the root."""
        if self._bench is None:
            ranks = Ranks(communicator.rank, communicator.world_size, partial(_compile, communicator))
            self._bench = Workbench(partial(prepare_trainer, make_ranks=lambda: ranks))
        bench = self._bench
        silo = agree(communicator, lambda: bench.silo(work.node_config, work.experiment))
        check_same_examples(communicator, self._digest(silo))
        model = agree(communicator, lambda: bench.trainer(silo, work.schema, work.experiment)).model
        agree(communicator, lambda: None if weights is None else model.set_weights(weights))  # refuses other shapes
        weights = broadcast_unless_equal(communicator, model.get_weights())
        if work.round_number is None:
            result = bench.evaluate(silo, work.schema, work.experiment, weights)
        else:
            result = bench.train(silo, work.schema, work.experiment, weights, work.round_number, work.evaluate)
        return communicator.on_root(result, None)


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
