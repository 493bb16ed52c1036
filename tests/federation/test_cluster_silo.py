"""Silos that are Horovod clusters, as their owners run them: law 3, and what happens when ranks are lost."""

import functools
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import psutil
import pytest

from fl_app.launch import cut_data
from fl_app.local_training import Workbench
from fl_app.rounds import run_federation
from fl_app.silo.cluster import ClusterWorkbench
from fl_app.silo.settings import Cluster
from shared.data import Schema, fit_schema, load_dataset, load_examples
from shared.experiment import Experiment, experiment_from_flat
from shared.processes import free_ports
from shared.run_record import RunRecord
from shared.weights import max_difference
from shared.zoo import build_model
from tests.federation.consortium import Consortium, a_consortium, finished, lines_until, wait_for_task
from tests.federation.processes import cleaned_up, final_weights, our_processes, rows, start, toml_file, wait_for
from tests.local_exchange import LocalExchange
from tests.parallel.launching import BIN, run_ranks

pytestmark = pytest.mark.federation

UNEVEN = {
    "name": "cluster",
    "data.name": "wine",
    "data.test_fraction": 0.2,
    "data.validation_fraction": 0.1,
    "model.name": "mlp",
    "partition.kind": "dirichlet",
    "partition.dirichlet_alpha": 1.0,
    "federation.num_rounds": 5,
    "federation.local_epochs": 2,
    "federation.local_batch_size": 16,
    "seed": 3,
}
OPTIMIZERS = {
    "momentum": {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.learning_rate": 0.02},
    "adam": {"optimizer.name": "adam", "optimizer.learning_rate": 0.01},
}


def ranks_of(mark: str) -> list[psutil.Process]:
    """The ranks of all clusters. (The processes of horovodrun have their command in theirs.)"""
    found = [(p.environ(), p) for p in our_processes(mark, "fl_app.silo.cluster")]
    return [p for _, _, p in sorted((e["HOROVOD_RANK"], p.pid, p) for e, p in found if "HOROVOD_RANK" in e)]


def experiment(run: Path, **changes: object) -> Experiment:
    return experiment_from_flat({**UNEVEN, "run.directory": str(run), **changes})


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    with cleaned_up(str(tmp_path)):
        yield functools.partial(start, str(tmp_path))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_law_3_silos_of_two_ranks_end_where_silos_of_one_process_do(starter, tmp_path: Path, optimizer: str) -> None:
    e = experiment(tmp_path / "ranks", **OPTIMIZERS[optimizer])
    run = starter("fl_app.launch", toml_file(tmp_path, e), "--silos", 2, "--num-workers", 2)
    before = lines_until(run, "roll call: 2 silos")
    assert len(ranks_of(str(tmp_path))) == 4
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, before + output
    here = experiment(tmp_path / "here", **OPTIMIZERS[optimizer])
    run_federation(here, LocalExchange(here, cut_data(here, 2, tmp_path)), RunRecord(here, "flower", "round"))
    sizes = [row["num_examples"] for row in rows(tmp_path / "ranks", "silos.jsonl")]
    assert len(set(sizes)) == 2  # uneven
    assert max_difference(final_weights(tmp_path / "ranks"), final_weights(tmp_path / "here")) <= 1e-5
    for mine, reference in zip(rows(tmp_path / "ranks"), rows(tmp_path / "here"), strict=True):
        for split in ("train", "validation", "test"):
            assert mine.get(split) == pytest.approx(reference.get(split), abs=1e-4)


FULL_BATCH = {"data.validation_fraction": 0.0, "federation.local_batch_size": 0, "federation.local_epochs": 1}
CENTRAL = {"training.epochs": 5, "training.global_batch_size": 1000, "data.validation_fraction": 0.0}
FED_MOMENTUM = {"server_optimizer.name": "fedavgm", "server_optimizer.momentum": 0.9}
EQUIVALENTS = {  # how many silos, what they do, and which central training that is
    "momentum": (2, FED_MOMENTUM, {"optimizer.momentum": 0.9}),
    # the mean of several silos' Adam steps is no Adam step: this one has all the data
    "adam": (1, {**OPTIMIZERS["adam"], "federation.local_epochs": 5, "federation.num_rounds": 1}, OPTIMIZERS["adam"]),
}


@pytest.mark.parametrize("optimizer", EQUIVALENTS)
def test_clusters_that_take_full_batch_steps_end_where_central_training_does(
    starter, tmp_path: Path, optimizer: str
) -> None:
    num_silos, federated, central = EQUIVALENTS[optimizer]
    sgd = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.05}
    e = experiment(tmp_path / "ranks", **{**sgd, **FULL_BATCH, **federated})
    run = starter("fl_app.launch", toml_file(tmp_path, e), "--silos", num_silos, "--num-workers", 2)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    (tmp_path / "c").mkdir()
    c = experiment(tmp_path / "central", **{**sgd, **CENTRAL, **central})
    done = run_ranks(1, "-m", "dist_train", toml_file(tmp_path / "c", c))
    assert done.returncode == 0, done.stderr[-2000:]
    assert max_difference(final_weights(tmp_path / "ranks"), final_weights(tmp_path / "central")) <= 1e-5
    start = build_model(e.model, load_dataset(e.data).schema, e.seed).get_weights()
    assert max_difference(final_weights(tmp_path / "ranks"), start) > 0.02  # it went somewhere


# --- tasks that cannot be done


def test_work_that_fails_by_itself_is_refused_once_and_the_next_task_is_done(tmp_path: Path, capfd) -> None:
    e = experiment(tmp_path / "run", **OPTIMIZERS["adam"])
    narrow = experiment(tmp_path / "run", **{**OPTIMIZERS["adam"], "model.name": NARROW})
    schema = fit_schema(load_examples(e.data), e.data)
    node = {"silo": "one", "data": "wine", "allow": NARROW}
    with ClusterWorkbench(Cluster(num_workers=2)) as bench:
        bench.start()
        weights = build_model(narrow.model, schema, e.seed).get_weights()
        with pytest.raises(ValueError, match=r"rank [01] failed with InvalidArgumentError"):
            bench.train(bench.silo(node, narrow), schema, narrow, weights, 1, evaluate=False)
        assert "started anew" not in capfd.readouterr().err
        weights = build_model(e.model, schema, e.seed).get_weights()
        result = bench.train(bench.silo(node, e), schema, e, weights, 1, evaluate=True)
        reference = Workbench().train(bench.silo(node, e), schema, e, weights, 1, evaluate=True)
        assert max_difference(result.update, reference.update) <= 1e-5
        capfd.readouterr()
        with pytest.raises(ValueError, match="shape"):
            bench.train(bench.silo(node, e), schema, e, [w[..., :1] for w in weights], 2, evaluate=True)
        bench.evaluate(bench.silo(node, e), schema, e, weights)
        assert "started anew" not in capfd.readouterr().err  # the ranks are still the same


def narrow_vocabulary(schema: Schema) -> keras.Model:
    """Fails in training: its embedding has a place for fewer numbers than the data has."""
    inputs = keras.Input(schema.input_shape)
    vectors = keras.layers.Embedding(2, 3)(inputs)
    return keras.Model(inputs, keras.layers.Dense(schema.num_classes)(keras.layers.Flatten()(vectors)))


NARROW = f"{__name__}:{narrow_vocabulary.__name__}"


# --- next to a plain silo, and killed


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """silo-0 is a cluster of two ranks, silo-1 one process."""
    folder = tmp_path_factory.mktemp("clusters")
    with a_consortium(folder) as ours:
        ours.data = cut_data(experiment(folder / "unused"), 2, folder)
        ours.start_silo("silo-0", ours.data["silo-0"], "--num-workers", "2")
        ours.start_silo("silo-1", ours.data["silo-1"])
        yield ours


LONG = {"federation.local_epochs": 60, "federation.num_rounds": 3}  # a task of some seconds


def kill(consortium: Consortium, victim: str) -> list[int]:
    """Kills the launcher of the ranks, or one of these; returns the process ids of all ranks that there were."""
    ranks = ranks_of(consortium.mark)
    worker = consortium.worker("silo-0")
    (launcher,) = (p for p in our_processes(consortium.mark, str(BIN / "horovodrun")) if p.ppid() == worker)
    {"launcher": launcher, "rank 0": ranks[0], "rank 1": ranks[1]}[victim].kill()
    return [process.pid for process in ranks]


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "launcher"])
def test_a_round_in_which_the_cluster_is_killed_ends_as_an_undisturbed_one(
    consortium: Consortium, tmp_path: Path, victim: str
) -> None:
    """Three times, in each round once."""
    e = experiment(tmp_path / "run", **LONG, **{"federation.min_silos": 2})
    log = consortium.folder / "silo-0.log"
    restarts_before = log.read_text().count("the cluster is ready again")
    run = consortium.start_run(e)
    output = lines_until(run, "roll call: 2 silos")
    for number in (1, 2, 3):
        wait_for_task(consortium.worker("silo-0"))
        mended = restarts_before + number - 1
        assert wait_for(lambda n=mended: log.read_text().count("the cluster is ready again") >= n, 60)
        time.sleep(1.5)  # amid the training
        killed = kill(consortium, victim)
        output += lines_until(run, f"round {number}/3")
        assert not any(psutil.pid_exists(pid) for pid in killed)
    output += finished(run)
    assert log.read_text().count("the cluster is ready again") - restarts_before == 3, log.read_text()
    assert [row["cohort"] for row in rows(e.run_directory) if "cohort" in row] == [["silo-0", "silo-1"]] * 3
    assert not any("failures" in row for row in rows(e.run_directory)), output
    here = experiment(tmp_path / "here", **LONG)
    run_federation(here, LocalExchange(here, consortium.data), RunRecord(here, "flower", "round"))
    assert max_difference(final_weights(tmp_path / "run"), final_weights(tmp_path / "here")) <= 1e-5


def test_ranks_that_are_lost_between_runs_are_there_again_before_the_next(
    consortium: Consortium, tmp_path: Path
) -> None:
    log = consortium.folder / "silo-0.log"
    before = log.read_text().count("the cluster is ready again")
    kill(consortium, "rank 1")
    assert wait_for(lambda: log.read_text().count("the cluster is ready again") == before + 1, 60)


def test_with_on_loss_drop_the_silos_round_is_given_up_with_the_reason(consortium: Consortium, tmp_path: Path) -> None:
    with consortium.another_silo("dropping", "wine", "--num-workers", "2", "--on-loss", "drop"):
        quorum = {"federation.min_silos": 3, "federation.min_replies": 2, "federation.num_rounds": 2}
        e = experiment(tmp_path / "run", **{**LONG, **quorum})
        run = consortium.start_run(e)
        output = lines_until(run, "roll call: 3 silos")
        wait_for_task(consortium.worker("dropping"))
        time.sleep(1.5)
        own = psutil.Process(consortium.worker("dropping")).children(recursive=True)
        [rank for rank in ranks_of(consortium.mark) if rank in own][-1].kill()
        output += finished(run)
    first, second = (row for row in rows(e.run_directory) if "cohort" in row)
    assert first["cohort"] == ["silo-0", "silo-1"]
    assert "its cluster lost ranks while it did this task: rank" in first["failures"]["dropping"], output
    assert second["cohort"] == ["dropping", "silo-0", "silo-1"]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("phase", ["the SuperNode is running", "the cluster is ready"])
def test_a_cluster_silo_that_is_ended_leaves_no_process(starter, tmp_path: Path, end: signal.Signals, phase: str):
    (port,) = free_ports(1)
    command = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--silo", "a", "--data", "wine", "--num-workers", "2")
    silo = starter("fl_app.silo", *command)
    before = lines_until(silo, phase)
    if phase == "the SuperNode is running":
        time.sleep(3)  # the ranks are starting
    silo.send_signal(end)
    output, _ = silo.communicate(timeout=30)
    assert wait_for(lambda: not our_processes(str(tmp_path)), 5), our_processes(str(tmp_path))
    if end == signal.SIGINT:
        assert silo.returncode == 130, before + output
        assert "has left the federation" in output


def test_a_cluster_that_cannot_be_started_is_told(starter, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = ("--insecure", "--superlink", f"127.0.0.1:{port}", "--silo", "a", "--data", "wine", "--num-workers", "2")
    silo = starter("fl_app.silo", *command, "--hosts", "no-such-host.invalid:2")
    output, _ = silo.communicate(timeout=200)
    assert silo.returncode == 2
    assert "horovodrun ended with status" in output
