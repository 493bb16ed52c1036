"""Silos as a consortium runs them: one SuperLink, living silos, several runs; and what happens when a silo fails."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fl_app.launch import cut_data
from fl_app.rounds import run_federation
from shared.experiment import Experiment, experiment_from_flat
from shared.processes import free_ports
from shared.run_record import RunRecord
from shared.weights import max_difference
from tests.federation.consortium import Consortium, a_consortium, finished, lines_until, wait_for_task
from tests.federation.processes import (
    MARK,
    cleaned_up,
    final_weights,
    our_processes,
    result,
    rows,
    start,
    toml_file,
    wait_for,
)
from tests.local_exchange import LocalExchange
from tests.parallel.launching import BIN, ROOT, environment

pytestmark = pytest.mark.federation

WINE = {
    "name": "silos",
    "data.name": "wine",
    "model.name": "mlp",
    "model.options": "units = [8]",
    "federation.num_rounds": 2,
    "federation.min_silos": 2,
    "federation.evaluate_on_server": False,
}


def experiment(run: Path, **changes: object) -> Experiment:
    return experiment_from_flat({**WINE, "run.directory": str(run), **changes})


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    folder = tmp_path_factory.mktemp("consortium")
    with a_consortium(folder) as ours:
        ours.data = cut_data(experiment(folder / "unused"), 2, folder)
        for name, data in ours.data.items():
            ours.start_silo(name, data)
        yield ours


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `python -m MODULE ...`; whatever it leaves behind is ended after the test."""
    with cleaned_up(str(tmp_path)):
        yield functools.partial(start, str(tmp_path))


def test_two_runs_queued_on_one_superlink_each_end_as_if_alone(consortium: Consortium, tmp_path: Path) -> None:
    """The silos' workers go from the one to the other and back; nothing of the one may stay in the other."""
    momentum = {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.learning_rate": 0.1}
    changes = ({"seed": 1}, {"seed": 2, **momentum})
    for i in range(2):
        (tmp_path / str(i)).mkdir()
    queued = [experiment(tmp_path / str(i) / "run", **changes[i]) for i in range(2)]
    outputs = [finished(run) for run in [consortium.start_run(e) for e in queued]]
    for e, output in zip(queued, outputs, strict=True):
        assert "round 2/2" in output, output
        alone = e.model_copy(update={"run": e.run.model_copy(update={"directory": f"{e.run_directory}-alone"})})
        run_federation(alone, LocalExchange(alone, consortium.data), RunRecord(alone, "flower", "round"))
        assert result(e.run_directory)["weights_sha256"] == result(alone.run_directory)["weights_sha256"]


@pytest.mark.parametrize("name", ["fl_app.strategies:FedAvg", "flwr.serverapp.strategy:FedAvg"])
def test_a_flower_strategy_by_name_ends_where_our_own_rounds_end(
    consortium: Consortium, tmp_path: Path, name: str
) -> None:
    e = experiment(tmp_path / "run", **{"federation.strategy": name})
    output = finished(consortium.start_run(e))
    assert "round 2/2" in output, output
    own = experiment(tmp_path / "own")
    run_federation(own, LocalExchange(own, consortium.data), RunRecord(own, "flower", "round"))
    assert max_difference(final_weights(e.run_directory), final_weights(own.run_directory)) <= 1e-6
    theirs, ours = result(e.run_directory), result(own.run_directory)
    for metric, value in ours["metrics"]["validation"].items():
        assert theirs["metrics"]["validation"][metric] == pytest.approx(value, abs=1e-5)
    # one exchange more in each round carries the weights to be judged
    assert theirs["bytes_sent"] > ours["bytes_sent"]


LONG = {"federation.local_epochs": 300, "federation.local_batch_size": 16}  # a task of some seconds


def test_a_worker_that_is_killed_on_a_task_is_named_at_once_and_replaced(
    consortium: Consortium, tmp_path: Path
) -> None:
    e = experiment(tmp_path / "run", **LONG, **{"federation.min_replies": 1})
    run = consortium.start_run(e)
    log = consortium.folder / "silo-1.log"
    victim = consortium.worker("silo-1")
    lines_until(run, "roll call: 2 silos")
    task = wait_for_task(victim)
    time.sleep(1)  # it trains
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    assert wait_for(lambda: not task.exists(), 5)
    assert time.monotonic() - killed < 5
    output = finished(run)
    told = "silo 'silo-1' is left out of the round: the silo's worker was ended by SIGKILL while it did this task"
    assert told in output, output
    first, second = (row for row in rows(e.run_directory) if "cohort" in row)
    assert first["cohort"] == ["silo-0"]
    assert "SIGKILL" in first["failures"]["silo-1"]
    assert second["cohort"] == ["silo-0", "silo-1"]
    assert "it is started anew" in log.read_text()
    assert consortium.worker("silo-1") != victim


def test_a_round_goes_on_without_a_silo_that_never_answers(consortium: Consortium, tmp_path: Path) -> None:
    changes = {"federation.min_replies": 1, "federation.round_timeout_s": 40.0, "federation.num_rounds": 1}
    e = experiment(tmp_path / "run", **LONG, **changes, **{"federation.evaluate_on_silos": False})
    run = consortium.start_run(e)
    frozen = consortium.worker("silo-0")
    lines_until(run, "roll call: 2 silos")
    wait_for_task(frozen)
    os.kill(frozen, signal.SIGSTOP)
    try:
        output = finished(run)
    finally:
        os.kill(frozen, signal.SIGCONT)
    assert "round 1/1" in output, output
    (row,) = (row for row in rows(e.run_directory) if "cohort" in row)
    assert row["cohort"] == ["silo-1"]
    assert row["failures"] == {"silo-0": "no answer within 40 s"}


def test_a_silo_that_vanishes_in_a_round_is_named_and_the_round_goes_on(consortium: Consortium, tmp_path: Path) -> None:
    """As when its machine or its line dies: nobody is left there to say so."""
    consortium.start_silo("third", "wine")
    e = experiment(tmp_path / "run", **LONG, **{"federation.min_silos": 3, "federation.min_replies": 2})
    run = consortium.start_run(e)
    worker = consortium.worker("third")
    lines_until(run, "roll call: 3 silos")
    wait_for_task(worker)
    consortium.group.processes["third"].kill()
    killed = time.monotonic()
    told = lines_until(run, "silo 'third' is left out of the round")
    assert time.monotonic() - killed < 35  # Flower's heartbeats come every 10 s; two may be missed
    output = finished(run)
    assert "silo 'third' is left out of the round: it is no longer connected" in told + output
    assert next(row["cohort"] for row in rows(e.run_directory) if "cohort" in row) == ["silo-0", "silo-1"]
    assert wait_for(lambda: not psutil.pid_exists(worker), 5)


GARBLING = """
import sys
if "fl_app.silo.worker" in sys.orig_argv:
    from dataclasses import replace
    from fl_app import messages
    honest = messages.pack_result
    messages.pack_result = lambda result: honest(replace(result, update=[array[..., :-1] for array in result.update]))
"""


def test_a_silo_that_sends_arrays_of_other_shapes_is_left_out_by_name(consortium: Consortium, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(GARBLING)
    with consortium.another_silo("garbling", "wine", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"):
        changes = {"federation.min_silos": 3, "federation.min_replies": 2, "federation.num_rounds": 2}
        e = experiment(tmp_path / "run", **changes)
        output = finished(consortium.start_run(e))
    told = [line for line in output.splitlines() if line.startswith("silo 'garbling' is left out of the round")]
    assert len(told) == 2, output
    assert all("an update must have the model's" in line and "should be" in line for line in told)
    assert [row["cohort"] for row in rows(e.run_directory) if "cohort" in row] == [["silo-0", "silo-1"]] * 2


def test_a_silo_with_another_app_is_refused_and_both_versions_are_told(consortium: Consortium, tmp_path: Path) -> None:
    for package in ("shared", "dist_train", "fl_app"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "shared" / "metrics.py").open("a") as file:
        file.write("# one line more\n")
    with consortium.another_silo("other", "wine", PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1") as log:
        e = experiment(tmp_path / "run", **{"federation.min_silos": 3})
        output = finished(consortium.start_run(e))
    (reason,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "silo 'other' refuses: it runs the app that is installed here" in reason
    assert "received the bundle" in reason
    assert "Install the same version" in reason
    assert "received the bundle" in log.read_text()
    assert not e.run_directory.exists()


def test_a_silo_whose_training_diverges_is_left_out_by_name(starter, tmp_path: Path) -> None:
    good, wild = tmp_path / "good.csv", tmp_path / "wild.csv"
    lines = [f"{i % 7},{i % 3},{i % 2}" for i in range(60)]
    good.write_text("\n".join(["a,b,label", *lines]))
    wild.write_text("\n".join(["a,b,label", *(f"{i}e30,{i % 3}e30,{i % 2}" for i in range(60))]))
    keys = {"federation.min_replies": 1, "optimizer.name": "sgd", "data.scaling": "none"}
    e = experiment(tmp_path / "run", **keys)
    silos = ("--silo", f"good={good}", "--silo", f"wild={wild}")
    run = starter("fl_app.launch", toml_file(tmp_path, e), *silos, "--run-dir", tmp_path / "run")
    output = finished(run)
    assert run.returncode == 0, output
    told = [line for line in output.splitlines() if line.startswith("silo 'wild' is left out of the round")]
    assert len(told) == 2
    assert all("must be finite" in line for line in told)
    assert [row["cohort"] for row in rows(tmp_path / "run") if "cohort" in row] == [["good"]] * 2
    assert our_processes(str(tmp_path)) == []


@pytest.mark.parametrize("node", ["flower", "worker-stock-waits"])
def test_stock_supernodes_run_the_same_app_to_the_same_weights(starter, tmp_path: Path, node: str) -> None:
    e = experiment(tmp_path / "run", **{"federation.num_rounds": 1, "federation.evaluate_on_silos": False})
    path = toml_file(tmp_path, e)
    run = starter("fl_app.launch", path, "--silos", 2, "--node", node, "--run-dir", tmp_path / "run")
    output = finished(run)
    assert run.returncode == 0, output
    here = experiment(tmp_path / "here", **{"federation.num_rounds": 1, "federation.evaluate_on_silos": False})
    run_federation(here, LocalExchange(here, cut_data(here, 2, tmp_path)), RunRecord(here, "flower", "round"))
    assert result(tmp_path / "run")["weights_sha256"] == result(tmp_path / "here")["weights_sha256"]


WITHOUT = """
import sys
from fl_app import flower_internals
from fl_app.silo.__main__ import main
flower_internals.{table}["flwr", "gone"] = ()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("table", "warning", "runs_instead"),
    [
        ("EXECUTOR", "no flwr.gone: each task starts a process", "flower-superexec"),
        ("WAITS", "no flwr.gone: its SuperNode looks for messages every 3 s only", "flower-supernode"),
    ],
)
def test_a_silo_falls_back_on_flower_as_it_is_and_says_so(
    tmp_path: Path, table: str, warning: str, runs_instead: str
) -> None:
    """Where Flower lacks an internal name that ours is built on. Flower's commands need not be on the PATH."""
    command = ["--insecure", "--superlink", f"127.0.0.1:{free_ports(1)[0]}", "--silo", "a", "--data", "wine"]
    path = os.pathsep.join(folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder) != BIN)
    with cleaned_up(str(tmp_path)):
        silo = subprocess.Popen(
            [sys.executable, "-c", WITHOUT.format(table=table), *command],
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
        output, _ = silo.communicate(timeout=30)
        assert silo.returncode == 130, output
        assert wait_for(lambda: not our_processes(str(tmp_path)), 5)


@pytest.mark.parametrize("phase", ["the SuperNode is running", "the worker is ready"])
def test_ctrl_c_at_a_silo_leaves_no_process(starter, tmp_path: Path, phase: str) -> None:
    """Also while its SuperNode waits for a SuperLink that is not there."""
    (port,) = free_ports(1)
    command = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--silo", "a", "--data", "wine")
    silo = starter("fl_app.silo", *command)
    before = lines_until(silo, phase)
    silo.send_signal(signal.SIGINT)
    output, _ = silo.communicate(timeout=30)
    assert silo.returncode == 130, before + output
    assert "has left the federation" in output
    assert "Traceback" not in before + output
    assert wait_for(lambda: not our_processes(str(tmp_path)), 1)


@pytest.mark.parametrize("victim", ["fl_app.silo", "fl_app.silo.supernode"])
def test_a_killed_silo_or_supernode_leaves_no_process(starter, tmp_path: Path, victim: str) -> None:
    (port,) = free_ports(1)
    command = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--silo", "a", "--data", "wine")
    silo = starter("fl_app.silo", *command)
    assert wait_for(lambda: our_processes(str(tmp_path), "fl_app.silo.worker"), 60)
    (process,) = our_processes(str(tmp_path), victim)
    process.kill()
    output, _ = silo.communicate(timeout=30)
    assert wait_for(lambda: not our_processes(str(tmp_path)), 3)
    if victim != "fl_app.silo":
        assert silo.returncode == 2
        assert "error: the SuperNode of silo a was ended by SIGKILL" in output
