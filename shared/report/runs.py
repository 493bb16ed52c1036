"""Run directories, read; and how their numbers are written."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.experiment import Scalar, load_experiment
from shared.run_record import read_metrics, read_silos

HELD_OUT = ("test", "validation")


@dataclass(frozen=True)
class Run:
    """One run directory, read. `result` is empty as long as the run is unfinished."""

    label: str  # the end of its path that tells it from the others
    settings: dict[str, Scalar]
    rows: list[dict[str, Any]]  # of metrics.jsonl, each with its epoch or round as "step" too
    silo_rows: list[dict[str, Any]]  # of silos.jsonl
    result: dict[str, Any]

    @property
    def participants(self) -> str:
        noun = "silo" if "num_silos" in self.result else "rank"
        count = self.result.get("num_silos", self.result.get("world_size"))
        return "-" if count is None else f"{count} {noun}{'' if count == 1 else 's'}"

    def cost(self, key: str) -> float | None:
        """`seconds` or `bytes_sent` of the whole run, or up to the last row of an unfinished one."""
        return self.result.get(key, self.rows[-1].get(key) if self.rows else None)

    def finals(self, split: str) -> dict[str, float]:
        return self.result.get("metrics", {}).get(split, {})

    def curve(self, x: str, split: str, metric: str) -> list[tuple[float, float]]:
        """(x, value) per row that has both; x is "step", "seconds" or "bytes_sent".

        Edge cases: a test value measured only at the end -> one point at the last row; nothing sent -> no points.
        """
        pairs = [(row.get(x), row.get(split, {}).get(metric)) for row in self.rows]
        if split == "test" and pairs and all(value is None for _, value in pairs):
            pairs = [(pairs[-1][0], self.finals(split).get(metric))]
        known = [(at, value) for at, value in pairs if at is not None and value is not None]
        return known if any(at > 0 for at, _ in known) else []

    def silos(self) -> list[SiloSummary]:
        """Each silo of the federation, by name; of a run that is none: nothing."""
        failures = [row.get("failures", {}) for row in self.rows]
        names = sorted({row["silo"] for row in self.silo_rows} | {name for failed in failures for name in failed})
        return [self._silo(name, [failed[name] for failed in failures if name in failed]) for name in names]

    def _silo(self, name: str, reasons: list[str]) -> SiloSummary:
        rows = [row for row in self.silo_rows if row["silo"] == name]
        last = rows[-1] if rows else {}
        seconds = statistics.median(row["seconds"] for row in rows) if rows else None
        metrics = {split: last.get(split, {}) for split in ("train", "validation")}
        return SiloSummary(name, len(rows), last.get("num_examples"), metrics, seconds, reasons)


@dataclass(frozen=True)
class SiloSummary:
    """What a silo did in a run: `metrics` by split are those of its last round, `reasons` why others failed."""

    name: str
    num_rounds: int
    num_examples: int | None
    metrics: dict[str, dict[str, float]]
    median_seconds: float | None
    reasons: list[str]


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Reads each directory once, in the order given. Raises ValueError for what is no run directory."""
    paths = list(dict.fromkeys(Path(directory).resolve() for directory in run_dirs))
    if not paths:
        raise ValueError("A report needs at least one run directory; received none. Name some, for example runs/*/")
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _read_run(path: Path, label: str) -> Run:
    if not os.access(path / "experiment.toml", os.R_OK):  # unlike Path.is_file it never raises
        raise ValueError(f"A run directory holds an experiment.toml; received {path}. Name one, for example runs/NAME.")
    file = path / "result.json"
    try:
        settings = load_experiment(path / "experiment.toml").to_flat()
        rows = [{"step": row.get("round", row.get("epoch")), **row} for row in read_metrics(path)]
        result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return Run(label, settings, rows, read_silos(path), result)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"The experiment.toml, metrics.jsonl and result.json of a run must be readable; received {path} ({error}). "
            f"Mend them or leave the run out."
        ) from None


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ: their names, or parent/name, ..."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(paths):
            break
    return labels


def loss_first(metrics: Iterable[str]) -> list[str]:
    """The different ones, the loss before all others."""
    return sorted(dict.fromkeys(metrics), key=lambda metric: metric != "loss")


def human_bytes(count: float | None) -> str:
    """Decimal units, as networks count.

    >>> human_bytes(33_716_760), human_bytes(0), human_bytes(None)
    ('33.7 MB', '0 B', '-')
    """
    if count is None:
        return "-"
    power = sum(count >= 999.5 * 1000**p for p in range(4))  # 999.5 kB would read 1e+03 kB
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def human_number(value: float | None) -> str:
    """
    >>> human_number(0.98765), human_number(1234.5), human_number(0.00012345), human_number(None)
    ('0.9877', '1,234.50', '0.0001234', '-')
    """
    if value is None:
        return "-"
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.4g}"
