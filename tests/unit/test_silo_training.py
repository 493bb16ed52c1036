"""A silo: its own data, what it allows, its answers, and that a workbench which keeps things from
task to task answers as a new one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from fl_app.aggregation.aggregator import Contribution
from fl_app.aggregation.mean import weighted_mean
from fl_app.failures import MessageError, SiloFailure
from fl_app.messages import DESCRIBE, EVALUATE, TRAIN, LocalResult, SiloEntry, Task, TrainingRequest
from fl_app.silo import workbench
from fl_app.silo.data import Silo, load_silo
from fl_app.silo.handlers import HANDLERS, Site, handle
from fl_app.silo.policy import OPEN, SiloSettings
from fl_app.silo.workbench import Workbench
from shared.data import Dataset, Schema
from shared.data.readers.arrays import save_npz
from shared.experiment import Experiment, experiment_from_flat
from shared.weights import Weights, add, weights_sha256
from tests.local_exchange import WINE, configure, initial_weights, wine_silos

OWN_MODEL = "tests.arithmetic_exchange:build_with_statistics"
HOSPITAL = SiloSettings("hospital-a", "wine")


def train_task(weights: Weights, round_number: int, evaluate: bool, schema: Schema = WINE) -> Task:
    body = TrainingRequest(schema, evaluate).to_body()
    return Task(TRAIN, round=round_number, body=body, arrays=weights)


def evaluate_task(weights: Weights, schema: Schema = WINE) -> Task:
    return Task(EVALUATE, body=TrainingRequest(schema, True).to_body(), arrays=weights)


def result_of(
    task: Task, bench: Workbench, experiment: Experiment, settings: SiloSettings = HOSPITAL
) -> LocalResult:
    result, state = bench.run(task, settings, experiment, {})
    assert state == {}
    return result


def holding(silo: Silo) -> Workbench:
    """A workbench for a silo of these examples."""
    return Workbench(load=lambda settings, experiment: silo)


# --- an answer


def test_an_update_is_what_training_added_and_the_metrics_are_of_the_weights_that_came_in(
    tmp_path: Path,
):
    experiment = configure(tmp_path)
    (silo,) = wine_silos(experiment, 1)
    bench = holding(silo)
    weights = initial_weights(experiment)
    before = weights_sha256(weights)
    result = result_of(train_task(weights, 1, True), bench, experiment)
    assert weights_sha256(weights) == before
    assert (result.num_examples, result.num_validation) == (len(silo.train), len(silo.validation))

    incoming = result_of(evaluate_task(weights), bench, experiment)
    assert result.validation == incoming.validation
    after = result_of(evaluate_task(add(weights, result.update)), bench, experiment)
    assert after.validation["loss"] < result.validation["loss"]
    assert (after.train, after.update) == ({}, [])
    assert 0.0 < after.seconds < 60.0
    assert 0.0 < result.seconds < 60.0

    mean = weighted_mean({"a": Contribution(result.update, result.num_examples)})
    differences = [np.abs(m - u).max() for m, u in zip(mean, result.update, strict=True)]
    assert max(differences) <= 2.0**-45  # the mean holds multiples of 2^-44


def test_a_silo_evaluates_only_if_asked_and_only_with_validation_examples(tmp_path: Path):
    experiment = configure(tmp_path)
    (silo,) = wine_silos(experiment, 1)
    weights = initial_weights(experiment)
    assert result_of(train_task(weights, 1, False), holding(silo), experiment).validation == {}

    bare = holding(replace(silo, name="bare", validation=silo.train.take(np.arange(0))))
    result = result_of(train_task(weights, 1, True), bare, experiment)
    assert (result.num_validation, result.validation) == (0, {})
    assert result_of(evaluate_task(weights), bare, experiment).validation == {}


def test_a_third_silo_in_one_process_compiles_and_traces_nothing_again(
    tmp_path: Path, num_prepared: list[str], monkeypatch: pytest.MonkeyPatch
):
    traces: list[str] = []
    compute_loss = keras.Model.compute_loss

    def counted(self: keras.Model, *arguments: Any, **options: Any) -> Any:
        traces.append("a graph that runs has no Python in it")
        return compute_loss(self, *arguments, **options)

    monkeypatch.setattr(keras.Model, "compute_loss", counted)
    experiment = configure(tmp_path)
    silos = {silo.name: silo for silo in wine_silos(experiment, 3)}
    sizes = {(len(silo.train), len(silo.validation)) for silo in silos.values()}
    assert len(sizes) > 1
    bench = Workbench(load=lambda settings, _: silos[settings.name], num_kept=3)
    task = train_task(initial_weights(experiment), 1, True)
    results, num_traces = {}, []
    for name in silos:
        results[name] = result_of(task, bench, experiment, SiloSettings(name, ""))
        num_traces.append(len(traces))
    assert len(num_prepared) == 1
    assert num_traces[0] > 0
    assert num_traces == [num_traces[0]] * 3
    for name, silo in silos.items():
        assert report(results[name]) == report(result_of(task, holding(silo), experiment))


# --- its data


def test_a_silo_loads_the_data_that_its_own_node_config_names(
    tmp_path: Path, make_data: Callable[..., Dataset]
):
    save_npz(tmp_path / "own.npz", make_data(40))
    experiment = configure(
        tmp_path, {"data.validation_fraction": 0.25}
    )  # whatever data the experiment names
    node_config = {"silo": "hospital-a", "data": str(tmp_path / "own.npz")}
    silo = Workbench().load(SiloSettings.from_node_config(node_config), experiment)
    assert (silo.name, len(silo.train), len(silo.validation)) == (
        "hospital-a",
        30,
        10,
    )  # a quarter is held out
    rows = {tuple(row) for row in (*silo.train.x, *silo.validation.x)}
    assert rows == {tuple(row) for row in make_data(40).x}


@pytest.mark.parametrize(("missing", "example"), [("silo", "hospital-a"), ("data", "data.csv")])
def test_a_node_config_that_lacks_a_key_is_refused_with_how_to_start_a_supernode(
    missing: str, example: str
):
    complete = {"silo": "a", "data": "wine"}
    for node_config in (
        {key: value for key, value in complete.items() if key != missing},
        complete | {missing: ""},
    ):
        with pytest.raises(
            ValueError, match=rf"must name '{missing}'.*flower-supernode --node-config.*{example}"
        ):
            SiloSettings.from_node_config(node_config)


def test_a_silo_without_training_examples_is_refused(
    tmp_path: Path, make_data: Callable[..., Dataset]
):
    save_npz(tmp_path / "own.npz", make_data(1))
    experiment = configure(tmp_path, {"data.validation_fraction": 0.7})
    with pytest.raises(
        ValueError,
        match=r"'a' has no training examples: 1 in all\. Lower data\.validation_fraction",
    ):
        load_silo(SiloSettings("a", str(tmp_path / "own.npz")), experiment)


# --- what it allows


def site(model: str, allow: str = "") -> Site:
    """A silo that allows these builders, in an experiment with this model."""
    settings = SiloSettings.from_node_config({"silo": "a", "data": "wine", "allow": allow})
    experiment = experiment_from_flat({"data.name": "wine", "model.name": model})
    return Site(settings, experiment, Workbench())


@pytest.mark.parametrize(
    "allow",
    ["", "tests.arithmetic_exchange", "other.module:build", f"x{OWN_MODEL}", OWN_MODEL[:-1]],
)
def test_a_builder_that_the_silo_does_not_allow_is_refused_with_how_to_allow_it(allow: str):
    for kind in HANDLERS:
        with pytest.raises(
            SiloFailure, match=r"imports only what its owner allows; received model\.name = "
        ) as caught:
            handle(Task(kind), site(OWN_MODEL, allow))
        assert str(caught.value).endswith(f"starts the silo with --allow {OWN_MODEL}")


def test_a_builder_that_is_not_allowed_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "planted.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SiloFailure, match="imports only what its owner allows"):
        handle(Task(DESCRIBE), site("planted:build"))
    assert "planted" not in sys.modules


@pytest.mark.parametrize(
    "allow", [OWN_MODEL, f"other.module:build {OWN_MODEL}", f"{OWN_MODEL}\nother.module:build"]
)
def test_a_builder_that_is_listed_is_built(allow: str):
    own = site(OWN_MODEL, allow)
    schema = own.bench.load(own.settings, own.experiment).schema
    answer = handle(evaluate_task(initial_weights(own.experiment), schema), own)
    assert set(LocalResult.from_answer(answer).validation) == {"loss", "accuracy"}


def test_the_models_of_the_zoo_need_no_leave():
    entry = SiloEntry.from_answer(handle(Task(DESCRIBE), site("mlp")))
    assert (entry.name, entry.num_examples) == ("a", 160)


def test_a_task_of_a_kind_that_is_not_known_is_refused():
    with pytest.raises(
        ValueError, match=r"a task 'erase', where a task is one of describe, inform, train,"
    ):
        handle(Task("erase"), site("mlp"))


# --- tasks that do not fit


def test_the_schema_of_other_examples_is_refused_before_a_model_of_it_is_built():
    own = site("linear")
    for schema in (Schema((10**9,), 3), Schema((8, 8, 1), 3), replace(WINE, num_classes=0)):
        with pytest.raises(MessageError, match="a schema of other examples than this silo's"):
            handle(evaluate_task([], schema), own)
    with pytest.raises(MessageError, match="lacks classes"):
        handle(evaluate_task([], replace(WINE, num_classes=2)), own)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights[:1], "weights of another model: 1 arrays of 39 numbers"),
        (lambda weights: [*weights, weights[0]], "where the experiment's model has 2 of 42"),
        (lambda weights: [w.T for w in weights], "weights of another model"),
        (lambda weights: [np.full_like(w, np.nan) for w in weights], "are not finite"),
        (lambda weights: [weights[0], np.float32([0, np.inf, 0])], "are not finite"),
    ],
)
def test_weights_that_do_not_fit_or_are_no_numbers_are_not_trained_on(change: Any, reason: str):
    own = site("linear")
    weights = change(initial_weights(own.experiment))
    for task in (evaluate_task(weights, WINE), train_task(weights, 1, False)):
        with pytest.raises(MessageError, match=reason):
            handle(task, own)


# --- a warm workbench


def adam(directory: Path) -> Experiment:
    """With dropout, moments, and gradients that are left over at the end of a round: 9 steps in
    pairs.
    """
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
    return configure(
        directory / "momentum", {"optimizer.momentum": 0.75, "federation.local_epochs": 2}
    )


def full_batch(directory: Path) -> Experiment:
    return configure(directory / "full", {"federation.local_batch_size": 0})


def weights_of(experiment: Experiment, round_number: int) -> Weights:
    """Some that a round might begin with."""
    rng = np.random.default_rng(round_number)
    return [
        np.float32(w + rng.normal(scale=0.1, size=w.shape)) for w in initial_weights(experiment)
    ]


def answer(
    bench: Workbench, experiment: Experiment, round_number: int, evaluate: bool
) -> dict[str, Any]:
    task = train_task(weights_of(experiment, round_number), round_number, evaluate)
    return report(result_of(task, bench, experiment))


def report(result: LocalResult) -> dict[str, Any]:
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
    silo = warm.load(HOSPITAL, experiment)
    assert -(-len(silo.train) // experiment.federation.local_batch_size) == 9
    for round_number in (2, 1):
        result_of(evaluate_task(weights_of(experiment, 5)), warm, experiment)
        assert answer(warm, experiment, round_number, False) == answer(
            Workbench(), experiment, round_number, False
        )


IN_ANOTHER_PROCESS = """
import json, sys
from pathlib import Path
from fl_app.silo.workbench import Workbench
from tests.unit.test_silo_training import adam, answer

print(json.dumps(answer(Workbench(), adam(Path(sys.argv[1])), 3, True)))
"""


def test_a_warm_workbench_answers_bit_by_bit_as_a_new_process(tmp_path: Path, project: Path):
    warm = Workbench()
    for round_number in (1, 2):
        answer(warm, adam(tmp_path), round_number, True)
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == answer(warm, adam(tmp_path), 3, True)


@pytest.fixture
def num_prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The experiments that models were compiled for, in order."""
    prepared, prepare = [], workbench.prepare_trainer

    def counted(schema: Any, experiment: Experiment, *others: Any) -> Any:
        prepared.append(experiment.run_directory.parent.name)
        return prepare(schema, experiment, *others)

    monkeypatch.setattr(workbench, "prepare_trainer", counted)
    return prepared


def test_the_models_of_the_last_two_experiments_stay_compiled(
    tmp_path: Path, num_prepared: list[str]
):
    warm = Workbench()
    for round_number in (1, 2, 3):
        answer(warm, momentum(tmp_path), round_number, True)
        answer(warm, full_batch(tmp_path), round_number, False)
    assert num_prepared == ["momentum", "full"]


def test_data_is_loaded_once_as_long_as_its_file_stays_as_it_is(
    tmp_path: Path, make_data: Callable[..., Dataset]
):
    save_npz(tmp_path / "own.npz", make_data(40))
    bench = Workbench()
    for source in (str(tmp_path / "own.npz"), "wine"):
        settings = SiloSettings("a", source, policy=OPEN)
        first = bench.load(settings, configure(tmp_path))
        assert bench.load(settings, configure(tmp_path)) is first


@pytest.mark.parametrize("what", ["time", "size"])
def test_a_data_file_that_changed_is_read_anew_and_trained_on(
    tmp_path: Path, make_data: Callable[..., Dataset], num_prepared: list[str], what: str
):
    path = tmp_path / "own.npz"
    save_npz(path, make_data(40, num_features=13))
    experiment, bench = configure(tmp_path), Workbench()
    settings = SiloSettings("a", str(path), policy=OPEN)
    task = train_task(initial_weights(experiment), 1, True, Schema((13,), 3))
    before = path.stat()
    first = report(result_of(task, bench, experiment, settings))
    save_npz(path, make_data(40 if what == "time" else 60, num_features=13, seed=1))
    changed_at = before.st_mtime_ns + (10**9 if what == "time" else 0)
    os.utime(path, ns=(changed_at, changed_at))
    assert (path.stat().st_size == before.st_size) == (what == "time")
    second = report(result_of(task, bench, experiment, settings))
    assert second == report(result_of(task, Workbench(), experiment, settings))
    assert second["update"] != first["update"]


def test_a_silo_whose_name_or_settings_are_others_is_another_one(
    tmp_path: Path, make_data: Callable[..., Dataset]
):
    bench = Workbench()
    half = configure(tmp_path, {"data.validation_fraction": 0.5})
    a, b = SiloSettings("a", "wine"), SiloSettings("b", "wine")
    silos = [
        bench.load(a, configure(tmp_path)),
        bench.load(b, configure(tmp_path)),
        bench.load(a, half),
    ]
    assert [silo.name for silo in silos] == ["a", "b", "a"]
    assert len({silo.validation.sha256() for silo in silos}) == 3


def test_data_that_could_not_be_used_is_looked_at_again(
    tmp_path: Path, make_data: Callable[..., Dataset]
):
    bench, settings = Workbench(), SiloSettings("a", str(tmp_path / "own.npz"), policy=OPEN)
    with pytest.raises(ValueError, match=r"own\.npz"):
        bench.load(settings, configure(tmp_path))
    save_npz(tmp_path / "own.npz", make_data(40))
    assert len(bench.load(settings, configure(tmp_path)).train) == 36
