"""Who owns which example when one data set is split over silos: flwr-datasets' partitioners, on indices."""

import tomllib
import warnings
from collections.abc import Callable

import numpy as np
from datasets import Dataset as Table
from flwr_datasets import partitioner as partitioners

from shared.data.splits import E
from shared.experiment import PartitionSection
from shared.seeding import rng_for, seed_for


def partition_indices(config: PartitionSection, labels: np.ndarray, num_silos: int, seed: int) -> list[np.ndarray]:
    """Splits range(len(labels)) over silos: a disjoint cover, determined by the seed; each part sorted.

    iid: equal random parts. dirichlet: class shares of each silo ~ Dirichlet(alpha) (Yurochkin et al. 2019,
    arXiv:1905.12022). pathological: `classes_per_silo` classes each (McMahan et al. 2017, arXiv:1602.05629).
    size: the given numbers of examples. Raises ValueError when the split cannot be made.
    """
    if not 1 <= num_silos <= len(labels):
        raise ValueError(f"The number of silos must lie in 1..{len(labels)} (the examples); received {num_silos}.")
    shuffled = rng_for(seed, "partition order").permutation(len(labels))
    table = Table.from_dict({"index": shuffled, "label": labels[shuffled]})
    partitioner = PARTITIONERS[config.kind](config, num_silos, seed_for(seed, "partition"))
    partitioner.dataset = table
    try:
        with warnings.catch_warnings(action="ignore"):  # of classes left out: refused below
            parts = [np.asarray(partitioner.load_partition(i)["index"], dtype=np.int64) for i in range(num_silos)]
    except ValueError as error:
        raise ValueError(f"partition.kind = {config.kind!r} cannot make {num_silos} silos: {error}") from None
    covered = sum(map(len, parts))
    if covered != len(labels):
        raise ValueError(
            f"partition.kind = {config.kind!r} gives {covered} of {len(labels)} examples to {num_silos} silos; every "
            "example must have an owner. Choose more silos, more classes_per_silo, or sizes that add up."
        )
    return [np.sort(part) for part in parts]


def partition(config: PartitionSection, pool: E, num_silos: int, seed: int) -> list[E]:
    """The silos' examples; see `partition_indices`. Groups stay whole: they are dealt, each as its commonest class."""
    labels = pool.labels
    if config.kind in ("dirichlet", "pathological") and labels is None:
        raise ValueError(f"partition.kind = {config.kind!r} splits by class; this data has none. Use 'iid' or 'size'.")
    labels = np.zeros(len(pool), np.int32) if labels is None else labels
    if pool.groups is None:
        return [pool.take(indices) for indices in partition_indices(config, labels, num_silos, seed)]
    names, group_of = np.unique(pool.groups, return_inverse=True)
    if len(names) < num_silos:
        raise ValueError(
            f"Groups stay whole (data.group): there must be one for each silo; received {len(names)} groups for "
            f"{num_silos} silos. Choose fewer silos."
        )
    dealt = partition_indices(config, _commonest(labels, group_of), num_silos, seed)
    return [pool.take(np.flatnonzero(np.isin(group_of, groups))) for groups in dealt]


def _commonest(labels: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """The commonest label of each group, of equally common ones the lowest.

    >>> _commonest(np.array([5, 2, 2, 7, 3]), np.array([0, 0, 0, 1, 1]))
    array([2, 3])
    """
    base = int(labels.max()) + 1
    pairs, counts = np.unique(group_of.astype(np.int64) * base + labels, return_counts=True)
    pairs = pairs[np.lexsort((-pairs, counts))]
    commonest = np.zeros(int(group_of.max()) + 1, np.int64)
    commonest[pairs // base] = pairs % base  # the last one of each group stays
    return commonest


def _sizes(config: PartitionSection, num_silos: int) -> list[int]:
    try:
        sizes = tomllib.loads(f"sizes = {config.sizes}")["sizes"]
    except tomllib.TOMLDecodeError:
        sizes = None
    if not isinstance(sizes, list) or len(sizes) != num_silos or not all(type(s) is int and s > 0 for s in sizes):
        raise ValueError(
            f"partition.sizes must name one positive whole number for each of the {num_silos} silos, like "
            f"'[100, 200]'; received {config.sizes!r}."
        )
    return sizes


# Partitioners want a least size; 1 keeps a strongly skewed split from leaving a silo without data.
PARTITIONERS: dict[str, Callable[[PartitionSection, int, int], partitioners.Partitioner]] = {
    "iid": lambda config, n, seed: partitioners.IidPartitioner(num_partitions=n),
    "dirichlet": lambda config, n, seed: partitioners.DirichletPartitioner(
        num_partitions=n,
        partition_by="label",
        alpha=config.dirichlet_alpha,
        min_partition_size=1,
        self_balancing=False,
        seed=seed,
    ),
    "pathological": lambda config, n, seed: partitioners.PathologicalPartitioner(
        num_partitions=n,
        partition_by="label",
        num_classes_per_partition=config.classes_per_silo,
        class_assignment_mode="first-deterministic",
        seed=seed,
    ),
    "size": lambda config, n, seed: partitioners.SizePartitioner(partition_sizes=_sizes(config, n)),
}
