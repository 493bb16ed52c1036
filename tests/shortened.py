"""The experiments that come along, shortened: their own models, data and settings, for two epochs
or rounds.
"""

from pathlib import Path

import numpy as np

from shared.data import Dataset, load_examples
from shared.data.readers.arrays import save_npz
from shared.experiment import DataSection, Experiment, load_experiment

EXPERIMENTS = sorted((Path(__file__).resolve().parents[1] / "experiments").glob("*.toml"))
SHORT = {
    "training.epochs": 2,
    "training.early_stopping_patience": 0,
    "federation.num_rounds": 2,
    "federation.local_epochs": 1,
    "federation.early_stopping_patience": 0,
    "federation.min_silos": 2,
}
FEWER: dict[str, dict[str, object]] = {
    "cifar10_resnet": {"optimizer.learning_rate": 0.01, "training.global_batch_size": 16},
}


def shortened(path: Path, folder: Path) -> Experiment:
    """The experiment, with its record in `folder`, on fewer examples where it has many."""
    changes = {**SHORT, **FEWER.get(path.stem, {})}
    if path.stem in STANDS_FOR:
        file = folder / f"{path.stem}.npz"
        changes["data.name"] = str(file)
        if not file.exists():
            save_npz(file, STANDS_FOR[path.stem]())
    overrides = [
        f"{key}={value!r}" if isinstance(value, str) else f"{key}={value}"
        for key, value in changes.items()
    ]
    return load_experiment(path, overrides, run_directory=str(folder / path.stem))


def random_images() -> Dataset:
    """Data that only the network has, by others of the same shape; some are brighter."""
    rng = np.random.default_rng(0)
    y = np.arange(120, dtype=np.int32) % 10
    x = rng.random((120, 32, 32, 3), np.float32) * (0.1 + 0.09 * y[:, None, None, None])
    return Dataset(x.astype(np.float32), y, num_classes=10)


def some_documentation() -> Dataset:
    """A part of the real one, in shorter sequences."""
    config = DataSection(name="documentation", sequence_length=32)
    return load_examples(config).take(np.arange(1000))


STANDS_FOR = {"cifar10_resnet": random_images, "documentation_lm": some_documentation}
