"""Agreement: mistakes that every rank must know of, and values that must be equal on all ranks."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from dist_train.collectives import Communicator

T = TypeVar("T")
Layout: TypeAlias = list[tuple[tuple[int, ...], str]]  # shape and dtype of each array


class AgreedError(ValueError):
    """A mistake of the user that is raised on every rank; the root reports it."""


@dataclass(frozen=True)
class _Arrival:
    """A rank's arrival at a point of the program where all ranks meet."""

    point: str
    value: Any = None
    failure: str | None = None  # the rank fails, and comes only to say so


def meet(communicator: Communicator, point: str, value: T) -> list[T]:
    """Returns the values of all ranks, by rank, which all must have come to the same point.

    Raises AgreedError if a rank has failed (`meet_as_failed`), or if ranks are at different points:
    one of them has called on its own what all must call together.
    """
    arrivals = communicator.all_gather_object(_Arrival(point, value))
    for rank, arrival in enumerate(arrivals):
        if isinstance(arrival, _Arrival) and arrival.failure is not None:
            raise AgreedError(f"Rank {rank} has failed at {arrival.point}: {arrival.failure}")

    points = [a.point if isinstance(a, _Arrival) else "another exchange" for a in arrivals]
    if len(set(points)) > 1:
        places = "; ".join(f"rank {rank} at {place}" for rank, place in enumerate(points))
        raise AgreedError(
            f"All ranks must come to the same points of a training; received {places}. Call fit and"
            " evaluate on every rank alike, also in callbacks."
        )
    return [arrival.value for arrival in arrivals]


def meet_as_failed(communicator: Communicator, point: str, error: BaseException) -> None:
    """Tells the other ranks, wherever they meet next, that this one fails with `error`."""
    communicator.all_gather_object(_Arrival(point, failure=describe(error)))
    error.known_to_all = True  # type: ignore[attr-defined]


def is_known_to_all(error: BaseException) -> bool:
    """Returns whether all ranks fail with this error, or have been told of it."""
    return isinstance(error, AgreedError) or getattr(error, "known_to_all", False)


def describe(error: BaseException) -> str:
    """Returns an error's kind and its text in one line.

    >>> describe(OSError("no\\nspace"))
    'OSError: no space'
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def agree(communicator: Communicator, make: Callable[[], T]) -> T:
    """Returns what `make` returns, if it succeeds on every rank.

    If it raises ValueError or OSError on any rank, the message of the lowest such rank is raised as
    AgreedError on all. So a mistake that only one rank can see (a missing file) ends the job
    everywhere, instead of leaving the others waiting in their next collective. Other exceptions
    pass through.
    """
    value: Any = None
    mistake = None
    try:
        value = make()
    except (ValueError, OSError) as error:
        mistake = str(error)

    for message in communicator.all_gather_object(mistake):
        if message is not None:
            raise AgreedError(message)
    return value


def broadcast_unless_equal(
    communicator: Communicator, arrays: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Returns the root's arrays; those that all ranks hold alike are their own ones, not copied.

    Of these nothing but hashes travels. Raises AgreedError if the ranks' arrays differ in number,
    shape or dtype.
    """
    result = list(arrays)
    differing = differing_arrays(communicator, "the comparison of arrays", arrays)
    if differing:
        received = communicator.broadcast_arrays([arrays[i] for i in differing])
        for i, array in zip(differing, received, strict=True):
            result[i] = array
    return result


def differing_arrays(
    communicator: Communicator, point: str, arrays: Sequence[np.ndarray]
) -> dict[int, list[int]]:
    """Returns the ranks that hold another array than the root, by the number of the array.

    Only hashes travel. Raises AgreedError if the arrays differ in number, shape or dtype.
    """
    layout = [(array.shape, str(array.dtype)) for array in arrays]
    digests = [_digest(array) for array in arrays]
    by_rank = meet(communicator, point, (layout, digests))
    _check_same_layout([layout for layout, _ in by_rank])

    _, of_root = by_rank[0]
    differing: dict[int, list[int]] = {}
    for rank, (_, of_rank) in enumerate(by_rank):
        for i, (own, expected) in enumerate(zip(of_rank, of_root, strict=True)):
            if own != expected:
                differing.setdefault(i, []).append(rank)
    return dict(sorted(differing.items()))


def check_same_examples(communicator: Communicator, sha256: str) -> None:
    """Raises AgreedError unless the training examples of all ranks have the same hash.

    Each rank takes its part of the data by position: on hosts with other data, parts would overlap
    or be missing.
    """
    by_rank = communicator.all_gather_object(sha256[:8])
    if len(set(by_rank)) > 1:
        raise AgreedError(
            "All ranks must load the same training examples; received sets with the hashes"
            f" {by_rank} by rank. Copy the data of one host to the others, or use a shared folder."
        )


def _digest(array: np.ndarray) -> bytes:
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8).data).digest()[:16]


def _check_same_layout(layouts: Sequence[Layout]) -> None:
    """Raises AgreedError with the first array that a rank has otherwise than the root."""
    for rank, layout in enumerate(layouts):
        for expected, received in itertools.zip_longest(layouts[0], layout):
            if expected != received:
                raise AgreedError(
                    f"All ranks must build the same model; received the array {received} on rank"
                    f" {rank} in the place of {expected} on rank 0. Install the same code on all"
                    " hosts; a builder must not depend on its host."
                )
