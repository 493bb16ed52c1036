"""make bench-distributed: the throughput of data-parallel training, contenders side by side.

Two ranks with a core each train the same four models on the same batches. All contenders are
started at once and interleaved in turns of a few seconds, so that whatever else the machine does
meets them all. The goals are ratios of medians.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.contest import Launch, run_contest
from benchmarks.environments import pinned_python, read_pins
from benchmarks.results import (
    Goal,
    Samples,
    goals_table,
    machine_facts,
    medians,
    medians_table,
    ratio,
    write_results,
)
from benchmarks.workloads import NUM_RANKS, WORKLOADS
from shared.processes import child_environment, free_ports

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
OUTPUT = Path("runs/bench/distributed.json")
TORCH_ENVIRONMENT = ".venv-torch"
TORCH_PINS = "benchmark.txt"
PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy", "horovod")

BETWEEN_TURNS_S = 900  # at most

OURS = "dist_train"
CONTENDERS = (OURS, "bare_horovod", "mwms", "torch_ddp", "one_process")
UNSTOPPABLE = ("mwms",)  # its ranks count as dead after 10 s without a heartbeat
# Goal: the contender that ours is compared with, and the least ratio of throughputs by model.
GOALS = {
    "vs_ddp": ("torch_ddp", {"mlp": 1.0, "cnn": 1.3, "transformer": 1.0, "dense": 1.3}),
    "vs_mwms": ("mwms", {"mlp": 1.3, "cnn": 1.15, "transformer": 1.1, "dense": 1.9}),
    "vs_bare_horovod": ("bare_horovod", {"mlp": 1.0, "cnn": 1.0, "transformer": 1.0, "dense": 1.0}),
}
# Settings of the shell that would speed up or slow down some contenders and not others.
UNWANTED = re.compile(
    r"(HOROVOD|OMPI|PMI|TF|XLA|OMP|KMP|MKL|OPENBLAS|GLOO|TORCH|KERAS)_.*|LOCAL_RANK|RANK|WORLD_SIZE"
)


def launches(
    contender: str, models: Sequence[str], num_slices: int, launcher: str, folder: Path
) -> list[Launch]:
    """The processes to start for a contender, whose root reports to `folder`."""
    arguments = ["--models", *models, "--slices", str(num_slices), "--turns", str(folder)]
    worker: list[str | Path] = [BIN / "python", "-m", "benchmarks.distributed_worker", contender]
    worker += arguments
    if contender == "one_process":
        return [Launch(worker, environment({}))]
    if contender == "mwms":
        return [Launch(worker, environment(variables)) for variables in mwms_variables()]
    if contender == "torch_ddp":
        python = pinned_python(TORCH_ENVIRONMENT, TORCH_PINS)
        command: list[str | Path] = [python, "-m", "benchmarks.distributed_torch", *arguments]
        return [Launch(command, environment(variables)) for variables in torch_variables()]

    # Under Horovod a rank that is stopped for the others' turns has not vanished.
    horovodrun: list[str | Path] = [BIN / "horovodrun", launcher, "-np", str(NUM_RANKS)]
    horovodrun += ["--gloo-timeout-seconds", str(BETWEEN_TURNS_S)]
    return [Launch([*horovodrun, *worker], environment({}))]


def mwms_variables() -> list[dict[str, str]]:
    """The cluster by rank, as MultiWorkerMirroredStrategy reads it."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(NUM_RANKS)]}
    variables = []
    for rank in range(NUM_RANKS):
        config = {"cluster": cluster, "task": {"type": "worker", "index": rank}}
        variables.append({"TF_CONFIG": json.dumps(config), "LOCAL_RANK": str(rank)})
    return variables


def torch_variables() -> list[dict[str, str]]:
    """The variables by rank that torchrun would set."""
    (port,) = free_ports(1)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(NUM_RANKS),
        # else Gloo looks up the host's name, which may have no address
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [{**common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(NUM_RANKS)]


def horovod_launcher(wants_mpi: bool) -> str:
    """The option for horovodrun by which ranks find each other.

    MPI only if Horovod was built with it.
    """
    if not wants_mpi:
        return "--gloo"
    program = "import sys, horovod.tensorflow as hvd; sys.exit(not hvd.mpi_built())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    if done.returncode != 0:
        print(
            "Horovod was built without MPI (make setup MPI=1 builds it): its ranks use Gloo",
            flush=True,
        )
    return "--gloo" if done.returncode else "--mpi"


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The common environment of all contenders' processes, and the variables of this one."""
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    common = child_environment(PATH=path, PYTHONPATH=str(ROOT))
    common = {name: value for name, value in common.items() if not UNWANTED.fullmatch(name)}
    return {**common, "TF_CPP_MIN_LOG_LEVEL": "2", **variables}


def make_goals(samples: Samples, failures: Mapping[str, str], models: Sequence[str]) -> list[Goal]:
    """The goals of the contenders and models that were asked for.

    Those of a contender that failed have no value.
    """
    measured = medians({name: cases for name, cases in samples.items() if name not in failures})
    return [
        Goal(f"{name}_{model}", ratio(measured, OURS, other, model), bound)
        for name, (other, bounds) in GOALS.items()
        for model, bound in bounds.items()
        if model in models and OURS in samples and other in samples
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument(
        "--slices", type=int, default=20, help="turns of each contender and model (default: 20)"
    )
    parser.add_argument(
        "--models", nargs="+", choices=WORKLOADS, default=[*WORKLOADS], help="default: all"
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], help="default: all"
    )
    parser.add_argument(
        "--mpi", action="store_true", help="start Horovod's ranks with MPI, if it was built with it"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=OUTPUT, help=f"the JSON file (default: {OUTPUT})"
    )
    options = parser.parse_args(arguments)
    if options.slices < 1:
        parser.error(f"--slices must be at least 1; received {options.slices}")
    if len(os.sched_getaffinity(0)) < NUM_RANKS:
        parser.error(
            f"each of the {NUM_RANKS} ranks needs a core of its own; received"
            f" {len(os.sched_getaffinity(0))}"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)

    # The facts first: the load of the machine counts before the benchmark begins.
    machine = machine_facts(PACKAGES)
    torch_pins = ROOT / "requirements" / TORCH_PINS
    machine["versions"]["torch"] = read_pins(torch_pins.read_text(encoding="utf-8"))["torch"]

    folder = options.output.parent / f"{options.output.stem}-logs"
    launcher = horovod_launcher(options.mpi)
    processes = {
        name: partial(launches, name, options.models, options.slices, launcher)
        for name in options.contenders
    }
    log = partial(print, flush=True)
    contest = run_contest(processes, options.models, options.slices, folder, log, UNSTOPPABLE)
    samples = contest.samples
    goals = make_goals(samples, contest.failures, options.models)
    write_results(options.output, machine, samples, goals, contest.failures)

    console = Console()
    if not console.is_terminal:
        console.width = 100  # a log file cuts nothing off
    console.print(
        medians_table(medians(samples), options.models, f"Samples/s of {NUM_RANKS} ranks, medians")
    )
    if goals:
        console.print(goals_table(goals))
    for name, reason in contest.failures.items():
        console.print(f"{name} was not measured: {reason}", style="red", markup=False)
    console.print(f"All samples: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
