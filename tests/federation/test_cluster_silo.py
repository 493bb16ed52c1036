"""Silos that are Horovod clusters, as their owners run them: law 3, and what happens when ranks are
lost.
"""

import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import keras
import psutil
import pytest

from dist_train.collectives import LocalCommunicator
from dist_train.trainer import train
from fl_app.launch import partition_data
from fl_app.messages import EVALUATE, TRAIN, Task, TrainingRequest
from fl_app.server.rounds import run_federation
from fl_app.silo.cluster import ClusterWorkbench
from fl_app.silo.policy import SiloSettings
from fl_app.silo.settings import Cluster
from fl_app.silo.workbench import Workbench
from shared.data import Schema, fit_schema, load_dataset, load_examples
from shared.processes import free_ports
from shared.run_record import RunRecord
from shared.weights import Weights, max_difference
from shared.zoo import build_model
from tests.federation.consortium import CLUSTER, PLAIN, Consortium, experiment, wait_for_task
from tests.federation.processes import (
    all_gone,
    final_weights,
    finished,
    lines_until,
    our_processes,
    rows,
    toml_file,
    wait_for,
)
from tests.local_exchange import exchange_of_files
from tests.parallel.launching import BIN

pytestmark = pytest.mark.federation

OPTIMIZERS: dict[str, dict[str, object]] = {
    "momentum": {
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.learning_rate": 0.02,
    },
    "adam": {"optimizer.name": "adam", "optimizer.learning_rate": 0.01},
}
MIXED = {"silo-0": CLUSTER, "silo-1": PLAIN}  # a cluster of two ranks, and one process
DROPPING = (*CLUSTER, "--on-loss", "drop")


@pytest.fixture
def consortium(superlink: Consortium) -> Consortium:
    superlink.gather(MIXED)
    return superlink


def ranks_of(consortium: Consortium) -> list[psutil.Process]:
    """The ranks of silo-0 by number. (The processes of horovodrun have their command in theirs.)"""
    running = consortium.processes_of("silo-0", "fl_app.silo.cluster")
    by_rank = {p.environ()["HOROVOD_RANK"]: p for p in running if "HOROVOD_RANK" in p.environ()}
    return [by_rank[rank] for rank in sorted(by_rank)]


# --- law 3: a silo of several ranks ends where a silo of one process does


LAW_3 = {
    "federation.num_rounds": 3,
    "federation.local_epochs": 2,
    "federation.evaluate_on_server": True,
}


@dataclass(frozen=True)
class Run:
    directory: Path
    output: str


@pytest.fixture(scope="module")
def queued(superlink: Consortium, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run with each optimizer, which were started at once."""
    superlink.gather(MIXED)
    folders = {name: tmp_path_factory.mktemp("law_3") for name in OPTIMIZERS}
    runs = {
        name: superlink.start_run(experiment(folders[name] / "ranks", **LAW_3, **keys))
        for name, keys in OPTIMIZERS.items()
    }
    assert len(ranks_of(superlink)) == 2
    return {name: Run(folders[name] / "ranks", finished(run)) for name, run in runs.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_law_3_a_silo_of_two_ranks_ends_where_a_silo_of_one_process_does(
    superlink: Consortium, queued: dict[str, Run], tmp_path: Path, optimizer: str
) -> None:
    ranks = queued[optimizer].directory
    assert "round 3/3" in queued[optimizer].output, queued[optimizer].output
    here = tmp_path / "here"
    superlink.run_here(experiment(here, **LAW_3, **OPTIMIZERS[optimizer]))
    check_equal(ranks, here)


def check_equal(ranks: Path, here: Path) -> None:
    """The same weights and metrics, and silos that are not alike."""
    assert len({row["num_examples"] for row in rows(ranks, "silos.jsonl")}) == 2
    assert max_difference(final_weights(ranks), final_weights(here)) <= 1e-5
    for mine, reference in zip(rows(ranks), rows(here), strict=True):
        for split in ("train", "validation", "test"):
            assert mine.get(split) == pytest.approx(reference.get(split), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_law_3_holds_for_a_federation_that_is_launched_with_clusters_only(
    starter, tmp_path: Path, optimizer: str
) -> None:
    e = experiment(tmp_path / "ranks", **LAW_3, **OPTIMIZERS[optimizer])
    run = starter("fl_app.launch", toml_file(tmp_path, e), "--silos", 2, "--num-workers", 2)
    output = finished(run, 300)
    assert run.returncode == 0, output
    here = experiment(tmp_path / "here", **LAW_3, **OPTIMIZERS[optimizer])
    exchange = exchange_of_files(here, partition_data(here, 2, tmp_path))
    run_federation(here, exchange, RunRecord(here, "flower", "round"))
    check_equal(tmp_path / "ranks", tmp_path / "here")


FULL_BATCH = {
    "data.validation_fraction": 0.0,
    "federation.local_batch_size": 0,
    "federation.evaluate_on_server": True,
}
CENTRAL = {
    "training.epochs": 5,
    "training.global_batch_size": 1000,
    "data.validation_fraction": 0.0,
}
SGD = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.05}
FED_MOMENTUM = {"server_optimizer.name": "fedavgm", "server_optimizer.momentum": 0.9}
EQUIVALENTS = {  # how many silos, what they do, and which central training that is
    "momentum": (
        2,
        {**SGD, **FED_MOMENTUM, "federation.num_rounds": 5},
        {**SGD, "optimizer.momentum": 0.9},
    ),
    # the mean of several silos' Adam steps is no Adam step: this one has all the data
    "adam": (
        1,
        {**OPTIMIZERS["adam"], "federation.local_epochs": 5, "federation.num_rounds": 1},
        OPTIMIZERS["adam"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", EQUIVALENTS)
def test_clusters_that_take_full_batch_steps_end_where_central_training_does(
    starter, tmp_path: Path, optimizer: str
) -> None:
    num_silos, federated, central = EQUIVALENTS[optimizer]
    e = experiment(tmp_path / "ranks", **FULL_BATCH, **federated)
    run = starter("fl_app.launch", toml_file(tmp_path, e), "--silos", num_silos, "--num-workers", 2)
    before = lines_until(run, "roll call: ")
    ranks = our_processes(str(tmp_path), "fl_app.silo.cluster")
    assert len([rank for rank in ranks if "HOROVOD_RANK" in rank.environ()]) == 2 * num_silos
    output = finished(run, 300)
    assert run.returncode == 0, before + output
    c = experiment(tmp_path / "central", **CENTRAL, **central)
    train(c, LocalCommunicator())
    weights = final_weights(tmp_path / "ranks")
    assert max_difference(weights, final_weights(tmp_path / "central")) <= 1e-5
    start = build_model(e.model, load_dataset(e.data).schema, e.seed).get_weights()
    assert max_difference(weights, start) > 0.02  # it went somewhere


# --- tasks that cannot be done


@pytest.mark.slow
def test_work_that_fails_by_itself_is_refused_once_and_the_next_task_is_done(
    tmp_path: Path, capfd
) -> None:
    e = experiment(tmp_path / "run", **OPTIMIZERS["adam"])
    narrow = experiment(
        tmp_path / "run", **{**OPTIMIZERS["adam"], "model.name": NARROW, "model.options": ""}
    )
    schema = fit_schema(load_examples(e.data), e.data)
    settings = SiloSettings("one", "wine", (NARROW,))

    def task(kind: str, weights: Weights, round_number: int) -> Task:
        body = TrainingRequest(schema, evaluate=True).to_body()
        return Task(kind, round=round_number, body=body, arrays=weights)

    with ClusterWorkbench(Cluster(num_workers=2)) as bench:
        bench.start()
        weights = build_model(narrow.model, schema, e.seed).get_weights()
        with pytest.raises(ValueError, match=r"rank [01] failed with InvalidArgumentError"):
            bench.run(task(TRAIN, weights, 1), settings, narrow, {})
        assert "restarted" not in capfd.readouterr().err
        weights = build_model(e.model, schema, e.seed).get_weights()
        first = task(TRAIN, weights, 1)
        result, _ = bench.run(first, settings, e, {})
        reference, _ = Workbench().run(first, settings, e, {})
        assert max_difference(result.update, reference.update) <= 1e-5
        capfd.readouterr()
        with pytest.raises(ValueError, match="weights of another model"):
            bench.run(task(TRAIN, [w[..., :1] for w in weights], 2), settings, e, {})
        bench.run(task(EVALUATE, weights, 2), settings, e, {})
        assert "restarted" not in capfd.readouterr().err  # the ranks are still the same


def narrow_vocabulary(schema: Schema) -> keras.Model:
    """Fails in training: its embedding has a place for fewer numbers than the data has."""
    inputs = keras.Input(schema.input_shape)
    vectors = keras.layers.Embedding(2, 3)(inputs)
    return keras.Model(
        inputs, keras.layers.Dense(schema.num_classes)(keras.layers.Flatten()(vectors))
    )


NARROW = f"{__name__}:{narrow_vocabulary.__name__}"


# --- ranks that are lost


LONG = {"federation.local_epochs": 60, "federation.num_rounds": 3}  # a task of some seconds
VICTIMS = ("rank 0", "rank 1", "launcher")
AGAIN = "the cluster is ready again"


def kill(consortium: Consortium, victim: str) -> list[psutil.Process]:
    """Kills the launcher of silo-0's ranks, or one of these; returns all ranks that there were."""
    ranks = ranks_of(consortium)
    worker = consortium.worker("silo-0")
    launching = consortium.processes_of("silo-0", str(BIN / "horovodrun"))
    (launcher,) = [process for process in launching if process.ppid() == worker]
    {"launcher": launcher, "rank 0": ranks[0], "rank 1": ranks[1]}[victim].kill()
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("victims", [VICTIMS], ids=["each once"])
def test_rounds_in_which_the_cluster_is_killed_end_as_undisturbed_ones(
    consortium: Consortium, tmp_path: Path, victims: tuple[str, ...]
) -> None:
    """In each of three rounds."""
    e = experiment(tmp_path / "run", **LONG)
    log = consortium.log("silo-0")
    restarts_before = log.read_text().count(AGAIN)
    run = consortium.start_run(e)
    output = lines_until(run, "roll call: 2 silos")
    for restarts, victim in enumerate(victims):
        wait_for_task(consortium.worker("silo-0"))
        mended = restarts_before + restarts
        assert wait_for(lambda n=mended: log.read_text().count(AGAIN) >= n, 60)
        time.sleep(1.5)  # amid the training
        ranks = kill(consortium, victim)
        output += lines_until(run, f"round {restarts + 1}/3")
        assert all_gone(ranks, 0)
    output += finished(run)
    assert log.read_text().count(AGAIN) - restarts_before == 3, log.read_text()
    cohorts = [row["cohort"] for row in rows(e.run_directory) if "cohort" in row]
    assert cohorts == [["silo-0", "silo-1"]] * 3
    assert not any("failures" in row for row in rows(e.run_directory)), output
    consortium.run_here(experiment(tmp_path / "here", **LONG))
    assert max_difference(final_weights(tmp_path / "run"), final_weights(tmp_path / "here")) <= 1e-5


@pytest.mark.slow
def test_ranks_that_are_lost_between_runs_are_there_again_before_the_next(
    consortium: Consortium,
) -> None:
    log = consortium.log("silo-0")
    before = log.read_text().count(AGAIN)
    kill(consortium, "rank 1")
    assert wait_for(lambda: log.read_text().count(AGAIN) == before + 1, 60)


def test_ctrl_c_at_a_cluster_silo_leaves_no_process(consortium: Consortium) -> None:
    processes = consortium.processes_of("silo-0")
    assert set(ranks_of(consortium)) < set(processes)
    silo = consortium.group.processes["silo-0"]
    silo.send_signal(signal.SIGINT)
    assert silo.wait(30) == 130
    assert "has left the federation" in consortium.log("silo-0").read_text()
    assert all_gone(processes, 5)


@pytest.mark.slow
def test_with_on_loss_drop_the_silos_round_is_given_up_with_the_reason(
    superlink: Consortium, tmp_path: Path
) -> None:
    superlink.gather({"silo-0": DROPPING, "silo-1": PLAIN})
    quorum = {"federation.min_replies": 1, "federation.num_rounds": 2}
    e = experiment(tmp_path / "run", **{**LONG, **quorum})
    run = superlink.start_run(e)
    output = lines_until(run, "roll call: 2 silos")
    wait_for_task(superlink.worker("silo-0"))
    time.sleep(1.5)  # amid the training
    kill(superlink, "rank 1")
    output += finished(run)
    first, second = (row for row in rows(e.run_directory) if "cohort" in row)
    assert first["cohort"] == ["silo-1"], output
    assert "its cluster lost ranks while it did this task: rank" in first["failures"]["silo-0"]
    assert second["cohort"] == ["silo-0", "silo-1"]


# --- the end of a silo


def test_a_cluster_silo_that_is_killed_leaves_no_process(superlink: Consortium) -> None:
    superlink.gather({"silo-0": DROPPING, "silo-1": PLAIN})
    processes = superlink.processes_of("silo-0")
    assert set(ranks_of(superlink)) < set(processes)
    superlink.group.processes["silo-0"].kill()
    assert all_gone(processes, 5)


def start_cluster_silo(starter, *options: str) -> subprocess.Popen:
    """One that calls a coordinator that is not there."""
    (port,) = free_ports(1)
    command = ["--insecure", "--superlink", f"127.0.0.1:{port}", "--silo", "a", "--data", "wine"]
    return starter("fl_app.silo", *command, *CLUSTER, *options)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("phase", ["the SuperNode is running", "the cluster is ready"])
def test_a_cluster_silo_that_is_ended_without_a_coordinator_leaves_no_process(
    starter, tmp_path: Path, end: signal.Signals, phase: str
) -> None:
    silo = start_cluster_silo(starter)
    before = lines_until(silo, phase)
    if phase == "the SuperNode is running":
        time.sleep(3)  # the ranks are starting
    silo.send_signal(end)
    output = finished(silo, 30)
    assert wait_for(lambda: not our_processes(str(tmp_path)), 5), our_processes(str(tmp_path))
    if end == signal.SIGINT:
        assert silo.returncode == 130, before + output
        assert "has left the federation" in output


@pytest.mark.slow
def test_a_cluster_that_cannot_be_started_is_told(starter) -> None:
    silo = start_cluster_silo(starter, "--hosts", "no-such-host.invalid:2")
    output = finished(silo, 200)
    assert silo.returncode == 2
    assert "horovodrun ended with status" in output
