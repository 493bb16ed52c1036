"""Deterministic splits: which examples are trained on, and which are held out."""

from typing import Protocol, Self, TypeVar

import numpy as np

from shared.seeding import rng_for


class Examples(Protocol):
    """What can be split: a `Dataset`, or a `Table` that is yet to become one."""

    def __len__(self) -> int: ...
    def take(self, indices: np.ndarray) -> Self: ...
    @property
    def groups(self) -> np.ndarray | None: ...
    @property
    def labels(self) -> np.ndarray | None: ...


E = TypeVar("E", bound=Examples)


def split_pool(examples: E, seed: int, test_fraction: float) -> tuple[E, E]:
    """Cuts off the test examples at random: (pool, test). The same for every runtime of an experiment."""
    return _cut(examples, rng_for(seed, "test split"), test_fraction)


def split_validation(pool: E, seed: int, validation_fraction: float, owner: str = "") -> tuple[E, E]:
    """Cuts off the validation examples of an owner (a silo's name; empty: the central pool): (train, validation)."""
    return _cut(pool, rng_for(seed, "validation split", owner), validation_fraction)


def _cut(examples: E, rng: np.random.Generator, fraction: float) -> tuple[E, E]:
    """(rest, part): a disjoint cover. Groups stay whole: then the part is as near to the fraction as whole ones allow.

    Raises ValueError if groups are asked to be held out and there is one only.
    """
    if examples.groups is None:
        order = rng.permutation(len(examples))
        num_cut = round(fraction * len(examples))
        return examples.take(order[num_cut:]), examples.take(order[:num_cut])
    names, sizes = np.unique(examples.groups, return_counts=True)
    order = rng.permutation(len(names))
    reached = np.concatenate([[0], np.cumsum(sizes[order])[:-1]])  # by so many groups; never by all
    num_groups = int(np.abs(reached - fraction * len(examples)).argmin())
    if fraction > 0 and num_groups == 0:
        raise ValueError(
            f"Groups stay whole (data.group), and no group is small enough to hold out {fraction:g} of "
            f"{len(examples)} examples in {len(names)} groups. Hold out another fraction, or none."
        )
    held_out = np.isin(examples.groups, names[order[:num_groups]])
    return examples.take(np.flatnonzero(~held_out)), examples.take(np.flatnonzero(held_out))
