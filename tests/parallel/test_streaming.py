"""Two ranks that read a table from disk end with the weights of one process that has it in
memory.
"""

from pathlib import Path

import keras
import numpy as np
import pytest

from dist_train.collectives import LocalCommunicator
from dist_train.trainer import train
from shared.experiment import load_experiment
from shared.weights import max_difference
from tests.parallel.launching import run_ranks
from tests.unit.test_streaming import KEYS, written

pytestmark = pytest.mark.parallel


def test_two_ranks_stream_what_one_process_holds(tmp_path: Path) -> None:
    data = [f"{key} = {value!r}" for key, value in KEYS.items()]
    text = ["[data]", f"name = {str(written(tmp_path))!r}", *data]
    text += ["[model]", 'name = "mlp"', "[training]", "epochs = 2"]
    path = tmp_path / "patients.toml"
    path.write_text("\n".join(text))

    one = load_experiment(path, ["data.stream=false"], run_directory=str(tmp_path / "one"))
    train(one, LocalCommunicator())
    ranks = ["--run-dir", tmp_path / "ranks", "--set", "data.stream=true"]
    done = run_ranks(2, "-m", "dist_train", path, *ranks, timeout_s=200)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]

    weights = [
        keras.models.load_model(tmp_path / run / "model.keras", compile=False).get_weights()
        for run in ("one", "ranks")
    ]
    assert max_difference(*weights) <= 1e-5
    assert max(float(np.abs(array).max()) for array in weights[0]) > 0.1
    assert len(list((tmp_path / ".encoded").glob("*.f32"))) == 1  # the ranks of a host share it
