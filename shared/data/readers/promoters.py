"""Promoters simulated by stated rules: two boxes at a distance, against decoys with one box."""

import numpy as np

from shared.data.readers.biosequences import LETTERS, Record
from shared.seeding import rng_for

# Of E. coli's promoters (Hawley and McClure 1983, doi:10.1093/nar/11.8.2237).
MINUS_35 = "TTGACA"
MINUS_10 = "TATAAT"
# Letters between the two (Harley and Reynolds 1987, doi:10.1093/nar/15.5.2343).
SPACINGS = (16, 17, 18)
SHORTEST = len(MINUS_35) + max(SPACINGS) + len(MINUS_10)


def simulate_promoters(
    num_sequences: int, length: int, seed: int, mutation_rate: float = 0.1
) -> list[Record]:
    """Returns random sequences, every second of which holds a promoter.

    | i % 4 | label | holds |
    |---|---|---|
    | 0, 2 | promoter | TTGACA, 16 to 18 letters, TATAAT, at a place drawn evenly |
    | 1 | background | one of the two boxes, in turn, at a place drawn evenly |
    | 3 | background | neither |

    All other letters are drawn evenly of A, C, G, T; each letter of a box is replaced by another
    with probability `mutation_rate`. So only the pair and its distance tell the classes apart.
    Raises ValueError if `length` is too short for a promoter.
    """
    if length < SHORTEST:
        raise ValueError(
            f"A promoter takes {SHORTEST} letters; received length = {length}. Raise it."
        )
    rng = rng_for(seed, "promoters")
    records = []
    for i in range(num_sequences):
        letters = rng.choice(list(LETTERS), length)
        label = "background"
        if i % 2 == 0:
            label = "promoter"
            _place_promoter(letters, rng, mutation_rate)
        elif i % 4 == 1:
            box = (MINUS_35, MINUS_10)[i // 4 % 2]
            start = int(rng.integers(length - len(box) + 1))
            _place_box(letters, start, box, rng, mutation_rate)
        records.append(Record(f"seq{i}", "".join(letters), f"label={label}"))
    return records


def _place_promoter(letters: np.ndarray, rng: np.random.Generator, mutation_rate: float) -> None:
    spacing = int(rng.choice(SPACINGS))
    num_letters = len(MINUS_35) + spacing + len(MINUS_10)
    first = int(rng.integers(len(letters) - num_letters + 1))
    second = first + len(MINUS_35) + spacing
    _place_box(letters, first, MINUS_35, rng, mutation_rate)
    _place_box(letters, second, MINUS_10, rng, mutation_rate)


def _place_box(
    letters: np.ndarray, start: int, box: str, rng: np.random.Generator, mutation_rate: float
) -> None:
    """Writes the box over the letters from `start` on, some of its letters mutated."""
    for place, letter in enumerate(box, start=start):
        alternatives = [other for other in LETTERS if other != letter]
        is_mutated = rng.random() < mutation_rate
        letters[place] = rng.choice(alternatives) if is_mutated else letter
