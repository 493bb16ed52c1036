"""python -m dist_train as a user starts it: alone and under horovodrun, with resume and with
mistakes.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.parallel.launching import run_ranks

pytestmark = pytest.mark.parallel
EXPERIMENT = "experiments/digits_cnn.toml"


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def test_a_run_resumed_in_new_processes_is_bit_equal(tmp_path: Path) -> None:
    def train(directory: str, epochs: int, *more: str) -> dict:
        run = tmp_path / directory
        options = ["--run-dir", run, "--set", f"training.epochs={epochs}", *more]
        done = run_ranks(2, "-m", "dist_train", EXPERIMENT, *options)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return result(run)

    with ThreadPoolExecutor() as meanwhile:
        training = meanwhile.submit(train, "undisturbed", 2)
        train("stopped", 1)
        resumed = train("stopped", 2, "--resume")
    undisturbed = training.result()
    assert resumed["weights_sha256"] == undisturbed["weights_sha256"]
    assert resumed["runtime"] == "horovod"
    assert resumed["world_size"] == 2
    assert (
        resumed["bytes_sent"]
        == undisturbed["bytes_sent"]
        == 2 * 2 * 41 * 4 * resumed["num_parameters"]
    )


def test_a_mistake_is_told_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_ranks(
        2, "-m", "dist_train", EXPERIMENT, "--run-dir", run, "--set", "training.global_batch_size=1"
    )
    assert done.returncode != 0
    told = [line for line in (done.stdout + done.stderr).splitlines() if "error:" in line]
    assert len([line for line in told if "global batch must not be smaller" in line]) == 1
    assert "dist_train/trainer.py" not in done.stdout + done.stderr  # no traceback of ours
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["experiments/digits_cn.toml"], "No experiment file at experiments/digits_cn.toml"),
        ([EXPERIMENT, "--set", "trainng.epochs=3"], "Did you mean 'training.epochs'?"),
        ([EXPERIMENT, "--set", "model.name=cn"], "Nearest: cnn."),
    ],
)
def test_mistakes_end_with_one_clean_line(tmp_path: Path, arguments: list[str], told: str) -> None:
    run = tmp_path / "run"
    done = run_ranks(1, "-m", "dist_train", *arguments, "--run-dir", run)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert "Traceback" not in done.stderr
    assert not run.exists()


def test_one_process_imports_no_horovod(tmp_path: Path) -> None:
    program = (
        "import sys; from dist_train.__main__ import main; status ="
        " main(['experiments/article_linear_distributed.toml', '--run-dir',"
        f" {str(tmp_path / 'run')!r}, '--set', 'run.tensorboard=true']); sys.exit(status or"
        " any(name.partition('.')[0] == 'horovod' for name in sys.modules))"
    )
    done = run_ranks(1, "-c", program)
    assert done.returncode == 0, done.stderr[-2000:]
    assert result(tmp_path / "run")["runtime"] == "single"
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.*"))
