"""The experiments that come along, shortened: their own models, data and settings, for two epochs or rounds."""

from pathlib import Path

import numpy as np

from shared.data import Dataset
from shared.data.arrays import save_npz
from shared.experiment import Experiment, load_experiment

EXPERIMENTS = sorted((Path(__file__).resolve().parents[1] / "experiments").glob("*.toml"))
SHORT = {
    "training.epochs": 2,
    "training.early_stopping_patience": 0,
    "federation.num_rounds": 2,
    "federation.local_epochs": 1,
    "federation.early_stopping_patience": 0,
    "federation.min_silos": 3,
}
FEWER: dict[str, dict[str, object]] = {
    "documentation_lm": {"data.sequence_length": 32, "data.test_fraction": 0.8},
    "cifar10_resnet": {"optimizer.learning_rate": 0.01, "training.global_batch_size": 16},
}


def shortened(path: Path, folder: Path) -> Experiment:
    """The experiment, with its record in `folder`; data that only the network has is random, of the same shape."""
    changes = {**SHORT, **FEWER.get(path.stem, {})}
    if path.stem == "cifar10_resnet":
        changes["data.name"] = str(folder / "cifar10.npz")
        rng = np.random.default_rng(0)
        y = np.arange(120, dtype=np.int32) % 10
        x = rng.random((120, 32, 32, 3), np.float32) * (
            0.1 + 0.09 * y[:, None, None, None]
        )  # some brighter than others
        if not (folder / "cifar10.npz").exists():
            save_npz(folder / "cifar10.npz", Dataset(x.astype(np.float32), y, num_classes=10))
    overrides = [f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}" for key, value in changes.items()]
    return load_experiment(path, overrides, directory=str(folder / path.stem))
