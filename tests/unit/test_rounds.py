"""The round loop, with silos in this process. Over real Flower: tests/federation."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_app import rounds
from fl_app.aggregation import Contribution, weighted_mean
from fl_app.local_training import (
    LocalResult,
    Silo,
    SiloEntry,
    evaluate_at_silo,
    load_silo,
    train_at_silo,
)
from fl_app.rounds import FederationError, common_schema, draw_cohort, run_federation
from shared.checkpoint import load_checkpoint
from shared.data import Dataset, Schema, load_dataset, shard, split_pool
from shared.data.dataset import split_validation
from shared.data.partition import partition
from shared.data.sources import save_npz
from shared.experiment import Experiment, experiment_from_flat
from shared.run_record import RunRecord, read_metrics
from shared.training import EpochBatches, compile_model, fit_epochs
from shared.weights import Weights, add, max_difference, num_bytes, weights_sha256
from shared.zoo import build_model
from tests.local_exchange import LocalExchange

BASE = {
    "data.name": "wine",
    "model.name": "linear",
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.1,
    "federation.num_rounds": 3,
    "federation.evaluate_on_server": False,
}
# The real trainings below leave out what they do not test: each evaluation costs as much as a training.
TRAIN_ONLY = {"federation.evaluate_on_silos": False}
NUM_BYTES = 4 * (13 * 3 + 3)  # of the linear model on wine: 13 columns, 3 classes, float32


class SilosHere(LocalExchange):
    """Silos that really train, in this process, on the examples they are given."""

    def __init__(self, experiment: Experiment, silos: list[Silo]) -> None:
        self.experiment = experiment
        self.silos = {silo.name: silo for silo in silos}


class Arithmetic:
    """An Exchange without Keras: what a silo answers follows from its number and the weights by simple arithmetic.

    Silo i holds i + 1 examples; its update is (i + 1) times the round's number, its validation loss i + sum(weights).
    """

    def __init__(self, num_silos: int = 3, reverse: bool = False, fails_in_round: int = 0) -> None:
        self.numbers = {f"silo-{i}": i for i in range(num_silos)}
        self.reverse, self.fails_in_round = reverse, fails_in_round
        self.seen: list[Weights] = []

    def roll_call(self, min_silos: int) -> dict[str, SiloEntry]:
        return self._each(list(self.numbers), lambda i: SiloEntry(f"silo-{i}", Schema((13,), 3), i + 1))

    def train(self, silos: list[str], round_number: int, schema: Schema, weights: Weights) -> dict[str, LocalResult]:
        if round_number == self.fails_in_round:
            raise FederationError("silo-1 vanished")
        self.seen.append(weights)
        return self._each(silos, lambda i: self._result(i, weights, (i + 1) * round_number))

    def evaluate(self, silos: list[str], schema: Schema, weights: Weights) -> dict[str, LocalResult]:
        self.seen.append(weights)
        return self._each(silos, lambda i: self._result(i, weights, 0))

    def _result(self, i: int, weights: Weights, update: float) -> LocalResult:
        return LocalResult(
            num_examples=i + 1,
            num_validation=2 * (i + 1),
            train={"loss": 0.1 * (i + 1)},
            validation={"loss": i + float(sum(w.sum(dtype=np.float64) for w in weights))},
            update=[np.full_like(w, update) for w in weights],
        )

    def _each(self, silos: list[str], make: Callable[[int], Any]) -> dict[str, Any]:
        return {name: make(self.numbers[name]) for name in sorted(silos, reverse=self.reverse)}


def configure(directory: Path, changes: Mapping[str, Any] = {}, **run: Any) -> Experiment:
    where = {"run.directory": str(directory / "run")} | {f"run.{key}": value for key, value in run.items()}
    return experiment_from_flat(BASE | dict(changes) | where)


def run(experiment: Experiment, exchange: Any) -> dict[str, Any]:
    return run_federation(experiment, exchange, RunRecord(experiment, "flower", "round"))


def final_weights(experiment: Experiment) -> Weights:
    return list(load_checkpoint(experiment.run_directory / "checkpoint.npz", experiment).arrays["weights"])


def initial_weights(experiment: Experiment, schema: Schema = Schema((13,), 3)) -> Weights:  # noqa: B008 (frozen)
    return build_model(experiment.model, schema, experiment.seed).get_weights()


def rows_without_times(experiment: Experiment) -> list[dict[str, Any]]:
    rows = read_metrics(experiment.run_directory)
    return [{key: row[key] for key in row if key != "seconds"} for row in rows]


def wine_silos(experiment: Experiment, num_silos: int) -> list[Silo]:
    """Unequal silos: a Dirichlet split of wine, less the test examples."""
    pool, _ = split_pool(load_dataset(experiment.data), experiment.seed, experiment.data.test_fraction)
    parts = partition(experiment.partition, pool, num_silos, experiment.seed)
    fraction = experiment.data.validation_fraction
    names = [f"silo-{i}" for i in range(num_silos)]
    return [Silo(n, *split_validation(p, experiment.seed, fraction, n)) for n, p in zip(names, parts, strict=True)]


# --- equivalences


def test_one_silo_is_a_plain_loop_of_its_local_training(tmp_path: Path):
    """Of which each round starts with a fresh optimizer, so that no momentum is kept between rounds."""
    changes = {"federation.num_rounds": 2, "federation.local_epochs": 2, "optimizer.momentum": 0.5}
    experiment = configure(tmp_path, TRAIN_ONLY | changes)
    silos = wine_silos(experiment, 1)
    run(experiment, SilosHere(experiment, silos))
    weights = initial_weights(experiment)
    for round_number in (1, 2):
        weights = add(weights, train_at_silo(silos[0], experiment, weights, round_number).update)
    assert weights_sha256(final_weights(experiment)) == weights_sha256(weights)


def test_one_silo_with_an_optimizer_without_memory_is_training_without_rounds(tmp_path: Path):
    """3 rounds of 2 epochs are 6 epochs of the same silo, in the same orders of examples."""
    changes = {"federation.local_epochs": 2, "federation.local_batch_size": 16}
    experiment = configure(tmp_path, TRAIN_ONLY | changes)
    silos = wine_silos(experiment, 1)
    run(experiment, SilosHere(experiment, silos))
    model = compile_model(build_model(experiment.model, silos[0].schema, 0), experiment, silos[0].schema)
    fit_epochs(model, EpochBatches(silos[0].train, 16, seed=0, owner="silo-0"), 0, 6)
    assert max_difference(model.get_weights(), initial_weights(experiment)) > 0.1
    # the update is a rounded float32 difference, so that weights + update may miss the last bit
    assert max_difference(final_weights(experiment), model.get_weights()) < 1e-6


def test_one_step_on_the_full_batch_of_every_silo_is_central_sgd_on_the_union(tmp_path: Path):
    changes = {
        "data.validation_fraction": 0.0,
        "partition.kind": "dirichlet",
        "federation.num_rounds": 5,
        "federation.local_batch_size": 0,
    }
    experiment = configure(tmp_path, changes)
    silos = wine_silos(experiment, 3)
    assert len({len(silo.train) for silo in silos}) == 3  # unequal, so that weights count
    run(experiment, SilosHere(experiment, silos))
    pool, _ = split_pool(load_dataset(experiment.data), experiment.seed, experiment.data.test_fraction)
    model = compile_model(build_model(experiment.model, pool.schema, experiment.seed), experiment, pool.schema)
    fit_epochs(model, EpochBatches(pool, 0, seed=0), 0, 5)
    assert max_difference(model.get_weights(), initial_weights(experiment)) > 0.1
    # float32 sums over other groups of examples, in 5 steps with entries of about 1
    assert max_difference(final_weights(experiment), model.get_weights()) < 1e-5


def test_resuming_after_every_round_ends_as_the_undisturbed_run_bit_by_bit(tmp_path: Path):
    """Really trained, by one silo of two in each round; the run is copied before each round, as a crash leaves it."""

    class CopiesTheRun(SilosHere):
        def train(self, silos: list[str], round_number: int, *task: Any) -> dict[str, LocalResult]:
            shutil.copytree(tmp_path / "run", tmp_path / f"before round {round_number}" / "run")
            return super().train(silos, round_number, *task)

    changes = TRAIN_ONLY | {"federation.cohort_size": 1, "federation.min_silos": 2}
    undisturbed = configure(tmp_path, changes)
    silos = wine_silos(undisturbed, 2)
    run(undisturbed, CopiesTheRun(undisturbed, silos))
    assert rows_without_times(undisturbed)[3]["train"]["accuracy"] > 0.5
    for round_number in (2, 3):
        resumed = configure(tmp_path / f"before round {round_number}", changes, resume=True)
        result = run(resumed, SilosHere(resumed, silos))
        assert result["rounds"] == 3
        assert weights_sha256(final_weights(resumed)) == weights_sha256(final_weights(undisturbed))
        assert rows_without_times(resumed) == rows_without_times(undisturbed)


def test_more_rounds_can_follow_a_finished_run(tmp_path: Path):
    long = configure(tmp_path / "long", {"federation.num_rounds": 5})
    run(long, Arithmetic())
    run(configure(tmp_path, {"federation.num_rounds": 2}), Arithmetic())
    more = configure(tmp_path, {"federation.num_rounds": 5}, resume=True)
    run(more, Arithmetic())
    assert weights_sha256(final_weights(more)) == weights_sha256(final_weights(long))
    assert rows_without_times(more) == rows_without_times(long)


def test_the_order_in_which_silos_answer_changes_nothing(tmp_path: Path):
    """Their means, 0.1 + 0.4 + 0.9, are a float sum that does depend on its order."""
    forwards, backwards = configure(tmp_path / "a"), configure(tmp_path / "b")
    results = [run(forwards, Arithmetic()), run(backwards, Arithmetic(reverse=True))]
    assert results[0] == results[1]
    assert weights_sha256(final_weights(forwards)) == weights_sha256(final_weights(backwards))
    assert rows_without_times(forwards) == rows_without_times(backwards)


def test_a_round_adds_the_weighted_mean_of_the_updates(tmp_path: Path):
    experiment = configure(tmp_path)
    run(experiment, Arithmetic())
    # in round r: (1 * 1 r + 2 * 2 r + 3 * 3 r) / 6 = 14/6 r; over rounds 1 to 3: 14/6 * 6 = 14
    moved = [w - w0 for w, w0 in zip(final_weights(experiment), initial_weights(experiment), strict=True)]
    for change in moved:
        np.testing.assert_allclose(change, 14.0, rtol=1e-5)


# --- what a run records


def test_rows_hold_what_was_trained_and_judged_in_each_round(tmp_path: Path):
    experiment = configure(tmp_path)
    exchange = Arithmetic()
    result = run(experiment, exchange)
    rows = rows_without_times(experiment)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("cohort") for row in rows] == [None, *[["silo-0", "silo-1", "silo-2"]] * 3]
    for row in rows[1:]:
        assert row["train"]["loss"] == pytest.approx((0.1 * 1 + 0.2 * 2 + 0.3 * 3) / 6)
    assert "train" not in rows[0]
    assert (result["num_silos"], result["silos"], result["rounds"]) == (3, ["silo-0", "silo-1", "silo-2"], 3)


def test_the_validation_of_a_rounds_weights_is_recorded_with_that_round_although_silos_tell_it_a_round_later(
    tmp_path: Path,
):
    experiment = configure(tmp_path)
    exchange = Arithmetic()
    result = run(experiment, exchange)
    # what was sent with round r + 1, or with the final evaluation, are the weights that round r ended with
    for row, weights in zip(rows_without_times(experiment), exchange.seen, strict=True):
        total = float(sum(w.sum(dtype=np.float64) for w in weights))
        # silo i judges them as i + total, with 2 (i + 1) examples: (2 * 0 + 4 * 1 + 6 * 2) / 12 = 4/3
        assert row["validation"]["loss"] == pytest.approx(total + 4 / 3)
    assert weights_sha256(exchange.seen[0]) == weights_sha256(initial_weights(experiment))
    assert weights_sha256(exchange.seen[3]) == weights_sha256(final_weights(experiment))
    assert result["metrics"]["validation"] == rows_without_times(experiment)[3]["validation"]


@pytest.mark.parametrize("cohort_size", [0, 2])
def test_bytes_are_counted_down_and_up_each_link_in_every_round(tmp_path: Path, cohort_size: int):
    experiment = configure(tmp_path, {"federation.cohort_size": cohort_size, "federation.min_silos": 3})
    result = run(experiment, Arithmetic())
    assert num_bytes(initial_weights(experiment)) == NUM_BYTES
    per_round = 2 * (cohort_size or 3) * NUM_BYTES
    assert [row["bytes_sent"] for row in rows_without_times(experiment)] == [0, per_round, 2 * per_round, 3 * per_round]
    assert result["bytes_sent"] == 3 * per_round


def test_the_server_tests_every_rounds_weights_on_the_examples_that_no_silo_has(tmp_path: Path):
    experiment = configure(tmp_path, {"federation.evaluate_on_server": True, "federation.num_rounds": 1})
    result = run(experiment, Arithmetic())
    rows = rows_without_times(experiment)
    assert {"loss", "accuracy"} == set(rows[0]["test"]) == set(rows[1]["test"])
    assert result["metrics"]["test"] == rows[1]["test"] != rows[0]["test"]
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["metrics"] == result["metrics"]
    assert saved["weights_sha256"] == weights_sha256(final_weights(experiment))


def test_silos_that_do_not_evaluate_send_no_validation(tmp_path: Path):
    experiment = configure(tmp_path, {"federation.evaluate_on_silos": False, "federation.num_rounds": 1})
    (silo,) = wine_silos(experiment, 1)
    assert len(silo.validation) > 0
    result = run(experiment, SilosHere(experiment, [silo]))
    assert result["metrics"] == {}
    assert all("validation" not in row for row in rows_without_times(experiment))


# --- what goes wrong


class NobodyMayCall:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


def test_resuming_what_never_ran_is_refused_before_any_silo_is_called(tmp_path: Path):
    with pytest.raises(ValueError, match="Nothing to resume"):
        run(configure(tmp_path, resume=True), NobodyMayCall())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_refused_before_any_silo_is_called(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(ValueError, match="exists already"):
        run(configure(tmp_path), NobodyMayCall())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("failing_round", [1, 2, 3])
def test_a_federation_that_fails_in_a_round_can_be_resumed_from_the_round_before(tmp_path: Path, failing_round: int):
    undisturbed = configure(tmp_path / "undisturbed")
    run(undisturbed, Arithmetic())
    with pytest.raises(FederationError, match="silo-1 vanished"):
        run(configure(tmp_path), Arithmetic(fails_in_round=failing_round))
    resumed = configure(tmp_path, resume=True)
    run(resumed, Arithmetic())
    assert weights_sha256(final_weights(resumed)) == weights_sha256(final_weights(undisturbed))
    assert rows_without_times(resumed) == rows_without_times(undisturbed)


def test_a_run_whose_server_crashed_before_its_checkpoint_forgets_the_rows_of_that_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    run(configure(tmp_path, {"federation.num_rounds": 1}), Arithmetic())
    monkeypatch.setattr(rounds, "_save", crash)
    with pytest.raises(KeyboardInterrupt):
        run(configure(tmp_path, resume=True), Arithmetic())
    monkeypatch.undo()
    assert [row["round"] for row in rows_without_times(configure(tmp_path))] == [0, 1, 2]
    resumed = configure(tmp_path, resume=True)
    run(resumed, Arithmetic())
    undisturbed = configure(tmp_path / "undisturbed")
    run(undisturbed, Arithmetic())
    assert rows_without_times(resumed) == rows_without_times(undisturbed)
    lines = (resumed.run_directory / "metrics.jsonl").read_text().splitlines()
    assert sum("cohort" in line for line in lines) == 3  # one for each round


def test_a_silo_whose_training_diverged_ends_the_round_with_its_name_and_the_checkpoint_stays(tmp_path: Path):
    class Diverges(Arithmetic):
        def train(self, silos: list[str], round_number: int, *task: Any) -> dict[str, LocalResult]:
            results = super().train(silos, round_number, *task)
            if round_number == 2:
                results["silo-1"].update[0][0, 0] = np.nan
            return results

    experiment = configure(tmp_path)
    with pytest.raises(ValueError, match="Silo 'silo-1' sent an update that is not finite"):
        run(experiment, Diverges())
    assert load_checkpoint(tmp_path / "run" / "checkpoint.npz", experiment).meta["round"] == 1


def test_a_run_is_resumed_by_the_silos_that_began_it(tmp_path: Path):
    run(configure(tmp_path, {"federation.num_rounds": 1}), Arithmetic(num_silos=3))
    longer = configure(tmp_path, {"federation.num_rounds": 2}, resume=True)
    with pytest.raises(FederationError, match=r"missing: \['silo-2'\], new: \[\].*min_silos = 3"):
        run(longer, Arithmetic(num_silos=2))


# --- cohorts


NAMES = [f"silo-{i}" for i in range(7)]


def cohort_config(size: int, seed: int = 0) -> Experiment:
    return experiment_from_flat({"seed": seed, "federation.cohort_size": size, "federation.min_silos": 7})


@pytest.mark.parametrize("size", [0, 1, 3, 7])
def test_a_cohort_is_so_many_different_silos_whatever_the_order_of_their_names(size: int):
    for round_number in range(1, 20):
        cohort = draw_cohort(cohort_config(size), NAMES, round_number)
        assert len(cohort) == len(set(cohort)) == (size or 7)
        assert set(cohort) <= set(NAMES)
        assert cohort == sorted(cohort) == draw_cohort(cohort_config(size), NAMES[::-1], round_number)


def test_cohorts_differ_by_round_and_by_seed():
    drawn = {
        (seed, tuple(tuple(draw_cohort(cohort_config(3, seed), NAMES, r)) for r in range(1, 6))) for seed in range(3)
    }
    assert len({cohorts for _, cohorts in drawn}) == 3
    assert all(len(set(cohorts)) > 1 for _, cohorts in drawn)


def test_every_silo_is_drawn_equally_often():
    rounds = 700
    drawn = [name for r in range(rounds) for name in draw_cohort(cohort_config(3), NAMES, r)]
    counts = [drawn.count(name) for name in NAMES]
    # binomial: mean 700 * 3/7 = 300, standard deviation sqrt(700 * 3/7 * 4/7) = 13; 4 of them are 52
    assert max(abs(count - 300) for count in counts) < 52
    assert sum(counts) == 3 * rounds


def test_only_the_cohort_trains(tmp_path: Path):
    experiment = configure(tmp_path, {"federation.cohort_size": 1, "federation.min_silos": 3})
    run(experiment, Arithmetic())
    cohorts = [row["cohort"] for row in rows_without_times(experiment)[1:]]
    assert cohorts == [draw_cohort(experiment, ["silo-0", "silo-1", "silo-2"], r) for r in (1, 2, 3)]
    numbers = [int(cohort[0].removeprefix("silo-")) for cohort in cohorts]
    moved = final_weights(experiment)[1] - initial_weights(experiment)[1]
    np.testing.assert_allclose(moved, sum((i + 1) * r for r, i in enumerate(numbers, start=1)), rtol=1e-6)


# --- the schema of a federation


def entry(name: str, *shape: int, num_classes: int = 3) -> SiloEntry:
    return SiloEntry(name, Schema(shape, num_classes), 10)


def test_the_classes_of_a_federation_are_the_union_of_its_parties_classes(make_data: Callable[..., Dataset]):
    silos = [entry("a", 4, num_classes=2), entry("b", 4, num_classes=5), entry("c", 4, num_classes=3)]
    for order in itertools.permutations(silos):
        assert common_schema(list(order), None) == Schema((4,), 5)
    assert common_schema(silos[:1], make_data(3, num_classes=7)) == Schema((4,), 7)
    assert common_schema([entry("a", 4, num_classes=0)], None) == Schema((4,), 0)


def test_parties_with_other_examples_or_another_task_are_named(make_data: Callable[..., Dataset]):
    with pytest.raises(ValueError, match="the same kind of examples") as caught:
        common_schema([entry("a", 4), entry("b", 5), entry("c", 4, num_classes=0)], make_data(3, num_features=6))
    for words in (
        "silo 'a': classification on examples of (4,)",
        "silo 'b': classification on examples of (5,)",
        "silo 'c': regression on examples of (4,)",
        "the server's test data: classification on examples of (6,)",
        "federation.evaluate_on_server = false",
    ):
        assert words in str(caught.value)


def test_a_silo_that_lacks_a_class_trains_the_federations_model(tmp_path: Path, make_data: Callable[..., Dataset]):
    """Its own data knows two classes of three."""
    experiment = configure(tmp_path, {"federation.num_rounds": 1, "federation.evaluate_on_silos": False})
    few, all_three = make_data(20, num_features=13, num_classes=2), make_data(20, num_features=13, seed=1)
    silos = [Silo("few", few, shard(few, 0, 4)), Silo("all", all_three, shard(all_three, 0, 4))]
    run(experiment, SilosHere(experiment, silos))
    assert [w.shape for w in final_weights(experiment)] == [(13, 3), (3,)]


# --- a silo


def test_an_update_is_what_training_added_and_the_metrics_are_of_the_weights_that_came_in(tmp_path: Path):
    experiment = configure(tmp_path)
    (silo,) = wine_silos(experiment, 1)
    weights = initial_weights(experiment)
    before = weights_sha256(weights)
    result = train_at_silo(silo, experiment, weights, 1)
    assert weights_sha256(weights) == before
    assert (result.num_examples, result.num_validation) == (len(silo.train), len(silo.validation))
    assert result.validation == evaluate_at_silo(silo, experiment, weights).validation
    after = evaluate_at_silo(silo, experiment, add(weights, result.update))
    assert after.validation["loss"] < result.validation["loss"]
    mean = weighted_mean({"a": Contribution(result.update, result.num_examples)})
    assert weights_sha256(mean) == weights_sha256(result.update)


def test_a_silo_loads_the_data_that_its_own_node_config_names(tmp_path: Path, make_data: Callable[..., Dataset]):
    save_npz(tmp_path / "own.npz", make_data(40))
    experiment = configure(tmp_path, {"data.validation_fraction": 0.25})
    silo = load_silo({"silo": "hospital-a", "data": str(tmp_path / "own.npz")}, experiment)
    assert (silo.name, len(silo.train), len(silo.validation)) == ("hospital-a", 30, 10)  # a quarter is held out
    rows = {tuple(row) for row in (*silo.train.x, *silo.validation.x)}
    assert rows == {tuple(row) for row in make_data(40).x}


@pytest.mark.parametrize(("missing", "example"), [("silo", "hospital-a"), ("data", "data.csv")])
def test_a_node_config_that_lacks_a_key_is_refused_with_how_to_start_a_supernode(missing: str, example: str):
    complete = {"silo": "a", "data": "wine"}
    for node_config in ({key: value for key, value in complete.items() if key != missing}, complete | {missing: ""}):
        with pytest.raises(ValueError, match=rf"must name '{missing}'.*flower-supernode --node-config.*{example}"):
            load_silo(node_config, Experiment())


def test_a_silo_without_training_examples_is_refused(tmp_path: Path, make_data: Callable[..., Dataset]):
    save_npz(tmp_path / "own.npz", make_data(1))
    experiment = configure(tmp_path, {"data.validation_fraction": 0.7})
    with pytest.raises(ValueError, match=r"'a' has no training examples: 1 in all\. Lower data\.validation_fraction"):
        load_silo({"silo": "a", "data": str(tmp_path / "own.npz")}, experiment)
