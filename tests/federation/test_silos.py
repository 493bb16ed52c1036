"""Silos as their owners run them: one SuperLink, living silos, several runs; and what happens when
a silo fails.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest

from fl_app.launch import partition_data
from fl_app.server.rounds import run_federation
from shared.processes import free_ports
from shared.run_record import RunRecord
from shared.weights import max_difference
from tests.federation.consortium import PLAIN, Consortium, experiment, wait_for_task
from tests.federation.processes import (
    MARK,
    all_gone,
    cleaned_up,
    final_weights,
    finished,
    lines_until,
    living,
    our_processes,
    result,
    rows,
    toml_file,
    wait_for,
)
from tests.local_exchange import exchange_of_files
from tests.parallel.launching import BIN, ROOT, environment

pytestmark = pytest.mark.federation

TWO_SILOS = {"silo-0": PLAIN, "silo-1": PLAIN}


@pytest.fixture
def consortium(superlink: Consortium) -> Consortium:
    superlink.gather(TWO_SILOS)
    return superlink


def cohorts(run: Path) -> list[list[str]]:
    return [row["cohort"] for row in rows(run) if "cohort" in row]


# --- several runs, one after the other and at once


MOMENTUM = {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.learning_rate": 0.1}
QUEUED: dict[str, dict[str, object]] = {"adam": {}, "momentum": {"seed": 2, **MOMENTUM}}


@dataclass(frozen=True)
class Run:
    directory: Path
    output: str


@pytest.fixture(scope="module")
def queued(superlink: Consortium, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two runs that were started at once, by name. The silos' workers go from the one to the other
    and back; nothing of the one may stay in the other.
    """
    superlink.gather(TWO_SILOS)
    folders = {name: tmp_path_factory.mktemp("queued") for name in QUEUED}
    runs = {
        name: superlink.start_run(experiment(folders[name] / "run", **QUEUED[name]))
        for name in QUEUED
    }
    return {name: Run(folders[name] / "run", finished(run)) for name, run in runs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUEUED)
def test_two_runs_queued_on_one_superlink_each_end_as_if_alone(
    superlink: Consortium, queued: dict[str, Run], tmp_path: Path, name: str
) -> None:
    assert "round 2/2" in queued[name].output, queued[name].output
    alone = tmp_path / "alone"
    superlink.run_here(experiment(alone, **QUEUED[name]))
    expected = result(alone)["weights_sha256"]
    assert result(queued[name].directory)["weights_sha256"] == expected


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fl_app.flower.optimizer_strategies:FedAvg", marks=pytest.mark.slow),
        "flwr.serverapp.strategy:FedAvg",
    ],
)
def test_a_flower_strategy_by_name_ends_where_our_own_rounds_end(
    consortium: Consortium, queued: dict[str, Run], tmp_path: Path, name: str
) -> None:
    e = experiment(tmp_path / "run", **{"federation.strategy": name})
    output = finished(consortium.start_run(e))
    assert "round 2/2" in output, output
    own = queued["adam"].directory
    assert max_difference(final_weights(e.run_directory), final_weights(own)) <= 1e-6
    theirs, ours = result(e.run_directory), result(own)
    for metric, value in ours["metrics"]["validation"].items():
        assert theirs["metrics"]["validation"][metric] == pytest.approx(value, abs=1e-5)
    # one exchange more in each round carries the weights to be judged
    assert theirs["bytes_sent"] > ours["bytes_sent"]


# --- silos that fail in a round


LONG = {"federation.local_epochs": 150}  # a task of some seconds
ROUND_TIMEOUT_S = 30.0  # Flower's heartbeats come every 10 s; two may be missed


@dataclass(frozen=True)
class Disturbed:
    """A run of two rounds, and what was done to three of its four silos in the first."""

    run: Path
    output: str
    log: str  # of the silo whose worker was killed
    task_left_s: float  # until the task that this worker died on was answered
    vanished_s: float  # until the silo that vanished was left out
    left_over: list[psutil.Process]  # of the silo that vanished, 3 s later


@pytest.fixture(scope="module")
def disturbed(superlink: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """Kills the worker of silo-0, freezes that of "frozen", which leaves after the round, and kills
    "vanishing", as when its machine or its line dies: nobody is left there to say so.
    """
    superlink.gather({**TWO_SILOS, "frozen": PLAIN, "vanishing": PLAIN})
    quorum = {"federation.min_silos": 4, "federation.min_replies": 1}
    timeout = {"federation.round_timeout_s": ROUND_TIMEOUT_S}
    e = experiment(tmp_path_factory.mktemp("disturbed") / "run", **LONG, **quorum, **timeout)
    victim = superlink.worker("silo-0")
    frozen = superlink.worker("frozen")
    vanishing = superlink.processes_of("vanishing")
    run = superlink.start_run(e)
    output = lines_until(run, "roll call: 4 silos")

    wait_for_task(frozen)
    os.kill(frozen, signal.SIGSTOP)
    try:
        wait_for_task(superlink.worker("vanishing"))
        task = wait_for_task(victim)
        time.sleep(1)  # they train
        superlink.group.processes["vanishing"].kill()
        vanished = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: not task.exists(), 20)
        task_left_s = time.monotonic() - killed

        all_gone(vanishing, vanished + 3 - time.monotonic())
        left_over = living(vanishing)

        output += lines_until(run, "silo 'vanishing' is left out of the round")
        vanished_s = time.monotonic() - vanished
        output += lines_until(run, "round 1/2")
    finally:
        os.kill(frozen, signal.SIGCONT)
    superlink.end_silo("frozen")
    output += finished(run)
    log = superlink.log("silo-0").read_text()
    return Disturbed(e.run_directory, output, log, task_left_s, vanished_s, left_over)


def first_failures(run: Path) -> dict[str, str]:
    return next(row["failures"] for row in rows(run) if "failures" in row)


def test_a_round_goes_on_without_the_silos_that_fail_and_the_next_has_those_that_are_back(
    disturbed: Disturbed,
) -> None:
    assert "round 2/2" in disturbed.output, disturbed.output
    assert cohorts(disturbed.run) == [["silo-1"], ["silo-0", "silo-1"]]


def test_a_worker_that_is_killed_on_a_task_is_named_at_once_and_replaced(
    disturbed: Disturbed,
) -> None:
    told = (
        "silo 'silo-0' is left out of the round: the silo's worker was ended by SIGKILL while it"
        " did this task"
    )
    assert told in disturbed.output, disturbed.output
    assert disturbed.task_left_s < 5
    assert "it is restarted" in disturbed.log
    assert "SIGKILL" in first_failures(disturbed.run)["silo-0"]


def test_a_silo_that_never_answers_is_left_out_when_the_time_is_up(disturbed: Disturbed) -> None:
    expected = f"no answer within {ROUND_TIMEOUT_S:g} s"
    assert first_failures(disturbed.run)["frozen"] == expected


def test_a_silo_that_vanishes_is_named_in_good_time_and_leaves_no_process(
    disturbed: Disturbed,
) -> None:
    told = "silo 'vanishing' is left out of the round: it is no longer connected"
    assert told in disturbed.output
    assert disturbed.vanished_s < 35
    assert disturbed.left_over == []


# --- silos that send what cannot be averaged


GARBLING = """
import sys
if "fl_app.flower.worker" in sys.orig_argv:
    from dataclasses import replace
    from fl_app.silo.workbench import Workbench
    honest = Workbench.run
    def cut(*arguments, **keywords):
        result, state = honest(*arguments, **keywords)
        return replace(result, update=[array[..., :-1] for array in result.update]), state
    Workbench.run = cut
"""


@pytest.fixture(scope="module")
def unusable(superlink: Consortium, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two rounds with a silo that sends arrays of other shapes, and one whose training
    diverges.
    """
    folder = tmp_path_factory.mktemp("unusable")
    (folder / "sitecustomize.py").write_text(GARBLING)
    wild = pd.read_parquet(superlink.data["silo-1"])
    wild[wild.columns.drop("label")] *= 1e30
    wild.to_parquet(folder / "wild.parquet")

    superlink.gather(TWO_SILOS)
    path = f"{folder}{os.pathsep}{ROOT}"
    superlink.start_silo("garbling", "wine", PYTHONPATH=path)
    superlink.start_silo("wild", str(folder / "wild.parquet"))
    quorum = {"federation.min_silos": 4, "federation.min_replies": 2}
    training = {"optimizer.name": "sgd", "optimizer.learning_rate": 1e-6, "data.scaling": "none"}
    e = experiment(folder / "run", **quorum, **training)
    with superlink.guests("garbling", "wild"):
        output = finished(superlink.start_run(e))
    return Run(e.run_directory, output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("silo", "reason"),
    [("garbling", "an update must have the model's"), ("wild", "must be finite")],
)
def test_a_silo_whose_update_cannot_be_averaged_is_left_out_by_name(
    unusable: Run, silo: str, reason: str
) -> None:
    start = f"silo {silo!r} is left out of the round"
    told = [line for line in unusable.output.splitlines() if line.startswith(start)]
    assert len(told) == 2, unusable.output
    assert all(reason in line for line in told)
    assert cohorts(unusable.directory) == [["silo-0", "silo-1"]] * 2


def test_a_silo_with_another_app_is_refused_and_both_versions_are_told(
    consortium: Consortium, tmp_path: Path
) -> None:
    for package in ("shared", "dist_train", "fl_app"):
        shutil.copytree(ROOT / package, tmp_path / package)  # with its bytecode
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "shared" / "metrics.py").open("a") as file:
        file.write("# one line more\n")
    log = consortium.start_silo("other", "wine", PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")
    with consortium.guests("other"):
        e = experiment(tmp_path / "run")
        output = finished(consortium.start_run(e))
    (reason,) = [line for line in output.splitlines() if "left out" in line]
    assert "silo 'other' refuses: it runs the app that is installed here" in reason
    assert "received the app" in reason
    assert "Install the same version" in reason
    assert "received the app" in log.read_text()
    assert cohorts(e.run_directory) == [["silo-0", "silo-1"]] * 2


# --- Flower's own nodes


@pytest.mark.slow
@pytest.mark.parametrize("node", ["flower", "worker-stock-waits"])
def test_stock_supernodes_run_the_same_app_to_the_same_weights(
    starter, tmp_path: Path, node: str
) -> None:
    short = {
        "federation.num_rounds": 1,
        "federation.min_silos": 1,
        "federation.evaluate_on_silos": False,
    }
    path = toml_file(tmp_path, experiment(tmp_path / "unused", **short))
    run = starter(
        "fl_app.launch", path, "--silos", 1, "--node", node, "--run-dir", tmp_path / "run"
    )
    output = finished(run)
    assert run.returncode == 0, output
    here = experiment(tmp_path / "here", **short)
    exchange = exchange_of_files(here, partition_data(here, 1, tmp_path))
    run_federation(here, exchange, RunRecord(here, "flower", "round"))
    assert result(tmp_path / "run")["weights_sha256"] == result(tmp_path / "here")["weights_sha256"]


WITHOUT = """
import sys
from fl_app.flower import {module}
from fl_app.silo.__main__ import main
{module}.INTERNALS["flwr", "gone"] = ()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("module", "warning", "runs_instead"),
    [
        ("node_tasks", "no flwr.gone: each task starts a process", "flower-superexec"),
        (
            "supernode",
            "no flwr.gone: its SuperNode polls for messages every 3 s only",
            "flower-supernode",
        ),
    ],
)
def test_a_silo_falls_back_on_flower_as_it_is_and_says_so(
    tmp_path: Path, module: str, warning: str, runs_instead: str
) -> None:
    """Where Flower lacks an internal name that ours is built on. Flower's commands need not be on
    the PATH.
    """
    command = ["--insecure", "--superlink", f"127.0.0.1:{free_ports(1)[0]}"]
    command += ["--silo", "a", "--data", "wine"]
    path = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder) != BIN
    )
    with cleaned_up(str(tmp_path)):
        silo = subprocess.Popen(
            [sys.executable, "-c", WITHOUT.format(module=module), *command],
            cwd=ROOT,
            env=environment(**{MARK: str(tmp_path), "PATH": path}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert warning in lines_until(silo, "the SuperNode is running")
        assert wait_for(lambda: our_processes(str(tmp_path), str(BIN / runs_instead)), 30)
        silo.send_signal(signal.SIGINT)
        output = finished(silo, 30)
        assert silo.returncode == 130, output
        assert wait_for(lambda: not our_processes(str(tmp_path)), 5)


# --- the end of a silo


def test_ctrl_c_at_a_silo_leaves_no_process(superlink: Consortium) -> None:
    superlink.gather({"silo-1": PLAIN})
    processes = superlink.processes_of("silo-1")
    silo = superlink.group.processes["silo-1"]
    silo.send_signal(signal.SIGINT)
    assert silo.wait(30) == 130
    log = superlink.log("silo-1").read_text()
    assert "has left the federation" in log
    assert "Traceback" not in log
    assert len(processes) == 3
    assert all_gone(processes, 1)


def test_a_killed_supernode_ends_its_silo_with_the_reason(superlink: Consortium) -> None:
    superlink.gather({"silo-0": PLAIN})
    processes = superlink.processes_of("silo-0")
    (node,) = superlink.processes_of("silo-0", "fl_app.flower.supernode")
    node.kill()
    assert superlink.group.processes["silo-0"].wait(30) == 2
    told = "error: the SuperNode of silo silo-0 was ended by SIGKILL"
    assert told in superlink.log("silo-0").read_text()
    assert all_gone(processes, 3)


@pytest.mark.parametrize("phase", ["the SuperNode is running", "the worker is ready"])
def test_ctrl_c_while_no_coordinator_is_there_leaves_no_process(
    starter, tmp_path: Path, phase: str
) -> None:
    (port,) = free_ports(1)
    command = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--silo", "a", "--data", "wine")
    silo = starter("fl_app.silo", *command)
    before = lines_until(silo, phase)
    silo.send_signal(signal.SIGINT)
    output = finished(silo, 30)
    assert silo.returncode == 130, before + output
    assert "has left the federation" in output
    assert "Traceback" not in before + output
    assert wait_for(lambda: not our_processes(str(tmp_path)), 1)
