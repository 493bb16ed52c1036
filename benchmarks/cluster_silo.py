"""make bench-cluster-silo: the cost and the gain of a silo that is a cluster of two workers.

Workers have one core each. Whole federations of one silo are interleaved: with one worker, which is
one process without Horovod, and with two. Rounds are timed, from the record of the server, not
start-up; the first round is not counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import tomli_w
from rich.console import Console
from rich.table import Table

from benchmarks.contest import ContenderError
from benchmarks.federation_contenders import environment, experiment, launch_command
from benchmarks.federation_footprint import cpu_seconds, spent
from benchmarks.federation_workload import EXAMPLES_PER_SILO, write_silos
from benchmarks.results import Goal, Samples, goals_table, machine_facts, medians, write_results
from benchmarks.workloads import WORKLOADS, examples, keras_model
from fl_app.messages import TRAIN, Task, TrainingRequest
from fl_app.silo.cluster import ClusterWorkbench
from fl_app.silo.policy import SiloSettings
from fl_app.silo.settings import Cluster
from shared.data import load_dataset
from shared.experiment import load_experiment
from shared.processes import ProcessGroup
from shared.run_record import read_metrics
from shared.state import NO_STATE

if TYPE_CHECKING:
    import keras

    from shared.data import Schema

OUTPUT = Path("runs/bench/cluster-silo.json")
PACKAGES = ("flwr", "horovod", "tensorflow", "keras", "numpy")
ONE, TWO = "1 worker", "2 workers"
TINY, TEXTS, IDLE = "mlp of 20 kB", "transformer", "idle"
EPOCH_BOUND, OVERHEAD_BOUND_S, IDLE_BOUND = 0.6, 0.3, 0.02
TIMEOUT_S = 300.0
IDLE_S = 20.0
# An epoch of 128 steps, some 10 s: the rest of a round's time is `cluster_round_overhead_s`.
NUM_TEXTS = 4096


def transformer(schema: Schema) -> keras.Model:
    """The model of `make bench-distributed`."""
    return keras_model(WORKLOADS[TEXTS])


def round_seconds(case: str, num_workers: int, num_rounds: int, folder: Path) -> list[float]:
    """Seconds of each round but the first of a federation of one silo.

    With one worker the whole federation has one core.
    """
    settings, data = {TINY: _tiny, TEXTS: _texts}[case](num_rounds + 1, folder)
    command = launch_command(settings, folder, "worker")
    command += ["--silo", f"one={data}", "--num-workers", str(num_workers)]
    if case == TEXTS and num_workers == 1:
        command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command]
    with ProcessGroup() as group:
        launched = group.start("launch", command, environment(folder), folder / "launch.log")
        deadline = time.monotonic() + TIMEOUT_S
        while launched.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
    marks = [row["seconds"] for row in read_metrics(folder / "run") if "cohort" in row]
    if launched.returncode != 0 or len(marks) != num_rounds + 1:
        raise ContenderError(
            f"{len(marks)} of {num_rounds + 1} rounds were done: see {folder}/launch.log"
        )
    return [after - before for before, after in pairwise(marks)]


def idle_cpu_per_rank(folder: Path) -> float:
    """The cores that a rank uses between tasks, after it has done one."""
    from shared.zoo import build_model  # Keras: here, not while others are timed

    settings, data = _tiny(1, folder)
    path = folder / "experiment.toml"
    path.write_text(tomli_w.dumps(settings), encoding="utf-8")
    experiment = load_experiment(path)
    schema = load_dataset(experiment.data.model_copy(update={"name": str(data)})).schema
    weights = build_model(experiment.model, schema, experiment.seed).get_weights()
    with ClusterWorkbench(Cluster(num_workers=2)) as bench:
        bench.start()
        body = TrainingRequest(schema, evaluate=True).to_body()
        task = Task(TRAIN, round=1, body=body, arrays=weights)
        bench.run(task, SiloSettings("one", str(data)), experiment, NO_STATE)
        ranks = [
            p for p in psutil.Process().children(recursive=True) if "HOROVOD_RANK" in p.environ()
        ]
        own = [p.pid for p in ranks if p.cmdline()[1:] == ["-m", "fl_app.silo.cluster"]]
        before = {pid: cpu_seconds(pid) for pid in own}
        time.sleep(IDLE_S)
        return max(spent(before[pid], cpu_seconds(pid)) for pid in own) / IDLE_S


def make_goals(samples: Samples) -> list[Goal]:
    found = medians(samples)
    one, two = found.get(ONE, {}), found.get(TWO, {})
    both = [case for case in (TINY, TEXTS) if case in one and case in two]
    epoch = two[TEXTS] / one[TEXTS] if TEXTS in both else None
    overhead = two[TINY] - one[TINY] if TINY in both else None
    return [
        Goal("two_workers_epoch_ratio", epoch, EPOCH_BOUND, "<="),
        Goal("cluster_round_overhead_s", overhead, OVERHEAD_BOUND_S, "<="),
        Goal("idle_cpu_per_rank", two.get(IDLE), IDLE_BOUND, "<="),
    ]


def _tiny(num_rounds: int, folder: Path) -> tuple[dict[str, Any], Path]:
    (data,) = write_silos(folder / "data", 1, EXAMPLES_PER_SILO)
    return experiment("20kB", num_rounds), data


def _texts(num_rounds: int, folder: Path) -> tuple[dict[str, Any], Path]:
    workload = WORKLOADS[TEXTS]
    x, y = examples(workload, NUM_TEXTS, rank=0)
    data = folder / "texts.npz"
    np.savez(data, x=x.astype(np.float32), y=y, num_classes=10)
    settings = experiment("20kB", num_rounds)
    settings["model"] = {"name": "benchmarks.cluster_silo:transformer"}
    settings["data"]["validation_fraction"] = 0.0
    settings["federation"] |= {
        "local_batch_size": workload.global_batch_size,
        "evaluate_on_silos": False,
    }
    return settings, data


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster_silo", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, help="of a federation, after the first (default: 3)"
    )
    parser.add_argument(
        "--repetitions", type=int, default=3, help="federations of each kind (default: 3)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=OUTPUT, help=f"the JSON file (default: {OUTPUT})"
    )
    options = parser.parse_args(arguments)
    if min(options.rounds, options.repetitions) < 1 or len(os.sched_getaffinity(0)) < 2:
        parser.error("needs --rounds and --repetitions of 1 or more, and two cores")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    logs = (options.output.parent / f"{options.output.stem}-logs").resolve()
    shutil.rmtree(logs, ignore_errors=True)
    samples: dict[str, dict[str, list[float]]] = {ONE: {}, TWO: {}}
    tell = partial(print, flush=True)
    for number in range(options.repetitions):
        for case in (TINY, TEXTS):
            for name, num_workers in ((ONE, 1), (TWO, 2))[:: 1 if number % 2 == 0 else -1]:
                folder = logs / f"{number}-{num_workers}-{case.split()[0]}"
                folder.mkdir(parents=True)
                found = round_seconds(case, num_workers, options.rounds, folder)
                samples[name].setdefault(case, []).extend(found)
                tell(f"{name}, {case}: " + ", ".join(f"{seconds:.3g}" for seconds in found))
    (logs / "idle").mkdir(parents=True)
    samples[TWO][IDLE] = [idle_cpu_per_rank(logs / "idle")]
    goals = make_goals(samples)
    write_results(options.output, machine_facts(PACKAGES), samples, goals, {})
    console = Console()
    table = Table("silo", "case", "median", title="Seconds per round; cores per rank")
    for name, cases in medians(samples).items():
        for case, figure in cases.items():
            table.add_row(name, case, f"{figure:.3g}")
    console.print(table)
    console.print(goals_table(goals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
