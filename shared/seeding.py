"""The only source of randomness: a generator for a seed and a scope."""

import hashlib

import numpy as np


def rng_for(seed: int, *scope: str | int) -> np.random.Generator:
    """Returns the generator that belongs to (seed, scope).

    It is the same on every machine, and independent between scopes. Each part of the scope is
    hashed with its type, so that ("round", 1) and ("round", "1") differ.

    >>> a = rng_for(0, "cohort", 3).integers(1000)
    >>> bool(a == rng_for(0, "cohort", 3).integers(1000))
    True
    """
    digests = [hashlib.sha256(repr(part).encode()).digest() for part in scope]
    words = [int.from_bytes(digest[:8], "big") for digest in digests]
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))


def seed_for(seed: int, *scope: str | int) -> int:
    """A 31-bit seed for a library that takes only an integer (Keras, a partitioner)."""
    return int(rng_for(seed, *scope).integers(2**31))
