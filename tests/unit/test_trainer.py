"""The trainer in one process: repeated, interrupted, resumed and stopped runs. More ranks:
tests/parallel.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from dist_train import trainer
from dist_train.collectives import LocalCommunicator
from dist_train.trainer import global_batch_size, learning_rate, train
from shared.experiment import Experiment, experiment_from_flat
from shared.run_record import read_metrics
from shared.weights import max_difference, weights_sha256

ALONE = LocalCommunicator()
EPOCHS = 3
# Random layers, an optimizer with a memory, three steps per epoch: all that a resumed run could get
# wrong.
SMALL = {
    "data.name": "wine",
    "model.options": "units = [8]\ndropout_rate = 0.5",
    "optimizer.learning_rate": 0.02,
    "training.epochs": EPOCHS,
    "training.global_batch_size": 48,
}
# Steps that are far too large: the validation loss is at its best early, and then never again.
DIVERGING = SMALL | {
    "optimizer.learning_rate": 1.0,
    "training.epochs": 12,
    "training.early_stopping_patience": 2,
}

Run = Callable[..., dict[str, Any]]


def experiment(directory: Path, flat: dict[str, Any], **run: Any) -> Experiment:
    return experiment_from_flat(
        flat | {"run.directory": str(directory)} | {f"run.{k}": v for k, v in run.items()}
    )


def final_weights(directory: Path, file: str = "model.keras") -> list[np.ndarray]:
    return keras.models.load_model(directory / file, compile=False).get_weights()


def result_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text())


def without_times(directory: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key != "seconds"} for row in read_metrics(directory)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("undisturbed")
    train(experiment(directory, SMALL), ALONE)
    return directory


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that stopped early."""
    directory = tmp_path_factory.mktemp("stopped")
    train(experiment(directory, DIVERGING), ALONE)
    return directory


# --- the same again


def test_training_twice_gives_equal_weights_and_rows_bit_by_bit(undisturbed: Path, tmp_path: Path):
    train(experiment(tmp_path, SMALL), ALONE)
    assert result_of(tmp_path)["weights_sha256"] == result_of(undisturbed)["weights_sha256"]
    assert without_times(tmp_path) == without_times(undisturbed)


def test_a_run_leaves_one_row_per_epoch_a_result_and_the_best_model(undisturbed: Path):
    rows, result = without_times(undisturbed), result_of(undisturbed)
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    for row in rows:
        assert {"loss", "accuracy"} == set(row["train"]) == set(row["validation"])
        assert row["bytes_sent"] == 0  # a process alone sends nothing
    assert {"train", "validation", "test"} == set(result["metrics"])
    assert (result["world_size"], result["epochs"], result["runtime"]) == (1, EPOCHS, "single")
    losses = [row["validation"]["loss"] for row in rows]
    assert result["best_epoch"] == 1 + losses.index(min(losses))
    assert weights_sha256(final_weights(undisturbed)) == result["weights_sha256"]
    assert result["metrics"]["validation"]["loss"] == pytest.approx(losses[-1])
    assert (undisturbed / "best.keras").is_file()


def test_a_run_that_crashes_in_an_epoch_and_is_resumed_ends_as_the_undisturbed_one(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It crashes at the worst time: when the last epoch's row is written and its checkpoint is
    not.
    """

    def crash_in_the_last_epoch(*arguments: Any) -> None:
        *_, progress = arguments
        if progress.epoch == EPOCHS:
            raise KeyboardInterrupt
        save_state(*arguments)

    save_state = trainer.save_state
    monkeypatch.setattr(trainer, "save_state", crash_in_the_last_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(experiment(tmp_path, SMALL), ALONE)
    assert len(read_metrics(tmp_path)) == EPOCHS
    monkeypatch.undo()
    resumed = train(experiment(tmp_path, SMALL, resume=True), ALONE)
    assert resumed["epochs"] == EPOCHS
    assert (
        len((tmp_path / "metrics.jsonl").read_text().splitlines()) == EPOCHS
    )  # the last epoch's first row is gone
    assert result_of(tmp_path)["weights_sha256"] == result_of(undisturbed)["weights_sha256"]
    assert without_times(tmp_path) == without_times(undisturbed)


def test_a_finished_run_can_be_made_longer(undisturbed: Path, tmp_path: Path):
    train(experiment(tmp_path, SMALL | {"training.epochs": 1}), ALONE)
    assert (
        max_difference(final_weights(tmp_path), final_weights(undisturbed)) > 0.01
    )  # the equality below means something
    train(experiment(tmp_path, SMALL, resume=True), ALONE)
    assert result_of(tmp_path)["weights_sha256"] == result_of(undisturbed)["weights_sha256"]
    assert without_times(tmp_path) == without_times(undisturbed)


def test_resuming_a_finished_run_changes_nothing(undisturbed: Path, tmp_path: Path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    train(experiment(tmp_path, SMALL, resume=True), ALONE)
    for key in ("weights_sha256", "metrics", "epochs", "best_epoch"):
        assert result_of(tmp_path)[key] == result_of(undisturbed)[key]
    assert without_times(tmp_path) == without_times(undisturbed)


# --- stopping early


def test_training_stops_when_the_validation_loss_has_not_improved_for_so_many_epochs(stopped: Path):
    losses = [row["validation"]["loss"] for row in read_metrics(stopped)]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < DIVERGING["training.epochs"]  # the patience is 2
    assert (result_of(stopped)["epochs"], result_of(stopped)["best_epoch"]) == (best + 2, best)


def test_a_run_that_stopped_early_does_not_go_on_when_it_is_resumed(stopped: Path, tmp_path: Path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    train(experiment(tmp_path, DIVERGING | {"training.epochs": 50}, resume=True), ALONE)
    assert result_of(tmp_path)["weights_sha256"] == result_of(stopped)["weights_sha256"]
    assert without_times(tmp_path) == without_times(stopped)


def test_restoring_the_best_ends_with_the_weights_of_the_best_epoch(stopped: Path, tmp_path: Path):
    best = result_of(stopped)["best_epoch"]
    train(experiment(tmp_path / "restored", DIVERGING | {"training.restore_best": True}), ALONE)
    train(experiment(tmp_path / "so many", DIVERGING | {"training.epochs": best}), ALONE)
    of_best_epoch = weights_sha256(final_weights(tmp_path / "so many"))
    assert weights_sha256(final_weights(stopped, "best.keras")) == of_best_epoch
    assert weights_sha256(final_weights(stopped)) != of_best_epoch
    restored = result_of(tmp_path / "restored")
    assert (restored["weights_sha256"], restored["best_epoch"]) == (of_best_epoch, best)
    row = read_metrics(stopped)[best - 1]
    assert restored["metrics"]["validation"]["loss"] == pytest.approx(row["validation"]["loss"])


def test_without_validation_examples_there_is_no_best_epoch(tmp_path: Path):
    flat = SMALL | {
        "data.validation_fraction": 0.0,
        "training.epochs": 1,
        "data.test_fraction": 0.0,
    }
    result = train(experiment(tmp_path, flat), ALONE)
    assert (result["best_epoch"], set(result["metrics"])) == (0, {"train"})
    assert not (tmp_path / "best.keras").exists()
    assert "validation" not in read_metrics(tmp_path)[0]


def test_watching_too_few_examples_to_hold_any_out_is_refused(tmp_path: Path):
    flat = DIVERGING | {"data.validation_fraction": 0.001}  # of 142 examples: none
    with pytest.raises(
        ValueError, match=r"need validation examples; .* Raise data\.validation_fraction"
    ):
        train(experiment(tmp_path / "none", flat), ALONE)


# --- what is refused, before a step is taken


def test_an_existing_run_is_refused_and_nothing_of_it_is_written(undisturbed: Path, tmp_path: Path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    before = {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()
    }
    with pytest.raises(ValueError, match="exists already"):
        train(experiment(tmp_path, SMALL | {"training.epochs": 99}), ALONE)
    assert {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()
    } == before


def test_another_experiments_checkpoint_is_refused_and_its_run_left_as_it_is(
    undisturbed: Path, tmp_path: Path
):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError,
        match=r"another experiment: optimizer\.learning_rate is 0\.5 here and 0\.02 there",
    ):
        train(experiment(tmp_path, SMALL | {"optimizer.learning_rate": 0.5}, resume=True), ALONE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_whose_data_changed_is_not_resumed(tmp_path: Path):
    table = tmp_path / "table.csv"
    rows = [f"{i % 7},{i % 5},{i % 2}" for i in range(60)]
    table.write_text("\n".join(["a,b,label", *rows]))
    flat = {
        "data.name": str(table),
        "data.label": "label",
        "model.name": "linear",
        "training.epochs": 1,
    }
    train(experiment(tmp_path / "run", flat), ALONE)
    train(experiment(tmp_path / "run", flat | {"training.epochs": 2}, resume=True), ALONE)

    changed = [row.replace("6,", "5,") for row in rows]
    table.write_text("\n".join(["a,b,label", *changed]))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=r"resumed on the training examples that it began with"):
        train(experiment(tmp_path / "run", flat | {"training.epochs": 3}, resume=True), ALONE)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_resuming_what_never_ran_is_refused_and_leaves_no_directory(tmp_path: Path):
    with pytest.raises(ValueError, match="Nothing to resume"):
        train(experiment(tmp_path / "none", SMALL, resume=True), ALONE)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_experiment_leaves_no_directory(tmp_path: Path):
    with pytest.raises(ValueError, match="Nearest: wine"):
        train(experiment(tmp_path / "none", SMALL | {"data.name": "wime"}), ALONE)
    assert list(tmp_path.iterdir()) == []


# --- the global batch


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_ranks_unless_it_is_given_per_rank(
    world_size: int,
):
    fixed = experiment_from_flat({"training.global_batch_size": 32})
    assert global_batch_size(fixed, world_size, num_examples=100) == 32
    growing = experiment_from_flat(
        {"training.per_rank_batch_size": 8, "training.global_batch_size": 1}
    )
    assert global_batch_size(growing, world_size, num_examples=100) == 8 * world_size


@pytest.mark.parametrize(
    ("batch_size", "num_examples", "world_size"),
    [
        (3, 100, 4),  # fewer examples in a batch than ranks
        (32, 3, 4),  # fewer examples at all
        (5, 51, 4),  # batches of 5 and a rest of 1: the last two are evened out to 3 and 3
    ],
)
def test_a_global_batch_that_leaves_a_rank_without_examples_is_refused(
    batch_size: int, num_examples: int, world_size: int
):
    small = experiment_from_flat({"training.global_batch_size": batch_size})
    with pytest.raises(
        ValueError,
        match=rf"batches of {batch_size} .* for {world_size} ranks.* = {2 * world_size} or",
    ):
        global_batch_size(small, world_size, num_examples)
    assert global_batch_size(small, 1, num_examples) == batch_size


def test_the_remedy_for_a_global_batch_that_is_too_small_helps():
    for world_size in range(1, 9):
        for num_examples in range(2 * world_size, 100):
            remedy = experiment_from_flat({"training.global_batch_size": 2 * world_size})
            assert global_batch_size(remedy, world_size, num_examples) == 2 * world_size


# --- the learning rate


def rate_at(step: int, world_size: int, **training: Any) -> float:
    flat = {"optimizer.learning_rate": 0.1, "training.per_rank_batch_size": 8}
    config = experiment_from_flat(
        flat | {f"training.{key}": value for key, value in training.items()}
    )
    rate = learning_rate(config, world_size, steps_per_epoch=10)
    return float(rate(step)) if callable(rate) else rate


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_rate_is_scaled_by_the_ranks_only_if_it_is_asked_for(world_size: int):
    assert rate_at(0, world_size) == 0.1
    assert rate_at(0, world_size, scale_learning_rate=True) == pytest.approx(0.1 * world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_rate_warms_up_linearly_from_the_base_to_the_scaled_one_and_stays_there(
    world_size: int,
):
    warmup = {"scale_learning_rate": True, "warmup_epochs": 2}  # 2 epochs of 10 steps
    for step in (0, 1, 7, 10, 19, 20, 21, 1000):
        expected = 0.1 * (1 + (world_size - 1) * min(step / 20, 1.0))
        assert rate_at(step, world_size, **warmup) == pytest.approx(expected, rel=1e-6)  # float32


def test_the_optimizers_own_count_of_steps_drives_the_warm_up():
    class OneOfFour(LocalCommunicator):
        """Scales as the first of 4 ranks would; there is nobody to talk to."""

        world_size = 4

    config = experiment_from_flat(
        SMALL
        | {
            "training.per_rank_batch_size": 12,
            "training.scale_learning_rate": True,
            "training.warmup_epochs": 2,
        }
    )
    job = trainer._build(config, OneOfFour())
    assert len(job.batches) == 3  # 128 examples in batches of 4 * 12
    for step, expected in ((0, 0.02), (3, 0.02 * 2.5), (6, 0.08), (9, 0.08)):
        job.model.optimizer.iterations.assign(step)
        assert float(job.model.optimizer.learning_rate) == pytest.approx(expected, rel=1e-6)


def test_ranks_with_other_data_are_refused_before_anything_is_written(tmp_path: Path):
    class BesideAnother(LocalCommunicator):
        """The second rank has loaded something else."""

        def all_gather_object(self, value: Any) -> list[Any]:
            return [value, "f00dcafe"] if isinstance(value, str) else [value, value]

    with pytest.raises(ValueError, match=r"the same training examples; received .*'f00dcafe'"):
        train(experiment(tmp_path / "run", SMALL), BesideAnother())
    assert not (tmp_path / "run").exists()


# --- what the result tells of the classes


def test_the_confusion_of_the_classes_agrees_with_the_accuracy(undisturbed: Path):
    result = result_of(undisturbed)
    counts = np.array(result["confusion"]["counts"])
    assert result["confusion"]["classes"] == ["0", "1", "2"]
    assert counts.sum() == round(0.2 * 178)
    assert np.trace(counts) / counts.sum() == pytest.approx(
        result["metrics"]["test"]["accuracy"], abs=1e-6
    )
    assert (
        counts.sum(axis=1).tolist() != counts.sum(axis=0).tolist()
    )  # else rows and columns could be exchanged


def test_a_regression_has_no_confusion(tmp_path: Path):
    train(experiment(tmp_path, {**SMALL, "data.name": "diabetes", "training.epochs": 1}), ALONE)
    assert "confusion" not in result_of(tmp_path)


def test_a_language_model_leaves_a_sample_of_its_text(tmp_path: Path):
    keys = {
        "data.name": "documentation",
        "data.sequence_length": 64,
        "model.name": "transformer_lm",
    }
    keys |= {
        "model.options": 'preset = "tiny"',
        "training.epochs": 1,
        "training.global_batch_size": 256,
    }
    train(experiment(tmp_path, keys), ALONE)
    result = result_of(tmp_path)
    assert "confusion" not in result
    assert len(result["sample"]["prompt"]) > 5
    assert 60 < len(result["sample"]["text"]) <= 200
    assert 0.1 < result["metrics"]["test"]["accuracy"] < 0.9
