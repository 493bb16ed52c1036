"""The smallest method with state: each silo counts its rounds that the server has used."""

from dataclasses import replace

import numpy as np

from fl_app.messages import TRAIN, LocalResult, Task
from fl_app.silo.policy import SiloSettings
from fl_app.silo.workbench import Workbench
from shared.experiment import Experiment
from shared.state import State


class CountingWorkbench(Workbench):
    """Trains as ever, and reports as the metric `count` how often it did so, by its own state."""

    def run(
        self, task: Task, settings: SiloSettings, experiment: Experiment, state: State
    ) -> tuple[LocalResult, State]:
        result, _ = super().run(task, settings, experiment, {})
        if task.kind != TRAIN:
            return result, state
        count = state["count"][0] + 1 if state else np.array(1)
        metrics = {**result.train, "count": float(count)}
        return replace(result, train=metrics), {"count": [count]}
