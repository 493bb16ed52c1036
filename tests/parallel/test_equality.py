"""N ranks on one global batch = one process: the law that everything else in dist_train rests on.
Real horovodrun, once for each N, with all the cases that the chosen tests need.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from tests.parallel.course_expectations import QUICK, check_case
from tests.parallel.equality_cases import CASES
from tests.parallel.equality_job import FACTS
from tests.parallel.launching import run_ranks

pytestmark = pytest.mark.parallel

JOB = Path(__file__).with_name("equality_job.py")
WORLD_SIZES = (2, 3)
CASES_BY_SIZE = [(case, size) for size in WORLD_SIZES for case in CASES]
EQUAL = [(case, size) for case, size in CASES_BY_SIZE if CASES[case].is_one_process]
EQUAL_METRICS = [(case, size) for case, size in EQUAL if CASES[case].has_exact_metrics]

# In make test, on two ranks; make test-slow has the other cases, and three ranks.
MAIN_CASES = (
    "sgd_momentum",
    "adam",
    "adamw_global_clip",
    "clipped",
    "accumulation",
    "uneven_last_batch",
    "weighted_mean_loss",
    "two_outputs",
    "embeddings",
    "batch_norm",
    "sync_batch_norm",
    "own_loop",
)

Job = Callable[[int], Path]


def marked(parameters: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters of which the main cases, on one or two ranks, are quick and the others slow.

    Each holds the name of a case, a number of ranks, and more of any kind.
    """
    quick = {*MAIN_CASES, 1, 2}
    return [
        pytest.param(*each, marks=() if quick.issuperset(each[:2]) else pytest.mark.slow)
        for each in parameters
    ]


SIZES = marked((size,) for size in WORLD_SIZES)


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Returns the folder that the job left on so many ranks; each job runs once."""
    cases = {case_of(item) for item in request.session.items if item.path == Path(__file__)}
    if FACTS in cases:
        cases |= {"adam", "adamw_global_clip"}
    folders: dict[int, Path] = {}

    def run(world_size: int) -> Path:
        if world_size not in folders:
            folder = tmp_path_factory.mktemp(f"ranks{world_size}")
            timeout_s = 200 + 20 * len(cases)
            done = run_ranks(world_size, JOB, folder, *sorted(cases), timeout_s=timeout_s)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            folders[world_size] = folder
        return folders[world_size]

    return run


def case_of(test: pytest.Item) -> str:
    parameters = test.callspec.params if hasattr(test, "callspec") else {}
    return parameters.get("case", FACTS)


def results(folder: Path, case: str, rank: int) -> dict[str, np.ndarray]:
    with np.load(folder / f"{case}.{rank}.npz") as file:
        return dict(file)


def weights(result: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [result[key] for key in sorted(result) if key.startswith("arr_")]


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


# --- the law, case by case


@pytest.mark.parametrize(("case", "world_size"), marked(EQUAL))
def test_n_ranks_end_with_the_weights_of_one_process(job: Job, case: str, world_size: int) -> None:
    one = weights(results(job(1), case, 0))
    many = weights(results(job(world_size), case, 0))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=CASES[case].tolerance)


@pytest.mark.parametrize(("case", "world_size"), marked(EQUAL_METRICS))
def test_metrics_are_those_of_one_process(job: Job, case: str, world_size: int) -> None:
    one = results(job(1), case, 0)
    many = results(job(world_size), case, 0)
    np.testing.assert_allclose(many["metrics"], one["metrics"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("case", "world_size"), marked(CASES_BY_SIZE))
def test_ranks_are_bit_equal_to_each_other(job: Job, case: str, world_size: int) -> None:
    root = weights(results(job(world_size), case, 0))
    for rank in range(1, world_size):
        other = weights(results(job(world_size), case, rank))
        for a, b in zip(root, other, strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("case", marked((case,) for case in CASES))
def test_training_moves_the_weights(job: Job, case: str) -> None:
    """Without this, a step that does nothing would pass the laws above."""
    losses = results(job(1), case, 0)["metrics"]
    assert np.all(np.isfinite(losses))
    assert not np.allclose(losses[:, 0], losses[:, -1], rtol=1e-3)


# --- other facts


@pytest.mark.parametrize(
    ("world_size", "bound"),
    # Sums of two floats do not depend on their order.
    [(1, 0.0), (2, 0.0), pytest.param(3, 1e-6, marks=pytest.mark.slow)],
)
def test_resumed_runs_equal_the_undisturbed_one(job: Job, world_size: int, bound: float) -> None:
    differences = facts(job(world_size))["resume"]
    assert len(differences) == 2
    assert max(differences.values()) <= bound


@pytest.mark.parametrize("world_size", SIZES)
def test_unequal_step_counts_are_refused_before_training(job: Job, world_size: int) -> None:
    refusals = facts(job(world_size))["refusals"]
    steps = list(range(1, world_size + 1))
    assert f"received {steps} by rank" in refusals["unequal steps"]
    assert "All ranks must validate or none" in refusals["validation on the root only"]
    assert refusals["weights moved"] == "0.0"


@pytest.mark.parametrize("name", QUICK)
def test_what_one_rank_decides_alone_reaches_all(job: Job, name: str) -> None:
    """The other cases: test_course.py."""
    check_case(job(2), name)


@pytest.mark.parametrize("world_size", SIZES)
def test_a_keras_without_the_hooks_is_refused(job: Job, world_size: int) -> None:
    message = facts(job(world_size))["refusals"]["missing hook"]
    assert "hook_that_this_keras_lacks" in message
    assert "make setup" in message


@pytest.mark.parametrize("world_size", SIZES)
def test_dropout_differs_between_ranks(job: Job, world_size: int) -> None:
    kept = 1 / 0.5  # on one rank, not on the other
    assert facts(job(world_size))["dropout"] == kept


def test_bytes_sent_are_the_gradients_of_all_steps(job: Job) -> None:
    case = results(job(2), "adam", 0)
    num_steps = 20
    bytes_per_step = sum(array.nbytes for array in weights(case))
    assert case["bytes_sent"] == num_steps * bytes_per_step


def test_saved_files_name_the_plain_keras_optimizer(job: Job) -> None:
    """A .keras file written under Horovod loads where there is none, with its optimizer state."""
    model = keras.models.load_model(job(2) / "saved.keras")
    assert type(model.optimizer) is keras.optimizers.AdamW
    assert int(model.optimizer.iterations) == 20
