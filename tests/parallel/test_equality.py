"""N ranks on one global batch = one process: the law that everything else in dist_train rests on. Real horovodrun."""

import json
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.parallel.equality_job import CASES
from tests.parallel.launching import run_ranks

pytestmark = pytest.mark.parallel
WORLD_SIZES = (2, 3)
CASES_BY_SIZE = [(case, size) for size in WORLD_SIZES for case in CASES]
# Batch normalisation with each rank's own statistics is another computation than with those of the global batch.
NOT_ONE_PROCESS = ("batch_norm",)
EQUAL = [(case, size) for case, size in CASES_BY_SIZE if case not in NOT_ONE_PROCESS]


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder that the job left on so many ranks; each job runs once, with the cases that the chosen tests need."""
    folders: dict[int, Path] = {}
    chosen = [item for item in request.session.items if item.path == Path(__file__)]
    needed = {item.callspec.params.get("case", "facts") if hasattr(item, "callspec") else "facts" for item in chosen}
    needed |= {"adam", "adamw_global_clip"} if "facts" in needed else set()

    def run(world_size: int) -> Path:
        if world_size not in folders:
            folder = tmp_path_factory.mktemp(f"ranks{world_size}")
            done = run_ranks(
                world_size,
                Path(__file__).with_name("equality_job.py"),
                folder,
                *sorted(needed),
                timeout_s=200 + 20 * len(needed),
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            folders[world_size] = folder
        return folders[world_size]

    return run


def results(folder: Path, case: str, rank: int) -> dict[str, np.ndarray]:
    with np.load(folder / f"{case}.{rank}.npz") as file:
        return dict(file)


def weights(result: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [result[key] for key in sorted(result) if key.startswith("arr_")]


@pytest.mark.parametrize(("case", "world_size"), EQUAL)
def test_n_ranks_end_with_the_weights_of_one_process(job, case: str, world_size: int) -> None:
    one, many = results(job(1), case, 0), results(job(world_size), case, 0)
    for a, b in zip(weights(one), weights(many), strict=True):
        # float32 sums in another order, 20 steps; float16 ones where the model computes in that
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-3 if case == "mixed_precision" else 1e-5)


# Keras weighs each batch's loss by its examples, also where the loss itself was divided by something else (weights,
# unmasked tokens, nothing): the reported loss of these cases depends on how a batch is cut, the gradient does not.
INEXACT_METRICS = (
    "weighted_mean_loss",
    "masked_tokens",
    "weighted_masked_mean",
    "two_outputs",
    "summed_loss",
    "mixed_precision",
)


@pytest.mark.parametrize(("case", "world_size"), [(c, n) for c, n in EQUAL if c not in INEXACT_METRICS])
def test_metrics_are_those_of_one_process(job, case: str, world_size: int) -> None:
    one, many = results(job(1), case, 0), results(job(world_size), case, 0)
    np.testing.assert_allclose(many["metrics"], one["metrics"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("case", "world_size"), CASES_BY_SIZE)
def test_ranks_are_bit_equal_to_each_other(job, case: str, world_size: int) -> None:
    root = results(job(world_size), case, 0)
    for rank in range(1, world_size):
        other = results(job(world_size), case, rank)
        for a, b in zip(weights(root), weights(other), strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("case", CASES)
def test_training_moves_the_weights(job, case: str) -> None:
    """Without this, a step that does nothing would pass the laws above."""
    losses = results(job(1), case, 0)["metrics"]
    assert np.all(np.isfinite(losses))
    assert not np.allclose(losses[:, 0], losses[:, -1], rtol=1e-3)


def test_resumed_runs_equal_the_undisturbed_one(job) -> None:
    for world_size, bound in ((1, 0.0), (2, 0.0), (3, 1e-6)):  # sums of two floats do not depend on their order
        for difference in json.loads((job(world_size) / "facts.json").read_text())["resume"].values():
            assert difference <= bound


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_unequal_step_counts_are_refused_before_training(job, world_size: int) -> None:
    refusals = json.loads((job(world_size) / "facts.json").read_text())["refusals"]
    steps = list(range(1, world_size + 1))
    assert f"received {steps} by rank" in refusals["unequal steps"]
    assert "All ranks must validate or none" in refusals["validation on the root only"]
    assert refusals["weights moved"] == "0.0"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_keras_without_the_hooks_is_refused(job, world_size: int) -> None:
    message = json.loads((job(world_size) / "facts.json").read_text())["refusals"]["missing hook"]
    assert "hook_that_this_keras_lacks" in message
    assert "make setup" in message


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_dropout_differs_between_ranks(job, world_size: int) -> None:
    assert (
        json.loads((job(world_size) / "facts.json").read_text())["dropout"] == 2.0
    )  # kept (1 / 0.5) on one, not on the other


def test_bytes_sent_are_the_gradients_of_all_steps(job) -> None:
    case = results(job(2), "adam", 0)
    num_steps, bytes_per_step = 20, sum(array.nbytes for array in weights(case))
    assert case["bytes_sent"] == num_steps * bytes_per_step


def test_saved_files_name_the_plain_keras_optimizer(job) -> None:
    """A .keras file written under Horovod loads where there is none, with its optimizer state."""
    model = keras.models.load_model(job(2) / "saved.keras")
    assert type(model.optimizer) is keras.optimizers.AdamW
    assert int(model.optimizer.iterations) == 20
