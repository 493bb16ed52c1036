"""make bench-scaling: the cost of ranks as the model grows: seconds per step, memory, start-up.

A step of a model with almost no computation is timed on one process and on two ranks of a core
each; the difference is the cost of reducing its gradients. Peak memory is that of each process
after 20 steps of a dense model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.results import Goal, machine_facts, write_results
from shared.processes import ProcessGroup, child_environment

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
OUTPUT = Path("runs/bench/distributed_scaling.json")
PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "horovod")
# (tensors, parameters): one of both grows at a time.
SIZES = [(10, 1_000_000), (100, 1_000_000), (300, 1_000_000), (1000, 1_000_000)]
SIZES += [(20, 100_000), (20, 1_000_000), (20, 10_000_000), (20, 50_000_000)]
DENSE_UNITS = 2048  # a hidden layer of the model whose memory is measured
NUM_STEPS = 20
TIMEOUT_S = 900.0
FUSION_BUFFER_BYTES = 128 * 2**20  # Horovod's default


def run_processes(num_ranks: int, *arguments: str) -> tuple[str, float]:
    """Runs a task on ranks, or in one process; returns the root's output, and the seconds.

    Raises RuntimeError with the end of the log.
    """
    with tempfile.TemporaryDirectory() as name, ProcessGroup() as group:
        output = Path(name) / "out.json"
        log = Path(name) / "log"
        command: list[str | Path] = []
        if num_ranks > 1:
            command += [BIN / "horovodrun", "--gloo", "-np", str(num_ranks)]
        command += [BIN / "python", "-m", "benchmarks.distributed_scaling", "--worker", output]
        command += arguments

        path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
        environment = child_environment(PATH=path, PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL="2")
        started = time.monotonic()
        process = group.start("ranks", command, environment, log)
        if process.wait(timeout=TIMEOUT_S) != 0:
            text = log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"{num_ranks} ranks failed:\n{text[-2000:]}")
        return output.read_text(encoding="utf-8"), time.monotonic() - started


def work(task: str, output: Path) -> None:
    """Does the task, in a rank or alone, and writes its result."""
    import dist_train.keras_horovod as hvk

    communicator = hvk.init(threads_per_rank=1)
    if task == "start":
        result: object = communicator.world_size
    elif task == "memory":
        step_seconds(communicator, dense_model())
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result = communicator.all_gather_object(peak_bytes)
    else:
        result = [step_seconds(communicator, many_tensors(*size)) for size in SIZES]
    if communicator.is_root:
        output.write_text(json.dumps(result), encoding="utf-8")


def many_tensors(num_tensors: int, num_parameters: int):  # type: ignore[no-untyped-def]
    """A model of equal tensors that computes next to nothing: the mean of their squares."""
    import keras

    class Tensors(keras.Model):
        def build(self, input_shape: object) -> None:
            shape = (num_parameters // num_tensors,)
            self.tensors = [
                self.add_weight(shape=shape, initializer="ones") for _ in range(num_tensors)
            ]

        def call(self, x):  # type: ignore[no-untyped-def]
            squares = sum(keras.ops.mean(keras.ops.square(tensor)) for tensor in self.tensors)
            return x + squares / num_tensors

    return Tensors()


def dense_model():  # type: ignore[no-untyped-def]
    import keras

    hidden = [keras.layers.Dense(DENSE_UNITS, activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((784,)), *hidden, keras.layers.Dense(1)])


def step_seconds(communicator, model) -> float:  # type: ignore[no-untyped-def]
    """The median time of a step of `fit` with plain SGD; the first epoch warms up."""
    import keras
    import numpy as np

    import dist_train.keras_horovod as hvk

    width = 784 if isinstance(model, keras.Sequential) else 1
    model.compile(
        keras.optimizers.SGD(1e-3), "mse", steps_per_execution=NUM_STEPS // 2, jit_compile=False
    )
    hvk.distribute(model, communicator)

    # Callbacks run once per half an epoch, after NUM_STEPS // 2 steps.
    x = np.ones((NUM_STEPS, width), np.float32)
    ends: list[float] = []
    timer = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
    )
    model.fit(x, x[:, :1], batch_size=1, epochs=5, verbose=0, shuffle=False, callbacks=[timer])
    keras.backend.clear_session()
    return median(ends[i + 1] - ends[i] for i in range(2, len(ends) - 1, 2)) / (NUM_STEPS // 2)


def memory_goal(one: float, ranks: Sequence[float]) -> Goal:
    """The worst rank's peak memory, without the fusion buffer, against that of one process."""
    return Goal("memory_per_rank", (max(ranks) - FUSION_BUFFER_BYTES) / one, 1.3, "<=")


def table_of_steps(alone: Sequence[float], ranks: Sequence[float]) -> Table:
    table = Table(
        "tensors",
        "parameters",
        "one process",
        "two ranks",
        "difference",
        title="Milliseconds per step",
    )
    for (tensors, parameters), one, two in zip(SIZES, alone, ranks, strict=True):
        cells = [f"{1000 * value:.2f}" for value in (one, two, two - one)]
        table.add_row(f"{tensors}", f"{parameters:,}", *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--task", choices=("start", "memory", "steps"), default="steps", help=argparse.SUPPRESS
    )
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.task, options.worker)
        return 0
    samples: dict[str, dict[str, list[float]]] = {}
    for name, num_ranks in (("one_process", 1), ("two_ranks", 2)):
        starts = [run_processes(num_ranks, "--task", "start")[1] for _ in range(3)]
        memory = json.loads(run_processes(num_ranks, "--task", "memory")[0])
        steps = json.loads(run_processes(num_ranks, "--task", "steps")[0])
        samples[name] = {"start_s": starts, "peak_bytes": memory, "step_s": steps}
        print(f"{name}: start {median(starts):.1f} s, peak {max(memory) / 1e6:.0f} MB", flush=True)
    one, two = samples["one_process"], samples["two_ranks"]
    Console().print(table_of_steps(one["step_s"], two["step_s"]))
    goal = memory_goal(one["peak_bytes"][0], two["peak_bytes"])
    print(f"{goal.name} {goal.value:.2f} (goal {goal.condition})")
    write_results(options.output, machine_facts(PACKAGES), samples, [goal], {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
