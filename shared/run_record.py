"""The run record: the files that every run leaves behind, whichever runtime made it.

RUN_DIR/experiment.toml   the experiment as it ran
RUN_DIR/metrics.jsonl     JSON objects, each about one epoch or round
RUN_DIR/silos.jsonl       of a federation: JSON objects, each about one silo in one round
RUN_DIR/schema.json       what the model takes: how columns become inputs, the names of classes
RUN_DIR/result.json       the final metrics, sizes, times and identities
RUN_DIR/model.keras       the trained model, adapters merged into it
RUN_DIR/adapter.npz       of a model with adapters: A and B of each
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shared.data import Schema
from shared.experiment import Experiment
from shared.weights import weights_sha256

if TYPE_CHECKING:
    import keras

CHECKPOINT = "checkpoint.npz"
ADAPTER = "adapter.npz"
METRICS = "metrics.jsonl"
SILOS = "silos.jsonl"
SCHEMA = "schema.json"
RESULT = "result.json"
VERSIONED = ("tensorflow", "tensorflow-cpu", "keras", "numpy", "horovod", "flwr")


class Record(Protocol):
    """The interface that a trainer writes to; ranks that do not write hold a `NullRecord`."""

    directory: Path

    def check(self) -> None: ...
    def open(self) -> None: ...
    def resume_at(self, step: int) -> None: ...
    def append(self, row: Mapping[str, Any]) -> None: ...
    def append_silos(self, rows: Iterable[Mapping[str, Any]]) -> None: ...
    def finish(self, model: keras.Model, schema: Schema, result: Mapping[str, Any]) -> None: ...
    def abort(self, error: BaseException) -> None: ...


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

    def abort(self, error: BaseException) -> None: ...


@contextlib.contextmanager
def aborted_on_error(record: Record) -> Iterator[None]:
    """Tells the record if the block ends by an error, by Ctrl-C or by SIGTERM."""
    try:
        yield
    except BaseException as error:
        record.abort(error)
        raise


class RunRecord:
    """Writes a new run directory or, if the experiment says resume, continues the one there is.

    `step_name` is what a row counts: "epoch" or "round".
    """

    def __init__(self, experiment: Experiment, runtime: str, step_name: str) -> None:
        self.directory = experiment.run_directory
        self.experiment = experiment
        self.runtime = runtime
        self.step_name = step_name
        self.seconds_before = 0.0  # of the runs that this one resumes

    def check(self) -> None:
        """Raises ValueError if this run would overwrite another one, or cannot be written.

        Leaves nothing behind.
        """
        try:
            if self.experiment.run.resume or not _holds_anything(self.directory):
                _try_to_write(self.directory)
                return
        except OSError as error:
            raise ValueError(
                "The run directory must be one that can be written to; received"
                f" {self.directory} ({error.strerror}). Choose another with --run-dir"
                " (run.directory)."
            ) from None
        raise ValueError(
            f"The run directory {self.directory} exists already. Continue that run with"
            " --resume (run.resume = true), choose another directory with --run-dir"
            " (run.directory), or delete it."
        )

    def open(self) -> None:
        """Starts the clock and, unless the run is resumed, makes the directory."""
        self.check()
        self.started = time.monotonic()
        if not self.experiment.run.resume:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write_experiment()

    def resume_at(self, step: int) -> None:
        """Drops the rows after `step`, the last one that the checkpoint holds.

        Seconds are counted on from the row of that step.
        """
        (self.directory / RESULT).unlink(missing_ok=True)  # until it is finished again

        rows = [row for row in read_metrics(self.directory) if row[self.step_name] <= step]
        _write_atomically(self.directory / METRICS, _lines(rows))
        if (self.directory / SILOS).exists():
            silo_rows = [row for row in read_silos(self.directory) if row[self.step_name] <= step]
            _write_atomically(self.directory / SILOS, _lines(silo_rows))

        self.seconds_before = rows[-1]["seconds"] if rows else 0.0
        self._write_experiment()

    @property
    def seconds(self) -> float:
        """The time that the run has taken so far, over all its parts."""
        return self.seconds_before + time.monotonic() - self.started

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds the row of an epoch or a round, with the seconds so far."""
        timed_row = {**row, "seconds": round(self.seconds, 3)}
        with (self.directory / METRICS).open("a", encoding="utf-8") as file:
            file.write(_lines([timed_row]))

    def append_silos(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds a row for each silo of a round: its examples, metrics and seconds."""
        with (self.directory / SILOS).open("a", encoding="utf-8") as file:
            file.write(_lines(rows))

    def finish(self, model: keras.Model, schema: Schema, result: Mapping[str, Any]) -> None:
        """Saves the model, its schema and the result.

        `result`: `metrics` by split, and what the runtime adds. Adapters are merged into the model,
        and saved apart too.
        """
        from shared.zoo import without_adapters  # Keras
        from shared.zoo.adapters import adapter_weights

        # The model, without and beside its adapters.
        adapters = adapter_weights(model)
        if adapters:
            np.savez(self.directory / ADAPTER, allow_pickle=False, **adapters)
        model = without_adapters(model, self.experiment.model, schema)
        model.save(self.directory / "model.keras")
        _write_json(self.directory / SCHEMA, schema.to_json())

        # The result comes last: a run that has one is finished.
        common = {
            "name": self.experiment.name,
            "runtime": self.runtime,
            "num_parameters": model.count_params(),
            "seconds": round(self.seconds, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "weights_sha256": weights_sha256(model.get_weights()),
            "experiment_sha256": self.experiment.sha256(),
            "versions": {"python": platform.python_version(), **installed_versions(VERSIONED)},
        }
        _write_json(self.directory / RESULT, {**common, **result})

    def abort(self, error: BaseException) -> None:
        """Does nothing: a directory without result.json is that of a run that has not ended."""

    def _write_experiment(self) -> None:
        _write_atomically(self.directory / "experiment.toml", self.experiment.to_toml())


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, one per epoch or round.

    Lines of the same step are merged: the first that has a key decides its value (silos evaluate
    the weights of a round one round later). A last line cut off by a crash is left out.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in _rows(directory / METRICS):
        step = row[step_name_of(row)]
        earlier = rows.get(step, {})
        rows[step] = row | earlier
    return [rows[step] for step in sorted(rows)]


def read_silos(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's silos.jsonl, one per silo and round; none, if it is no federation."""
    return [*_rows(directory / SILOS)]


def step_name_of(row: Mapping[str, Any]) -> str:
    """Returns "epoch" or "round", whichever the row counts."""
    return "round" if "round" in row else "epoch"


def _holds_anything(directory: Path) -> bool:
    """True for a file, and for a folder that is not empty."""
    if directory.is_dir():
        return any(directory.iterdir())
    return os.path.lexists(directory)


def _try_to_write(directory: Path) -> None:
    """Raises OSError if no file can be made in the directory; removes all that it makes."""
    folders = [directory, *directory.parents]
    missing = [folder for folder in folders if not os.path.lexists(folder)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield _with_nan(json.loads(line))
        except json.JSONDecodeError:  # cut off by a crash
            return


def read_result(directory: Path) -> dict[str, Any]:
    """The result of a finished run. A number that is null in the file was not finite: NaN."""
    text = (directory / RESULT).read_text(encoding="utf-8")
    result: dict[str, Any] = _with_nan(json.loads(text))
    return result


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_without_nan(row), allow_nan=False) + "\n" for row in rows)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_atomically(path, json.dumps(_without_nan(value), allow_nan=False, indent=2) + "\n")


def _without_nan(value: Any) -> Any:
    """The value with null for each number that is not finite, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    """The inverse of `_without_nan`, but for what kind of number it was."""
    if isinstance(value, dict):
        return {key: _with_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed here."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
