"""make bench-distributed: the throughput of data-parallel training, all contenders side by side in one run.

Two ranks with a core each train the same four models on the same batches; each round starts every contender in turn, so
that whatever else the machine does meets them all. The goals are ratios of the medians over all rounds.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

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
from shared.processes import ProcessGroup, child_environment, free_ports
from tools import bootstrap

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
OUTPUT = Path("runs/bench/distributed.json")
TORCH_ENVIRONMENT = ".venv-torch"
TORCH_PINS = "benchmark.txt"
PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy", "horovod")
TIMEOUT_S = 300.0  # of one contender in one round, which takes 20 to 90 s

OURS = "dist_train"
CONTENDERS = (OURS, "bare_horovod", "mwms", "torch_ddp", "one_process")
# Goal: the contender that ours is compared with, and the least ratio of throughputs by model.
GOALS = {
    "vs_ddp": ("torch_ddp", {"mlp": 1.0, "cnn": 1.3, "transformer": 1.0, "dense": 1.3}),
    "vs_mwms": ("mwms", {"mlp": 1.3, "cnn": 1.15, "transformer": 1.1, "dense": 1.9}),
    "vs_bare_horovod": ("bare_horovod", {"mlp": 1.0, "cnn": 1.0, "transformer": 1.0, "dense": 1.0}),
}
# Settings of the shell that would speed up or slow down some contenders and not others.
UNWANTED = re.compile(r"(HOROVOD|OMPI|PMI|TF|XLA|OMP|KMP|MKL|OPENBLAS|GLOO|TORCH|KERAS)_.*|LOCAL_RANK|RANK|WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """One process of a contender: its command, and the variables it needs besides the common ones."""

    command: Sequence[str | Path]
    variables: Mapping[str, str]


class ContenderError(Exception):
    """Why a contender could not be measured, in a sentence."""


def launches(contender: str, models: Sequence[str], output: Path, launcher: str) -> list[Launch]:
    """The processes to start for a contender; its first rank writes the samples to `output`."""
    arguments = ["--models", *models, "-o", str(output)]
    worker: list[str | Path] = [BIN / "python", "-m", "benchmarks.distributed_worker", contender, *arguments]
    if contender == "one_process":
        return [Launch(worker, {})]
    if contender == "torch_ddp":
        command: list[str | Path] = [torch_python(), "-m", "benchmarks.distributed_torch", *arguments]
        return [Launch(command, variables) for variables in torch_variables()]
    if contender == "mwms":
        return [Launch(worker, variables) for variables in mwms_variables()]
    return [Launch([BIN / "horovodrun", launcher, "-np", str(NUM_RANKS), *worker], {})]


def mwms_variables() -> list[dict[str, str]]:
    """By rank: the cluster as MultiWorkerMirroredStrategy reads it."""
    workers = [f"127.0.0.1:{port}" for port in free_ports(NUM_RANKS)]
    cluster = {"worker": workers}
    configs = [{"cluster": cluster, "task": {"type": "worker", "index": i}} for i in range(NUM_RANKS)]
    return [{"TF_CONFIG": json.dumps(config), "LOCAL_RANK": str(i)} for i, config in enumerate(configs)]


def torch_variables() -> list[dict[str, str]]:
    """By rank: what torchrun would set."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": str(NUM_RANKS)}
    common["GLOO_SOCKET_IFNAME"] = "lo"  # else Gloo looks up the host's name, which may have no address
    return [{**common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(NUM_RANKS)]


def torch_python() -> Path:
    """The interpreter of the environment with the pinned PyTorch, which is made if it is not there."""
    setup = bootstrap.Setup(ROOT, ROOT / TORCH_ENVIRONMENT, mpi=False, gpu=False)
    pins = read_pins(setup.requirements(TORCH_PINS).read_text(encoding="utf-8"))
    if not has_packages(setup.python, pins):
        try:
            bootstrap.make_venv(setup)
            remedy = f"pip could not install {', '.join(pins)}: check network and disk space"
            bootstrap.run_pip(setup, remedy, "install", "--no-compile", "-r", setup.requirements(TORCH_PINS))
        except (bootstrap.SetupError, OSError) as error:
            raise ContenderError(str(error)) from error
    return setup.python


def read_pins(requirements: str) -> dict[str, str]:
    """The versions by package in the text of a requirement file.

    >>> read_pins("torch==2.0.1  # why")
    {'torch': '2.0.1'}
    """
    return dict(re.findall(r"(?m)^([\w.-]+)==([^\s;#]+)", requirements))


def has_packages(python: Path, pins: Mapping[str, str]) -> bool:
    """Whether the interpreter runs and has those versions; a local part, as in 2.0.1+cpu, does not count."""
    program = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    try:
        done = subprocess.run([python, "-I", "-c", program, *pins], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return [found.partition("+")[0] for found in done.stdout.split()] == list(pins.values())


def horovod_launcher(wants_mpi: bool) -> str:
    """The option that tells horovodrun how ranks find each other; MPI only if Horovod was built with it."""
    if not wants_mpi:
        return "--gloo"
    program = "import sys, horovod.tensorflow as hvd; sys.exit(not hvd.mpi_built())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    if done.returncode != 0:
        print("Horovod was built without MPI (make setup MPI=1 builds it): its ranks use Gloo", flush=True)
    return "--gloo" if done.returncode else "--mpi"


def run_contender(contender: str, models: Sequence[str], folder: Path, launcher: str) -> dict[str, list[float]]:
    """Runs a contender's processes to their end: samples per second by model. Raises ContenderError."""
    output, log = folder / f"{contender}.json", folder / f"{contender}.log"
    output.unlink(missing_ok=True)
    with ProcessGroup() as group:
        for rank, launch in enumerate(launches(contender, models, output, launcher)):
            group.start(f"rank {rank}", launch.command, environment(launch.variables), log.with_suffix(f".{rank}.log"))
        reason = wait(group)
    if reason is None and not output.is_file():
        reason = "wrote no samples"
    if reason is not None:
        raise ContenderError(f"{reason}: see {log.with_suffix('.*.log')}")
    return dict(json.loads(output.read_text(encoding="utf-8")))


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The common environment of all contenders' processes, and the variables of this one."""
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    common = child_environment(PATH=path, PYTHONPATH=str(ROOT))
    common = {name: value for name, value in common.items() if not UNWANTED.fullmatch(name)}
    return {**common, "TF_CPP_MIN_LOG_LEVEL": "2", **variables}


def wait(group: ProcessGroup, timeout_s: float = TIMEOUT_S) -> str | None:
    """Waits until all processes have ended well; otherwise the reason, as soon as there is one."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        statuses = {name: process.poll() for name, process in group.processes.items()}
        for name, status in statuses.items():
            if status:
                return f"{name} ended with status {status}"
        if all(status == 0 for status in statuses.values()):
            return None
        time.sleep(0.2)
    return f"did not end within {timeout_s:.0f} s"


def run_rounds(
    rounds: int, contenders: Sequence[str], models: Sequence[str], folder: Path, launcher: str
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """The samples by contender and model, and why contenders failed. One that failed is not started again."""
    samples: dict[str, dict[str, list[float]]] = {name: {model: [] for model in models} for name in contenders}
    failures: dict[str, str] = {}
    for number in range(rounds):
        first = number % len(contenders)  # no contender is always the one that follows the same other
        for name in (*contenders[first:], *contenders[:first]):
            if name in failures:
                continue
            started = time.monotonic()
            try:
                found = run_contender(name, models, folder, launcher)
                for model, figures in found.items():
                    samples[name][model] += figures
                news = "  ".join(f"{m} {figure:,.0f}" for m, figure in medians({name: found})[name].items())
            except ContenderError as error:
                failures[name] = str(error)
                news = f"FAILED: {error}"
            print(f"round {number + 1}/{rounds}  {name:12} {time.monotonic() - started:4.0f} s  {news}", flush=True)
    return samples, failures


def make_goals(samples: Samples, failures: Mapping[str, str], models: Sequence[str]) -> list[Goal]:
    """The goals of the contenders and models that were asked for. Those of a contender that failed have no value."""
    whole = medians({name: found for name, found in samples.items() if name not in failures})
    return [
        Goal(f"{name}_{model}", ratio(whole, OURS, other, model), bound)
        for name, (other, bounds) in GOALS.items()
        for model, bound in bounds.items()
        if model in models and OURS in samples and other in samples
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender is measured (default: 5)")
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=[*WORKLOADS], help="default: all")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], help="default: all")
    parser.add_argument("--mpi", action="store_true", help="start Horovod's ranks with MPI, if it was built with it")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, help=f"the JSON file (default: {OUTPUT})")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1; received {options.rounds}")
    if len(os.sched_getaffinity(0)) < NUM_RANKS:
        parser.error(f"each of the {NUM_RANKS} ranks needs a core of its own; received {len(os.sched_getaffinity(0))}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    machine = machine_facts(PACKAGES)
    torch_pins = ROOT / "requirements" / TORCH_PINS
    machine["versions"]["torch"] = read_pins(torch_pins.read_text(encoding="utf-8"))["torch"]
    folder = options.output.parent / f"{options.output.stem}-logs"
    folder.mkdir(parents=True, exist_ok=True)
    launcher = horovod_launcher(options.mpi)
    samples, failures = run_rounds(options.rounds, options.contenders, options.models, folder, launcher)
    goals = make_goals(samples, failures, options.models)
    write_results(options.output, machine, samples, goals, failures)
    console = Console()
    if not console.is_terminal:
        console.width = 100  # a log file cuts nothing off
    console.print(medians_table(medians(samples), options.models, f"Samples/s of {NUM_RANKS} ranks, medians"))
    if goals:
        console.print(goals_table(goals))
    for name, reason in failures.items():
        console.print(f"{name} was not measured: {reason}", style="red", markup=False)
    console.print(f"All samples: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
