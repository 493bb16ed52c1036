"""A run record with a copy on an MLflow server: [run] mlflow = "http://...".

RUN_DIR stays the record of the run. MLflow gets the experiment's keys as parameters, each row's
numbers as metrics by epoch or round, and at the end the result and the model.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.data import Schema
from shared.experiment import Experiment
from shared.processes import exit_on_sigterm
from shared.run_record import SCHEMA, RunRecord, read_result, step_name_of

if TYPE_CHECKING:
    import keras

MLFLOW_RUN = "mlflow.json"  # in RUN_DIR: which run of the server this is
COPIED = ("experiment.toml", SCHEMA, "result.json", "model.keras")
STEPS = ("epoch", "round")


class MlflowRecord:
    """Wraps a `RunRecord`.

    A server that does not answer at the start ends the run; one that goes away later does not.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.experiment: Experiment = record.experiment
        self.directory = record.directory
        self.run_id = ""  # until it is open, and after its end
        self.is_lost = False

    def check(self) -> None:
        self.record.check()

    def open(self) -> None:
        """Raises ValueError if the server does not answer, before anything is written."""
        self.check()
        self.client, self.run_id = self._connect()
        _end_by_exception()

        self.record.open()
        self.directory.mkdir(parents=True, exist_ok=True)
        identity = json.dumps({"run_id": self.run_id}) + "\n"
        (self.directory / MLFLOW_RUN).write_text(identity, encoding="utf-8")

    def resume_at(self, step: int) -> None:
        self.record.resume_at(step)

    def append(self, row: Mapping[str, Any]) -> None:
        self.record.append(row)
        self._log(_flat_numbers(row), row[step_name_of(row)])

    def append_silos(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Logs the silos' metrics as silos/NAME/SPLIT/METRIC, those of a round together."""
        rows = list(rows)
        self.record.append_silos(rows)

        by_round: dict[int, dict[str, float]] = {}
        for row in rows:
            metrics = _flat_numbers({split: row[split] for split in ("train", "validation")})
            of_round = by_round.setdefault(row["round"], {})
            for name, value in metrics.items():
                of_round[f"silos/{row['silo']}/{name}"] = value

        for number, numbers in by_round.items():
            self._log(numbers, number)

    def finish(self, model: keras.Model, schema: Schema, result: Mapping[str, Any]) -> None:
        """Logs the result as final/..., copies the files and ends MLflow's run."""
        self.record.finish(model, schema, result)

        written = read_result(self.directory)
        logged = ("metrics", "seconds", "bytes_sent")
        numbers = _flat_numbers({key: value for key, value in written.items() if key in logged})
        final = {f"final/{name.removeprefix('metrics/')}": n for name, n in numbers.items()}
        self._log(final, 0)
        self._try(self._close)
        self.run_id = ""

    def abort(self, error: BaseException) -> None:
        """Ends MLflow's run as FAILED or, by Ctrl-C or a signal, as KILLED."""
        self.record.abort(error)
        if not self.run_id:
            return
        self._try(lambda: self.client.set_terminated(self.run_id, _status_after(error)))
        self.run_id = ""

    def _connect(self) -> tuple[Any, str]:
        uri = self.experiment.run.mlflow
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of 7, which take minutes
        try:
            from mlflow.tracking import MlflowClient

            client = MlflowClient(tracking_uri=uri)
            return client, self._resumed(client) or self._created(client)
        except ImportError:
            raise ValueError(
                f"run.mlflow = {uri!r} needs MLflow's client, which is not installed. Run pip"
                " install mlflow-skinny, or set run.mlflow = ''."
            ) from None
        # The client raises its own errors, and those of what it is built on.
        except Exception as error:
            reason = _first_line(error).rstrip(". ")
            raise ValueError(
                "run.mlflow must name an MLflow server that answers (http://host:5000) or a"
                f" database of its kind (sqlite:///mlflow.db); received {uri!r}: {reason}. Correct"
                " it, or set run.mlflow = ''."
            ) from None

    def _resumed(self, client: Any) -> str | None:
        """The id of the run that this one continues, set to running again; None for a new one."""
        path = self.directory / MLFLOW_RUN
        if not (self.experiment.run.resume and path.is_file()):
            return None
        run_id = _noted_run_id(path)
        client.update_run(run_id, status="RUNNING")
        return run_id

    def _created(self, client: Any) -> str:
        """The id of a new run in MLflow's experiment of this name, with the parameters logged."""
        from mlflow.entities import Param

        name = self.experiment.name
        existing = client.get_experiment_by_name(name)
        experiment_id = existing.experiment_id if existing else client.create_experiment(name)

        tags = {"runtime": self.record.runtime, "directory": str(self.directory)}
        run = client.create_run(experiment_id, run_name=self.directory.name, tags=tags)
        run_id: str = run.info.run_id

        parameters = [
            Param(key, str(value))
            for key, value in self.experiment.to_flat().items()
            if _is_parameter(key, value)
        ]
        client.log_batch(run_id, params=parameters)
        return run_id

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        if numbers:
            self._try(lambda: self._log_batch(numbers, step))

    def _log_batch(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(1000 * time.time())
        metrics = [Metric(name, value, now_ms, step) for name, value in numbers.items()]
        # One request per thousand, which is MLflow's limit: its client divides them.
        self.client.log_batch(self.run_id, metrics)

    def _close(self) -> None:
        for name in COPIED:
            self.client.log_artifact(self.run_id, str(self.directory / name))
        self.client.set_terminated(self.run_id, "FINISHED")

    def _try(self, write: Callable[[], None]) -> None:
        """Writes to MLflow; a failure is reported once and does not end the run.

        A run of days must not end because of a copy of its record.
        """
        if self.is_lost:
            return
        try:
            write()
        except Exception as error:
            self.is_lost = True
            print(
                f"MLflow at {self.experiment.run.mlflow} gets no more of this run "
                f"({_first_line(error)}); its record in {self.directory} goes on",
                file=sys.stderr,
                flush=True,
            )


def end_for_killed_process(experiment: Experiment, error: BaseException) -> None:
    """Ends MLflow's run of the experiment if it is still RUNNING, for a process that was killed.

    `error` is what ended the run where that process was started. Raises nothing.
    """
    path = experiment.run_directory / MLFLOW_RUN
    if not experiment.run.mlflow or not path.is_file():
        return
    try:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=experiment.run.mlflow)
        run_id = _noted_run_id(path)
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, _status_after(error))
    except Exception as failure:  # no client here, or no server
        print(
            f"MLflow at {experiment.run.mlflow} may take this run for one that goes on"
            f" ({_first_line(failure)})",
            file=sys.stderr,
        )


def _noted_run_id(path: Path) -> str:
    """The id of MLflow's run, which its record has noted in the run directory."""
    run_id: str = json.loads(path.read_text(encoding="utf-8"))["run_id"]
    return run_id


def _status_after(error: BaseException) -> str:
    """MLflow's word for a run that an error ended, or Ctrl-C or a signal."""
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _end_by_exception() -> None:
    """Has SIGTERM end the process by an exception, as Ctrl-C does, so that MLflow hears of it.

    Whoever has another handler, such as Flower, keeps it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        exit_on_sigterm()


def _first_line(error: Exception) -> str:
    lines = str(error)[:200].splitlines()
    return lines[0] if lines else type(error).__name__


def _flat_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by path.

    >>> _flat_numbers({"epoch": 2, "test": {"loss": 0.5}, "cohort": ["a"], "seconds": 1.5})
    {'test/loss': 0.5, 'seconds': 1.5}
    """
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            for name, number in _flat_numbers(value).items():
                flat[f"{key}/{name}"] = number
        elif isinstance(value, int | float) and key not in STEPS:
            flat[key] = value
    return flat


def _is_parameter(key: str, value: Any) -> bool:
    """Returns False for the keys of where a record lies, and for empty ones.

    The former are no parameters of an experiment, the latter MLflow refuses.
    """
    return not key.startswith("run.") and str(value) != ""


def make_record(experiment: Experiment, runtime: str, step_name: str) -> RunRecord | MlflowRecord:
    """Returns the record that the experiment asks for."""
    record = RunRecord(experiment, runtime, step_name)
    return MlflowRecord(record) if experiment.run.mlflow else record
