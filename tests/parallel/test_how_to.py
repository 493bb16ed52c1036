"""The script of docs/how-to-keras-horovod.md, as printed there."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.parallel.launching import ROOT, run_ranks

pytestmark = [pytest.mark.parallel, pytest.mark.slow]
PAGE = ROOT / "docs" / "how-to-keras-horovod.md"


def printed_script() -> str:
    match = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert match
    return match[1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_printed_script_trains_and_saves_a_model_that_loads_anywhere(
    tmp_path: Path, world_size: int
) -> None:
    script = tmp_path / "digits.py"
    script.write_text(printed_script(), encoding="utf-8")
    done = run_ranks(world_size, script, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    accuracies = [float(value) for value in re.findall(r"val_accuracy: ([\d.]+)", done.stdout)]
    assert len(accuracies) == 5, done.stdout[-2000:]  # told once per epoch: by the root alone
    assert accuracies[-1] > 0.85
    model = keras.models.load_model(tmp_path / "digits.keras")
    assert type(model.optimizer) is keras.optimizers.Adam
    assert type(model.layers[1]) is keras.layers.BatchNormalization
    assert np.isfinite(model.predict(np.zeros((1, 8, 8, 1), np.float32), verbose=0)).all()
    assert len(printed_script().strip().splitlines()) <= 35
