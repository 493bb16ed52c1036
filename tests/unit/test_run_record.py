"""The run record: what a run leaves behind, and how a resumed run goes on with it."""

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import keras
import numpy as np
import pytest

from shared.data import Schema
from shared.experiment import Experiment, ModelSection, experiment_from_flat, load_experiment
from shared.run_record import NullRecord, RunRecord, read_metrics, read_result
from shared.weights import weights_sha256
from shared.zoo import build_model


def experiment_in(directory: Path, **run: bool) -> Experiment:
    flat = {"name": "mine", "seed": 3, "run.directory": str(directory / "run")}
    return experiment_from_flat(flat | {f"run.{key}": value for key, value in run.items()})


def opened(directory: Path, step_name: str = "epoch", **run: bool) -> RunRecord:
    record = RunRecord(experiment_in(directory, **run), "single", step_name)
    record.open()
    return record


def rows(directory: Path) -> list[dict]:
    """The rows without their seconds, which are checked apart."""
    return [
        {key: row[key] for key in row if key != "seconds"}
        for row in read_metrics(directory / "run")
    ]


@pytest.fixture
def model() -> keras.Model:
    return build_model(ModelSection(name="linear"), Schema((4,), 3), seed=0)


# --- a new run


def test_a_run_leaves_its_experiment_rows_result_and_model(tmp_path: Path, model: keras.Model):
    record = opened(tmp_path)
    record.append({"epoch": 1, "train": {"loss": 0.5}})
    record.append({"epoch": 2, "train": {"loss": 0.25}})
    record.finish(
        model,
        Schema((4,), 3),
        {"metrics": {"test": {"loss": 0.125}}, "bytes_sent": 17, "epochs": 2},
    )
    names = ["experiment.toml", "metrics.jsonl", "model.keras", "result.json", "schema.json"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    assert load_experiment(tmp_path / "run" / "experiment.toml") == experiment_in(tmp_path)
    assert rows(tmp_path) == [
        {"epoch": 1, "train": {"loss": 0.5}},
        {"epoch": 2, "train": {"loss": 0.25}},
    ]


def test_the_result_tells_metrics_sizes_times_and_identities(tmp_path: Path, model: keras.Model):
    metrics = {"test": {"loss": 0.125}}
    opened(tmp_path).finish(
        model, Schema((4,), 3), {"metrics": metrics, "bytes_sent": 17, "epochs": 2}
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    seconds, versions = result.pop("seconds"), result.pop("versions")
    finished = datetime.fromisoformat(result.pop("finished"))
    assert result == {
        "name": "mine",
        "runtime": "single",
        "num_parameters": 4 * 3 + 3,
        "weights_sha256": weights_sha256(model.get_weights()),
        "experiment_sha256": experiment_in(tmp_path).sha256(),
        "metrics": {"test": {"loss": 0.125}},
        "bytes_sent": 17,
        "epochs": 2,
    }
    assert 0.0 <= seconds < 60.0
    assert timedelta() <= datetime.now(UTC) - finished < timedelta(minutes=1)
    assert (versions["keras"], versions["numpy"]) == (keras.__version__, np.__version__)
    assert {"python", "flwr"} <= set(versions)


def test_numbers_that_are_not_finite_are_null_in_the_files_which_stay_json(
    tmp_path: Path, model: keras.Model
):
    record = opened(tmp_path)
    record.append({"epoch": 1, "train": {"loss": math.inf, "accuracy": 0.5}})
    record.finish(model, Schema((4,), 3), {"metrics": {"test": {"loss": math.nan}}})
    for name in ("metrics.jsonl", "result.json"):
        text = (tmp_path / "run" / name).read_text()
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (row,) = rows(tmp_path)
    assert math.isnan(row["train"].pop("loss"))
    assert row == {"epoch": 1, "train": {"accuracy": 0.5}}
    assert math.isnan(read_result(tmp_path / "run")["metrics"]["test"]["loss"])


def test_the_model_of_a_run_loads_with_its_weights(tmp_path: Path, model: keras.Model):
    opened(tmp_path).finish(model, Schema((4,), 3), {})
    loaded = keras.models.load_model(tmp_path / "run" / "model.keras", compile=False)
    assert weights_sha256(loaded.get_weights()) == weights_sha256(model.get_weights())


def test_rows_are_there_as_soon_as_they_are_appended_with_seconds_that_never_fall(tmp_path: Path):
    record = opened(tmp_path)
    for epoch in range(1, 4):
        record.append({"epoch": epoch})
        assert len(rows(tmp_path)) == epoch
    seconds = [row["seconds"] for row in read_metrics(tmp_path / "run")]
    assert seconds == sorted(seconds)


# --- no run is overwritten


@pytest.mark.parametrize("method", ["check", "open"])
def test_a_directory_that_holds_anything_is_refused_and_left_as_it_is(tmp_path: Path, method: str):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    record = RunRecord(experiment_in(tmp_path), "single", "epoch")
    with pytest.raises(
        ValueError, match=r"run directory .*run exists already\. .*--resume.*--run-dir.*delete"
    ):
        getattr(record, method)()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match=r"run exists already"):
        opened(tmp_path)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("place", ["file/run", "a" * 300, f"new/{'a' * 300}", "/proc/run"])
def test_a_directory_that_cannot_be_written_is_refused_at_the_check_and_nothing_is_left(
    tmp_path: Path, place: str, resume: bool
):
    (tmp_path / "file").write_text("mine")
    flat = {"run.directory": str(tmp_path / place), "run.resume": resume}
    record = RunRecord(experiment_from_flat(flat), "single", "epoch")
    with pytest.raises(
        ValueError, match=r"must be one that can be written to; received .* Choose another with"
    ):
        record.check()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_directory_will_do_and_checking_makes_none(tmp_path: Path):
    RunRecord(experiment_in(tmp_path), "single", "epoch").check()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    opened(tmp_path)
    assert (tmp_path / "run" / "experiment.toml").is_file()


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path: Path, model: keras.Model):
    record = NullRecord(tmp_path / "run")
    record.check()
    record.open()
    record.resume_at(1)
    record.append({"epoch": 1})
    record.finish(model, Schema((4,), 3), {})
    assert list(tmp_path.iterdir()) == []


# --- resuming


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("step_name", ["epoch", "round"])
def test_resuming_keeps_the_rows_up_to_the_step_and_drops_the_later_ones(
    tmp_path: Path, step_name: str, step: int
):
    record = opened(tmp_path, step_name)
    for i in range(1, 4):
        record.append({step_name: i, "run": "first"})
    again = opened(tmp_path, step_name, resume=True)
    again.resume_at(step)
    again.append({step_name: step + 1, "run": "second"})
    kept = [{step_name: i, "run": "first"} for i in range(1, step + 1)]
    assert rows(tmp_path) == [*kept, {step_name: step + 1, "run": "second"}]


def test_the_seconds_of_a_resumed_run_count_on_from_the_step_it_resumes(tmp_path: Path):
    opened(tmp_path)
    lines = [{"epoch": 1, "seconds": 1000.0}, {"epoch": 2, "seconds": 2000.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    again = opened(tmp_path, resume=True)
    again.resume_at(1)
    again.append({"epoch": 2})
    assert 1000.0 <= read_metrics(tmp_path / "run")[-1]["seconds"] < 1060.0


def test_a_run_that_goes_on_has_no_result_until_it_is_finished_again(
    tmp_path: Path, model: keras.Model
):
    opened(tmp_path).finish(model, Schema((4,), 3), {})
    opened(tmp_path, resume=True).resume_at(0)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_resumed_run_records_the_experiment_as_it_is_now(tmp_path: Path):
    opened(tmp_path)
    longer = experiment_from_flat(
        experiment_in(tmp_path, resume=True).to_flat() | {"training.epochs": 99}
    )
    recorded = tmp_path / "run" / "experiment.toml"
    record = RunRecord(longer, "single", "epoch")
    record.open()
    assert load_experiment(recorded).training.epochs == 10  # nothing is resumed yet
    record.resume_at(0)
    assert load_experiment(recorded).training.epochs == 99


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_resuming_keeps_what_silos_said_up_to_the_step_and_drops_the_rest(
    tmp_path: Path, step: int
):
    record = opened(tmp_path, "round")
    for i in range(1, 4):
        record.append_silos({"round": i, "silo": name} for name in "ab")
    again = opened(tmp_path, "round", resume=True)
    again.resume_at(step)
    again.append_silos([{"round": step + 1, "silo": "c"}])
    kept = [{"round": i, "silo": name} for i in range(1, step + 1) for name in "ab"]
    lines = (tmp_path / "run" / "silos.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*kept, {"round": step + 1, "silo": "c"}]


def test_what_a_crash_cut_off_of_what_silos_said_is_dropped(tmp_path: Path):
    opened(tmp_path, "round").append_silos([{"round": 1, "silo": "a"}])
    path = tmp_path / "run" / "silos.jsonl"
    whole = path.read_text()
    for length in range(len(whole)):
        path.write_text(whole + whole[:length])
        opened(tmp_path, "round", resume=True).resume_at(1)
        assert path.read_text().startswith(whole)
        assert path.read_text()[len(whole) :] in ("", whole)


def test_a_run_without_silos_has_no_file_about_them_even_when_it_is_resumed(tmp_path: Path):
    opened(tmp_path).append({"epoch": 1})
    opened(tmp_path, resume=True).resume_at(1)
    assert not (tmp_path / "run" / "silos.jsonl").exists()


# --- reading


def test_lines_of_one_round_are_one_row_and_the_first_to_name_a_key_wins(tmp_path: Path):
    record = opened(tmp_path, "round")
    record.append({"round": 1, "test": {"loss": 0.5}, "bytes_sent": 10})
    record.append({"round": 2, "test": {"loss": 0.25}})
    record.append({"round": 1, "validation": {"loss": 0.75}, "bytes_sent": 99})
    assert rows(tmp_path) == [
        {"round": 1, "test": {"loss": 0.5}, "bytes_sent": 10, "validation": {"loss": 0.75}},
        {"round": 2, "test": {"loss": 0.25}},
    ]


def test_a_round_whose_lines_were_merged_survives_a_resume(tmp_path: Path):
    record = opened(tmp_path, "round")
    for row in ({"round": 1, "a": 1}, {"round": 2, "a": 2}, {"round": 1, "b": 1}):
        record.append(row)
    opened(tmp_path, "round", resume=True).resume_at(1)
    assert rows(tmp_path) == [{"round": 1, "a": 1, "b": 1}]


def test_a_last_line_that_a_crash_cut_off_is_left_out_wherever_it_was_cut(tmp_path: Path):
    record = opened(tmp_path)
    record.append({"epoch": 1, "train": {"loss": 0.5}})
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    for length in range(len(whole) - 1):
        path.write_text(whole + whole.replace('"epoch": 1', '"epoch": 2')[:length])
        assert rows(tmp_path) == [{"epoch": 1, "train": {"loss": 0.5}}]
    again = opened(tmp_path, resume=True)
    again.resume_at(1)
    again.append({"epoch": 2})
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2]


def test_a_run_without_rows_has_none(tmp_path: Path):
    assert read_metrics(tmp_path) == []
