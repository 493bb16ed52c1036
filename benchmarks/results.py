"""The results of a benchmark: samples, goals and the machine's facts, as JSON and as tables."""

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rich.table import Table

from shared.run_record import installed_versions

# Contender, then model or case: figures.
Samples: TypeAlias = Mapping[str, Mapping[str, Sequence[float]]]
Medians: TypeAlias = dict[str, dict[str, float]]

CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Goal:
    """A figure and its bound. A figure that could not be measured is None, and its goal is not met.

    >>> Goal("vs_other", 1.25, bound=1.3).met
    False
    """

    name: str
    value: float | None
    bound: float
    comparison: Literal[">=", "<="] = ">="

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bound if self.comparison == ">=" else self.value <= self.bound

    @property
    def condition(self) -> str:
        return f"{self.comparison} {self.bound}"

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "goal": self.condition, "met": self.met}


def medians(samples: Samples) -> Medians:
    """The median of each non-empty list of figures."""
    return {
        contender: {case: statistics.median(figures) for case, figures in cases.items() if figures}
        for contender, cases in samples.items()
    }


def ratio(of: Medians, numerator: str, denominator: str, case: str) -> float | None:
    """One contender's median over another's; None if either was not measured."""
    above = of.get(numerator, {}).get(case)
    below = of.get(denominator, {}).get(case)
    return None if above is None or not below else above / below


def machine_facts(packages: Iterable[str]) -> dict[str, Any]:
    """The machine and its software, as the benchmark meets them.

    cores: those that this process may use. load: of this moment, the work of others, some of which
    the benchmark may suffer from.
    """
    cpu_info = CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.is_file() else ""
    one_minute_load, *_ = os.getloadavg()
    return {
        "cpu": cpu_name(cpu_info),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(one_minute_load, 2),
        "versions": installed_versions(packages),
    }


def cpu_name(cpu_info: str) -> str:
    """The processor's name from the text of /proc/cpuinfo, or else its architecture."""
    for line in cpu_info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def write_results(
    path: Path,
    machine: Mapping[str, Any],
    samples: Samples,
    goals: Sequence[Goal],
    failures: Mapping[str, str],
) -> None:
    """Writes {"machine", "samples", "goals", "failures"} as JSON.

    `failures` holds the reason of each contender that has no value.
    """
    results = {
        "machine": machine,
        "samples": samples,
        "goals": [goal.as_json() for goal in goals],
        "failures": failures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".partial")
    draft.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def medians_table(of: Medians, cases: Sequence[str], title: str) -> Table:
    """A row for each contender, a column for each case."""
    table = Table("contender", title=title)
    for case in cases:
        table.add_column(case, justify="right")
    for contender, figures in of.items():
        cells = [f"{figures[case]:,.0f}" if case in figures else "-" for case in cases]
        table.add_row(contender, *cells)
    return table


def goals_table(goals: Sequence[Goal], title: str = "Goals") -> Table:
    """A row for each goal: its figure, its bound, and whether it is met."""
    table = Table("name", title=title)
    for column in ("value", "goal", "met"):
        table.add_column(column, justify="right")
    for goal in goals:
        value = "not measured" if goal.value is None else f"{goal.value:.3f}"
        is_met = "[green]yes[/]" if goal.met else "[red]no[/]"
        table.add_row(goal.name, value, goal.condition, is_met)
    return table
