"""The laws of the round loop, with silos in this process. Over real Flower: tests/federation."""

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_app.aggregation.aggregator import Contribution
from fl_app.aggregation.mean import weighted_mean
from fl_app.exchange import Roster
from fl_app.failures import Failure, FederationError
from fl_app.messages import TRAIN, Answer, SiloEntry, Task
from fl_app.server import rounds
from fl_app.server.optimizer import ServerOptimizer, apply_update, initial_state
from fl_app.server.registration import common_schema
from fl_app.server.state import ServerState
from fl_app.silo.data import make_silo
from fl_app.silo.training import epochs_of_round, prepare_data, prepare_trainer
from fl_app.simulation.exchange import exchange_of_silos
from shared.checkpoint import load_checkpoint
from shared.data import Dataset, Schema, encode, load_examples, split
from shared.run_record import read_metrics
from shared.training import EpochBatches, compile_model, fit_epochs
from shared.weights import Weights, add, max_difference, weights_sha256
from shared.zoo import build_model
from tests.arithmetic_exchange import Arithmetic
from tests.local_exchange import (
    WINE,
    configure,
    final_weights,
    initial_weights,
    observed,
    rows_without_times,
    run,
    wine_silos,
)

# The real trainings below leave out what they do not test: each evaluation costs as much as a
# training.
TRAIN_ONLY = {"federation.evaluate_on_silos": False}


# --- equivalences


def test_one_silo_is_a_plain_loop_of_its_local_training(tmp_path: Path):
    """Each round starts with a fresh optimizer, so that no momentum is kept between rounds."""
    changes = {"federation.num_rounds": 2, "federation.local_epochs": 2, "optimizer.momentum": 0.5}
    experiment = configure(tmp_path, TRAIN_ONLY | changes)
    (silo,) = wine_silos(experiment, 1)
    run(experiment, exchange_of_silos(experiment, [silo]))
    weights = initial_weights(experiment)
    for round_number in (1, 2):
        trainer = prepare_trainer(silo.schema, experiment, steps_per_epoch=0)
        data = prepare_data(silo, silo.schema, experiment)
        epochs = epochs_of_round(experiment, round_number)
        weights = add(weights, trainer.train(data, weights, epochs, state={}).update)
    assert weights_sha256(final_weights(experiment)) == weights_sha256(weights)


def test_one_silo_with_an_optimizer_without_memory_is_training_without_rounds(tmp_path: Path):
    """3 rounds of 2 epochs are 6 epochs of the same silo, in the same orders of examples."""
    changes = {"federation.local_epochs": 2, "federation.local_batch_size": 16}
    experiment = configure(tmp_path, TRAIN_ONLY | changes)
    silos = wine_silos(experiment, 1)
    run(experiment, exchange_of_silos(experiment, silos))
    model = compile_model(
        build_model(experiment.model, silos[0].schema, 0), experiment, silos[0].schema
    )
    fit_epochs(
        model,
        EpochBatches(encode(silos[0].train, silos[0].schema), 16, seed=0, owner="silo-0"),
        0,
        6,
    )
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
    run(experiment, exchange_of_silos(experiment, silos))
    central = split(load_examples(experiment.data), experiment.data, experiment.seed)
    model = compile_model(
        build_model(experiment.model, central.schema, experiment.seed), experiment, central.schema
    )
    fit_epochs(model, EpochBatches(central.train, 0, seed=0), 0, 5)
    assert max_difference(model.get_weights(), initial_weights(experiment)) > 0.1
    # float32 sums over other groups of examples, in 5 steps with entries of about 1
    assert max_difference(final_weights(experiment), model.get_weights()) < 1e-5


def test_a_round_adds_the_weighted_mean_of_the_updates(tmp_path: Path):
    experiment = configure(tmp_path)
    run(experiment, Arithmetic())
    # in round r: (1 * 1 r + 2 * 2 r + 3 * 3 r) / 6 = 14/6 r; over rounds 1 to 3: 14/6 * 6 = 14
    moved = [
        w - w0 for w, w0 in zip(final_weights(experiment), initial_weights(experiment), strict=True)
    ]
    for change in moved:
        np.testing.assert_allclose(change, 14.0, rtol=1e-5)


def test_a_round_in_which_a_silo_fails_adds_the_mean_of_the_others(tmp_path: Path):
    experiment = configure(tmp_path, {"federation.min_replies": 2, "federation.num_rounds": 2})
    run(experiment, Arithmetic(fails_in_round=2))
    # round 1: (1 * 1 + 2 * 2 + 3 * 3) / 6 = 14/6; round 2 without silo-1: 2 (1 * 1 + 3 * 3) / 4 = 5
    for w, w0 in zip(final_weights(experiment), initial_weights(experiment), strict=True):
        np.testing.assert_allclose(w - w0, 14 / 6 + 5, rtol=1e-5)


def test_the_order_in_which_silos_answer_changes_nothing(tmp_path: Path):
    """Their means, 0.1 + 0.4 + 0.9, are a float sum that does depend on its order."""
    forwards, backwards = configure(tmp_path / "a"), configure(tmp_path / "b")
    results = [run(forwards, Arithmetic()), run(backwards, Arithmetic(reverse=True))]
    assert results[0] == results[1]
    assert weights_sha256(final_weights(forwards)) == weights_sha256(final_weights(backwards))
    assert rows_without_times(forwards) == rows_without_times(backwards)
    silos = [(e.run_directory / "silos.jsonl").read_text() for e in (forwards, backwards)]
    assert silos[0] == silos[1]


# --- server optimizers


class Drawn(Arithmetic):
    """Random updates, others in each round."""

    def update(self, i: int, round_number: int, weights: Weights) -> Weights:
        rng = np.random.default_rng([i, round_number])
        return [rng.normal(size=w.shape).astype(w.dtype) for w in weights]


@pytest.fixture(params=["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def with_server_optimizer(request: pytest.FixtureRequest) -> dict[str, Any]:
    """An experiment with it, and a model of which not every array is trainable."""
    settings = {"name": request.param, "learning_rate": 0.5, "beta_2": 0.9, "tau": 0.01}
    settings |= {"momentum": 0.75} if request.param != "fedavg" else {}
    section = {f"server_optimizer.{key}": value for key, value in settings.items()}
    return section | {"model.name": "tests.arithmetic_exchange:build_with_statistics"}


def test_rounds_are_steps_of_the_server_optimizer(
    tmp_path: Path, with_server_optimizer: dict[str, Any]
):
    experiment, exchange = configure(tmp_path, with_server_optimizer), Drawn()
    run(experiment, exchange)
    optimizer = ServerOptimizer(**experiment.server_optimizer.model_dump())
    weights = initial_weights(experiment)
    trainable = [
        variable.trainable
        for variable in build_model(experiment.model, WINE, experiment.seed).weights
    ]
    assert sorted(set(trainable)) == [False, True]
    state = initial_state(optimizer, weights, trainable)
    for round_number in (1, 2, 3):
        updates = {
            name: exchange.update(i, round_number, weights) for name, i in exchange.numbers.items()
        }
        mean = weighted_mean(
            {name: Contribution(u, exchange.numbers[name] + 1) for name, u in updates.items()}
        )
        weights, state = apply_update(optimizer, state, weights, mean, trainable)
    assert weights_sha256(final_weights(experiment)) == weights_sha256(weights)


def test_resuming_after_every_round_restores_the_server_optimizer(
    tmp_path: Path, with_server_optimizer: dict[str, Any]
):
    undisturbed = configure(tmp_path / "undisturbed", with_server_optimizer)
    run(undisturbed, Drawn())
    for num_rounds in (1, 2, 3):  # from the checkpoint of the round before
        again = with_server_optimizer | {"federation.num_rounds": num_rounds}
        run(configure(tmp_path, again, resume=num_rounds > 1), Drawn())
    checkpoints = [
        load_checkpoint(d / "run" / "checkpoint.npz", undisturbed)
        for d in (tmp_path, tmp_path / "undisturbed")
    ]
    metas = [{**checkpoint.meta, "run_id": "any"} for checkpoint in checkpoints]
    assert metas[0] == metas[1]
    arrays = [
        {name: weights_sha256(group) for name, group in checkpoint.arrays.items()}
        for checkpoint in checkpoints
    ]
    assert arrays[0] == arrays[1]


# --- resuming


def test_resuming_after_every_round_ends_as_the_undisturbed_run_bit_by_bit(tmp_path: Path):
    """Really trained, by one silo of two in each round; the run is copied before each round, as a
    crash leaves it.
    """

    def copy_the_run(tasks: Mapping[str, Task]) -> None:
        for task in [*tasks.values()][:1]:
            shutil.copytree(tmp_path / "run", tmp_path / f"before round {task.round}" / "run")

    changes = TRAIN_ONLY | {"federation.cohort_size": 1, "federation.min_silos": 2}
    undisturbed = configure(tmp_path, changes)
    silos = wine_silos(undisturbed, 2)
    run(undisturbed, observed(exchange_of_silos(undisturbed, silos), copy_the_run))
    assert rows_without_times(undisturbed)[3]["train"]["accuracy"] > 0.5
    for round_number in (2, 3):
        resumed = configure(tmp_path / f"before round {round_number}", changes, resume=True)
        result = run(resumed, exchange_of_silos(resumed, silos))
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
def test_a_federation_that_fails_in_a_round_can_be_resumed_from_the_round_before(
    tmp_path: Path, failing_round: int
):
    undisturbed = configure(tmp_path / "undisturbed")
    run(undisturbed, Arithmetic())
    with pytest.raises(FederationError, match="silo 'silo-1': it vanished"):
        run(configure(tmp_path), Arithmetic(fails_in_round=failing_round))
    resumed = configure(tmp_path, resume=True)
    run(resumed, Arithmetic())
    assert weights_sha256(final_weights(resumed)) == weights_sha256(final_weights(undisturbed))
    assert rows_without_times(resumed) == rows_without_times(undisturbed)


@pytest.mark.parametrize("crashing_round", [1, 2, 3])
def test_a_run_whose_server_crashed_before_its_checkpoint_forgets_the_rows_of_that_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashing_round: int
):
    save = rounds.save_state

    def crash(experiment: Any, record: Any, state: ServerState) -> None:
        if state.round == crashing_round:
            raise KeyboardInterrupt
        save(experiment, record, state)

    monkeypatch.setattr(rounds, "save_state", crash)
    with pytest.raises(KeyboardInterrupt):
        run(configure(tmp_path), Arithmetic())
    monkeypatch.undo()
    assert [row["round"] for row in rows_without_times(configure(tmp_path))] == list(
        range(crashing_round + 1)
    )
    resumed = configure(tmp_path, resume=True)
    run(resumed, Arithmetic())
    undisturbed = configure(tmp_path / "undisturbed")
    run(undisturbed, Arithmetic())
    assert rows_without_times(resumed) == rows_without_times(undisturbed)
    lines = (resumed.run_directory / "metrics.jsonl").read_text().splitlines()
    assert sum("cohort" in line for line in lines) == 3  # one for each round
    silos = [(e.run_directory / "silos.jsonl").read_text() for e in (resumed, undisturbed)]
    assert silos[0] == silos[1]


def test_a_silo_whose_training_diverged_ends_the_round_with_its_name_and_the_checkpoint_stays(
    tmp_path: Path,
):
    class Diverges(Arithmetic):
        def update(self, i: int, round_number: int, weights: Weights) -> Weights:
            update = super().update(i, round_number, weights)
            if (i, round_number) == (1, 2):
                update[0][0, 0] = np.nan
            return update

    experiment = configure(tmp_path)
    with pytest.raises(
        FederationError, match=r"silo 'silo-1': an update must be finite.*received nan"
    ):
        run(experiment, Diverges())
    assert load_checkpoint(tmp_path / "run" / "checkpoint.npz", experiment).meta["round"] == 1


class LosesAConnection(Arithmetic):
    """In round 2 the connection to silo-1 is lost, `num_times` in a row."""

    def __init__(self, num_times: int, comes_back: bool = True) -> None:
        super().__init__()
        self.num_times = num_times
        self.comes_back = comes_back
        self.attempts: list[tuple[int, int]] = []  # (round, attempt) of silo-0's tasks

    def respond(self, silo: str, task: Task) -> Answer | Failure:
        if task.kind == TRAIN and silo == "silo-0":
            self.attempts.append((task.round, task.attempt))
        is_lost = task.round == 2 and task.attempt < self.num_times
        if task.kind == TRAIN and silo == "silo-1" and is_lost:
            return Failure("it is no longer connected", is_disconnected=True)
        return super().respond(silo, task)

    def silos(self) -> Roster:
        entries = super().silos().entries
        is_gone = self.attempts and not self.comes_back
        return Roster({n: e for n, e in entries.items() if not (is_gone and n == "silo-1")})


@pytest.mark.parametrize("num_times", [1, rounds.MAX_RETRIES])
def test_a_round_is_repeated_if_silos_that_were_lost_are_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_times: int
):
    undisturbed = configure(tmp_path / "undisturbed")
    run(undisturbed, Arithmetic())
    experiment = configure(tmp_path)
    exchange = LosesAConnection(num_times)
    run(experiment, exchange)
    assert exchange.attempts == [(1, 0), *[(2, i) for i in range(num_times + 1)], (3, 0)]
    assert weights_sha256(final_weights(experiment)) == weights_sha256(final_weights(undisturbed))
    assert "round 2 is repeated: silo-1 connected again" in capsys.readouterr().out


@pytest.mark.parametrize(
    "exchange",
    [LosesAConnection(rounds.MAX_RETRIES + 1), LosesAConnection(1, comes_back=False)],
    ids=["too often", "for good"],
)
def test_a_round_is_not_repeated_for_ever(tmp_path: Path, exchange: LosesAConnection):
    experiment = configure(tmp_path)
    with pytest.raises(FederationError, match="silo 'silo-1': it is no longer connected"):
        run(experiment, exchange)
    assert len(exchange.attempts) <= 1 + rounds.MAX_RETRIES + 1
    assert load_checkpoint(tmp_path / "run" / "checkpoint.npz", experiment).meta["round"] == 1


def test_a_silo_that_connects_after_the_roll_call_is_left_out_by_name_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class GetsANewcomer(Arithmetic):
        def silos(self) -> Roster:
            entries = dict(super().silos().entries)
            if self.seen:  # the first round has begun
                entries["late"] = SiloEntry("late", WINE, 10)
            return Roster(entries)

    experiment = configure(tmp_path)
    result = run(experiment, GetsANewcomer())
    line = "silo 'late' is left out: it connected after the roll call"
    assert capsys.readouterr().out.count(line) == 1
    assert result["silos"] == ["silo-0", "silo-1", "silo-2"]


def test_a_round_that_has_its_quorum_is_not_repeated(tmp_path: Path):
    experiment = configure(tmp_path, {"federation.min_replies": 2})
    exchange = LosesAConnection(1)
    run(experiment, exchange)
    assert exchange.attempts == [(1, 0), (2, 0), (3, 0)]


def test_more_replies_than_there_are_silos_are_not_waited_for(tmp_path: Path):
    experiment = configure(tmp_path, {"federation.min_replies": 4})
    with pytest.raises(
        ValueError, match=r"min_replies cannot exceed the silos that take part; received 4 with 3"
    ):
        run(experiment, Arithmetic(num_silos=3))


def test_a_run_is_resumed_by_the_silos_that_began_it(tmp_path: Path):
    run(configure(tmp_path, {"federation.num_rounds": 1}), Arithmetic(num_silos=3))
    longer = configure(tmp_path, {"federation.num_rounds": 2}, resume=True)
    with pytest.raises(FederationError, match=r"missing: \['silo-2'\], new: \[\].*min_silos = 3"):
        run(longer, Arithmetic(num_silos=2))


def test_with_a_quorum_a_run_is_resumed_without_a_silo_that_is_missing(tmp_path: Path, capsys):
    quorum = {"federation.min_replies": 2, "federation.min_silos": 2}
    run(configure(tmp_path, {**quorum, "federation.num_rounds": 1}), Arithmetic(num_silos=3))
    longer = configure(tmp_path, {**quorum, "federation.num_rounds": 2}, resume=True)
    run(longer, Arithmetic(num_silos=2))
    assert "the run goes on without silo-2, who began it" in capsys.readouterr().out
    rows = read_metrics(longer.run_directory)
    assert [row["cohort"] for row in rows if "cohort" in row] == [
        ["silo-0", "silo-1", "silo-2"],
        ["silo-0", "silo-1"],
    ]


def test_a_silo_that_is_new_to_a_resumed_run_is_left_out_by_name(tmp_path: Path, capsys):
    run(configure(tmp_path, {"federation.num_rounds": 1}), Arithmetic(num_silos=2))
    longer = configure(tmp_path, {"federation.num_rounds": 2}, resume=True)
    run(longer, Arithmetic(num_silos=3))
    assert "silo 'silo-2' is left out: it did not begin the run" in capsys.readouterr().out
    rows = read_metrics(longer.run_directory)
    assert [row["cohort"] for row in rows if "cohort" in row] == [["silo-0", "silo-1"]] * 2


# --- the schema of a federation


def entry(name: str, *shape: int, num_classes: int = 3) -> SiloEntry:
    return SiloEntry(name, Schema(shape, num_classes), 10)


def test_the_classes_of_a_federation_are_the_union_of_its_parties_classes(
    make_data: Callable[..., Dataset],
):
    silos = [
        entry("a", 4, num_classes=2),
        entry("b", 4, num_classes=5),
        entry("c", 4, num_classes=3),
    ]
    for order in itertools.permutations(silos):
        assert common_schema(list(order), None) == Schema((4,), 5)
    assert common_schema(silos[:1], make_data(3, num_classes=7).schema) == Schema((4,), 7)
    assert common_schema([entry("a", 4, num_classes=0)], None) == Schema((4,), 0)


def test_parties_with_other_examples_or_another_task_are_named(make_data: Callable[..., Dataset]):
    silos = [entry("a", 4), entry("b", 5), entry("c", 4, num_classes=0)]
    with pytest.raises(ValueError, match="the same kind of examples") as caught:
        common_schema(silos, make_data(3, num_features=6).schema)
    for words in (
        "silo 'a': classification on examples of (4,)",
        "silo 'b': classification on examples of (5,)",
        "silo 'c': regression on examples of (4,)",
        "the server's test data: classification on examples of (6,)",
        "federation.evaluate_on_server = false",
    ):
        assert words in str(caught.value)


def test_a_silo_that_lacks_a_class_trains_the_federations_model(
    tmp_path: Path, make_data: Callable[..., Dataset]
):
    """Its own data knows two classes of three."""
    experiment = configure(
        tmp_path, {"federation.num_rounds": 1, "federation.evaluate_on_silos": False}
    )
    few, all_three = (
        make_data(20, num_features=13, num_classes=2),
        make_data(20, num_features=13, seed=1),
    )
    silos = [make_silo("few", few, experiment), make_silo("all", all_three, experiment)]
    run(experiment, exchange_of_silos(experiment, silos))
    assert [w.shape for w in final_weights(experiment)] == [(13, 3), (3,)]
