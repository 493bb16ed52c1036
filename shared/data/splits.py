"""Deterministic splits of examples into those trained on and those held out."""

from typing import Protocol, Self, TypeVar

import numpy as np

from shared.seeding import rng_for


class Examples(Protocol):
    """Examples that can be split: a `Dataset`, or a `Table` that is not encoded yet."""

    def __len__(self) -> int: ...
    def take(self, indices: np.ndarray) -> Self: ...
    @property
    def groups(self) -> np.ndarray | None: ...
    @property
    def labels(self) -> np.ndarray | None: ...


E = TypeVar("E", bound=Examples)


def split_pool(examples: E, seed: int, test_fraction: float) -> tuple[E, E]:
    """Returns (pool, test): the test examples are drawn by the seed alone, for every runtime."""
    rng = rng_for(seed, "test split")
    return _hold_out(examples, rng, test_fraction)


def split_validation(
    pool: E, seed: int, validation_fraction: float, owner: str = ""
) -> tuple[E, E]:
    """Returns (train, validation), drawn by the seed and the owner of the pool.

    `owner`: a silo's name; empty: the central pool.
    """
    rng = rng_for(seed, "validation split", owner)
    return _hold_out(pool, rng, validation_fraction)


def _hold_out(examples: E, rng: np.random.Generator, fraction: float) -> tuple[E, E]:
    """(kept, held out): a disjoint cover, with round(fraction * n) examples held out."""
    if examples.groups is not None:
        return _hold_out_groups(examples, examples.groups, rng, fraction)
    order = rng.permutation(len(examples))
    num_held_out = round(fraction * len(examples))
    return examples.take(order[num_held_out:]), examples.take(order[:num_held_out])


def _hold_out_groups(
    examples: E, groups: np.ndarray, rng: np.random.Generator, fraction: float
) -> tuple[E, E]:
    """(kept, held out), where groups stay whole: as near to the fraction as that allows.

    Raises ValueError if a fraction is asked for and no group can be held out.
    """
    names, sizes = np.unique(groups, return_counts=True)
    order = rng.permutation(len(names))

    # num_examples[i]: held out with the first i groups of the order; never with all of them.
    num_examples = np.concatenate([[0], np.cumsum(sizes[order])[:-1]])
    distance = np.abs(num_examples - fraction * len(examples))
    num_groups = int(distance.argmin())
    if fraction > 0 and num_groups == 0:
        raise ValueError(
            f"Groups stay whole (data.group), and no group is small enough to hold out {fraction:g}"
            f" of {len(examples)} examples in {len(names)} groups. Hold out another fraction, or"
            " none."
        )

    # Both parts keep the order of the examples.
    is_held_out = np.isin(groups, names[order[:num_groups]])
    kept = examples.take(np.flatnonzero(~is_held_out))
    held_out = examples.take(np.flatnonzero(is_held_out))
    return kept, held_out
