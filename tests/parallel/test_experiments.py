"""Every experiment that comes along trains, shortened, on two real ranks."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.launching import run_ranks
from tests.shortened import EXPERIMENTS, shortened

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


def test_every_experiment_trains_on_two_ranks(tmp_path: Path) -> None:
    for path in EXPERIMENTS:
        shortened(path, tmp_path)  # writes what stands for the data of the network
    done = run_ranks(2, Path(__file__).with_name("experiments_job.py"), tmp_path, timeout_s=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for path in EXPERIMENTS:
        result = json.loads((tmp_path / path.stem / "result.json").read_text())
        assert (result["world_size"], result["epochs"]) == (2, 2), path.stem
        assert np.isfinite(result["metrics"]["test"]["loss"]), path.stem
