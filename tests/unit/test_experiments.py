"""Every experiment that comes along runs, shortened, in both of its forms: here in one process and
over silos.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from dist_train.collectives import LocalCommunicator
from dist_train.trainer import train
from fl_app.server.rounds import run_federation
from fl_app.silo.data import make_silo
from fl_app.simulation.exchange import exchange_of_silos
from shared.data import load_examples, split_pool
from shared.data.partition import partition
from shared.run_record import RunRecord, read_metrics
from tests.shortened import EXPERIMENTS, shortened


def ids(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", EXPERIMENTS, ids=ids)
def test_every_experiment_trains_in_one_process(tmp_path: Path, path: Path):
    result = train(shortened(path, tmp_path), LocalCommunicator())
    rows = read_metrics(tmp_path / path.stem)
    assert len(rows) == 2
    assert rows[1]["train"]["loss"] < rows[0]["train"]["loss"]
    assert np.isfinite(result["metrics"]["test"]["loss"])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=ids)
def test_every_experiment_is_federated(tmp_path: Path, path: Path):
    experiment = shortened(path, tmp_path)
    pool, _ = split_pool(
        load_examples(experiment.data), experiment.seed, experiment.data.test_fraction
    )
    parts = partition(experiment.partition, pool, 2, experiment.seed)
    silos = [make_silo(f"silo-{i}", part, experiment) for i, part in enumerate(parts)]
    run_federation(
        experiment, exchange_of_silos(experiment, silos), RunRecord(experiment, "flower", "round")
    )
    result = json.loads((tmp_path / path.stem / "result.json").read_text())
    assert (result["rounds"], result["num_silos"]) == (2, 2)
    assert np.isfinite(result["metrics"]["test"]["loss"])
    rows = [
        json.loads(line) for line in (tmp_path / path.stem / "silos.jsonl").read_text().splitlines()
    ]
    before, after = (
        np.mean([row["train"]["loss"] for row in rows if row["round"] == r]) for r in (1, 2)
    )
    assert after < before
