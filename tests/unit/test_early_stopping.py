"""What follows from the validation losses of the rounds: when to stop, which weights are the best,
when to look.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from fl_app.messages import TRAIN, LocalResult, Task
from fl_app.server.state import Loss, ServerState, with_validation
from shared.experiment import Experiment
from shared.weights import Weights, weights_sha256
from tests.arithmetic_exchange import Arithmetic, GivenLosses
from tests.local_exchange import configure, final_weights, rows_without_times, run

NAN = math.nan


def watching(
    directory: Path,
    patience: int = 0,
    restore_best: bool = False,
    num_rounds: int = 6,
    evaluate_every: int = 1,
    **run: bool,
) -> Experiment:
    changes = {
        "federation.early_stopping_patience": patience,
        "federation.restore_best": restore_best,
        "federation.num_rounds": num_rounds,
        "federation.evaluate_every": evaluate_every,
    }
    return configure(directory, changes, **run)


def rounds_in(weights: Weights) -> int:
    """How many rounds these weights have behind them: each adds 1 to the biases, which begin at
    0.
    """
    return round(float(weights[-1][0]))


def saved_model(experiment: Experiment, name: str = "model.keras") -> Weights:
    return keras.models.load_model(experiment.run_directory / name, compile=False).get_weights()


# --- stopping


# losses[r] is of the weights after round r, which are judged at the beginning of round r + 1
LOSSES = [5.0, 4.0, 3.0, 3.5, 3.25, 2.0, 6.0]


@pytest.mark.parametrize(
    ("patience", "losses", "rounds_done", "best_round"),
    [
        (
            2,
            LOSSES,
            5,
            5,
        ),  # 3.5 and 3.25 are no better than 3; what round 5 made of it is seen at the end
        (2, [5.0, 4.0, 3.0, 3.5, 3.25, 3.0, 0.0], 5, 2),  # equally good is not better
        (3, LOSSES, 6, 5),  # 2 comes before the third that is no better
        (1, LOSSES, 4, 2),  # stops at once
        (1, [5.0, 6.0, 7.0, 0.0, 0.0, 0.0, 0.0], 2, 0),  # no round helps
        (9, LOSSES, 6, 5),
        (0, LOSSES, 6, 5),  # never stops, but restores the best, and says which it was
        (2, [5.0, 4.0, NAN, NAN, 0.0, 0.0, 0.0], 4, 4),  # what is not a number is no better
        (1, [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25], 6, 6),  # better and better
    ],
)
def test_it_stops_when_the_validation_loss_has_not_fallen_for_so_many_evaluations(
    tmp_path: Path, patience: int, losses: list[float], rounds_done: int, best_round: int
):
    experiment = watching(tmp_path, patience, restore_best=patience == 0)
    result = run(experiment, GivenLosses(losses))
    assert (result["rounds"], result["best_round"]) == (rounds_done, best_round)
    assert rounds_in(final_weights(experiment)) == rounds_done
    assert rounds_in(saved_model(experiment, "best.keras")) == best_round
    assert [row["round"] for row in rows_without_times(experiment)] == list(range(rounds_done + 1))


def test_without_patience_or_restoring_nothing_is_watched(tmp_path: Path):
    experiment = watching(tmp_path)
    result = run(experiment, GivenLosses([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]))
    assert result["rounds"] == 6
    assert "best_round" not in result
    assert not (tmp_path / "run" / "best.keras").exists()


# --- the best weights


@pytest.mark.parametrize("restore_best", [True, False])
def test_the_run_ends_with_its_best_weights_if_these_are_restored_or_else_with_the_last(
    tmp_path: Path, restore_best: bool
):
    losses = [5.0, 4.0, 3.0, 3.5, 3.25, 3.75, 3.125]
    experiment = watching(tmp_path, patience=9, restore_best=restore_best)
    result = run(experiment, GivenLosses(losses))
    ends_with = 2 if restore_best else 6
    assert rounds_in(saved_model(experiment)) == ends_with
    assert result["metrics"]["validation"] == {"loss": losses[ends_with]}
    assert (result["rounds"], result["best_round"]) == (6, 2)
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["weights_sha256"] == weights_sha256(saved_model(experiment))
    assert rows_without_times(experiment)[6]["validation"] == {
        "loss": losses[6]
    }  # the row is of the last weights


def test_the_test_metrics_of_the_result_are_of_the_weights_it_ends_with(tmp_path: Path):
    experiment = watching(tmp_path, restore_best=True, num_rounds=2)
    experiment = configure(tmp_path, experiment.to_flat() | {"federation.evaluate_on_server": True})
    result = run(experiment, GivenLosses([3.0, 1.0, 2.0]))
    rows = rows_without_times(experiment)
    assert result["metrics"]["test"] == rows[1]["test"] != rows[2]["test"]


def test_the_best_model_is_saved_beside_the_last(tmp_path: Path):
    experiment = watching(tmp_path, patience=9, num_rounds=3)
    run(experiment, GivenLosses([3.0, 1.0, 2.0, 1.5]))
    assert (
        rounds_in(saved_model(experiment)),
        rounds_in(saved_model(experiment, "best.keras")),
    ) == (3, 1)


class JudgesNothing(GivenLosses):
    """Silos that are too small to hold any examples back."""

    def result(self, i: int, round_number: int, weights: Weights, evaluate: bool) -> LocalResult:
        return super().result(i, round_number, weights, evaluate=False)


@pytest.mark.parametrize(
    "exchange", [GivenLosses([NAN] * 4), JudgesNothing([])], ids=["no number", "no examples"]
)
def test_a_run_that_no_silo_can_judge_ends_with_its_last_weights(
    tmp_path: Path, exchange: Arithmetic
):
    experiment = watching(tmp_path, restore_best=True, num_rounds=3)
    result = run(experiment, exchange)
    assert result["rounds"] == 3
    assert rounds_in(saved_model(experiment)) == 3
    assert not (tmp_path / "run" / "best.keras").exists()


# --- across a resume


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_resumed_after_any_round_stops_and_restores_as_the_undisturbed_one(
    tmp_path: Path, every: int
):
    class CopiesTheRun(GivenLosses):
        def post(self, tasks: Mapping[str, Task], timeout_s: float) -> None:
            task = next(iter(tasks.values()))
            if task.kind == TRAIN:
                shutil.copytree(tmp_path / "run", tmp_path / f"before {task.round}" / "run")
            super().post(tasks, timeout_s)

    losses = [5.0, 4.0, 3.0, 3.5, 3.25, 3.75, 3.5, 7.0, 8.0, 9.0]
    settings = {"patience": 2, "restore_best": True, "num_rounds": 9, "evaluate_every": every}
    undisturbed = watching(tmp_path, **settings)
    expected = run(undisturbed, CopiesTheRun(losses))
    last = {1: 5, 2: 7}[
        every
    ]  # worse after 3 and 4, seen in 4 and 5; after 4 and 6, seen in 5 and 7
    assert (expected["rounds"], expected["best_round"]) == (last, 2)
    shutil.copytree(
        tmp_path / "run", tmp_path / f"before {last + 1}" / "run"
    )  # the run that has stopped already
    for round_number in range(1, last + 2):
        resumed = watching(tmp_path / f"before {round_number}", **settings, resume=True)
        assert run(resumed, GivenLosses(losses)) == expected
        for name in ("model.keras", "best.keras"):
            assert weights_sha256(saved_model(resumed, name)) == weights_sha256(
                saved_model(undisturbed, name)
            )
        assert rows_without_times(resumed) == rows_without_times(undisturbed)


def test_what_a_shorter_run_judged_at_its_end_does_not_count_when_it_goes_on(tmp_path: Path):
    """Weights after round 3, the best, are judged only by a run that ends there."""
    losses = [5.0, 4.0, 3.0, 1.0, 2.0, 3.0, 2.5]
    settings = {"restore_best": True, "evaluate_every": 2}
    assert run(watching(tmp_path, num_rounds=3, **settings), GivenLosses(losses))["best_round"] == 3
    longer = run(watching(tmp_path, num_rounds=6, resume=True, **settings), GivenLosses(losses))
    undisturbed = run(
        watching(tmp_path / "undisturbed", num_rounds=6, **settings), GivenLosses(losses)
    )
    assert longer == undisturbed
    assert longer["best_round"] == 4


# --- looking every so many rounds


@pytest.mark.parametrize(
    ("every", "judged"), [(1, {0, 1, 2, 3, 4, 5}), (2, {0, 2, 4, 5}), (3, {0, 3, 5}), (9, {0, 5})]
)
def test_weights_are_evaluated_every_so_many_rounds_and_at_the_end(
    tmp_path: Path, every: int, judged: set[int]
):
    changes = {
        "federation.evaluate_every": every,
        "federation.num_rounds": 5,
        "federation.evaluate_on_server": True,
    }
    experiment, exchange = configure(tmp_path, changes), GivenLosses([1.0] * 6, num_silos=2)
    run(experiment, exchange)
    assert sorted(exchange.judged) == sorted([*judged, *judged])  # by each silo once
    rows = rows_without_times(experiment)
    assert {row["round"] for row in rows if "validation" in row} == judged
    assert {row["round"] for row in rows if "test" in row} == judged
    assert [row["round"] for row in rows if "train" in row] == [1, 2, 3, 4, 5]


def test_patience_counts_evaluations_not_rounds(tmp_path: Path):
    losses = [3.0, 9.0, 4.0, 9.0, 5.0, 9.0, 9.0, 9.0, 9.0]
    result = run(
        watching(tmp_path, patience=2, evaluate_every=2, num_rounds=8), GivenLosses(losses)
    )
    assert (result["rounds"], result["best_round"]) == (
        5,
        0,
    )  # after 2 and 4 no better, the latter seen in round 5


# --- which silos are compared


@pytest.mark.parametrize(
    ("later", "is_better"),
    [
        ({"a": (2.0, 10)}, False),  # worse at a; the mean of all falls from 3 to 2
        ({"b": (4.0, 10)}, True),  # better at b; the mean of all rises from 3 to 4
        ({"a": (0.9, 10), "b": (4.9, 10), "c": (99.0, 10)}, True),
        ({"a": (2.0, 1), "b": (4.9, 1000)}, False),
    ],
)
def test_weights_are_compared_over_the_silos_that_have_judged_both(
    later: dict[str, Loss], is_better: bool
):
    weights = [np.zeros(1, np.float32)]
    before = ServerState(weights, round=1)
    state = with_validation(before, {"a": (1.0, 10), "b": (5.0, 10)})
    assert (state.best.step, state.best.loss) == (1, 3.0)
    state = with_validation(replace(state, round=2), later)
    assert state.best.step == (2 if is_better else 1)
    assert state.best.evaluations_since == (0 if is_better else 1)


def test_weights_without_a_common_silo_are_not_compared():
    state = with_validation(ServerState([], round=1), {"a": (1.0, 10)})
    assert with_validation(replace(state, round=2), {"b": (0.1, 10)}) == replace(state, round=2)
    assert with_validation(state, {}) is state


def test_where_cohorts_are_drawn_all_silos_judge_the_weights_that_are_selected(tmp_path: Path):
    """Silo i judges by 10 i + the round's loss: a cohort of silo 0 would always look the best."""

    class Biased(GivenLosses):
        def loss(self, i: int, weights: Weights) -> float:
            return 10 * i + super().loss(i, weights)

    drawn = {"federation.cohort_size": 1, "federation.min_silos": 3}
    changes = {**drawn, "federation.restore_best": True, "federation.num_rounds": 4}
    exchange = Biased([5.0, 4.0, 1.0, 3.0, 2.0], num_silos=3)
    experiment = configure(tmp_path, changes)
    result = run(experiment, exchange)
    assert result["best_round"] == 2
    assert [exchange.judged.count(r) for r in range(5)] == [3, 3, 6, 3, 3]  # the best once more
    validation = [row["validation"]["loss"] for row in rows_without_times(experiment)]
    assert validation == pytest.approx([loss + 10 * 16 / 12 for loss in exchange.losses])


@pytest.mark.parametrize("bad", [-math.inf, NAN, 1e308])
def test_a_loss_that_is_no_number_does_not_win_and_its_silo_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: float
):
    class OneLies(GivenLosses):
        def loss(self, i: int, weights: Weights) -> float:
            return bad if i == 1 else super().loss(i, weights)

    experiment = watching(tmp_path, restore_best=True, num_rounds=3)
    result = run(experiment, OneLies([5.0, 2.0, 3.0, 4.0]))
    assert result["best_round"] == 1
    line = "silo 'silo-1': validation loss not finite, left out of the means"
    assert line in capsys.readouterr().out
    for name in ("metrics.jsonl", "silos.jsonl", "result.json"):
        text = (experiment.run_directory / name).read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
    validation = [row["validation"]["loss"] for row in rows_without_times(experiment)]
    assert validation == [5.0, 2.0, 3.0, 4.0]
