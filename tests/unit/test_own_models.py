"""The user's own models: trained, restored, resumed, reported and exported, or refused before."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from dist_train.agreement import AgreedError
from dist_train.collectives import LocalCommunicator
from dist_train.trainer import train
from fl_app.simulation.exchange import exchange_of_silos
from shared.data import Schema
from shared.data.schema import schema_from_json
from shared.experiment import Experiment, ModelSection, experiment_from_flat, load_experiment
from shared.export import FORMATS, export
from shared.report.__main__ import main as report
from shared.run_record import read_metrics, read_result
from shared.weights import weights_sha256
from shared.zoo import build_model, saved_model
from tests.local_exchange import configure, run, wine_silos

OWN = ["build_layers", "build_network", "build_sequential", "build_opaque", "build_registered"]
UNKNOWN_TO_KERAS = "build_layers"  # the quick tests' one: layers, a function and a lambda
SUBCLASS = "build_network"
PROJECT = Path(__file__).resolve().parents[2]


def own(builder: str) -> str:
    return f"tests.own_models:{builder}"


def experiment(directory: Path, builder: str, **keys: Any) -> Experiment:
    changed = {key.replace("__", "."): value for key, value in keys.items()}
    common = {
        "name": "own",
        "data.name": "wine",
        "model.name": own(builder),
        "optimizer.learning_rate": 0.05,
        "training.epochs": 3,
        "training.restore_best": True,
        "run.directory": str(directory),
    }
    return experiment_from_flat({**common, **changed})


def saved(directory: Path) -> keras.Model:
    """The model of a run, as an export reads it."""
    schema = schema_from_json(json.loads((directory / "schema.json").read_text()))
    config = load_experiment(directory / "experiment.toml").model
    return saved_model(config, schema, directory / "model.keras")


def quick(builders: Iterable[str], *names: str) -> list[Any]:
    """The builders as parameters: those of these names in the quick suite, the others slow."""
    return [
        pytest.param(builder, marks=() if builder in names else pytest.mark.slow)
        for builder in builders
    ]


# --- trained, restored as best, resumed, reported


@pytest.mark.parametrize("builder", quick(OWN, UNKNOWN_TO_KERAS, SUBCLASS))
def test_an_own_model_ends_with_the_weights_of_its_best_epoch(tmp_path: Path, builder: str):
    """With steps this large the best epoch is not the last one."""
    run_keys = {"optimizer__name": "sgd", "optimizer__learning_rate": 5.0}
    result = train(experiment(tmp_path / "run", builder, **run_keys), LocalCommunicator())
    assert result["best_epoch"] in (1, 2)

    # The record has the best epoch's loss, and the file the weights that the record tells of.
    rows = read_metrics(tmp_path / "run")
    best = rows[result["best_epoch"] - 1]["validation"]
    assert result["metrics"]["validation"]["loss"] == pytest.approx(best["loss"], rel=1e-5)
    written = read_result(tmp_path / "run")
    assert weights_sha256(saved(tmp_path / "run").get_weights()) == written["weights_sha256"]


@pytest.mark.parametrize("builder", quick([UNKNOWN_TO_KERAS, SUBCLASS], SUBCLASS))
def test_a_resumed_run_of_an_own_model_ends_as_the_undisturbed_one(tmp_path: Path, builder: str):
    train(experiment(tmp_path / "whole", builder, training__epochs=2), LocalCommunicator())
    train(experiment(tmp_path / "parts", builder, training__epochs=1), LocalCommunicator())
    resumed = experiment(tmp_path / "parts", builder, training__epochs=2, run__resume=True)
    train(resumed, LocalCommunicator())
    whole, parts = (read_result(tmp_path / name) for name in ("whole", "parts"))
    assert whole["weights_sha256"] == parts["weights_sha256"]


def test_an_own_model_is_trained_over_silos(tmp_path: Path):
    changes = {"model.name": own(SUBCLASS), "federation.num_rounds": 2}
    federated = configure(tmp_path, {**changes, "federation.restore_best": True})
    result = run(federated, exchange_of_silos(federated, wine_silos(federated, 2)))
    assert result["rounds"] == 2
    assert (federated.run_directory / "model.keras").is_file()


def test_an_own_model_is_the_beginning_of_another_run(tmp_path: Path):
    """Its classes are unknown to Keras, and its file's weights are found all the same."""
    train(experiment(tmp_path / "first", UNKNOWN_TO_KERAS, training__epochs=1), LocalCommunicator())
    path = tmp_path / "first" / "model.keras"
    config = ModelSection(name=own(UNKNOWN_TO_KERAS), initial=str(path))
    model = build_model(config, Schema((13,), 3), seed=9)
    expected = read_result(tmp_path / "first")["weights_sha256"]
    assert weights_sha256(model.get_weights()) == expected

    with pytest.raises(
        ValueError, match=r"model\.initial = .* cannot be loaded: the file has other layers"
    ):
        build_model(config, Schema((4,), 3), seed=9)


# --- exported


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one epoch, by builder."""
    folder = tmp_path_factory.mktemp("finished")
    for builder in (UNKNOWN_TO_KERAS, SUBCLASS, "build_registered"):
        train(experiment(folder / builder, builder, training__epochs=1), LocalCommunicator())
    return {path.name: path for path in folder.iterdir()}


CASES = [
    pytest.param(
        builder, name, marks=() if (builder, name) == (SUBCLASS, "savedmodel") else pytest.mark.slow
    )
    for builder in (UNKNOWN_TO_KERAS, SUBCLASS, "build_registered")
    for name in FORMATS
    if name != "keras" or builder == "build_registered"
]


@pytest.mark.parametrize(("builder", "format_name"), CASES)
def test_an_own_model_is_exported(
    finished: dict[str, Path], tmp_path: Path, builder: str, format_name: str
):
    """The command reads back what it wrote, and compares it with the run's model."""
    form = FORMATS[format_name]
    path = export(finished[builder], format_name, tmp_path / f"export{form.suffix}")
    assert path.exists()


@pytest.mark.slow
def test_an_own_model_is_reported(finished: dict[str, Path], tmp_path: Path):
    page = tmp_path / "report.html"
    assert report([*map(str, finished.values()), "-o", str(page)]) == 0
    assert SUBCLASS in page.read_text()


def test_keras_takes_registered_classes_alone_and_a_refusal_says_so(
    finished: dict[str, Path], tmp_path: Path
):
    with pytest.raises(ValueError, match="register_keras_serializable") as caught:
        export(finished[UNKNOWN_TO_KERAS], "keras", tmp_path / "export.keras")
    assert len(str(caught.value)) < 800
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("builder", [UNKNOWN_TO_KERAS, SUBCLASS, "build_registered"])
def test_a_new_process_exports_an_own_model_and_says_one_line(
    finished: dict[str, Path], tmp_path: Path, builder: str
):
    name = "keras" if builder == "build_registered" else "onnx"
    command = [sys.executable, "-m", "shared.export", str(finished[builder]), "--format", name]
    output = str(tmp_path / "export.model.keras")
    ended = subprocess.run(
        [*command, "-o", output],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.count("\n") == 1


def test_a_run_that_does_not_exist_is_reported_at_once(tmp_path: Path):
    """Before TensorFlow is imported, which takes seconds and many lines."""
    command = [sys.executable, "-m", "shared.export", "no/run", "--format", "onnx"]
    started = time.monotonic()
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 2  # 0.1 s on an idle machine; TensorFlow needs 5
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: An export takes the directory of a finished run")
    assert "no/run, which does not exist" in ended.stderr
    assert ended.stderr.count("\n") == 1

    # What makes it quick: none of these is imported by then.
    slow = "{'keras', 'tensorflow', 'numpy', 'pandas', 'pydantic'}"
    code = f"import sys, shared.export.__main__; print({slow} & set(sys.modules))"
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert imported.stdout == "set()\n"


# --- refused, before anything is trained


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ("build_unsaveable", r"a model that Keras can save; received .*get_config"),
        ("build_failing", r"takes batches of float32 of shape \(None, 13\); .*no_such_thing"),
        ("build_two_outputs", r"one output; received one that gives a dict"),
        ("build_late_variables", r"batches .* received one that fails .*already built"),
        ("build_changing", r"the same model each time it is called"),
    ],
)
def test_a_model_that_would_be_lost_is_refused_before_it_is_trained(
    tmp_path: Path, builder: str, message: str
):
    with pytest.raises((ValueError, AgreedError), match=message) as caught:
        train(experiment(tmp_path / "run", builder), LocalCommunicator())
    sentence = str(caught.value)
    assert repr(own(builder)) in sentence
    assert "Your own layers" in sentence
    assert "\n" not in sentence
    assert not (tmp_path / "run").exists()

    federated = configure(tmp_path / "federated", {"model.name": own(builder)})
    with pytest.raises(ValueError, match=message):
        run(federated, exchange_of_silos(federated, wine_silos(federated, 1)))


def test_the_line_that_fails_is_named():
    with pytest.raises(ValueError, match=r"in .*own_models\.py, line \d+: AttributeError"):
        build_model(ModelSection(name=own("build_failing")), Schema((4,), 3), seed=0)


def test_a_subclass_has_all_its_variables_before_an_optimizer_asks_for_them():
    model = build_model(ModelSection(name=own(SUBCLASS)), Schema((4,), 3), seed=0)
    shapes = [tuple(variable.shape) for variable in model.trainable_variables]
    assert sorted(shapes) == sorted([(4, 5), (5,), (5,), (5,), (5,), (5, 3), (3,)])
    np.testing.assert_array_equal(model.norm.moving_mean, 0)  # no example went through it
