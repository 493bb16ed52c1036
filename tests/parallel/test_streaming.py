"""Two ranks that read a table from disk end with the weights of one process that has it in memory."""

from pathlib import Path

import keras
import numpy as np
import pytest

from shared.weights import max_difference
from tests.parallel.launching import run_ranks
from tests.unit.test_streaming import KEYS, written

pytestmark = pytest.mark.parallel


def test_two_ranks_stream_what_one_process_holds(tmp_path: Path) -> None:
    path = written(tmp_path)
    lines = [f"{key} = {value!r}" for key, value in KEYS.items()]
    text = "\n".join(["[data]", f"name = {str(path)!r}", *lines, "[model]", 'name = "mlp"', "[training]", "epochs = 2"])
    (tmp_path / "patients.toml").write_text(text)
    weights = []
    for num_ranks, stream in ((1, "false"), (2, "true")):
        directory = tmp_path / f"ranks{num_ranks}"
        arguments = [tmp_path / "patients.toml", "--run-dir", directory, "--set", f"data.stream={stream}"]
        done = run_ranks(num_ranks, "-m", "dist_train", *arguments, timeout_s=200)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        weights.append(keras.models.load_model(directory / "model.keras", compile=False).get_weights())
    assert max_difference(*weights) <= 1e-5
    assert max(float(np.abs(array).max()) for array in weights[0]) > 0.1
    assert len(list((tmp_path / ".encoded").glob("*.f32"))) == 1  # the ranks of a host share it
