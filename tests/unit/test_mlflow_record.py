"""The copy of a record in MLflow: a real database of its kind, read back by MLflow's client."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf
from mlflow.tracking import MlflowClient

from dist_train.collectives import LocalCommunicator
from dist_train.trainer import train
from shared.data import Schema
from shared.experiment import Experiment, experiment_from_flat
from shared.mlflow_record import MlflowRecord, end_for_killed_process, make_record
from shared.run_record import aborted_on_error


def experiment(folder: Path, **keys: Any) -> Experiment:
    common = {
        "name": "logged",
        "data.name": "wine",
        "model.name": "linear",
        "training.epochs": 2,
        "run.directory": str(folder / "run"),
        "run.mlflow": f"sqlite:///{folder}/mlflow.db",
    }
    return experiment_from_flat(
        {**common, **{key.replace("__", "."): value for key, value in keys.items()}}
    )


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new current directory: MLflow keeps the files of a run beside it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without runs: MLflow takes seconds to lay one out."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def in_database(in_folder: Path, empty_database: Path) -> Path:
    """A new current directory with a database of its own."""
    shutil.copy(empty_database, in_folder)
    return in_folder


def logged_run(folder: Path) -> tuple[MlflowClient, Any]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("logged").experiment_id])
    return client, run


def test_parameters_metrics_by_epoch_and_the_model_are_logged_and_a_resumed_run_goes_on(
    in_database: Path,
):
    result = train(experiment(in_database), LocalCommunicator())
    client, run = logged_run(in_database)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.learning_rate"] == "0.001"
    assert run.data.metrics["final/test/accuracy"] == result["metrics"]["test"]["accuracy"]
    rows = [
        json.loads(line)
        for line in (in_database / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    logged = client.get_metric_history(run.info.run_id, "validation/loss")
    assert [(metric.step, metric.value) for metric in logged] == [
        (r["epoch"], r["validation"]["loss"]) for r in rows
    ]
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"experiment.toml", "schema.json", "result.json", "model.keras"}

    train(experiment(in_database, training__epochs=3, run__resume=True), LocalCommunicator())
    client, again = logged_run(in_database)  # still one
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    logged = client.get_metric_history(run.info.run_id, "validation/loss")
    assert [metric.step for metric in logged] == [1, 2, 3]


def test_each_silos_metrics_are_logged_by_round(in_database: Path):
    record = make_record(experiment(in_database), "flower", "round")
    assert isinstance(record, MlflowRecord)
    record.open()
    silo = {
        "round": 4,
        "silo": "north",
        "num_examples": 9,
        "train": {"loss": 0.5},
        "validation": {},
    }
    record.append_silos(iter([silo]))
    client, run = logged_run(in_database)
    (metric,) = client.get_metric_history(run.info.run_id, "silos/north/train/loss")
    assert (metric.step, metric.value) == (4, 0.5)
    assert json.loads((in_database / "run" / "silos.jsonl").read_text()) == silo


def test_the_metrics_of_a_thousand_silos_are_one_call_and_arrive(
    in_database: Path, monkeypatch: pytest.MonkeyPatch
):
    record = make_record(experiment(in_database), "flower", "round")
    assert isinstance(record, MlflowRecord)
    record.open()
    num_calls = 0
    log_batch = record.client.log_batch

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        log_batch(*arguments, **options)

    monkeypatch.setattr(record.client, "log_batch", counted)
    record.append_silos(
        {"round": 1, "silo": f"s{i}", "train": {"loss": i}, "validation": {"loss": -i}}
        for i in range(1001)  # twice as many metrics: more than MLflow takes in one request
    )

    assert num_calls == 1
    _, run = logged_run(in_database)
    assert len(run.data.metrics) == 2002
    assert run.data.metrics["silos/s1000/validation/loss"] == -1000


# --- the end of a run


def interrupt(name: str) -> None:
    """Ends the training from within a step: by an error, or by a signal to this process."""
    if name == "error":
        raise ArithmeticError("the layer is ill")
    os.kill(os.getpid(), getattr(signal, name))


def build_ending(schema: Schema, by: str) -> keras.Model:
    """A linear model whose first step ends the run."""

    @keras.saving.register_keras_serializable("tests")
    class Ending(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            ended = tf.py_function(lambda: interrupt(by), [], [])
            with tf.control_dependencies([ended]):
                return tf.identity(x)

        def compute_output_spec(self, x: Any) -> Any:
            return keras.KerasTensor(x.shape, x.dtype)

    inputs = keras.Input(schema.input_shape)
    outputs = keras.layers.Dense(schema.num_outputs)(Ending()(inputs))
    return keras.Model(inputs, outputs)


@pytest.fixture
def own_sigterm() -> Iterator[None]:
    """The default handler of SIGTERM, as a process starts with, and the one before after it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("own_sigterm")
@pytest.mark.parametrize(
    ("by", "status", "kind"),
    [
        ("error", "FAILED", Exception),
        ("SIGINT", "KILLED", KeyboardInterrupt),
        ("SIGTERM", "KILLED", SystemExit),
    ],
)
def test_a_run_that_ends_before_its_time_is_not_left_running(
    in_database: Path, by: str, status: str, kind: type[BaseException]
):
    ending = experiment(
        in_database, model__name=f"{__name__}:build_ending", model__options=f"by = '{by}'"
    )
    with pytest.raises(kind):
        train(ending, LocalCommunicator())

    _, run = logged_run(in_database)
    assert run.info.status == status
    assert run.info.end_time


def test_an_open_record_is_failed_by_any_error(in_database: Path):
    record = make_record(experiment(in_database), "flower", "round")
    record.open()
    with pytest.raises(ZeroDivisionError), aborted_on_error(record):
        _ = 1 / 0

    _, run = logged_run(in_database)
    assert run.info.status == "FAILED"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "KILLED"), (ValueError(), "FAILED")]
)
def test_a_run_whose_process_was_killed_is_ended_by_the_one_that_started_it(
    in_database: Path, error: BaseException, status: str
):
    make_record(experiment(in_database), "flower", "round").open()
    end_for_killed_process(experiment(in_database), error)
    _, run = logged_run(in_database)
    assert run.info.status == status

    end_for_killed_process(experiment(in_database), SystemExit())
    _, run = logged_run(in_database)
    assert run.info.status == status  # it had ended already


def test_a_run_that_is_refused_before_it_begins_is_none_of_mlflows(in_folder: Path):
    record = make_record(experiment(in_folder), "flower", "round")
    with pytest.raises(ZeroDivisionError), aborted_on_error(record):
        _ = 1 / 0
    assert not (in_folder / "mlflow.db").exists()


# --- servers that do not answer


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://x"])
def test_a_server_that_does_not_answer_ends_the_run_before_anything_is_written(
    in_folder: Path, uri: str
):
    with pytest.raises(
        ValueError, match=r"run\.mlflow must name an MLflow server that answers .* received '" + uri
    ):
        train(experiment(in_folder, run__mlflow=uri), LocalCommunicator())
    assert not (in_folder / "run").exists()


def test_a_server_that_goes_away_later_does_not_end_the_run(
    in_database: Path, capsys: pytest.CaptureFixture[str]
):
    record = make_record(experiment(in_database), "single", "epoch")
    record.open()
    (in_database / "mlflow.db").write_bytes(b"no database any more" * 1000)
    record.append({"epoch": 1, "train": {"loss": 1.0}})
    record.append({"epoch": 2, "train": {"loss": 0.5}})
    assert capsys.readouterr().err.count("gets no more of this run") == 1
    assert len((in_database / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_the_key_there_is_no_mlflow(in_folder: Path):
    train(experiment(in_folder, run__mlflow=""), LocalCommunicator())
    assert not (in_folder / "mlflow.db").exists()
    assert not (in_folder / "run" / "mlflow.json").exists()
