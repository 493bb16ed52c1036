"""Real federations on loopback: a SuperLink, SuperNodes, Flower messages. The laws that tie the two halves together."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import psutil
import pytest

from fl_app.launch import LaunchError, cut_data, federate
from fl_app.local_training import load_silo, train_at_silo
from shared.experiment import Experiment, experiment_from_flat
from shared.weights import Weights, add, max_difference, weights_sha256
from shared.zoo import build_model
from tests.parallel.launching import ROOT, environment, run_ranks

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


def toml_file(folder: Path, e: Experiment) -> Path:
    path = folder / "experiment.toml"
    path.write_text(e.to_toml())
    return path


def final_weights(run: Path) -> Weights:
    return keras.models.load_model(run / "model.keras").get_weights()


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def our_processes(marker: str) -> list[psutil.Process]:
    """All processes that were started with the marker in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ARCHIPELAGO_TEST") == marker:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts `python -m fl_app.launch`; whatever it leaves behind is ended after the test."""
    marker = str(tmp_path)

    def start(*arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "fl_app.launch", *map(str, arguments)],
            cwd=ROOT,
            env=environment(ARCHIPELAGO_TEST=marker),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    yield start
    for process in our_processes(marker):
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the law: two silos of unequal size and skewed classes, through real messages."""
    folder = tmp_path_factory.mktemp("undisturbed")
    e = experiment(folder / "run")
    federate(e, cut_data(e, 2, folder), folder)
    return folder / "run"


def test_a_federation_of_full_batch_steps_is_central_sgd(undisturbed: Path, tmp_path: Path) -> None:
    path = toml_file(tmp_path, experiment(tmp_path / "unused"))
    for num_ranks in (1, 2):
        run = tmp_path / f"central{num_ranks}"
        done = run_ranks(num_ranks, "-m", "dist_train", path, "--run-dir", run)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert result(run)["world_size"] == num_ranks
        assert max_difference(final_weights(run), final_weights(undisturbed)) <= 1e-5
        assert abs(result(run)["metrics"]["test"]["loss"] - result(undisturbed)["metrics"]["test"]["loss"]) <= 1e-5
    start = build_model(experiment(tmp_path).model, load_schema(), seed=5).get_weights()
    assert max_difference(final_weights(undisturbed), start) > 0.05  # it went somewhere


def load_schema():
    from shared.data import load_dataset

    return load_dataset(experiment(Path("unused")).data).schema


def test_the_run_record_is_whole(undisturbed: Path) -> None:
    found = result(undisturbed)
    assert found["runtime"] == "flower"
    assert found["silos"] == ["silo-0", "silo-1"]
    assert found["weights_sha256"] == weights_sha256(final_weights(undisturbed))
    # two silos, five rounds, down and up, four bytes a parameter
    assert found["bytes_sent"] == 2 * NUM_ROUNDS * 2 * 4 * found["num_parameters"]
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(NUM_ROUNDS + 1))


def test_a_killed_federation_dies_whole_and_resumes_bit_equal(undisturbed: Path, launcher, tmp_path: Path) -> None:
    run, path = tmp_path / "run", toml_file(tmp_path, experiment(tmp_path / "unused"))
    killed = launcher(path, "--silos", 2, "--run-dir", run)
    rows = run / "metrics.jsonl"
    assert wait_for(lambda: rows.is_file() and '"round": 2' in rows.read_text(), timeout_s=240)
    assert len(our_processes(str(tmp_path))) >= 7  # launcher, SuperLink, two SuperNodes, their executors
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert wait_for(lambda: not our_processes(str(tmp_path)), timeout_s=15)
    assert not (run / "result.json").exists()

    resumed = launcher(path, "--silos", 2, "--run-dir", run, "--resume")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert "round 1/" not in output
    assert result(run)["weights_sha256"] == result(undisturbed)["weights_sha256"]
    assert wait_for(lambda: not our_processes(str(tmp_path)), timeout_s=5)


def test_one_silo_is_local_training_and_its_order_is_its_names(tmp_path: Path) -> None:
    e = experiment(
        tmp_path / "run",
        **{
            "data.validation_fraction": 0.2,
            "federation.num_rounds": 2,
            "federation.local_epochs": 2,
            "federation.local_batch_size": 16,
            "optimizer.name": "adam",
            "optimizer.learning_rate": 0.01,
        },
    )
    silos = cut_data(e, 1, tmp_path)
    federate(e, silos, tmp_path)

    silo = load_silo({"silo": "silo-0", "data": silos["silo-0"]}, e)
    weights = build_model(e.model, silo.schema, e.seed).get_weights()
    for round_number in (1, 2):
        weights = add(weights, train_at_silo(silo, e, weights, round_number).update)
    assert max_difference(final_weights(tmp_path / "run"), weights) <= 1e-6
    assert set(result(tmp_path / "run")["metrics"]) == {"test", "validation"}


def test_a_silo_without_usable_data_ends_the_run_with_its_reason_kept_at_the_silo(tmp_path: Path, capfd) -> None:
    bad = tmp_path / "patients.csv"
    bad.write_text("age,label\nforty-two,1\n")
    e = experiment(tmp_path / "run")
    with pytest.raises(LaunchError) as caught:
        federate(e, {"a": "wine", "b": str(bad)}, tmp_path)
    message = str(caught.value)
    assert "silo b" in message  # from the silo's own log, on the silo's own machine
    assert "forty-two" in message
    sent = capfd.readouterr().out  # the ServerApp's lines: what left the silo
    assert "silo 'b' refuses" in sent
    assert "forty-two" not in sent
    assert not (tmp_path / "run").exists()


def test_ctrl_c_shuts_everything_down(launcher, tmp_path: Path) -> None:
    path = toml_file(tmp_path, experiment(tmp_path / "unused"))
    process = launcher(path, "--silos", 2, "--run-dir", tmp_path / "run")
    assert wait_for(lambda: len(our_processes(str(tmp_path))) >= 6, timeout_s=60)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not our_processes(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--silos", "0"], "number of silos must lie in"),
        (["--set", "partition.kind=size"], "needs partition.sizes"),
        (["--silo", "hospital"], "--silo takes NAME=DATA"),
        (["--port", "PORT"], "is in use"),
    ],
)
def test_mistakes_end_with_one_clean_line(launcher, tmp_path: Path, arguments: list[str], told: str) -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        port = str(occupied.getsockname()[1])
        arguments = [port if argument == "PORT" else argument for argument in arguments]
        process = launcher(
            toml_file(tmp_path, experiment(tmp_path / "unused")), "--run-dir", tmp_path / "run", *arguments
        )
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert [line for line in output.splitlines() if line.startswith("error: ") and told in line], output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
