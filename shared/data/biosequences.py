"""Sequences of DNA: FASTA and FASTQ files, one-hot arrays, and promoters simulated by stated rules."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.data.dataset import Dataset
from shared.seeding import rng_for

LETTERS = "ACGT"
# What each letter of IUPAC's code may stand for (Cornish-Bowden 1985, doi:10.1093/nar/13.9.3021).
AMBIGUOUS = {"A": "A", "C": "C", "G": "G", "T": "T", "U": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT"}
AMBIGUOUS |= {"M": "AC", "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT"}
MINUS_35, MINUS_10 = "TTGACA", "TATAAT"  # of E. coli's promoters (Hawley and McClure 1983, doi:10.1093/nar/11.8.2237)
SPACINGS = (16, 17, 18)  # letters between the two (Harley and Reynolds 1987, doi:10.1093/nar/15.5.2343)


@dataclass(frozen=True)
class Record:
    """A sequence with its name; `qualities`: Phred scores of a FASTQ file, one for each letter."""

    name: str
    sequence: str
    description: str = ""
    qualities: tuple[int, ...] = ()

    @property
    def fields(self) -> dict[str, str]:
        """The words key=value of the description."""
        return dict(word.split("=", 1) for word in self.description.split() if "=" in word)


def read_sequences(path: Path) -> Iterator[Record]:
    """The records of a FASTA or FASTQ file (.fasta, .fa, .fastq, .fq; also with .gz).

    Raises ValueError, naming file and line, for what is not of the format, unknown letters, or a name that comes twice.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    names: set[str] = set()
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="ascii") as file:
            lines = ((number, line.rstrip("\r\n")) for number, line in enumerate(file, start=1))
            for number, record in _fastq(path, lines) if kind in ("fastq", "fq") else _fasta(path, lines):
                _check(path, number, record, names)
                yield record
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as a file of sequences: {error}. Is it whole? Write it again."
        ) from None


def _fasta(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Record]]:
    header, start, parts = "", 0, list[str]()
    for number, line in lines:
        if line.startswith(">"):
            if start:
                yield start, _record(header, "".join(parts))
            header, start, parts = line[1:], number, []
        elif line and not start:
            raise ValueError(
                f"{path}: a FASTA file begins with '>' and a name; received {line[:20]!r} in line {number}."
            )
        else:
            parts.append(line.strip())
    if start:
        yield start, _record(header, "".join(parts))


def _fastq(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Record]]:
    for number, header in lines:
        if not header:
            continue
        rest = [line for _, line in (next(lines, (0, None)) for _ in range(3))]
        if None in rest:
            raise ValueError(f"{path}: the record in line {number} is cut off. A FASTQ record has four lines.")
        sequence, plus, scores = (str(line) for line in rest)
        if not header.startswith("@") or not plus.startswith("+"):
            raise ValueError(
                f"{path}: a FASTQ record is @name, letters, +, scores; received {header[:20]!r} in line {number}."
            )
        if len(scores) != len(sequence):
            raise ValueError(
                f"{path}: the record in line {number} has {len(sequence)} letters and {len(scores)} scores. Mend it."
            )
        yield number, _record(header[1:], sequence, tuple(ord(score) - 33 for score in scores))


def _record(header: str, sequence: str, qualities: tuple[int, ...] = ()) -> Record:
    name, _, description = header.strip().partition(" ")
    return Record(name, sequence.upper(), description, qualities)


def _check(path: Path, number: int, record: Record, names: set[str]) -> None:
    problem = ""
    if not record.name:
        problem = "has no name"
    elif record.name in names:
        problem = f"has the name {record.name!r}, which came before"
    elif not record.sequence:
        problem = f"({record.name}) has no letters"
    elif wrong := re.search(f"[^{''.join(AMBIGUOUS)}]", record.sequence):
        problem = f"({record.name}) holds {wrong[0]!r}, which is no letter of DNA"
    if problem:
        raise ValueError(f"{path}: the record in line {number} {problem}. Mend it or take it out.")
    names.add(record.name)


def write_fasta(path: Path, records: Sequence[Record]) -> None:
    """Writes a FASTA file that `read_sequences` reads back, 60 letters a line."""
    with path.open("w", encoding="ascii") as file:
        for record in records:
            file.write(f">{record.name} {record.description}".rstrip() + "\n")
            file.writelines(record.sequence[i : i + 60] + "\n" for i in range(0, len(record.sequence), 60))


def one_hot(sequences: Sequence[str], length: int) -> np.ndarray:
    """float32, shape (n, length, 4), by A, C, G, T: an ambiguous letter is shared out, what is missing at the end is 0.

    >>> one_hot(["AN"], 3)[0].tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]]
    """
    table = np.zeros((128, 4), np.float32)
    for letter, stands_for in AMBIGUOUS.items():
        table[ord(letter)] = [(base in stands_for) / len(stands_for) for base in LETTERS]
    codes = np.zeros((len(sequences), length), np.uint8)  # 0: no letter
    for row, sequence in zip(codes, sequences, strict=True):
        row[: len(sequence)] = np.frombuffer(sequence[:length].encode("ascii"), np.uint8)[:length]
    return table[codes]


def sequences_dataset(records: Sequence[Record], label: str, source: str) -> Dataset:
    """Examples as long as the longest sequence; the class of each is the word `label`=... of its description."""
    unlabelled = [record.name for record in records if label not in record.fields]
    if unlabelled or not records:
        received = f"none in {unlabelled[0]!r} ({len(unlabelled)} such)" if unlabelled else "no records"
        raise ValueError(
            f"{source}: each record's description names its class as {label}=... (data.label); received {received}."
        )
    names = tuple(sorted({record.fields[label] for record in records}))
    y = np.array([names.index(record.fields[label]) for record in records], np.int32)
    length = max(len(record.sequence) for record in records)
    return Dataset(one_hot([record.sequence for record in records], length), y, len(names), classes=names)


def simulate_promoters(num_sequences: int, length: int, seed: int, mutation_rate: float = 0.1) -> list[Record]:
    """Background with all four letters alike; every second sequence holds a promoter, the others may hold half of one.

    A promoter: TTGACA, 16 to 18 letters, TATAAT, at a place drawn evenly, each letter of the two boxes replaced by
    another with probability `mutation_rate`. Half of the other sequences hold one of the two boxes alone, mutated
    likewise: what tells them apart is the pair and its distance. label=promoter or label=background.
    """
    longest = len(MINUS_35) + max(SPACINGS) + len(MINUS_10)
    if length < longest:
        raise ValueError(f"A promoter takes {longest} letters; received length = {length}. Raise it.")
    rng = rng_for(seed, "promoters")
    records = []
    for i in range(num_sequences):
        letters = rng.choice(list(LETTERS), length)
        is_promoter = i % 2 == 0
        if is_promoter:
            spacing = int(rng.choice(SPACINGS))
            start = int(rng.integers(length - len(MINUS_35) - spacing - len(MINUS_10) + 1))
            _place(letters, start, MINUS_35, rng, mutation_rate)
            _place(letters, start + len(MINUS_35) + spacing, MINUS_10, rng, mutation_rate)
        elif i % 4 == 1:
            _place(letters, int(rng.integers(length - 5)), (MINUS_35, MINUS_10)[i // 4 % 2], rng, mutation_rate)
        label = "promoter" if is_promoter else "background"
        records.append(Record(f"seq{i}", "".join(letters), f"label={label}"))
    return records


def _place(letters: np.ndarray, start: int, box: str, rng: np.random.Generator, mutation_rate: float) -> None:
    for place, letter in enumerate(box, start=start):
        others = [other for other in LETTERS if other != letter]
        letters[place] = rng.choice(others) if rng.random() < mutation_rate else letter
