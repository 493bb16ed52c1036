"""Who owns which example: every kind is a disjoint cover, drawn by the seed, and skewed as it
says.
"""

from collections.abc import Callable

import numpy as np
import pytest

from shared.data import Dataset, load_dataset
from shared.data.partition import PARTITIONERS, partition, partition_indices
from shared.experiment import DataSection, PartitionSection

NUM_CLASSES = 10
# One setting for every kind of partition; a new kind needs its own. (Four silos with five classes
# each, drawn by the seed, own all ten classes for the seeds 0 and 2.)
SETTINGS: dict[str, dict] = {
    "iid": {},
    "dirichlet": {"dirichlet_alpha": 0.5},
    "pathological": {"classes_per_silo": 5},
    "size": {"sizes": "[100, 200, 300, 400]"},
}


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """1000 examples of 10 classes, of about 100 each."""
    return np.random.default_rng(0).integers(NUM_CLASSES, size=1000)


def partitioned(
    labels: np.ndarray, kind: str, num_silos: int = 4, seed: int = 0, **settings
) -> list[np.ndarray]:
    return partition_indices(PartitionSection(kind=kind, **settings), labels, num_silos, seed)


def class_shares(labels: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """The share of each class (columns) that each silo (rows) owns; every column sums to 1."""
    counts = np.array([np.bincount(labels[part], minlength=NUM_CLASSES) for part in parts])
    return counts / counts.sum(axis=0)


# --- every kind


@pytest.mark.parametrize("kind", PARTITIONERS)
def test_every_example_has_exactly_one_owner_and_every_silo_has_examples(
    labels: np.ndarray, kind: str
):
    parts = partitioned(labels, kind, **SETTINGS[kind])
    assert len(parts) == 4
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    for part in parts:
        assert part.dtype == np.int64
        assert len(part) > 0
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("kind", PARTITIONERS)
def test_a_partition_depends_on_the_seed_and_on_nothing_else(labels: np.ndarray, kind: str):
    np.random.seed(1)  # noqa: NPY002 (the global generator must not matter)
    one = partitioned(labels, kind, seed=0, **SETTINGS[kind])
    np.random.seed(2)  # noqa: NPY002
    again, other = (partitioned(labels, kind, seed=seed, **SETTINGS[kind]) for seed in (0, 2))
    for a, b in zip(one, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert {tuple(part) for part in one}.isdisjoint(tuple(part) for part in other)


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_the_seed_draws_which_classes_a_silo_owns(labels: np.ndarray, kind: str):
    one, other = (
        class_shares(labels, partitioned(labels, kind, seed=seed, **SETTINGS[kind]))
        for seed in (0, 2)
    )
    assert np.abs(one - other).max() > 0.2


@pytest.mark.parametrize("kind", PARTITIONERS)
def test_one_silo_owns_everything(labels: np.ndarray, kind: str):
    settings = SETTINGS[kind] | {"sizes": "[1000]", "classes_per_silo": NUM_CLASSES}
    (everything,) = partitioned(labels, kind, num_silos=1, **settings)
    assert everything.tolist() == list(range(1000))


def test_the_parts_of_a_pool_hold_its_examples(make_data: Callable[..., Dataset]):
    pool = make_data(100, num_classes=NUM_CLASSES, weighted=True)
    config = PartitionSection(kind="dirichlet")
    for part, indices in zip(
        partition(config, pool, 3, 0), partition_indices(config, pool.y, 3, 0), strict=True
    ):
        np.testing.assert_array_equal(part.x, pool.x[indices])
        np.testing.assert_array_equal(part.y, pool.y[indices])
        np.testing.assert_array_equal(part.sample_weight, pool.sample_weight[indices])
        assert part.num_classes == NUM_CLASSES


# --- what each kind promises


@pytest.mark.parametrize(
    ("num_silos", "sizes"), [(1, {1000}), (3, {333, 334}), (7, {142, 143}), (300, {3, 4})]
)
def test_iid_parts_are_equal_up_to_one_example(labels: np.ndarray, num_silos: int, sizes: set[int]):
    assert set(map(len, partitioned(labels, "iid", num_silos))) == sizes


def test_iid_parts_are_drawn_across_the_order_of_the_examples(labels: np.ndarray):
    # 500 of 0..999 without replacement: mean 499.5, standard deviation 1000 / sqrt(12 * 1000) =
    # 9.1; 5 of them are 46
    assert abs(partitioned(labels, "iid", 2)[0].mean() - 499.5) < 46


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_dirichlet_shares_vary_as_the_distribution_says_and_not_as_for_another_alpha(
    labels: np.ndarray, alpha: float
):
    """Var p = (1/K)(1 - 1/K) / (K alpha + 1) for the share p of a class that one of K silos
    owns.
    """
    num_silos = 4
    shares = np.concatenate(
        [
            class_shares(labels, partitioned(labels, "dirichlet", seed=seed, dirichlet_alpha=alpha))
            for seed in range(10)
        ]
    )
    measured = np.mean((shares - 1 / num_silos) ** 2)  # over 10 seeds, 4 silos, 10 classes

    def expected(alpha: float) -> float:
        return (1 / num_silos) * (1 - 1 / num_silos) / (num_silos * alpha + 1)

    assert measured == pytest.approx(expected(alpha), rel=0.2)
    assert measured != pytest.approx(expected(2 * alpha), rel=0.2)
    assert measured != pytest.approx(expected(alpha / 2), rel=0.2)


def test_a_small_alpha_skews_and_a_large_one_does_not(labels: np.ndarray):
    """Statistic: the largest share of a class that one silo owns, mean over the classes; at least
    1/4 of 4 silos.
    """
    for seed in range(3):
        largest = {
            alpha: (
                class_shares(
                    labels, partitioned(labels, "dirichlet", seed=seed, dirichlet_alpha=alpha)
                )
                .max(axis=0)
                .mean()
            )
            for alpha in (0.1, 100.0)
        }
        assert largest[0.1] > 0.65
        assert largest[100.0] < 0.35


@pytest.mark.parametrize(
    ("classes_per_silo", "num_silos"), [(5, 4), (2, 10), (1, 10), (1, 20), (10, 3)]
)
def test_pathological_silos_own_so_many_classes(
    labels: np.ndarray, classes_per_silo: int, num_silos: int
):
    parts = partitioned(labels, "pathological", num_silos, classes_per_silo=classes_per_silo)
    assert [len(np.unique(labels[part])) for part in parts] == [classes_per_silo] * num_silos


def test_sizes_are_exact_and_their_examples_drawn_at_random(labels: np.ndarray):
    parts = partitioned(labels, "size", 3, sizes="[1, 599, 400]")
    assert [len(part) for part in parts] == [1, 599, 400]
    assert parts[1].tolist() != list(range(1, 600))


# --- splits that cannot be made


@pytest.mark.parametrize("num_silos", [-1, 0, 1001])
def test_a_number_of_silos_that_the_examples_do_not_allow_is_refused(
    labels: np.ndarray, num_silos: int
):
    with pytest.raises(
        ValueError, match=rf"must lie in 1\.\.1000 \(the examples\); received {num_silos}"
    ):
        partitioned(labels, "iid", num_silos)


@pytest.mark.parametrize(
    "sizes", ["[1000]", "[1, 2, 997]", "1000", "[0, 1000]", "[-1, 1001]", "[1.0, 999.0]", "many"]
)
def test_sizes_that_do_not_name_a_number_for_each_silo_are_refused(labels: np.ndarray, sizes: str):
    with pytest.raises(
        ValueError, match="one positive whole number for each of the 2 silos, like"
    ) as caught:
        partitioned(labels, "size", 2, sizes=sizes)
    assert repr(sizes) in str(caught.value)


def test_sizes_that_do_not_add_up_are_refused(labels: np.ndarray):
    with pytest.raises(
        ValueError, match=r"gives 999 of 1000 examples to 2 silos.*sizes that add up"
    ):
        partitioned(labels, "size", 2, sizes="[1, 998]")
    with pytest.raises(ValueError, match=r"'size' cannot make 2 silos: .*1001.*1000"):
        partitioned(labels, "size", 2, sizes="[1, 1000]")


def test_classes_that_nobody_owns_are_refused(labels: np.ndarray):
    with pytest.raises(ValueError, match=r"of 1000 examples to 4 silos.*more classes_per_silo"):
        partitioned(labels, "pathological", 4, classes_per_silo=2)  # 8 of 10 classes at most


def test_more_classes_per_silo_than_there_are_is_refused(labels: np.ndarray):
    with pytest.raises(ValueError, match=r"'pathological' cannot make 4 silos: .*=11"):
        partitioned(labels, "pathological", 4, classes_per_silo=11)


def test_a_dirichlet_split_that_leaves_a_silo_empty_is_refused(labels: np.ndarray):
    with pytest.raises(ValueError, match=r"'dirichlet' cannot make 40 silos: .*alpha"):
        partitioned(labels, "dirichlet", 40, dirichlet_alpha=0.001)


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_numbers_cannot_be_split_by_class(kind: str):
    diabetes = load_dataset(DataSection(name="diabetes"))
    with pytest.raises(
        ValueError, match=rf"'{kind}' splits by class; this data has none\. Use 'iid' or 'size'"
    ):
        partition(PartitionSection(kind=kind), diabetes, 3, 0)
    assert sum(map(len, partition(PartitionSection(kind="iid"), diabetes, 3, 0))) == len(diabetes)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_groups_are_never_at_two_silos(kind: str):
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 30, 400)
    y = (groups % 3).astype(np.int32)
    pool = Dataset(np.arange(400, dtype=np.float32)[:, None], y, 3, groups=groups)
    parts = partition(PartitionSection(kind=kind), pool, 4, seed=1)
    assert sorted(np.concatenate([part.x.ravel() for part in parts])) == list(range(400))
    of_silo = [set(part.groups) for part in parts]
    assert sum(map(len, of_silo)) == len(set.union(*of_silo)) == 30
    assert min(map(len, parts)) > 0


def test_there_must_be_a_group_for_each_silo():
    pool = Dataset(
        np.zeros((10, 1), np.float32), np.zeros(10, np.int32), 1, groups=np.arange(10) % 2
    )
    with pytest.raises(ValueError, match="one for each silo; received 2 groups for 3 silos"):
        partition(PartitionSection(), pool, 3, seed=0)
