"""A federation on this machine, without its processes: the silos' data, and why a run ended."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fl_app.launch import partition_data, watch
from fl_app.launch.__main__ import main
from fl_app.launch.federation import federate, write_run_config
from fl_app.launch.output import explain, how_to_go_on, relay
from fl_app.launch.silo_data import own_data
from fl_app.silo.settings import Cluster
from shared.data import load_examples, split_pool
from shared.experiment import DataSection, Experiment, experiment_from_flat, load_experiment
from shared.processes import ProcessGroup, direct_on_loopback


def experiment(**changes: object) -> Experiment:
    return experiment_from_flat({"data.name": "wine", **changes})


# --- the silos' data


def test_the_experiments_data_less_the_test_split_is_partitioned_into_files(tmp_path: Path):
    e = experiment(**{"data.name": "digits"})
    silos = partition_data(e, 3, tmp_path)
    assert list(silos) == ["silo-0", "silo-1", "silo-2"]

    pool, _ = split_pool(load_examples(e.data), e.seed, e.data.test_fraction)
    parts = [load_examples(DataSection(name=path)) for path in silos.values()]
    images = [image.tobytes() for part in parts for image in part.x]
    assert sorted(images) == sorted(image.tobytes() for image in pool.x)


def test_a_silos_own_file_is_named_by_its_absolute_path_and_a_built_in_set_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").touch()
    silos = own_data(["a=a.csv", "b=digits"], experiment())
    assert silos == {"a": str(tmp_path / "a.csv"), "b": "digits"}
    assert own_data([], experiment()) == {}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["a"], "--silo takes NAME=DATA; received 'a'. Example"),
        (["=a.csv"], "--silo takes NAME=DATA"),
        (["a="], "--silo takes NAME=DATA"),
        (["../a=a.csv"], "made of letters, digits, .*; received '../a'"),
        (["a=b.csv", "a=c.csv"], "a name of its own; received 'a' twice"),
    ],
)
def test_assignments_that_cannot_be_are_refused(assignments: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        own_data(assignments, experiment())


def test_the_server_does_not_test_on_a_silos_own_data(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.touch()
    e = experiment(**{"data.name": str(path)})
    with pytest.raises(ValueError, match="test on examples that a silo trains on"):
        own_data([f"a={path}"], e)

    e = experiment(**{"data.name": str(path), "federation.evaluate_on_server": False})
    assert own_data([f"a={path}"], e) == {"a": str(path)}


def test_the_run_waits_for_all_silos_and_writes_where_the_user_is(tmp_path: Path):
    e = experiment(**{"run.directory": "here", "seed": 7})
    merged = load_experiment(write_run_config(e, {"a": "wine", "b": "wine"}, tmp_path))
    assert merged.seed == 7
    assert merged.federation.min_silos == 2
    assert merged.run_directory == Path("here").resolve()


def test_a_plain_flower_node_has_one_worker(tmp_path: Path):
    with pytest.raises(ValueError, match="one worker; received --num-workers 2"):
        federate(experiment(), {"a": "wine"}, tmp_path, node="flower", cluster=Cluster(2))


# --- the output of a run


def output_of(*lines: str) -> Any:
    """Stands for a process with this output."""
    return SimpleNamespace(stdout=io.BytesIO("\n".join(lines).encode()))


def test_lines_are_printed_until_the_server_reports_an_error(capsys: pytest.CaptureFixture[str]):
    lines = ("round 1/2: loss 0.5", "error: too few", "Traceback", "error: again")
    assert relay(output_of(*lines), 2) == ["server: error: too few", "server: error: again"]
    assert capsys.readouterr().out == "round 1/2: loss 0.5\n"


@pytest.fixture
def logs(tmp_path: Path) -> dict[str, Path]:
    """The logs of a SuperLink, of 20 lines, and of a silo, by the names of their processes."""
    superlink, silo = tmp_path / "superlink.log", tmp_path / "silo-0.log"
    superlink.write_text("".join(f"line {i}\n" for i in range(20)))
    silo.write_text("began\n")
    return {"the SuperLink": superlink, "silo silo-0": silo}


def test_errors_of_the_server_and_in_the_logs_explain_a_run_each_once(logs: dict[str, Path]):
    logs["silo silo-0"].write_text("began\nerror: no file\nerror: no file\n")
    reason, details = explain({}, ["server: error: too few"], logs)
    assert reason.splitlines() == [
        "The run did not finish:",
        "  server: error: too few",
        "  silo-0: error: no file",
    ]
    assert details == ""


def test_a_process_that_has_ended_is_named_and_the_end_of_its_own_log_is_shown(
    logs: dict[str, Path],
):
    reason, details = explain({"the SuperLink": "was ended by SIGKILL"}, [], logs)
    assert reason.splitlines() == [
        "The run did not finish:",
        "  the SuperLink was ended by SIGKILL",
    ]
    assert details.splitlines() == ["--- superlink.log", *(f"line {i}" for i in range(5, 20))]


def test_without_any_reason_the_ends_of_all_logs_are_shown(logs: dict[str, Path]):
    reason, details = explain({}, [], logs)
    assert reason == "The run did not finish; the logs above may say why."
    assert [line for line in details.splitlines() if "---" in line] == [
        "--- superlink.log",
        "--- silo-0.log",
    ]


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (None, "It had not begun"),
        (["experiment.toml"], r"delete .*run or choose another --run-dir, and"),
        (["experiment.toml", "checkpoint.npz"], "continue with the same command and --resume"),
    ],
)
def test_a_run_that_did_not_finish_says_how_to_go_on(
    tmp_path: Path, files: list[str] | None, advice: str
):
    e = experiment(**{"run.directory": str(tmp_path / "run")})
    if files is not None:
        e.run_directory.mkdir()
        for name in files:
            (e.run_directory / name).touch()
    assert re.search(advice, how_to_go_on(e))


# --- the watch over processes


@pytest.fixture
def group() -> Iterator[ProcessGroup]:
    """A run that would go on for minutes, and a silo."""
    with ProcessGroup() as group:
        for name in ("flwr run", "silo a"):
            group.start(name, ["sleep", "300"], os.environ)
        yield group


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "GRACE_S", 0.5)


@pytest.mark.parametrize("command", ["flwr-serverapp", "flower-superexec"])
def test_a_run_whose_server_is_gone_is_ended_soon_and_the_process_named(
    tmp_path: Path, group: ProcessGroup, command: str
):
    server = subprocess.Popen(["sleep", "300"])
    (tmp_path / command).write_text(f"{server.pid}\n")
    watched = watch.Watch(group, "flwr run", tmp_path)
    watched.start()
    assert watched.ended_commands() == {}
    with pytest.raises(subprocess.TimeoutExpired):
        group.processes["flwr run"].wait(1.5)

    server.kill()  # and not waited for: it is a zombie
    assert group.processes["flwr run"].wait(5) == -signal.SIGTERM
    assert watched.ended_commands() == {watch.OWN_COMMANDS[command]: "has ended"}
    assert watched.ended_processes() == {}
    server.wait()
    assert watched.ended_commands() == {watch.OWN_COMMANDS[command]: "has ended"}


def test_a_run_of_which_a_silo_is_gone_is_ended_and_says_how(tmp_path: Path, group: ProcessGroup):
    watched = watch.Watch(group, "flwr run", tmp_path)
    watched.start()
    group.processes["silo a"].kill()
    assert group.processes["flwr run"].wait(5) == -signal.SIGTERM
    assert watched.ended_processes() == {"silo a": "was ended by SIGKILL"}


# --- options


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_is_none_is_refused(tmp_path: Path, port: int):
    with pytest.raises(ValueError, match=f"from 1 to 65535; received --port {port}. Choose"):
        federate(experiment(), {"a": "wine"}, tmp_path, port=port)


def test_a_number_of_silos_beside_named_ones_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "mine.toml"
    path.write_text(experiment().to_toml())
    assert main([str(path), "--silos", "5", "--silo", "a=wine"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --silos N divides one data set")
    assert "received --silos 5 and --silo a=wine. Leave one out." in error


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_no_proxy_stands_between_the_processes(monkeypatch: pytest.MonkeyPatch, name: str):
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "example.org")
    expected = "example.org,127.0.0.1,localhost"
    assert direct_on_loopback() == {"NO_PROXY": expected, "no_proxy": expected}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_launcher_that_is_ended_says_how_to_go_on(
    tmp_path: Path, project: Path, number: int, status: int
):
    path = tmp_path / "mine.toml"
    path.write_text(experiment().to_toml())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    launcher = subprocess.Popen(
        [sys.executable, "-m", "fl_app.launch", path, "--run-dir", tmp_path / "run"],
        cwd=project,
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not any(scratch.glob("archipelago-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    launcher.send_signal(number)
    _, error = launcher.communicate(timeout=60)
    assert launcher.returncode == status
    assert error.splitlines()[-1].startswith("interrupted: everything is shut down; a run that had")
    assert "Traceback" not in error
    assert list(scratch.glob("archipelago-*")) == []
