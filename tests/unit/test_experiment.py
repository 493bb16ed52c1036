"""The experiment: two spellings of one strict description, and its identity."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.experiment import (
    Experiment,
    Scalar,
    experiment_from_flat,
    flatten,
    load_experiment,
    nearest_names,
    parse_override,
)

# A valid experiment from which every single key can be changed, and what the keys with few values change to.
BASE = {
    "model.initial": "trained.keras",
    "optimizer.name": "sgd",
    "training.per_rank_batch_size": 8,
    "training.scale_learning_rate": True,
    "federation.min_silos": 3,
    "federation.cohort_size": 2,
    "server_optimizer.name": "fedadam",
}
# A Flower strategy has rules of its own in place of these.
WITHOUT_OURS = {"federation.cohort_size": 0, "server_optimizer.name": "fedavg"}
OTHER_TEXT = {
    "data.task": "regression",
    "data.scaling": "none",
    "data.missing": "fill",
    "data.class_weights": "balanced",
    "data.delimiter": ";",
    "model.precision": "mixed_bfloat16",
    "model.adapter": "lora",
    "optimizer.name": "adamw",
    "training.aggregation": "adasum",
    "partition.kind": "dirichlet",
    "server_optimizer.name": "fedyogi",
    "performance.gradient_grouping": "per_tensor",
}
FREE_TO_CHANGE = {"name", "training.epochs", "federation.cross_site_evaluation"}
FREE_TO_CHANGE |= {f"federation.{key}" for key in ("num_rounds", "silo_timeout_s", "round_timeout_s")}
KEYS = list(Experiment().to_flat())


def another_value(key: str, value: Scalar) -> Scalar:
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 or 0.125
        case str():
            return OTHER_TEXT.get(key, value + "x")


def with_and_without(key: str) -> tuple[Experiment, Experiment]:
    """Two experiments that differ in this key alone."""
    flat = experiment_from_flat(BASE | (WITHOUT_OURS if key == "federation.strategy" else {})).to_flat()
    return experiment_from_flat(flat | {key: another_value(key, flat[key])}), experiment_from_flat(flat)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Experiment]:
    def load_text(text: str, *overrides: str, **run: Scalar) -> Experiment:
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return load_experiment(path, overrides, **run)

    return load_text


# --- two spellings of one thing


def test_toml_and_flat_keys_give_back_an_experiment_of_which_every_key_is_changed(load: Callable[..., Experiment]):
    flat = experiment_from_flat(BASE).to_flat()
    # adasum has no predivide factor, a Flower strategy has rules of its own, and who watches must evaluate
    agreeing = {"performance.predivide_factor": 0.0, "federation.strategy": "", "federation.evaluate_on_silos": True}
    agreeing |= BASE
    changed = experiment_from_flat({key: another_value(key, value) for key, value in flat.items()} | agreeing)
    assert load(changed.to_toml()) == changed
    assert experiment_from_flat(changed.to_flat()) == changed


def test_flat_keys_are_exactly_the_flattened_tables_of_the_toml_spelling():
    experiment = experiment_from_flat(BASE)
    assert flatten(tomllib.loads(experiment.to_toml())) == experiment.to_flat()


def test_every_key_has_a_default_of_scalar_type():
    for key, value in Experiment().to_flat().items():
        assert type(value) in (bool, int, float, str), key


def test_flowers_run_config_in_pyproject_is_the_defaults_key_by_key_and_type_by_type(project: Path):
    tables = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    declared, defaults = flatten(tables["tool"]["flwr"]["app"]["config"]), Experiment().to_flat()
    assert declared == defaults
    assert {key: type(value) for key, value in declared.items()} == {key: type(v) for key, v in defaults.items()}


def test_an_empty_file_and_empty_sections_are_the_defaults(load: Callable[..., Experiment]):
    assert load("") == load("[data]\n[training]\n") == Experiment()


def test_a_whole_number_stands_for_a_float(load: Callable[..., Experiment]):
    assert load("[optimizer]\nlearning_rate = 1").to_flat()["optimizer.learning_rate"] == 1.0


def test_an_experiment_cannot_be_changed():
    with pytest.raises(ValidationError):
        Experiment().seed = 1


def test_a_run_directory_is_named_after_the_experiment_unless_it_is_given():
    assert Experiment(name="mine").run_directory == Path("runs/mine")
    assert experiment_from_flat({"run.directory": "there"}).run_directory == Path("there")


# --- identity


@pytest.mark.parametrize("key", KEYS)
def test_each_key_changes_the_sha256_except_those_of_run(key: str):
    changed, plain = with_and_without(key)
    assert (changed.sha256() == plain.sha256()) == key.startswith("run.")


@pytest.mark.parametrize("key", KEYS)
def test_each_key_changes_the_trajectory_except_how_long_how_fast_and_where(key: str):
    is_free = key in FREE_TO_CHANGE or key.startswith(("run.", "performance."))
    changed, plain = with_and_without(key)
    assert (changed.trajectory() == plain.trajectory()) == is_free


# --- the files that come along


def test_every_experiment_that_comes_along_loads_and_its_header_says_how_it_was_run(project: Path):
    files = sorted((project / "experiments").glob("*.toml"))
    assert files
    for file in files:
        load_experiment(file)
        lines = file.read_text(encoding="utf-8").splitlines()
        num_header = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        header = "\n".join(lines[:num_header])
        for label in ("run:", "hardware:", "time:", "result:"):
            assert re.search(rf"{label} +\S", header), f"{file.name}: the header must say '{label} ...'"


# --- overrides


def test_overrides_win_over_the_file_and_arguments_of_the_run_win_over_overrides(load: Callable[..., Experiment]):
    experiment = load("seed = 1\n[data]\nname = 'wine'", "seed=2", "run.directory=a", directory="b", resume=True)
    assert (experiment.seed, experiment.data.name) == (2, "wine")
    assert (experiment.run.directory, experiment.run.resume) == ("b", True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", ("seed", 3)),
        (" seed = 3", ("seed", 3)),
        ("data.test_fraction=0.5", ("data.test_fraction", 0.5)),
        ("training.restore_best=true", ("training.restore_best", True)),
        ("data.name=wine", ("data.name", "wine")),  # no TOML: a bare string
        ("data.name='wine'", ("data.name", "wine")),
        ("model.options=units = [64]", ("model.options", "units = [64]")),  # the first = is ours
        ("model.options=", ("model.options", "")),
    ],
)
def test_an_override_is_toml_or_a_bare_string(text: str, expected: tuple[str, Scalar]):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["seed", "=3", " =3", ""])
def test_an_override_without_key_or_value_is_refused_with_an_example(text: str):
    with pytest.raises(ValueError, match=r"section\.key=value; received .* Example: --set"):
        parse_override(text)


def test_overrides_are_checked_like_the_file(load: Callable[..., Experiment]):
    with pytest.raises(ValueError, match=r"Unknown key 'training.epoch'.*'training.epochs'"):
        load("", "training.epoch=3")


# --- strictness: the rule, the value received, the remedy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = 1", ["'sed'", "Did you mean 'seed'?"]),
        ("[training]\nepoch = 3", ["'training.epoch'", "Did you mean 'training.epochs'?"]),
        ("[optimiser]\nname = 'sgd'", ["'optimiser.name'", "Did you mean 'optimizer.name'?"]),
        ("[optimizer]\nlr = 0.1", ["'optimizer.lr'", "Known keys of [optimizer]: name, learning_rate, momentum"]),
        ("[cluster]\nsize = 3", ["'cluster.size'", "Known sections and keys: name, seed, data, model"]),
        ("[optimiser]", ["'optimiser'", "Did you mean 'optimizer'?"]),
        ("[cluster]", ["'cluster'", "Known sections and keys: name, seed, data, model"]),
        ("[data.inner]\nname = 'wine'", ["'data.inner'", "Known keys of [data]: name, label"]),
        ("data = 'wine'", ["data is a section", "'wine'", "Write a line [data]"]),
        ("[[data]]\nname = 'wine'", ["data is a section", "[{'name': 'wine'}]", "Write a line [data]"]),
        ("[seed]", ["seed must be a valid integer", "{}", "default: 0"]),
        ("[data.name]\nx = 1", ["data.name must be a valid string", "{'x': 1}", "default: 'digits'"]),
        ("seed = 1.0", ["seed must be a valid integer", "1.0", "default: 0"]),
        ("seed = true", ["seed must be a valid integer", "True", "default: 0"]),
        ("[optimizer]\nlearning_rate = true", ["must be a valid number", "True", "default: 0.001"]),
        ("[optimizer]\nlearning_rate = '0.1'", ["must be a valid number", "'0.1'", "default: 0.001"]),
        ("[optimizer]\nlearning_rate = nan", ["must be a finite number", "nan", "default: 0.001"]),
        ("[optimizer]\nlearning_rate = inf", ["must be a finite number", "inf", "default: 0.001"]),
        ("[optimizer]\nlearning_rate = 0.0", ["must be greater than 0", "0.0", "default: 0.001"]),
        ("[data]\ntest_fraction = 1.0", ["must be less than 1", "1.0", "default: 0.2"]),
        ("[data]\ntest_fraction = -0.1", ["must be greater than or equal to 0", "-0.1", "default: 0.2"]),
        ("[training]\nepochs = 0", ["must be greater than or equal to 1", "0", "default: 10"]),
        ("[training]\nrestore_best = 1", ["must be a valid boolean", "1", "default: False"]),
        ("[model]\noptions = ['units']", ["must be a valid string", "['units']", "default: ''"]),
        ("[partition]\nkind = 'even'", ["must be 'iid', 'dirichlet', 'pathological' or 'size'", "'even'"]),
        ("name = 'a/b'", ["name must match pattern", "'a/b'", "default: 'experiment'"]),
    ],
)
def test_what_is_not_of_the_form_is_refused_with_rule_value_and_remedy(
    load: Callable[..., Experiment], text: str, words: list[str]
):
    with pytest.raises(ValueError, match=r"mine\.toml") as caught:
        load(text)
    for word in words:
        assert word in str(caught.value)


def test_every_problem_of_a_file_is_told_at_once(load: Callable[..., Experiment]):
    with pytest.raises(ValueError, match=r"optimizer\.name must be 'sgd'.*\n.*training\.epochs must be greater"):
        load("[training]\nepochs = 0\n[optimizer]\nname = 'adagrad'")


# --- files that are none


def test_a_file_that_is_no_toml_is_refused_with_the_place_of_the_mistake(load: Callable[..., Experiment]):
    with pytest.raises(ValueError, match=r"mine.toml is not valid TOML: .*line 2"):
        load("seed = 1\n[data\n")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.toml is not valid TOML"):
        load_experiment(tmp_path / "binary.toml")


def test_a_missing_file_is_refused_with_where_to_look(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none.toml", tmp_path / "file" / "none.toml"):
        with pytest.raises(ValueError, match=r"No experiment file at .*none.toml.*ls experiments"):
            load_experiment(path)


def test_a_directory_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=f"one TOML file; received the directory {tmp_path}"):
        load_experiment(tmp_path)


def test_nearest_names_are_the_most_similar_or_all_if_none_is():
    assert nearest_names("wime", ["digits", "wine", "diabetes"]) == ["wine"]
    assert nearest_names("xyz", ["b", "a"]) == ["a", "b"]
