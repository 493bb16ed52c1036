"""A silo: its own data, what it allows, what it answers, and that a warm workbench answers as a cold one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_app import local_training
from fl_app.aggregation import Contribution, weighted_mean
from fl_app.local_training import LocalResult, Silo, Workbench, check_node_config, load_silo
from shared.data import Dataset
from shared.data.arrays import save_npz
from shared.experiment import Experiment, experiment_from_flat
from shared.weights import Weights, add, weights_sha256
from tests.local_exchange import WINE, configure, initial_weights, wine_silos

OWN_MODEL = "tests.arithmetic_exchange:build_with_statistics"


# --- an answer


def test_an_update_is_what_training_added_and_the_metrics_are_of_the_weights_that_came_in(tmp_path: Path):
    experiment, bench = configure(tmp_path), Workbench()
    (silo,) = wine_silos(experiment, 1)
    weights = initial_weights(experiment)
    before = weights_sha256(weights)
    result = bench.train(silo, WINE, experiment, weights, 1, True)
    assert weights_sha256(weights) == before
    assert (result.num_examples, result.num_validation) == (len(silo.train), len(silo.validation))
    assert result.validation == bench.evaluate(silo, WINE, experiment, weights).validation
    after = bench.evaluate(silo, WINE, experiment, add(weights, result.update))
    assert after.validation["loss"] < result.validation["loss"]
    assert (after.train, after.update) == ({}, [])
    assert 0.0 < after.seconds < 60.0
    assert 0.0 < result.seconds < 60.0
    mean = weighted_mean({"a": Contribution(result.update, result.num_examples)})
    # the mean holds multiples of 2^-44
    assert max(float(np.abs(m - u).max()) for m, u in zip(mean, result.update, strict=True)) <= 2.0**-45


def test_a_silo_judges_the_weights_only_if_asked_and_only_with_validation_examples(tmp_path: Path):
    experiment, bench = configure(tmp_path), Workbench()
    (silo,) = wine_silos(experiment, 1)
    weights = initial_weights(experiment)
    assert bench.train(silo, WINE, experiment, weights, 1, False).validation == {}
    bare = replace(silo, name="bare", validation=silo.train.take(np.arange(0)))
    result = bench.train(bare, WINE, experiment, weights, 1, True)
    assert (result.num_validation, result.validation) == (0, {})
    assert bench.evaluate(bare, WINE, experiment, weights).validation == {}


# --- its data


def test_a_silo_loads_the_data_that_its_own_node_config_names(tmp_path: Path, make_data: Callable[..., Dataset]):
    save_npz(tmp_path / "own.npz", make_data(40))
    experiment = configure(tmp_path, {"data.validation_fraction": 0.25})  # whatever data the experiment names
    silo = Workbench().silo({"silo": "hospital-a", "data": str(tmp_path / "own.npz")}, experiment)
    assert (silo.name, len(silo.train), len(silo.validation)) == ("hospital-a", 30, 10)  # a quarter is held out
    rows = {tuple(row) for row in (*silo.train.x, *silo.validation.x)}
    assert rows == {tuple(row) for row in make_data(40).x}


@pytest.mark.parametrize(("missing", "example"), [("silo", "hospital-a"), ("data", "data.csv")])
def test_a_node_config_that_lacks_a_key_is_refused_with_how_to_start_a_supernode(missing: str, example: str):
    complete = {"silo": "a", "data": "wine"}
    for node_config in ({key: value for key, value in complete.items() if key != missing}, complete | {missing: ""}):
        with pytest.raises(ValueError, match=rf"must name '{missing}'.*flower-supernode --node-config.*{example}"):
            Workbench().silo(node_config, Experiment())


def test_a_silo_without_training_examples_is_refused(tmp_path: Path, make_data: Callable[..., Dataset]):
    save_npz(tmp_path / "own.npz", make_data(1))
    experiment = configure(tmp_path, {"data.validation_fraction": 0.7})
    with pytest.raises(ValueError, match=r"'a' has no training examples: 1 in all\. Lower data\.validation_fraction"):
        load_silo("a", str(tmp_path / "own.npz"), experiment)


# --- what it allows


def naming(model: str) -> Experiment:
    return experiment_from_flat({"data.name": "wine", "model.name": model})


@pytest.mark.parametrize(
    "allow", ["", "tests.arithmetic_exchange", "other.module:build", f"x{OWN_MODEL}", OWN_MODEL[:-1]]
)
def test_a_builder_that_the_silo_does_not_allow_is_refused_with_how_to_allow_it(allow: str):
    node_config = {"silo": "a", "data": "wine", "allow": allow}
    with pytest.raises(ValueError, match=r"imports only what it allows: .*; received model\.name = ") as caught:
        Workbench().silo(node_config, naming(OWN_MODEL))
    assert f"allows: {allow or 'nothing'};" in str(caught.value)
    assert str(caught.value).endswith(f"start the silo with --allow {OWN_MODEL}")


def test_a_builder_that_is_not_allowed_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "planted.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="imports only what it allows: nothing"):
        Workbench().silo({"silo": "a", "data": "wine"}, naming("planted:build"))
    assert "planted" not in sys.modules


@pytest.mark.parametrize("allow", [OWN_MODEL, f"other.module:build {OWN_MODEL}", f"{OWN_MODEL}\nother.module:build"])
def test_a_builder_that_is_listed_is_built(allow: str):
    experiment, bench = naming(OWN_MODEL), Workbench()
    silo = bench.silo({"silo": "a", "data": "wine", "allow": allow}, experiment)
    result = bench.evaluate(silo, silo.schema, experiment, initial_weights(experiment))
    assert set(result.validation) == {"loss", "accuracy"}


def test_the_models_of_the_zoo_need_no_leave():
    assert check_node_config({"silo": "a", "data": "wine"}, naming("mlp")) == ("a", "wine")


# --- a warm workbench


def adam(directory: Path) -> Experiment:
    """With dropout, moments, and gradients that are left over at the end of a round: 9 steps in pairs."""
    changes = {
        "model.name": "mlp",
        "model.options": "units = [8]\ndropout_rate = 0.5",
        "optimizer.name": "adam",
        "optimizer.accumulation_steps": 2,
        "federation.local_batch_size": 18,
        "federation.local_epochs": 1,
    }
    return configure(directory / "adam", changes)


def momentum(directory: Path) -> Experiment:
    return configure(directory / "momentum", {"optimizer.momentum": 0.75, "federation.local_epochs": 2})


def full_batch(directory: Path) -> Experiment:
    return configure(directory / "full", {"federation.local_batch_size": 0})


def weights_of(experiment: Experiment, round_number: int) -> Weights:
    """Some that a round might begin with."""
    rng = np.random.default_rng(round_number)
    return [np.float32(w + rng.normal(scale=0.1, size=w.shape)) for w in initial_weights(experiment)]


def answer(bench: Workbench, experiment: Experiment, round_number: int, evaluate: bool) -> dict[str, Any]:
    silo = bench.silo({"silo": "hospital-a", "data": "wine"}, experiment)
    return told(bench.train(silo, WINE, experiment, weights_of(experiment, round_number), round_number, evaluate))


def told(result: LocalResult) -> dict[str, Any]:
    """All but the time it took."""
    return {**vars(result), "update": weights_sha256(result.update), "seconds": 0}


def test_a_warm_workbench_answers_bit_by_bit_as_a_cold_one_whatever_it_did_before(tmp_path: Path):
    a, b, c = adam(tmp_path), momentum(tmp_path), full_batch(tmp_path)
    tasks = [(a, 1, True), (b, 3, False), (a, 3, False), (b, 1, True), (a, 2, True)]
    tasks += [(c, 1, True), (a, 3, False), (b, 2, True)]  # a third one takes the place of another
    warm = Workbench()
    for experiment, round_number, evaluate in tasks:
        found = answer(warm, experiment, round_number, evaluate)
        assert found == answer(Workbench(), experiment, round_number, evaluate)
        assert (found["validation"] != {}) == evaluate


def test_judging_between_two_rounds_changes_nothing(tmp_path: Path):
    experiment, warm = adam(tmp_path), Workbench()
    silo = warm.silo({"silo": "hospital-a", "data": "wine"}, experiment)
    assert -(-len(silo.train) // experiment.federation.local_batch_size) == 9
    for round_number in (2, 1):
        warm.evaluate(silo, WINE, experiment, weights_of(experiment, 5))
        assert answer(warm, experiment, round_number, False) == answer(Workbench(), experiment, round_number, False)


IN_ANOTHER_PROCESS = """
import json, sys
from pathlib import Path
from fl_app.local_training import Workbench
from tests.unit.test_local_training import adam, answer

print(json.dumps(answer(Workbench(), adam(Path(sys.argv[1])), 3, True)))
"""


def test_a_warm_workbench_answers_bit_by_bit_as_a_new_process(tmp_path: Path, project: Path):
    warm = Workbench()
    for round_number in (1, 2):
        answer(warm, adam(tmp_path), round_number, True)
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == answer(warm, adam(tmp_path), 3, True)


@pytest.fixture
def num_prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The experiments that models were compiled for, in order."""
    prepared, prepare = [], local_training.prepare_trainer

    def counted(silo: Silo, schema: Any, experiment: Experiment) -> Any:
        prepared.append(experiment.run_directory.parent.name)
        return prepare(silo, schema, experiment)

    monkeypatch.setattr(local_training, "prepare_trainer", counted)
    return prepared


def test_the_models_of_the_last_two_experiments_stay_compiled(tmp_path: Path, num_prepared: list[str]):
    warm = Workbench()
    for round_number in (1, 2, 3):
        answer(warm, momentum(tmp_path), round_number, True)
        answer(warm, full_batch(tmp_path), round_number, False)
    assert num_prepared == ["momentum", "full"]


def test_data_is_loaded_once_as_long_as_its_file_stays_as_it_is(tmp_path: Path, make_data: Callable[..., Dataset]):
    save_npz(tmp_path / "own.npz", make_data(40))
    bench = Workbench()
    for source in (str(tmp_path / "own.npz"), "wine"):
        node_config = {"silo": "a", "data": source}
        assert bench.silo(node_config, configure(tmp_path)) is bench.silo(node_config, configure(tmp_path))


@pytest.mark.parametrize("what", ["time", "size"])
def test_a_data_file_that_changed_is_read_anew_and_trained_on(
    tmp_path: Path, make_data: Callable[..., Dataset], num_prepared: list[str], what: str
):
    path = tmp_path / "own.npz"
    save_npz(path, make_data(40, num_features=13))
    experiment, bench = configure(tmp_path), Workbench()
    node_config, weights = {"silo": "a", "data": str(path)}, initial_weights(experiment)
    before = path.stat()
    first = told(bench.train(bench.silo(node_config, experiment), WINE, experiment, weights, 1, True))
    save_npz(path, make_data(40 if what == "time" else 60, num_features=13, seed=1))
    changed_at = before.st_mtime_ns + (10**9 if what == "time" else 0)
    os.utime(path, ns=(changed_at, changed_at))
    assert (path.stat().st_size == before.st_size) == (what == "time")
    second = told(bench.train(bench.silo(node_config, experiment), WINE, experiment, weights, 1, True))
    cold = Workbench()
    assert second == told(cold.train(cold.silo(node_config, experiment), WINE, experiment, weights, 1, True))
    assert second["update"] != first["update"]


def test_a_silo_whose_name_or_settings_are_others_is_another_one(tmp_path: Path, make_data: Callable[..., Dataset]):
    bench = Workbench()
    half = configure(tmp_path, {"data.validation_fraction": 0.5})
    a, b = ({"silo": name, "data": "wine"} for name in "ab")
    silos = [bench.silo(a, configure(tmp_path)), bench.silo(b, configure(tmp_path)), bench.silo(a, half)]
    assert [silo.name for silo in silos] == ["a", "b", "a"]
    assert len({silo.validation.sha256() for silo in silos}) == 3


def test_data_that_could_not_be_used_is_looked_at_again(tmp_path: Path, make_data: Callable[..., Dataset]):
    bench, node_config = Workbench(), {"silo": "a", "data": str(tmp_path / "own.npz")}
    with pytest.raises(ValueError, match=r"own\.npz"):
        bench.silo(node_config, configure(tmp_path))
    save_npz(tmp_path / "own.npz", make_data(40))
    assert len(bench.silo(node_config, configure(tmp_path)).train) == 36
