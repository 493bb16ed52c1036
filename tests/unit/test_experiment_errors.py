"""Errors about an experiment: the origin of the value, the rule, the value received, the remedy."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.command_line import add_experiment_arguments, experiment_from_arguments
from shared.experiment import Experiment, load_experiment, nearest_names


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Experiment]:
    def load_text(text: str, *overrides: str, **options: Any) -> Experiment:
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return load_experiment(path, overrides, **options)

    return load_text


# --- strictness: the rule, the value received, the remedy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = 1", ["'sed'", "Did you mean 'seed'?"]),
        ("[training]\nepoch = 3", ["'training.epoch'", "Did you mean 'training.epochs'?"]),
        ("[optimiser]\nname = 'sgd'", ["'optimiser.name'", "Did you mean 'optimizer.name'?"]),
        (
            "[optimizer]\nlr = 0.1",
            ["'optimizer.lr'", "Known keys of [optimizer]: name, learning_rate, momentum"],
        ),
        (
            "[cluster]\nsize = 3",
            ["'cluster.size'", "Known sections and keys: name, seed, data, model"],
        ),
        ("[optimiser]", ["'optimiser'", "Did you mean 'optimizer'?"]),
        ("[cluster]", ["'cluster'", "Known sections and keys: name, seed, data, model"]),
        ("[data.others]\nname = 'wine'", ["'data.others'", "Known keys of [data]: name, label"]),
        ("data = 'wine'", ["data is a section", "'wine'", "data.name", "below a line [data]"]),
        (
            "[[data]]\nname = 'wine'",
            ["data is a section", "[{'name': 'wine'}]", "below a line [data]"],
        ),
        ("[seed]", ["seed must be a valid integer", "{}", "default: 0"]),
        (
            "[data.name]\nx = 1",
            ["data.name must be a valid string", "{'x': 1}", "default: 'digits'"],
        ),
        ("seed = 1.0", ["seed must be a valid integer", "1.0", "default: 0"]),
        ("seed = true", ["seed must be a valid integer", "True", "default: 0"]),
        ("[optimizer]\nlearning_rate = true", ["must be a valid number", "True", "default: 0.001"]),
        (
            "[optimizer]\nlearning_rate = '0.1'",
            ["must be a valid number", "'0.1'", "default: 0.001"],
        ),
        ("[optimizer]\nlearning_rate = nan", ["must be a finite number", "nan", "default: 0.001"]),
        ("[optimizer]\nlearning_rate = inf", ["must be a finite number", "inf", "default: 0.001"]),
        ("[optimizer]\nlearning_rate = 0.0", ["must be greater than 0", "0.0", "default: 0.001"]),
        ("[data]\ntest_fraction = 1.0", ["must be less than 1", "1.0", "default: 0.2"]),
        (
            "[data]\ntest_fraction = -0.1",
            ["must be greater than or equal to 0", "-0.1", "default: 0.2"],
        ),
        ("[training]\nepochs = 0", ["must be greater than or equal to 1", "0", "default: 10"]),
        ("[training]\nrestore_best = 1", ["must be a valid boolean", "1", "default: False"]),
        ("[model]\noptions = ['units']", ["must be a valid string", "['units']", "default: ''"]),
        (
            "[partition]\nkind = 'even'",
            ["must be 'iid', 'dirichlet', 'pathological' or 'size'", "'even'"],
        ),
        ("name = 'a/b'", ["name must match pattern", "'a/b'", "default: 'experiment'"]),
        (f"name = '{'a' * 300}'", ["name must have at most 100 characters", "aaa'"]),
        (f"seed = {10**23}", ["seed must be less than or equal to 9223372036854775807", "100000"]),
        (f"[training]\nepochs = {2**63}", ["training.epochs must be less than or equal to"]),
        (f"[data]\nsequence_length = {2**63}", ["data.sequence_length must be less than or"]),
        (f"[optimizer]\nlearning_rate = {10**400}", ["optimizer.learning_rate must be a"]),
    ],
)
def test_what_is_not_of_the_form_is_refused_with_rule_value_and_remedy(
    load: Callable[..., Experiment], text: str, words: list[str]
):
    with pytest.raises(ValueError, match=r"mine\.toml") as caught:
        load(text)
    for word in words:
        assert word in str(caught.value)


def test_every_problem_of_a_file_is_reported_at_once(load: Callable[..., Experiment]):
    with pytest.raises(
        ValueError, match=r"optimizer\.name must be 'sgd'.*\n.*training\.epochs must be greater"
    ):
        load("[training]\nepochs = 0\n[optimizer]\nname = 'adagrad'")


def test_broken_rules_of_several_sections_are_reported_at_once(load: Callable[..., Experiment]):
    with pytest.raises(
        ValueError,
        match=r"mine.toml with --set optimizer.momentum=0.5: optimizer.*\n.*mine.toml: partition",
    ):
        load("[partition]\nkind = 'size'", "optimizer.momentum=0.5")


# --- files that are none


def test_a_file_that_is_no_toml_is_refused_with_the_place_of_the_mistake(
    load: Callable[..., Experiment],
):
    with pytest.raises(ValueError, match=r"mine.toml is not valid TOML: .*line 2"):
        load("seed = 1\n[data\n")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "seed = 1".encode("utf-16")])
def test_a_file_that_is_no_text_in_utf_8_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "binary.toml").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"binary.toml is not valid TOML: it must be text in UTF-8"
    ):
        load_experiment(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed = 1\nname = 'a'\nseed = 2", "a key is set twice (at line 3, column 9): seed = 2"),
        ("[data]\n[model]\n[data]", "Cannot declare ('data',) twice (at line 3, column 6): [data]"),
        ("[training]\nepochs = [1", "Unclosed array (at end of document)"),
        (f"seed = {'[' * 5000}", "its brackets are nested too deeply"),
        (f"seed = {'{a=' * 5000}", "its brackets are nested too deeply"),
        (f"seed = {'9' * 5000}", "Exceeds the limit"),
    ],
)
def test_a_mistake_of_the_files_form_is_shown_in_one_sentence(
    load: Callable[..., Experiment], text: str, reason: str
):
    with pytest.raises(ValueError, match="is not valid TOML") as caught:
        load(text)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_override_of_thousands_of_brackets_is_no_traceback_either(
    load: Callable[..., Experiment],
):
    with pytest.raises(ValueError, match=r"--set seed=.*: seed must be a valid integer"):
        load("", f"seed={'[' * 5000}")


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


# --- errors name the origin of the value: the file, or the option of the command


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.epoch=3",
            "Unknown key 'training.epoch' in --set training.epoch=3. Did you mean"
            " 'training.epochs'?",
        ),
        (
            "training.epochs=three",
            "--set training.epochs=three: training.epochs must be a valid integer; received"
            " 'three' (default: 10).",
        ),
        (
            "training.epochs=0",
            "--set training.epochs=0: training.epochs must be greater than or equal to 1; received"
            " 0 (default: 10).",
        ),
        (
            "data=wine",
            "--set data=wine: data is a section; received data = 'wine'. Set one of its keys, such"
            " as data.name; in a file they stand below a line [data].",
        ),
    ],
)
def test_a_mistake_in_an_override_is_blamed_on_it(
    load: Callable[..., Experiment], override: str, message: str
):
    with pytest.raises(ValueError, match=r"--set") as caught:
        load("[training]\nepochs = 2", "seed=1", override)
    assert str(caught.value) == message


def test_a_mistake_in_the_file_is_blamed_on_the_file_whatever_is_overridden(
    load: Callable[..., Experiment], tmp_path: Path
):
    with pytest.raises(ValueError, match="epochs") as caught:
        load("[training]\nepochs = 0", "training.global_batch_size=8", resume=True)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.toml'}: training.epochs must be")


def test_the_last_of_several_overrides_of_a_key_counts_and_is_blamed(
    load: Callable[..., Experiment],
):
    assert load("seed = -1", "data.name=wine", "seed=-1", "seed=2").seed == 2
    with pytest.raises(ValueError, match=r"^--set seed=-2: seed must"):
        load("", "seed=-1", "seed=-2")


TWO_SILOS = "[federation]\nmin_silos = 2"
STRATEGY = "[federation]\nstrategy = 'a.b:C'"


@pytest.mark.parametrize(
    ("text", "overrides", "options", "origin"),
    [
        (f"{TWO_SILOS}\ncohort_size = 5", ["seed=1"], {"run_directory": "there"}, "FILE"),
        (
            TWO_SILOS,
            ["seed=1", "federation.cohort_size=5"],
            {"resume": True},
            "FILE with --set federation.cohort_size=5",
        ),
        (
            TWO_SILOS,
            ["federation.cohort_size=5", "federation.min_silos=4"],
            {},
            "--set federation.min_silos=4 and --set federation.cohort_size=5",
        ),
        (
            "[data]\nvalidation_fraction = 0.0",
            ["training.restore_best=true"],
            {},
            "FILE with --set training.restore_best=true",
        ),
        (
            STRATEGY,
            ["server_optimizer.learning_rate=0.5"],
            {},
            "FILE with --set server_optimizer.learning_rate=0.5",
        ),
        (STRATEGY, [], {"resume": True}, "FILE with --resume"),
        (STRATEGY, ["run.resume=true"], {}, "FILE with --set run.resume=true"),
        (
            "",
            ["federation.strategy=a.b:C"],
            {"resume": True},
            "--set federation.strategy=a.b:C and --resume",
        ),
    ],
)
def test_a_broken_rule_is_blamed_on_all_options_that_take_part_in_it(
    load: Callable[..., Experiment],
    tmp_path: Path,
    text: str,
    overrides: list[str],
    options: dict[str, Any],
    origin: str,
):
    with pytest.raises(ValueError, match="received") as caught:
        load(text, *overrides, **options)
    blamed, _, _ = str(caught.value).partition(": ")
    assert blamed == origin.replace("FILE", str(tmp_path / "mine.toml"))


def test_a_run_directory_of_the_wrong_form_is_blamed_on_its_option(load: Callable[..., Experiment]):
    with pytest.raises(ValueError, match=r"^--run-dir 3: run.directory must be a valid string"):
        load("", "run.directory=there", run_directory=3)


def test_options_of_a_command_reach_the_experiment_and_its_errors(tmp_path: Path):
    parser = argparse.ArgumentParser()
    add_experiment_arguments(parser)
    path = tmp_path / "mine.toml"
    path.write_text("seed = 1\ndata.name = 'wine'")
    arguments = [str(path), "--set", "seed=2", "--run-dir", "there", "--resume"]
    experiment = experiment_from_arguments(parser.parse_args(arguments))
    assert (experiment.seed, experiment.run_directory) == (2, Path("there"))
    assert experiment.run.resume

    arguments += ["--set", "federation.strategy=a.b:C"]
    with pytest.raises(ValueError, match=r"^--set federation.strategy=a.b:C and --resume: A run"):
        experiment_from_arguments(parser.parse_args(arguments))
