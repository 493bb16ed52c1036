"""The experiment: two spellings of one strict description, and its identity."""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shared.experiment import (
    Experiment,
    Scalar,
    experiment_from_flat,
    experiment_from_run_config,
    flatten,
    load_experiment,
    parse_override,
)

# A valid experiment from which every single key can be changed, and what the keys with few values
# change to.
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
    "data.task": "classification",
    "data.decimal": ",",
    "data.thousands": " ",
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
FREE_TO_CHANGE |= {
    f"federation.{key}" for key in ("num_rounds", "silo_timeout_s", "round_timeout_s")
}
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
    base = BASE | WITHOUT_OURS if key == "federation.strategy" else BASE
    plain = experiment_from_flat(base)
    flat = plain.to_flat()
    changed = experiment_from_flat(flat | {key: another_value(key, flat[key])})
    return changed, plain


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Experiment]:
    def load_text(text: str, *overrides: str, **options: Any) -> Experiment:
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return load_experiment(path, overrides, **options)

    return load_text


# --- two spellings of one thing


def test_toml_and_flat_keys_give_back_an_experiment_of_which_every_key_is_changed(
    load: Callable[..., Experiment],
):
    flat = experiment_from_flat(BASE).to_flat()
    # adasum has no predivide factor, a Flower strategy has rules of its own, and selection by
    # validation loss needs silos that evaluate
    agreeing = {
        "performance.predivide_factor": 0.0,
        "federation.strategy": "",
        "federation.evaluate_on_silos": True,
    }
    agreeing |= BASE
    changed = experiment_from_flat(
        {key: another_value(key, value) for key, value in flat.items()} | agreeing
    )
    assert load(changed.to_toml()) == changed
    assert experiment_from_flat(changed.to_flat()) == changed


def test_flat_keys_are_exactly_the_flattened_tables_of_the_toml_spelling():
    experiment = experiment_from_flat(BASE)
    assert flatten(tomllib.loads(experiment.to_toml())) == experiment.to_flat()


def test_every_key_has_a_default_of_scalar_type():
    for key, value in Experiment().to_flat().items():
        assert type(value) in (bool, int, float, str), key


def test_what_a_file_leaves_out_is_the_default_but_for_the_data(load: Callable[..., Experiment]):
    defaults = load("[data]\nname = 'digits'\n[training]\n")
    assert defaults == load("[training]", "data.name=digits") == Experiment()


@pytest.mark.parametrize("text", ["", "\n# a comment\n", "name = 'mine'\nseed = 3\n[data]\n"])
def test_a_file_that_is_empty_or_cut_off_before_its_data_is_refused(
    load: Callable[..., Experiment], text: str
):
    with pytest.raises(ValueError, match=r"must say on which data.*received none\. Is it whole\?"):
        load(text)


def test_a_byte_order_mark_does_not_matter(load: Callable[..., Experiment]):
    text = "seed = 3\n[data]\nname = 'wine'"
    assert load(f"\ufeff{text}") == load(text)


def test_a_whole_number_stands_for_a_float(load: Callable[..., Experiment]):
    experiment = load("[optimizer]\nlearning_rate = 1", "data.name=wine")
    assert experiment.to_flat()["optimizer.learning_rate"] == 1.0


def test_an_experiment_cannot_be_changed():
    with pytest.raises(ValidationError):
        Experiment().seed = 1


def test_a_run_directory_is_named_after_the_experiment_unless_it_is_given():
    assert Experiment(name="mine").run_directory == Path("runs/mine")
    assert experiment_from_flat({"run.directory": "there"}).run_directory == Path("there")


# --- identity

# As computed since data.decimal and its like: the sha256, and that of the trajectory. Checkpoints
# and records of runs hold them; a new key changes them all, which the CHANGELOG then says.
IDENTITIES = {
    "digits_cnn": (
        "50032fb2372ce5ff77299c6918c272d45e59c51c1e8c8b5408628f95129b6284",
        "9a7f260d36227c550ad3a14996f31765d07f018cb8f84d4f7c88d12d585c0d22",
    ),
    "documentation_lm": (
        "d77dd85646a7a67b58ca4bdb84433daeb753d7b0f58d1d9445ca58b3a2ffb14f",
        "9c5822802416e8c8384b2bc4f880d5eeaa2ef4391d6f65a3c332cf77d7e92a67",
    ),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_of_earlier_runs_stay(project: Path, name: str):
    experiment = load_experiment(project / "experiments" / f"{name}.toml")
    trajectory = json.dumps(experiment.trajectory(), sort_keys=True)
    trajectory_sha256 = hashlib.sha256(trajectory.encode()).hexdigest()
    assert (experiment.sha256(), trajectory_sha256) == IDENTITIES[name]


@pytest.mark.parametrize("key", KEYS)
def test_each_key_changes_the_sha256_except_those_of_run_and_the_cache(key: str):
    is_free = key == "data.cache" or key.startswith("run.")
    changed, plain = with_and_without(key)
    assert (changed.sha256() == plain.sha256()) == is_free


@pytest.mark.parametrize("key", KEYS)
def test_each_key_changes_the_trajectory_except_how_long_how_fast_and_where(key: str):
    is_free = key in (*FREE_TO_CHANGE, "data.cache") or key.startswith(("run.", "performance."))
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
            assert re.search(rf"{label} +\S", header), (
                f"{file.name}: the header must say '{label} ...'"
            )


# --- overrides


def test_overrides_win_over_the_file_and_arguments_of_the_run_win_over_overrides(
    load: Callable[..., Experiment],
):
    experiment = load(
        "seed = 1\n[data]\nname = 'wine'",
        "seed=2",
        "run.directory=a",
        run_directory="b",
        resume=True,
    )
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


def test_an_empty_table_as_override_leaves_the_section_of_the_file(load: Callable[..., Experiment]):
    assert load("[data]\nname = 'wine'", "data={}").data.name == "wine"


# --- the run config, which comes with every message


def test_a_run_config_is_parsed_once_and_any_other_content_again():
    config = Experiment(seed=1).to_flat()
    experiment = experiment_from_run_config(config)
    assert experiment == experiment_from_flat(config)
    reordered = dict(reversed(config.items()))
    assert experiment_from_run_config(reordered) is experiment
    assert experiment_from_run_config(config | {"seed": 2}).seed == 2


@pytest.mark.parametrize("value", [1.0, True])
def test_a_value_that_is_equal_but_of_another_type_is_another_run_config(value: Scalar):
    experiment_from_run_config({"seed": 1})
    with pytest.raises(ValueError, match="the run config: seed must be a valid integer"):
        experiment_from_run_config({"seed": value})


def test_few_run_configs_are_kept():
    first = experiment_from_run_config({"seed": 0})
    for seed in range(1, 20):
        experiment_from_run_config({"seed": seed})
    again = experiment_from_run_config({"seed": 0})
    assert again == first
    assert again is not first
