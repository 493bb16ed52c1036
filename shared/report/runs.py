"""Run directories as values, and how their numbers are written."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.experiment import Scalar, load_experiment
from shared.run_record import read_metrics, read_result, read_silos

HELD_OUT = ("test", "validation")
MIN_STEPS_TO_TELL = 3  # epochs or rounds from which on start-up is told from training


@dataclass(frozen=True)
class Run:
    """One run directory.

    label: the end of its path that no other run of the report has.
    rows: of metrics.jsonl, each with its epoch or round as "step" too.
    silo_rows: of silos.jsonl.
    result: empty as long as the run is unfinished.
    """

    label: str
    settings: dict[str, Scalar]
    rows: list[dict[str, Any]]
    silo_rows: list[dict[str, Any]]
    result: dict[str, Any]

    @property
    def participants(self) -> str:
        """The silos or ranks, as "3 silos"; "-" while the run is unfinished."""
        noun = "silo" if "num_silos" in self.result else "rank"
        count = self.result.get("num_silos", self.result.get("world_size"))
        if count is None:
            return "-"
        return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

    def cost(self, key: str) -> float | None:
        """`seconds` or `bytes_sent` of the run, of an unfinished one up to its last row."""
        so_far = self.rows[-1].get(key) if self.rows else None
        return self.result.get(key, so_far)

    @property
    def day(self) -> str:
        """The day on which the run finished, as 2026-12-01; empty if that is not known."""
        return self.result.get("finished", "")[:10]

    @property
    def startup_s(self) -> float | None:
        """The start-up: what the first epoch or round took beyond the median of the later ones.

        None if there are too few to tell.
        """
        ends = [row["seconds"] for row in self.rows if row["step"] and "seconds" in row]
        if len(ends) < MIN_STEPS_TO_TELL:
            return None
        later = [end - begin for begin, end in itertools.pairwise(ends)]
        return max(0.0, ends[0] - statistics.median(later))

    def finals(self, split: str) -> dict[str, float]:
        """The metrics of a split at the end of the run."""
        return self.result.get("metrics", {}).get(split, {})

    def curve(self, x: str, split: str, metric: str) -> list[tuple[float, float]]:
        """(x, value) per row that has both; x is "step", "seconds" or "bytes_sent".

        | the run                               | its curve                     |
        |---------------------------------------|-------------------------------|
        | has a test value only at the end      | one point, at the last row    |
        | sent nothing, and x is "bytes_sent"   | no points                     |
        """
        pairs = [(row.get(x), row.get(split, {}).get(metric)) for row in self.rows]
        has_values = any(value is not None for _, value in pairs)
        if split == "test" and pairs and not has_values:
            last_x, _ = pairs[-1]
            pairs = [(last_x, self.finals(split).get(metric))]

        points = [(at, value) for at, value in pairs if at is not None and value is not None]
        return points if any(at > 0 for at, _ in points) else []

    def silos(self) -> list[SiloSummary]:
        """Each silo of a federation, sorted by name; empty for any other run."""
        reasons: dict[str, list[str]] = {row["silo"]: [] for row in self.silo_rows}
        for row in self.rows:
            for name, reason in row.get("failures", {}).items():
                reasons.setdefault(name, []).append(reason)
        return [self._silo(name, reasons[name]) for name in sorted(reasons)]

    def _silo(self, name: str, reasons: list[str]) -> SiloSummary:
        rows = [row for row in self.silo_rows if row["silo"] == name]
        if not rows:
            return SiloSummary(name, 0, None, {"train": {}, "validation": {}}, None, reasons)
        last = rows[-1]
        return SiloSummary(
            name=name,
            num_rounds=len(rows),
            num_examples=last.get("num_examples"),
            metrics={split: last.get(split, {}) for split in ("train", "validation")},
            median_seconds=statistics.median(row["seconds"] for row in rows),
            reasons=reasons,
        )


@dataclass(frozen=True)
class SiloSummary:
    """A silo's part in a run.

    metrics: by split, of its last round. reasons: for each round in which it failed.
    """

    name: str
    num_rounds: int
    num_examples: int | None
    metrics: dict[str, dict[str, float]]
    median_seconds: float | None
    reasons: list[str]


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Reads each directory once, in the order given.

    Raises ValueError for a path that is no run directory, or if none is given.
    """
    paths = list(dict.fromkeys(Path(directory).resolve() for directory in run_dirs))
    if not paths:
        raise ValueError(
            "A report needs at least one run directory; received none. Name some, for example"
            " runs/*/"
        )
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _read_run(path: Path, label: str) -> Run:
    if not os.access(path / "experiment.toml", os.R_OK):  # unlike Path.is_file it never raises
        raise ValueError(
            f"A run directory holds an experiment.toml; received {path}. Name one, for example"
            " runs/NAME."
        )
    result_file = path / "result.json"
    try:
        settings = load_experiment(path / "experiment.toml").to_flat()
        rows = [{"step": row.get("round", row.get("epoch")), **row} for row in read_metrics(path)]
        silo_rows = read_silos(path)
        result = {}
        if result_file.exists():
            result = read_result(result_file.parent)
    except (ValueError, OSError) as error:
        raise ValueError(
            "The experiment.toml, metrics.jsonl and result.json of a run must be readable;"
            f" received {path} ({error}). Correct them or leave the run out."
        ) from None
    return Run(label, settings, rows, silo_rows, result)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ: their names, or parent/name, ..."""
    longest = max(len(path.parts) for path in paths)
    for depth in range(1, longest + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(paths):
            break
    return labels


def loss_first(metrics: Iterable[str]) -> list[str]:
    """The different metrics, the loss before all others.

    >>> loss_first(["mae", "loss", "mae"])
    ['loss', 'mae']
    """
    return sorted(dict.fromkeys(metrics), key=lambda metric: metric != "loss")


def human_bytes(count: float | None) -> str:
    """A number of bytes in decimal units, as networks count.

    >>> human_bytes(33_716_760), human_bytes(0), human_bytes(None)
    ('33.7 MB', '0 B', '-')
    """
    if count is None:
        return "-"
    power = sum(count >= 999.5 * 1000**p for p in range(4))  # 999.5 kB would read 1e+03 kB
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{count / 1000**power:.3g} {unit}"


def human_number(value: float | None) -> str:
    """A number with the digits that matter.

    >>> human_number(0.98765), human_number(1234.5), human_number(0.00012345), human_number(None)
    ('0.9877', '1,234.50', '0.0001234', '-')
    """
    if value is None:
        return "-"
    if abs(value) >= 10:
        return f"{value:,.2f}"
    if abs(value) >= 0.001:
        return f"{value:.4f}"
    return f"{value:.4g}"
