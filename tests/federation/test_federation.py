"""Real federations on loopback: a SuperLink, SuperNodes, Flower messages. The laws that tie the two
halves together.
"""

import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from fl_app.launch import LaunchError, federate, partition_data
from fl_app.server.rounds import run_federation
from shared.data import load_dataset
from shared.experiment import Experiment, experiment_from_flat
from shared.processes import free_ports
from shared.run_record import RunRecord
from shared.weights import max_difference, weights_sha256
from shared.zoo import build_model
from tests.federation.processes import (
    final_weights,
    finished,
    lines_until,
    our_processes,
    result,
    start,
    toml_file,
    wait_for,
)
from tests.local_exchange import exchange_of_files
from tests.parallel.launching import BIN, ROOT, environment, run_ranks

pytestmark = pytest.mark.federation
NUM_ROUNDS = 5

# One SGD step per round on each silo's whole data: the federation of the law.
FULL_BATCH = {
    "name": "full_batch",
    "seed": 5,
    "data.name": "wine",
    "data.validation_fraction": 0.0,
    "model.name": "mlp",
    "model.options": "units = [8]",
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.2,
    "partition.kind": "dirichlet",
    "partition.dirichlet_alpha": 0.5,
    "federation.num_rounds": NUM_ROUNDS,
    "federation.local_batch_size": 0,
    "training.epochs": NUM_ROUNDS,
    "training.global_batch_size": 1000,
}


def experiment(run: Path, **changes: object) -> Experiment:
    return experiment_from_flat({**FULL_BATCH, "run.directory": str(run), **changes})


@dataclass
class KilledRun:
    """A federation whose launcher was killed after round 2, and which was then resumed to its
    end.
    """

    run: Path
    num_processes: int  # when it was killed
    left_over: list[
        psutil.Process
    ]  # of them, 3 s later: Flower's own watch over parents takes longer
    output: str  # of the resumed launcher


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilledRun]:
    folder = tmp_path_factory.mktemp("killed")
    marker, run = str(folder), folder / "run"
    path = toml_file(folder, experiment(folder / "unused"))
    first = start(marker, "fl_app.launch", path, "--silos", 2, "--run-dir", run)
    rows = run / "metrics.jsonl"
    reached = wait_for(lambda: rows.is_file() and '"round": 2' in rows.read_text(), timeout_s=400)
    num_processes = len(our_processes(marker))
    first.kill()
    assert reached, finished(first)
    first.wait()
    wait_for(lambda: not our_processes(marker), timeout_s=3)
    left_over = our_processes(marker)
    resumed = start(marker, "fl_app.launch", path, "--silos", 2, "--run-dir", run, "--resume")
    output = finished(resumed, 400)
    yield KilledRun(run, num_processes, left_over, output)
    for process in our_processes(marker):
        process.kill()


def test_a_killed_launcher_takes_all_its_processes_along(killed: KilledRun) -> None:
    assert (
        killed.num_processes >= 9
    )  # launcher, SuperLink, two silos of three each, the app of the server
    assert killed.left_over == []


def test_a_killed_and_resumed_federation_is_bit_equal_to_an_undisturbed_one(
    killed: KilledRun, tmp_path: Path
) -> None:
    """The undisturbed one runs in this process, without Flower: messages lose nothing either."""
    e = experiment(tmp_path / "run", **{"federation.min_silos": 2})
    exchange = exchange_of_files(e, partition_data(e, 2, tmp_path))
    run_federation(e, exchange, RunRecord(e, "flower", "round"))
    assert (
        "round 1/5" not in killed.output
    )  # round 2 may be repeated: its row is written before its checkpoint
    assert "round 3/5" in killed.output
    assert result(killed.run)["weights_sha256"] == result(tmp_path / "run")["weights_sha256"]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_federation_of_full_batch_steps_is_central_sgd(
    killed: KilledRun, tmp_path: Path, num_ranks: int
) -> None:
    e = experiment(tmp_path / "unused")
    central = tmp_path / "central"
    path = toml_file(tmp_path, e)
    done = run_ranks(num_ranks, "-m", "dist_train", path, "--run-dir", central)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert result(central)["world_size"] == num_ranks
    assert max_difference(final_weights(central), final_weights(killed.run)) <= 1e-5
    losses = [result(run)["metrics"]["test"]["loss"] for run in (central, killed.run)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    start = build_model(e.model, load_dataset(e.data).schema, e.seed).get_weights()
    assert max_difference(final_weights(killed.run), start) > 0.05  # it went somewhere


def test_the_run_record_is_whole(killed: KilledRun) -> None:
    found = result(killed.run)
    assert found["runtime"] == "flower"
    assert found["silos"] == ["silo-0", "silo-1"]
    assert found["weights_sha256"] == weights_sha256(final_weights(killed.run))
    # two silos, five rounds, down and up, four bytes a parameter
    assert found["bytes_sent"] == 2 * NUM_ROUNDS * 2 * 4 * found["num_parameters"]
    rows = [json.loads(line) for line in (killed.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(NUM_ROUNDS + 1))


def test_a_silo_without_usable_data_ends_the_run_with_its_reason_kept_at_the_silo(
    tmp_path: Path, capfd
) -> None:
    bad = tmp_path / "patients.csv"
    bad.write_text("age,label\nforty-two,1\n")
    e = experiment(tmp_path / "run")
    with pytest.raises(LaunchError) as caught:
        federate(e, {"a": "wine", "b": str(bad)}, tmp_path)
    lines = str(caught.value).splitlines()
    (reason,) = (
        line for line in lines if line.startswith("  b: ")
    )  # from the silo's own log, on its own machine
    assert "forty-two" in reason
    (sent,) = (line for line in lines if line.startswith("  server: "))  # what left the silo
    assert "silo 'b' refuses" in sent
    assert "forty-two" not in sent + capfd.readouterr().out
    assert not (tmp_path / "run").exists()


PHASES = ("the SuperLink starts", "roll call", "round 1/")


@pytest.mark.parametrize(
    "phase", ["the silos start", *(pytest.param(p, marks=pytest.mark.slow) for p in PHASES)]
)
def test_ctrl_c_shuts_everything_down(starter, tmp_path: Path, phase: str) -> None:
    run = tmp_path / "run"
    path = toml_file(tmp_path, experiment(tmp_path / "unused"))
    process = starter("fl_app.launch", path, "--silos", 2, "--run-dir", run)
    num_processes = {"the SuperLink starts": 2, "the silos start": 6}.get(phase)
    if num_processes:
        assert wait_for(lambda: len(our_processes(str(tmp_path))) >= num_processes, timeout_s=60)
    else:
        lines_until(process, phase)
    process.send_signal(signal.SIGINT)
    output = finished(process, 30)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert wait_for(lambda: not our_processes(str(tmp_path)), 1)
    assert not (run / "result.json").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_run_at_mlflow_too(starter, tmp_path: Path) -> None:
    """The server, which has opened it, is killed with the SuperLink and cannot end it."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    path = toml_file(
        tmp_path,
        experiment(tmp_path / "unused", **{"federation.num_rounds": 1000, "run.mlflow": uri}),
    )
    process = starter("fl_app.launch", path, "--silos", 2, "--run-dir", tmp_path / "run")
    lines_until(process, "round 1/")
    process.send_signal(signal.SIGINT)
    finished(process, 30)

    noted = json.loads((tmp_path / "run" / "mlflow.json").read_text())
    run = MlflowClient(tracking_uri=uri).get_run(noted["run_id"])
    assert run.info.status == "KILLED"


@pytest.mark.slow
def test_a_server_that_is_killed_is_named_soon_and_loopback_needs_no_proxy(
    starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nobody listens
    path = toml_file(tmp_path, experiment(tmp_path / "unused", **{"federation.num_rounds": 1000}))
    process = starter("fl_app.launch", path, "--silos", 2, "--run-dir", tmp_path / "run")
    lines_until(process, "round 2/")

    (server,) = our_processes(str(tmp_path), str(BIN / "flwr-serverapp"))
    server.kill()
    output = finished(process, 30)  # Flower notices it after 50 s
    assert process.returncode == 2, output
    assert output.splitlines()[-3:] == [
        "error: The run did not finish:",
        "  the ServerApp has ended",
        "Its last round is saved: once the cause is gone, continue with the same command and"
        " --resume.",
    ]


def test_a_superlink_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    (tmp_path / "config.toml").write_text(
        f'[superlink.nowhere]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    path = toml_file(tmp_path, experiment(tmp_path / "run"))
    done = subprocess.run(
        [BIN / "flwr", "run", ROOT, "nowhere", "--run-config", path],
        env=environment(FLWR_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "SuperLink" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--silos", "0"], "number of silos must lie in"),
        (["--set", "partition.kind=size"], "needs partition.sizes"),
        (["--silo", "hospital"], "--silo takes NAME=DATA"),
        (["--silo", "a/b=wine"], "made of letters"),
        (
            ["--silo", "a=LICENSE", "--set", "data.name=LICENSE"],
            "test on examples that a silo trains on",
        ),
        (["--port", "PORT"], "is in use"),
        (["--port", "99999"], "from 1 to 65535"),
    ],
)
def test_mistakes_end_with_one_clean_line(
    starter, tmp_path: Path, arguments: list[str], told: str
) -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = str(occupied.getsockname()[1])
        arguments = [port if argument == "PORT" else argument for argument in arguments]
        path = toml_file(tmp_path, experiment(tmp_path / "unused"))
        process = starter("fl_app.launch", path, "--run-dir", tmp_path / "run", *arguments)
        output = finished(process, 60)
    assert process.returncode == 2
    assert [line for line in output.splitlines() if line.startswith("error: ") and told in line], (
        output
    )
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
