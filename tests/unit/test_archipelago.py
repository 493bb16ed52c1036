"""The command: quick help, one clean line for mistakes, and a reference that is the code's."""

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from archipelago.__main__ import COMMANDS, main
from archipelago.train import launch_command
from shared.data import Schema
from shared.experiment import Experiment, ModelSection, experiment_from_flat
from shared.experiment.reference import keys_of, section_names
from shared.hosts import check_hosts
from shared.run_record import RunRecord
from shared.zoo import build_model
from tools import reference

HEAVY = {"numpy", "keras", "tensorflow", "flwr", "horovod", "pandas", "pydantic", "rich"}


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "archipelago", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# --- the table


def test_help_imports_nothing_but_pythons_own_library():
    code = "import sys; from archipelago.__main__ import main; main(['--help'])"
    code += "; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stderr.split())
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert f"archipelago {command.example}" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_it_does(name: str):
    text = reference.help_text(name)
    assert text.startswith(f"usage: archipelago {name}")


def test_the_version_is_that_of_the_project_and_the_app(project: Path):
    pinned = tomllib.loads((project / "pyproject.toml").read_text())["project"]["version"]
    words = run_here("--version").stdout.split()
    assert words[:3] == ["archipelago", f"{pinned},", "app"]
    assert len(words[3]) == 16


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fedrate"], "there is no command 'fedrate'; there are train, federate"),
        (["train", "nowhere.toml"], "No experiment file at nowhere.toml"),
        (["train", "x.toml", "--ranks", "0"], "one rank or more; received --ranks 0"),
        (["train", "x.toml", "--ranks", "3", "--hosts", "a:2"], "room for 2, and --ranks 3"),
        (["keys", "modle"], "received 'modle'"),
        (["status", "nowhere"], "holds an experiment.toml; received nowhere"),
    ],
)
def test_a_mistake_is_one_clean_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error")
    assert told in error
    assert error.count("\n") == 1


def test_without_the_packages_a_command_says_what_to_do_and_doctor_works(project: Path):
    """As with a Python in which nothing is installed."""
    plain = [sys.executable, "-I", "-S", "-c"]
    code = f"import sys; sys.path.insert(0, {str(project)!r}); import archipelago.__main__ as a;"
    for command in ("report", "federate", "keys"):
        script = code + f" sys.exit(a.main([{command!r}]))"
        done = subprocess.run([*plain, script], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stdout
        assert "has no package " in done.stderr
        assert "Run make setup" in done.stderr
        assert done.stderr.count("\n") == 1

    script = code + " sys.exit(a.main(['doctor']))"
    environment = {"PATH": "", "HOME": "/nonexistent"}
    done = subprocess.run(
        [*plain, script], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1, done.stderr
    for missing in ("g++", "make", "keras", "flwr", "horovod"):
        (line,) = [line for line in done.stdout.splitlines() if f"  {missing}: " in line]
        assert line.startswith("MISSING")
    missing = done.stdout.splitlines()[-1].removeprefix("missing: ").split(", ")
    assert missing[:3] == ["g++", "make", "git"]
    assert {"keras", "flwr", "horovod"} <= set(missing)


# --- train


def test_ranks_are_launched_over_gloo_with_the_other_options(tmp_path: Path):
    command = launch_command(4, "a:2,b:2", ["x.toml", "--set", "seed=3", "--resume"])
    assert command[0] == str(Path(sys.executable).parent / "horovodrun")
    assert command[1:6] == ["--gloo", "-np", "4", "-H", "a:2,b:2"]
    assert command[6:] == [
        sys.executable,
        "-m",
        "dist_train",
        "x.toml",
        "--set",
        "seed=3",
        "--resume",
    ]


@pytest.mark.parametrize("hosts", ["a", "a:0", "a:2,", "a:2;b:2", " a:2", "a:2,b:x"])
def test_hosts_that_are_no_list_are_refused(hosts: str):
    with pytest.raises(ValueError, match="as in h1:2,h2:2; received"):
        check_hosts(hosts, 2, "--ranks")


# --- keys, and the pages made of them


def test_every_key_has_a_meaning():
    for section in ["", *section_names()]:
        for key in keys_of(section):
            assert len(key.meaning) > 5, f"{section}.{key.name}"


def test_the_keys_are_the_experiments_own_and_can_be_read_back():
    text = "".join(
        f"{f'[{name}]' if name else ''}\n" + "\n".join(key.as_toml for key in keys_of(name)) + "\n"
        for name in ["", *section_names()]
    )
    assert tomllib.loads(text) == Experiment().model_dump()


def test_the_reference_pages_are_what_the_code_says(tmp_path: Path):
    assert reference.main(["--check"]) == 0
    assert reference.main(["--check"], tmp_path) == 1
    assert reference.main(["--write"], tmp_path) == 0
    assert reference.main(["--check"], tmp_path) == 0


def test_the_schema_for_editors_knows_every_key():
    schema = json.loads(reference.pages()["experiment.schema.json"])
    federation = schema["$defs"]["FederationSection"]["properties"]
    assert federation["num_rounds"]["minimum"] == 1
    assert federation["num_rounds"]["default"] == 10
    assert "description" in federation["num_rounds"]


# --- status


def status_of(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["status", str(run)]) == 0
    return capsys.readouterr().out


def test_the_status_of_a_federation_goes_on_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    flat = {"name": "mine", "run.directory": str(run), "federation.num_rounds": 7}
    record = RunRecord(experiment_from_flat(flat), "flower", "round")
    record.open()
    assert "mine: has begun" in status_of(run, capsys)

    record.append({"round": 0, "bytes_sent": 0})
    row = {"round": 1, "train": {"loss": 0.5}, "bytes_sent": 3_000_000, "cohort": ["a", "b"]}
    record.append({**row, "failures": {"c": "no answer within 5 s"}})
    os.utime(run / "metrics.jsonl", (time.time() - 90, time.time() - 90))
    text = status_of(run, capsys)
    assert "mine: round 1 of 7, 0 s of training, last written 90 s ago" in text
    assert "train loss 0.5000" in text
    assert "3 MB sent so far" in text
    assert "answered in that round: a, b" in text
    assert "left out of that round: c: no answer within 5 s" in text

    model = build_model(ModelSection(name="linear"), Schema((4,), 3), seed=0)
    record.finish(model, Schema((4,), 3), {"metrics": {"test": {"loss": 0.25}}})
    assert status_of(run, capsys).startswith("mine: finished\n  test loss 0.2500\n")
