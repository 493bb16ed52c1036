"""The partition of one data set over silos: flwr-datasets' partitioners, on indices."""

import warnings
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from flwr_datasets import partitioner as partitioners

from shared.data.splits import E
from shared.experiment import PartitionSection, parse_toml
from shared.seeding import rng_for, seed_for


def partition(config: PartitionSection, pool: E, num_silos: int, seed: int) -> list[E]:
    """Returns the silos' examples; see `partition_indices`.

    Groups stay whole: they are dealt out like examples, each as its commonest class. Raises
    ValueError if the examples have no classes to go by, or too few groups.
    """
    labels = pool.labels
    if labels is None:
        if config.kind in ("dirichlet", "pathological"):
            raise ValueError(
                f"partition.kind = {config.kind!r} splits by class; this data has none. Use 'iid'"
                " or 'size'."
            )
        labels = np.zeros(len(pool), np.int32)
    if pool.groups is not None:
        return _partition_groups(config, pool, pool.groups, labels, num_silos, seed)
    parts = partition_indices(config, labels, num_silos, seed)
    return [pool.take(indices) for indices in parts]


def partition_indices(
    config: PartitionSection, labels: np.ndarray, num_silos: int, seed: int
) -> list[np.ndarray]:
    """Returns the indices that each silo owns: a disjoint cover of range(len(labels)).

    The seed determines it; each part is sorted.

    | kind | parts |
    |---|---|
    | iid | random, equal in size up to one example |
    | dirichlet | class shares of each silo ~ Dirichlet(alpha) (arXiv:1905.12022) |
    | pathological | `classes_per_silo` classes each (arXiv:1602.05629) |
    | size | random, of the given numbers of examples |

    Raises ValueError when there is no such partition.
    """
    num_examples = len(labels)
    if not 1 <= num_silos <= num_examples:
        raise ValueError(
            f"The number of silos must lie in 1..{num_examples} (the examples); received"
            f" {num_silos}."
        )

    # Partitioners deal out the rows of a table, which are shuffled first.
    shuffled = rng_for(seed, "partition order").permutation(num_examples)
    partitioner = PARTITIONERS[config.kind](config, num_silos, seed_for(seed, "partition"))
    partitioner.dataset = datasets.Dataset.from_dict({"index": shuffled, "label": labels[shuffled]})
    try:
        with warnings.catch_warnings(action="ignore"):  # of classes left out: refused below
            parts = [_load_part(partitioner, silo) for silo in range(num_silos)]
    except ValueError as error:
        raise ValueError(
            f"partition.kind = {config.kind!r} cannot make {num_silos} silos: {error}"
        ) from None

    num_owned = sum(len(part) for part in parts)
    if num_owned != num_examples:
        raise ValueError(
            f"partition.kind = {config.kind!r} gives {num_owned} of {num_examples} examples to"
            f" {num_silos} silos; every example must have an owner. Choose more silos, more"
            " classes_per_silo, or sizes that add up."
        )
    return [np.sort(part) for part in parts]


def _load_part(partitioner: partitioners.Partitioner, silo: int) -> np.ndarray:
    return np.asarray(partitioner.load_partition(silo)["index"], dtype=np.int64)


# --- groups


def _partition_groups(
    config: PartitionSection,
    pool: E,
    groups: np.ndarray,
    labels: np.ndarray,
    num_silos: int,
    seed: int,
) -> list[E]:
    names, group_of = np.unique(groups, return_inverse=True)
    if len(names) < num_silos:
        raise ValueError(
            "Groups stay whole (data.group): there must be one for each silo; received"
            f" {len(names)} groups for {num_silos} silos. Choose fewer silos."
        )
    group_labels = _commonest_labels(labels, group_of)
    silo_groups = partition_indices(config, group_labels, num_silos, seed)
    return [pool.take(np.flatnonzero(np.isin(group_of, owned))) for owned in silo_groups]


def _commonest_labels(labels: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """The commonest label of each group; of equally common ones the lowest.

    >>> _commonest_labels(np.array([5, 2, 2, 7, 3]), np.array([0, 0, 0, 1, 1]))
    array([2, 3])
    """
    # Count each pair (group, label), coded as one number.
    base = int(labels.max()) + 1
    codes = group_of.astype(np.int64) * base + labels
    pairs, counts = np.unique(codes, return_counts=True)

    # Rarest first, then highest label first: the last one written for a group stays.
    pairs = pairs[np.lexsort((-pairs, counts))]
    commonest = np.zeros(int(group_of.max()) + 1, np.int64)
    commonest[pairs // base] = pairs % base
    return commonest


# --- partitioners: (config, number of silos, seed) to flwr-datasets' object


def _iid(config: PartitionSection, num_silos: int, seed: int) -> partitioners.Partitioner:
    return partitioners.IidPartitioner(num_partitions=num_silos)


def _dirichlet(config: PartitionSection, num_silos: int, seed: int) -> partitioners.Partitioner:
    return partitioners.DirichletPartitioner(
        num_partitions=num_silos,
        partition_by="label",
        alpha=config.dirichlet_alpha,
        min_partition_size=1,  # however skewed, no silo is left without data
        self_balancing=False,
        seed=seed,
    )


def _pathological(config: PartitionSection, num_silos: int, seed: int) -> partitioners.Partitioner:
    return partitioners.PathologicalPartitioner(
        num_partitions=num_silos,
        partition_by="label",
        num_classes_per_partition=config.classes_per_silo,
        class_assignment_mode="first-deterministic",
        seed=seed,
    )


def _size(config: PartitionSection, num_silos: int, seed: int) -> partitioners.Partitioner:
    sizes = _parse_sizes(config.sizes)
    are_sizes = isinstance(sizes, list) and all(type(size) is int and size > 0 for size in sizes)
    if not are_sizes or len(sizes) != num_silos:
        raise ValueError(
            f"partition.sizes must name one positive whole number for each of the {num_silos}"
            f" silos, like '[100, 200]'; received {config.sizes!r}."
        )
    return partitioners.SizePartitioner(partition_sizes=sizes)


def _parse_sizes(text: str) -> Any:
    """The TOML value of the text; None if it is not TOML."""
    try:
        return parse_toml(f"sizes = {text}")["sizes"]
    except ValueError:
        return None


PARTITIONERS: dict[str, Callable[[PartitionSection, int, int], partitioners.Partitioner]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "size": _size,
}
