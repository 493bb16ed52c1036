"""What a federation's run leaves behind: rows, bytes, times, what silos said, and who judged
what.
"""

import json
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fl_app.exchange import Traffic
from fl_app.failures import Failure
from fl_app.messages import EVALUATE, TRAIN, Answer, Reply, Task
from fl_app.server import rounds
from fl_app.simulation.exchange import exchange_of_silos
from shared.experiment import Experiment
from shared.run_record import read_metrics
from shared.weights import Weights, add, num_bytes, weights_sha256
from tests.arithmetic_exchange import Arithmetic, GivenLosses
from tests.local_exchange import (
    configure,
    final_weights,
    initial_weights,
    rows_without_times,
    run,
    wine_silos,
)

NUM_BYTES = 4 * (13 * 3 + 3)  # of the linear model on wine: 13 columns, 3 classes, float32
NAMES = ["silo-0", "silo-1", "silo-2"]


def total(weights: Weights) -> float:
    return float(sum(w.sum(dtype=np.float64) for w in weights))


def rows_of_silos(experiment: Experiment) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (experiment.run_directory / "silos.jsonl").read_text().splitlines()
    ]


# --- rows


def test_rows_hold_what_was_trained_and_judged_in_each_round(tmp_path: Path):
    experiment = configure(tmp_path)
    result = run(experiment, Arithmetic())
    rows = rows_without_times(experiment)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("cohort") for row in rows] == [None, NAMES, NAMES, NAMES]
    for row in rows[1:]:
        assert row["train"]["loss"] == pytest.approx((0.1 * 1 + 0.2 * 2 + 0.3 * 3) / 6)
        assert "failures" not in row
    assert "train" not in rows[0]
    assert (result["num_silos"], result["silos"], result["rounds"]) == (3, NAMES, 3)


def test_the_validation_of_a_rounds_weights_is_recorded_with_that_round_although_it_comes_later(
    tmp_path: Path,
):
    experiment = configure(tmp_path)
    exchange = Arithmetic()
    result = run(experiment, exchange)
    # what was sent with round r + 1, or with the final evaluation, are the weights that round r
    # ended with
    for row, weights in zip(rows_without_times(experiment), exchange.seen, strict=True):
        # silo i judges them as i + total, with 2 (i + 1) examples: (2 * 0 + 4 * 1 + 6 * 2) / 12 =
        # 4/3
        assert row["validation"]["loss"] == pytest.approx(total(weights) + 4 / 3)
    assert weights_sha256(exchange.seen[0]) == weights_sha256(initial_weights(experiment))
    assert weights_sha256(exchange.seen[3]) == weights_sha256(final_weights(experiment))
    assert result["metrics"]["validation"] == rows_without_times(experiment)[3]["validation"]


def test_a_silo_that_failed_is_named_with_its_reason_in_the_row_and_counts_in_nothing_else(
    tmp_path: Path,
):
    experiment = configure(tmp_path, {"federation.min_replies": 1})
    run(experiment, Arithmetic(fails_in_round=2))
    rows = rows_without_times(experiment)
    assert [row.get("failures") for row in rows] == [None, None, {"silo-1": "it vanished"}, None]
    assert rows[2]["cohort"] == ["silo-0", "silo-2"]
    assert rows[2]["train"]["loss"] == pytest.approx((0.1 * 1 + 0.3 * 3) / 4)
    assert [row["silo"] for row in rows_of_silos(experiment) if row["round"] == 2] == [
        "silo-0",
        "silo-2",
    ]


def test_the_server_tests_every_rounds_weights_on_the_examples_that_no_silo_has(tmp_path: Path):
    experiment = configure(
        tmp_path, {"federation.evaluate_on_server": True, "federation.num_rounds": 1}
    )
    result = run(experiment, Arithmetic())
    rows = rows_without_times(experiment)
    assert {"loss", "accuracy"} == set(rows[0]["test"]) == set(rows[1]["test"])
    assert result["metrics"]["test"] == rows[1]["test"] != rows[0]["test"]
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["metrics"] == result["metrics"]
    assert saved["weights_sha256"] == weights_sha256(final_weights(experiment))


def test_silos_that_do_not_evaluate_send_no_validation(tmp_path: Path):
    experiment = configure(
        tmp_path, {"federation.evaluate_on_silos": False, "federation.num_rounds": 1}
    )
    (silo,) = wine_silos(experiment, 1)
    assert len(silo.validation) > 0
    result = run(experiment, exchange_of_silos(experiment, [silo]))
    assert result["metrics"] == {}
    assert all("validation" not in row for row in rows_without_times(experiment))


# --- bytes


@pytest.mark.parametrize("cohort_size", [0, 2])
def test_bytes_are_counted_down_and_up_each_link_in_every_round(tmp_path: Path, cohort_size: int):
    experiment = configure(
        tmp_path, {"federation.cohort_size": cohort_size, "federation.min_silos": 3}
    )
    result = run(experiment, Arithmetic())
    assert num_bytes(initial_weights(experiment)) == NUM_BYTES
    per_round = 2 * (cohort_size or 3) * NUM_BYTES
    assert [row["bytes_sent"] for row in rows_without_times(experiment)] == [
        0,
        per_round,
        2 * per_round,
        3 * per_round,
    ]
    assert result["bytes_sent"] == 3 * per_round


def test_what_is_sent_to_silos_that_do_not_answer_counts_and_what_they_do_not_send_does_not(
    tmp_path: Path,
):
    experiment = configure(tmp_path, {"federation.min_replies": 2})
    run(experiment, Arithmetic(fails_in_round=2))
    sent = [row["bytes_sent"] / NUM_BYTES for row in rows_without_times(experiment)]
    assert sent == [0, 3 + 3, 6 + 3 + 2, 11 + 3 + 3]


def test_over_selected_silos_cost_only_the_way_down(tmp_path: Path):
    changes = {
        "federation.cohort_size": 2,
        "federation.over_selection": 1,
        "federation.min_silos": 3,
    }
    experiment = configure(tmp_path, changes)
    result = run(experiment, Arithmetic())
    assert result["bytes_sent"] == 3 * (3 + 2) * NUM_BYTES
    assert [row.get("cohort") for row in rows_without_times(experiment)] == [
        None,
        *[["silo-0", "silo-1"]] * 3,
    ]


# --- times


class TakesTime(Arithmetic):
    """On a clock of its own: each reply comes 2 s after the one before, of which 0.25 s are the
    server's transfer.
    """

    now = 0.0

    def next(self, timeout_s: float) -> Reply | None:
        self.now += 2.0
        self.traffic = Traffic(self.traffic.num_bytes, self.traffic.seconds + 0.25)
        return super().next(timeout_s)


@pytest.mark.parametrize("num_silos", [2, 3])
def test_what_a_round_took_is_the_slowest_silos_computing_the_transfer_and_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_silos: int
):
    exchange = TakesTime(num_silos)
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: exchange.now))
    experiment = configure(tmp_path)
    run(experiment, exchange)
    took, transfer, compute = (
        2.0 * num_silos,
        0.25 * num_silos,
        0.5 * num_silos,
    )  # silo i computes 0.5 (i + 1) s
    expected = {
        "round": took,
        "compute": compute,
        "wait": took - transfer - compute,
        "transfer": transfer,
    }
    rows = read_metrics(experiment.run_directory)
    assert [row.get("timing") for row in rows] == [None, expected, expected, expected]


def test_times_of_a_real_round_add_up(tmp_path: Path):
    experiment = configure(tmp_path, {"federation.num_rounds": 1})
    run(experiment, exchange_of_silos(experiment, wine_silos(experiment, 1)))
    timing = read_metrics(experiment.run_directory)[1]["timing"]
    assert timing["compute"] > 0.0
    assert timing["compute"] + timing["wait"] + timing["transfer"] == pytest.approx(
        timing["round"], abs=2e-4
    )


def test_a_silo_that_says_it_computed_for_longer_than_the_round_took_leaves_no_negative_wait(
    tmp_path: Path,
):
    experiment = configure(tmp_path, {"federation.num_rounds": 1})
    run(experiment, Arithmetic())
    timing = read_metrics(experiment.run_directory)[1]["timing"]
    assert (timing["compute"], timing["wait"]) == (1.5, 0.0)


# --- what each silo said


def test_what_each_silo_said_is_kept_by_round_and_silo(tmp_path: Path):
    experiment = configure(tmp_path)
    exchange = Arithmetic(num_silos=2, reverse=True)
    run(experiment, exchange)
    rows = rows_of_silos(experiment)
    assert [(row["round"], row["silo"]) for row in rows] == [
        (r, f"silo-{i}") for r in (1, 2, 3) for i in (0, 1)
    ]
    for row in rows:
        i, sent = int(row["silo"][-1]), exchange.seen[row["round"] - 1]
        assert row == {
            "round": row["round"],
            "silo": f"silo-{i}",
            "num_examples": i + 1,
            "num_validation": 2 * (i + 1),
            "train": {"loss": 0.1 * (i + 1)},
            "validation": {"loss": i + total(sent)},
            "seconds": 0.5 * (i + 1),
        }


def test_a_resumed_run_goes_on_with_what_silos_said_after_its_checkpoint(tmp_path: Path):
    run(configure(tmp_path, {"federation.num_rounds": 2}), Arithmetic())
    with (tmp_path / "run" / "silos.jsonl").open(
        "a"
    ) as file:  # as a crash before the next checkpoint leaves them
        file.write('{"round": 3, "silo": "silo-0"}\n{"round": 3, "sil')
    resumed, undisturbed = configure(tmp_path, resume=True), configure(tmp_path / "undisturbed")
    run(resumed, Arithmetic())
    run(undisturbed, Arithmetic())
    assert rows_of_silos(resumed) == rows_of_silos(undisturbed)


# --- each silo's model at each silo


def test_each_silos_model_is_judged_by_each_silo(tmp_path: Path):
    """A silo's model: one more round of its own from the final weights."""
    experiment = configure(
        tmp_path, {"federation.cross_site_evaluation": True, "federation.num_rounds": 2}
    )
    result = run(experiment, Arithmetic())
    weights = final_weights(experiment)
    assert sorted(result["cross_site"]) == NAMES
    for i, model in enumerate(NAMES):
        local = add(
            weights, [np.full_like(w, (i + 1) * 3) for w in weights]
        )  # silo i's update of round 3
        assert result["cross_site"][model] == {
            name: {"loss": j + total(local)} for j, name in enumerate(NAMES)
        }
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["cross_site"] == result["cross_site"]
    assert saved["weights_sha256"] == weights_sha256(weights)


def test_the_models_of_silos_begin_with_the_best_weights_if_these_are_restored(tmp_path: Path):
    changes = {"federation.cross_site_evaluation": True, "federation.restore_best": True}
    exchange = GivenLosses([3.0, 1.0, 2.0, 2.0])  # by rounds done: each adds 1 to the weights
    result = run(configure(tmp_path, changes), exchange)
    assert result["cross_site"]["silo-0"]["silo-1"] == {"loss": 2.0}  # of round 1 and one more


def test_a_silo_that_is_gone_at_the_end_is_left_out_of_the_last_evaluation(tmp_path: Path, capsys):
    """What was trained is kept, with the metrics of those that answer."""

    class LosesOne(Arithmetic):
        def respond(self, silo: str, task: Task) -> Answer | Failure:
            if task.kind == EVALUATE and silo == "silo-2":
                return Failure("it is no longer connected")
            return super().respond(silo, task)

    experiment = configure(tmp_path)
    result = run(experiment, LosesOne())
    # silo i judges as i + total, with 2 (i + 1) examples: (2 * 0 + 4 * 1) / 6 = 2/3
    assert result["metrics"]["validation"]["loss"] == pytest.approx(
        total(final_weights(experiment)) + 2 / 3
    )
    assert (tmp_path / "run" / "model.keras").is_file()
    assert (
        "silo 'silo-2' is left out of the evaluation: it is no longer connected"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("garbled", [False, True])
def test_a_silo_that_fails_when_its_own_model_is_asked_for_does_not_cost_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], garbled: bool
):
    class FailsAtTheEnd(Arithmetic):
        def respond(self, silo: str, task: Task) -> Answer | Failure:
            answer = super().respond(silo, task)
            if task.kind == TRAIN and task.round == 4 and silo == "silo-1":
                assert isinstance(answer, Answer)
                return replace(answer, arrays=()) if garbled else Failure("it vanished")
            return answer

    experiment = configure(tmp_path, {"federation.cross_site_evaluation": True})
    result = run(experiment, FailsAtTheEnd())
    assert sorted(result["cross_site"]) == ["silo-0", "silo-2"]
    assert sorted(result["cross_site"]["silo-0"]) == ["silo-0", "silo-1", "silo-2"]
    assert "cross-site evaluation goes without silo 'silo-1': " in capsys.readouterr().out
    assert (tmp_path / "run" / "model.keras").is_file()


# --- what silos are asked


def test_silos_are_asked_for_the_round_and_given_the_time_of_a_round(tmp_path: Path):
    asked: list[tuple[Any, ...]] = []

    class Remembers(Arithmetic):
        def post(self, tasks: Mapping[str, Task], timeout_s: float) -> None:
            task = tasks[NAMES[0]]
            if task.kind == TRAIN:
                asked.append((list(tasks), task.round, task.body["evaluate"], timeout_s))
            super().post(tasks, timeout_s)

    run(
        configure(tmp_path, {"federation.num_rounds": 2, "federation.round_timeout_s": 7.5}),
        Remembers(),
    )
    assert asked == [(NAMES, 1, True, 7.5), (NAMES, 2, True, 7.5)]


def test_no_update_stays_in_memory_until_the_next_one_comes(tmp_path: Path):
    """So a round needs the memory of one update and a sum, however many silos there are."""
    updates: list[weakref.ref[np.ndarray]] = []

    class Watches(Arithmetic):
        def update(self, i: int, round_number: int, weights: Weights) -> Weights:
            assert all(update() is None for update in updates)
            made = super().update(i, round_number, weights)
            updates.append(weakref.ref(made[0]))
            return made

    run(configure(tmp_path, {"federation.num_rounds": 1}), Watches(num_silos=5))
    assert len(updates) == 5
