"""make bench-federation: the seconds of a federated round, all contenders side by side in one run.

Contenders are interleaved, each with a whole short federation of silos on this machine; rounds are
timed, not start-up. All train the same model on the same data, and evaluate it at the silos. Of
ours alone: the server's memory, and the processor time of a federation that waits.
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from benchmarks.contest import ContenderError
from benchmarks.distributed import ROOT
from benchmarks.environments import read_pins
from benchmarks.federation_contenders import CONTENDERS, NVFLARE_PINS, Case, Federation, measure
from benchmarks.federation_footprint import idle_cpu, server_memory
from benchmarks.federation_workload import SIZES
from benchmarks.results import (
    Goal,
    Medians,
    Samples,
    goals_table,
    machine_facts,
    medians,
    ratio,
    write_results,
)

Turn: TypeAlias = tuple[str, Case]
Measurement: TypeAlias = Callable[[Path], Mapping[str, list[float]]]  # writes to the folder alone

OUTPUT = Path("runs/bench/federation.json")
PACKAGES = ("flwr", "tensorflow", "tensorflow-cpu", "keras", "numpy")
SILOS = {"20kB": (2, 4, 8), "5MB": (2, 4, 8), "100MB": (2,)}  # more of the largest take minutes
MAX_SILOS = 8  # for whom there is data

OURS = "ours"
GOAL_CASE = Case(2, "20kB")  # of all contenders; other cases are ours alone, unless asked for
# Goal: the contender that ours is compared with, and the largest ratio of seconds.
ROUND_GOALS = {
    "round_vs_stock_launcher": ("flower_stock", round(1 / 14, 4)),
    "round_vs_stock_supernode": ("ours_stock_waits", 0.25),
    "round_vs_nvflare": ("nvflare", 1.0),
}
SAMPLES_ONLY = ("nvflare_tuned",)  # measured once
DEFAULT_CONTENDERS = (OURS, *(other for other, _ in ROUND_GOALS.values()), *SAMPLES_ONLY)

MEMORY, FEW_REPLIES, MANY_REPLIES, MEMORY_BOUND = "server_memory_mb", 8, 64, 1.1
IDLE, IDLE_PARTS, IDLE_BOUND = "idle_cores", ("silo", "server"), 0.02
FOOTPRINTS = ("memory", "idle")


class Tally:
    """Figures by contender and case, and the reasons why some are missing."""

    def __init__(self, logs: Path, log: Callable[[str], None]) -> None:
        self.logs = logs
        self.log = log
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.failures: dict[str, str] = {}  # by contender and case, which has no further turns then

    def add(self, contender: str, case: str, measured: Measurement) -> None:
        """Adds the figures by case that a measurement returns, or the reason why there are none.

        It gets an empty folder, which stays, with its logs, only if it fails.
        """
        name = failure_name(contender, case)
        started = time.monotonic()
        if name in self.failures:
            return

        folder = self.logs / re.sub(r"\W+", "-", f"{contender} {case}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        cases = self.samples.setdefault(contender, {})
        try:
            figures_by_case = measured(folder)
        except ContenderError as error:
            self.failures[name] = str(error)
            self.log(f"{name} FAILED: {error}")
            return

        shutil.rmtree(folder, ignore_errors=True)
        seconds = time.monotonic() - started
        for measured_case, figures in figures_by_case.items():
            cases.setdefault(measured_case, []).extend(figures)
            text = ", ".join(f"{figure:.3g}" for figure in figures)
            self.log(f"{contender}, {measured_case}: {text} (after {seconds:.0f} s)")


def failure_name(contender: str, case: str) -> str:
    return f"{contender} ({case})"


def turns(
    contenders: Sequence[str], cases: Sequence[Case], repetitions: int, in_all_cases: bool
) -> list[Turn]:
    """The order of the federations to run.

    In the case of the goals all contenders are interleaved, beginning with another one each time;
    the other cases come after.
    """
    order = []
    for number in range(repetitions if GOAL_CASE in cases else 0):
        first = number % len(contenders)
        rotated = (*contenders[first:], *contenders[:first])
        order += [(name, GOAL_CASE) for name in rotated if number == 0 or name not in SAMPLES_ONLY]

    for case in cases:
        if case != GOAL_CASE:
            order += [(name, case) for name in contenders if name == OURS or in_all_cases]
    return order


def measure_rounds(tally: Tally, order: Sequence[Turn], num_rounds: int) -> None:
    """Adds the seconds of each round, for each turn."""

    def rounds(name: str, case: Case, folder: Path) -> dict[str, list[float]]:
        return {str(case): measure(CONTENDERS[name], Federation(case, num_rounds, folder))}

    for name, case in order:
        tally.add(name, str(case), partial(rounds, name, case))


def measure_footprints(tally: Tally, chosen: Sequence[str]) -> None:
    """Adds the footprints that are chosen.

    "memory": the server's peak memory in MB by number of replies. "idle": the cores that silo and
    server use while nothing happens.
    """

    def memory(number: int, folder: Path) -> dict[str, list[float]]:
        return {replies(number): [server_memory(number, folder)]}

    def idle(folder: Path) -> dict[str, list[float]]:
        return {part: [cores] for part, cores in idle_cpu(folder).items()}

    if "memory" in chosen:
        for number in (FEW_REPLIES, MANY_REPLIES):
            tally.add(MEMORY, replies(number), partial(memory, number))
    if "idle" in chosen:
        tally.add(IDLE, "a round", idle)


def replies(number: int) -> str:
    return f"{number} replies"


def make_goals(samples: Samples, failures: Mapping[str, str]) -> list[Goal]:
    """The goals of all that was measured. Those of a contender that failed have no value."""
    measured = medians(_without_failures(samples, failures))

    # Seconds of a round against those of the others.
    goals = []
    for name, (other, bound) in ROUND_GOALS.items():
        if OURS in samples and other in samples:
            value = ratio(measured, OURS, other, str(GOAL_CASE))
            goals.append(Goal(name, value, bound, "<="))

    # The footprints of ours.
    if MEMORY in samples:
        few = measured[MEMORY].get(replies(FEW_REPLIES))
        many = measured[MEMORY].get(replies(MANY_REPLIES))
        growth = many / few if few and many else None
        goals.append(Goal("server_memory_ratio", growth, MEMORY_BOUND, "<="))
    if IDLE in samples:
        for part in IDLE_PARTS:
            goals.append(Goal(f"idle_cpu_{part}", measured[IDLE].get(part), IDLE_BOUND, "<="))
    return goals


def _without_failures(samples: Samples, failures: Mapping[str, str]) -> Samples:
    """The samples of the cases that did not fail."""
    return {
        contender: {
            case: figures
            for case, figures in cases.items()
            if failure_name(contender, case) not in failures
        }
        for contender, cases in samples.items()
    }


def figures_table(of: Medians) -> Table:
    """A row for each contender and case."""
    table = Table("contender", "case", title="Medians: seconds per round; MB; cores")
    table.add_column("median", justify="right")
    for contender, cases in of.items():
        for case, figure in cases.items():
            table.add_row(contender, case, f"{figure:.3g}")
    return table


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federation", description=__doc__)
    contenders = [*DEFAULT_CONTENDERS]
    parser.add_argument("--silos", nargs="+", type=int, help=f"default: by size, {SILOS}")
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="of the model (default: all)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="of a federation, after the first (default: 3)"
    )
    parser.add_argument("--repetitions", type=int, default=3, help=f"of {GOAL_CASE} (default: 3)")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=contenders,
        help=f"default: {' '.join(contenders)}",
    )
    parser.add_argument(
        "--all-cases",
        action="store_true",
        help=f"all contenders in all cases, not only {GOAL_CASE}",
    )
    parser.add_argument(
        "--footprints", nargs="*", choices=FOOTPRINTS, default=[*FOOTPRINTS], help="default: all"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=OUTPUT, help=f"the JSON file (default: {OUTPUT})"
    )
    options = parser.parse_args(arguments)
    for name in ("rounds", "repetitions"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1; received {getattr(options, name)}")
    if any(not 1 <= number <= MAX_SILOS for number in options.silos or ()):
        parser.error(f"--silos must be from 1 to {MAX_SILOS}; received {options.silos}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    machine = machine_facts(PACKAGES)
    pins = ROOT / "requirements" / NVFLARE_PINS
    machine["versions"]["nvflare"] = read_pins(pins.read_text(encoding="utf-8"))["nvflare"]
    logs = (options.output.parent / f"{options.output.stem}-logs").resolve()
    cases = [Case(silos, size) for size in options.sizes for silos in options.silos or SILOS[size]]
    tally = Tally(logs, partial(print, flush=True))
    order = turns(options.contenders, cases, options.repetitions, options.all_cases)
    measure_rounds(tally, order, options.rounds)
    measure_footprints(tally, options.footprints)
    goals = make_goals(tally.samples, tally.failures)
    write_results(options.output, machine, tally.samples, goals, tally.failures)

    console = Console()
    if not console.is_terminal:
        console.width = 100  # a log file cuts nothing off
    console.print(figures_table(medians(tally.samples)))
    if goals:
        console.print(goals_table(goals))
    for name, reason in tally.failures.items():
        console.print(f"{name} was not measured: {reason}", style="red", markup=False)
    console.print(f"All samples: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
