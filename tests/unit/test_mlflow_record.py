"""The copy of a record in MLflow: a real database of its kind, read back by MLflow's client."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from dist_train.collectives import LocalCommunicator
from dist_train.trainer import train
from shared.experiment import Experiment, experiment_from_flat
from shared.mlflow_record import MlflowRecord, make_record


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


def logged_run(folder: Path) -> tuple[MlflowClient, Any]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("logged").experiment_id])
    return client, run


def test_parameters_metrics_by_epoch_and_the_model_are_logged_and_a_resumed_run_goes_on(
    in_folder: Path,
):
    result = train(experiment(in_folder), LocalCommunicator())
    client, run = logged_run(in_folder)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.learning_rate"] == "0.001"
    assert run.data.metrics["final/test/accuracy"] == result["metrics"]["test"]["accuracy"]
    rows = [
        json.loads(line) for line in (in_folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    logged = client.get_metric_history(run.info.run_id, "validation/loss")
    assert [(metric.step, metric.value) for metric in logged] == [
        (r["epoch"], r["validation"]["loss"]) for r in rows
    ]
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"experiment.toml", "schema.json", "result.json", "model.keras"}

    train(experiment(in_folder, training__epochs=3, run__resume=True), LocalCommunicator())
    client, again = logged_run(in_folder)  # still one
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    logged = client.get_metric_history(run.info.run_id, "validation/loss")
    assert [metric.step for metric in logged] == [1, 2, 3]


def test_each_silos_metrics_are_logged_by_round(in_folder: Path):
    record = make_record(experiment(in_folder), "flower", "round")
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
    client, run = logged_run(in_folder)
    (metric,) = client.get_metric_history(run.info.run_id, "silos/north/train/loss")
    assert (metric.step, metric.value) == (4, 0.5)
    assert json.loads((in_folder / "run" / "silos.jsonl").read_text()) == silo


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
    in_folder: Path, capsys: pytest.CaptureFixture[str]
):
    record = make_record(experiment(in_folder), "single", "epoch")
    record.open()
    (in_folder / "mlflow.db").write_bytes(b"no database any more" * 1000)
    record.append({"epoch": 1, "train": {"loss": 1.0}})
    record.append({"epoch": 2, "train": {"loss": 0.5}})
    assert capsys.readouterr().err.count("gets no more of this run") == 1
    assert len((in_folder / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_the_key_there_is_no_mlflow(in_folder: Path):
    train(experiment(in_folder, run__mlflow=""), LocalCommunicator())
    assert not (in_folder / "mlflow.db").exists()
    assert not (in_folder / "run" / "mlflow.json").exists()
