"""A run record that is written to an MLflow server too, which the experiment names: [run] mlflow = "http://...".

RUN_DIR stays the record of the run; MLflow gets a copy: the experiment's keys as parameters, each row's numbers as
metrics by epoch or round, and at the end the result and the model.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from shared.data import Schema
from shared.experiment import Experiment
from shared.run_record import SCHEMA, RunRecord, step_name_of

if TYPE_CHECKING:
    import keras

MLFLOW_RUN = "mlflow.json"  # in RUN_DIR: which run of the server this is
COPIED = ("experiment.toml", SCHEMA, "result.json", "model.keras")


class MlflowRecord:
    """Wraps a `RunRecord`. A server that cannot be had at the start ends the run; one that goes away later does not."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.experiment: Experiment = record.experiment
        self.directory = record.directory
        self.is_lost = False

    def check(self) -> None:
        self.record.check()

    def open(self) -> None:
        """Raises ValueError if the server does not answer, before anything is written."""
        self.check()
        self.client, self.run_id = self._connect()
        self.record.open()
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / MLFLOW_RUN).write_text(json.dumps({"run_id": self.run_id}) + "\n", encoding="utf-8")

    def resume_at(self, step: int) -> None:
        self.record.resume_at(step)

    def append(self, row: Mapping[str, Any]) -> None:
        self.record.append(row)
        self._log(_flat_numbers(row), row[step_name_of(row)])

    def append_silos(self, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = list(rows)
        self.record.append_silos(rows)
        for row in rows:
            metrics = _flat_numbers({split: row[split] for split in ("train", "validation")})
            self._log({f"silos/{row['silo']}/{name}": value for name, value in metrics.items()}, row["round"])

    def finish(self, model: keras.Model, schema: Schema, result: Mapping[str, Any]) -> None:
        self.record.finish(model, schema, result)
        written = json.loads((self.directory / "result.json").read_text(encoding="utf-8"))
        numbers = {name: value for name, value in written.items() if name in ("metrics", "seconds", "bytes_sent")}
        self._log({f"final/{name.removeprefix('metrics/')}": v for name, v in _flat_numbers(numbers).items()}, 0)
        self._try(self._close)

    def _connect(self) -> tuple[Any, str]:
        uri = self.experiment.run.mlflow
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of 7, which take minutes
        try:
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=uri)
            return client, self._resumed(client) or self._created(client)
        except ImportError:
            raise ValueError(
                f"run.mlflow = {uri!r} needs MLflow's client, which is not installed. Run pip install mlflow-skinny, "
                "or set run.mlflow = ''."
            ) from None
        except Exception as error:  # the client raises its own errors, and those of what it is built on
            raise ValueError(
                f"run.mlflow must name an MLflow server that answers (http://host:5000) or a database of its kind "
                f"(sqlite:///mlflow.db); received {uri!r}: {str(error)[:200].splitlines()[0].rstrip('. ')}. "
                "Mend it, or set run.mlflow = ''."
            ) from None

    def _resumed(self, client: Any) -> str | None:
        path = self.directory / MLFLOW_RUN
        if not (self.experiment.run.resume and path.is_file()):
            return None
        run_id: str = json.loads(path.read_text(encoding="utf-8"))["run_id"]
        client.update_run(run_id, status="RUNNING")
        return run_id

    def _created(self, client: Any) -> str:
        from mlflow.entities import Param

        name = self.experiment.name
        found = client.get_experiment_by_name(name)
        experiment_id = found.experiment_id if found else client.create_experiment(name)
        tags = {"runtime": self.record.runtime, "directory": str(self.directory)}
        run = client.create_run(experiment_id, run_name=self.directory.name, tags=tags)
        parameters = [Param(key, str(value)) for key, value in self.experiment.to_flat().items() if _tells(key, value)]
        client.log_batch(run.info.run_id, params=parameters)
        run_id: str = run.info.run_id
        return run_id

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        if numbers:
            self._try(lambda: self._log_batch(numbers, step))

    def _log_batch(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(1000 * time.time())
        self.client.log_batch(self.run_id, [Metric(name, value, now_ms, step) for name, value in numbers.items()])

    def _close(self) -> None:
        for name in COPIED:
            self.client.log_artifact(self.run_id, str(self.directory / name))
        self.client.set_terminated(self.run_id, "FINISHED")

    def _try(self, write: Any) -> None:
        """A run of days must not end because of a copy of its record; but its owner is told."""
        if self.is_lost:
            return
        try:
            write()
        except Exception as error:
            self.is_lost = True
            print(
                f"MLflow at {self.experiment.run.mlflow} gets no more of this run "
                f"({str(error)[:200].splitlines()[0]}); "
                f"its record in {self.directory} goes on",
                file=sys.stderr,
                flush=True,
            )


def _flat_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by path.

    >>> _flat_numbers({"epoch": 2, "test": {"loss": 0.5}, "cohort": ["a"], "seconds": 1.5})
    {'test/loss': 0.5, 'seconds': 1.5}
    """
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": number for name, number in _flat_numbers(value).items()}
        elif isinstance(value, int | float) and key not in ("epoch", "round"):
            flat[key] = value
    return flat


def _tells(key: str, value: Any) -> bool:
    """Where a record lies is no parameter of an experiment, and MLflow takes no empty ones."""
    return not key.startswith("run.") and str(value) != ""


def make_record(experiment: Experiment, runtime: str, step_name: str) -> RunRecord | MlflowRecord:
    """The record that the experiment wants."""
    record = RunRecord(experiment, runtime, step_name)
    return MlflowRecord(record) if experiment.run.mlflow else record
