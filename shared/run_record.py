"""The run record: what every run leaves behind, whichever runtime made it.

RUN_DIR/experiment.toml   the experiment as it ran
RUN_DIR/metrics.jsonl     JSON objects, each about one epoch or round
RUN_DIR/silos.jsonl       of a federation: JSON objects, each about one silo in one round
RUN_DIR/schema.json       what the model takes: how columns become inputs, the names of classes
RUN_DIR/result.json       the final metrics, sizes, times and identities
RUN_DIR/model.keras       the trained model, adapters merged into it
RUN_DIR/adapter.npz       of a model with adapters: A and B of each
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shared.data import Schema
from shared.experiment import Experiment
from shared.weights import weights_sha256

if TYPE_CHECKING:
    import keras

CHECKPOINT, ADAPTER = "checkpoint.npz", "adapter.npz"
METRICS, SILOS = "metrics.jsonl", "silos.jsonl"
SCHEMA = "schema.json"
VERSIONED = ("tensorflow", "tensorflow-cpu", "keras", "numpy", "horovod", "flwr")


class Record(Protocol):
    """What a trainer writes to; ranks that do not write hold a `NullRecord`."""

    directory: Path

    def check(self) -> None: ...
    def open(self) -> None: ...
    def resume_at(self, step: int) -> None: ...
    def append(self, row: Mapping[str, Any]) -> None: ...
    def append_silos(self, rows: Iterable[Mapping[str, Any]]) -> None: ...
    def finish(self, model: keras.Model, schema: Schema, result: Mapping[str, Any]) -> None: ...


class NullRecord:
    """Writes nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def check(self) -> None: ...

    def open(self) -> None: ...

    def resume_at(self, step: int) -> None: ...

    def append(self, row: Mapping[str, Any]) -> None: ...

    def append_silos(self, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def finish(self, model: keras.Model, schema: Schema, result: Mapping[str, Any]) -> None: ...


class RunRecord:
    """Writes a run directory, anew or, if the experiment says resume, where it stopped.

    `step_name` says what a row counts: "epoch" or "round".
    """

    def __init__(self, experiment: Experiment, runtime: str, step_name: str) -> None:
        self.directory = experiment.run_directory
        self.experiment = experiment
        self.runtime = runtime
        self.step_name = step_name
        self.seconds_before = 0.0  # of the runs that this one resumes

    def check(self) -> None:
        """Raises ValueError if there is a run already that this one would overwrite. Writes nothing."""
        is_free = not self.directory.exists() or (self.directory.is_dir() and not any(self.directory.iterdir()))
        if not self.experiment.run.resume and not is_free:
            raise ValueError(
                f"The run directory {self.directory} exists already. Continue that run with --resume (run.resume = "
                "true), choose another directory with --run-dir (run.directory), or delete it."
            )

    def open(self) -> None:
        """Starts the clock and, unless the run is resumed, the directory."""
        self.check()
        self.started = time.monotonic()
        if not self.experiment.run.resume:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write_experiment()

    def resume_at(self, step: int) -> None:
        """Keeps the rows up to `step`, the one that the checkpoint holds, and goes on counting seconds from there."""
        (self.directory / "result.json").unlink(missing_ok=True)  # until it is finished again
        kept = [row for row in read_metrics(self.directory) if row[self.step_name] <= step]
        _write_atomically(self.directory / METRICS, _lines(kept))
        if (self.directory / SILOS).exists():
            of_silos = [row for row in read_silos(self.directory) if row[self.step_name] <= step]
            _write_atomically(self.directory / SILOS, _lines(of_silos))
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self._write_experiment()

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def append(self, row: Mapping[str, Any]) -> None:
        with (self.directory / METRICS).open("a", encoding="utf-8") as file:
            file.write(_lines([{**row, "seconds": round(self.seconds, 3)}]))

    def append_silos(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """What each silo of a round said of itself."""
        with (self.directory / SILOS).open("a", encoding="utf-8") as file:
            file.write(_lines(rows))

    def finish(self, model: keras.Model, schema: Schema, result: Mapping[str, Any]) -> None:
        """Saves the model, its schema and the result: `metrics` by split, and what the runtime adds.

        Adapters are merged into the model, and saved apart too.
        """
        from shared.zoo import without_adapters  # Keras
        from shared.zoo.adapters import adapter_weights

        if adapters := adapter_weights(model):
            np.savez(self.directory / ADAPTER, allow_pickle=False, **adapters)
        model = without_adapters(model, self.experiment.model, schema)
        model.save(self.directory / "model.keras")
        _write_atomically(self.directory / SCHEMA, json.dumps(schema.to_json(), indent=2) + "\n")
        common = {
            "name": self.experiment.name,
            "runtime": self.runtime,
            "num_parameters": model.count_params(),
            "seconds": round(self.seconds, 3),
            "weights_sha256": weights_sha256(model.get_weights()),
            "experiment_sha256": self.experiment.sha256(),
            "versions": {"python": platform.python_version(), **installed_versions(VERSIONED)},
        }
        _write_atomically(self.directory / "result.json", json.dumps({**common, **result}, indent=2) + "\n")

    def _write_experiment(self) -> None:
        _write_atomically(self.directory / "experiment.toml", self.experiment.to_toml())


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, one per epoch or round.

    Lines of the same step are merged, the first to name a key wins (silos judge a round's weights one round later). A
    last line cut off by a crash is left out.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in _rows(directory / METRICS):
        step = row[step_name_of(row)]
        rows[step] = row | rows.get(step, {})
    return [rows[step] for step in sorted(rows)]


def read_silos(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's silos.jsonl, one per silo and round; none, if it is no federation."""
    return [*_rows(directory / SILOS)]


def step_name_of(row: Mapping[str, Any]) -> str:
    """What the row counts: "epoch" or "round"."""
    return "round" if "round" in row else "epoch"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # cut off by a crash
            return


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed here."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
