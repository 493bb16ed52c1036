"""Sequences of DNA: FASTA and FASTQ files, and one-hot arrays."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.data.dataset import Dataset
from shared.data.readers.kinds import kind_of, open_bytes

LETTERS = "ACGT"
# The bases that a letter of IUPAC's code stands for (Cornish-Bowden 1985,
# doi:10.1093/nar/13.9.3021).
BASES = {
    "A": "A",
    "C": "C",
    "G": "G",
    "T": "T",
    "U": "T",
    "R": "AG",
    "Y": "CT",
    "S": "CG",
    "W": "AT",
    "K": "GT",
    "M": "AC",
    "B": "CGT",
    "D": "AGT",
    "H": "ACT",
    "V": "ACG",
    "N": "ACGT",
}
UNKNOWN_LETTER = re.compile(f"[^{''.join(BASES)}]")
LETTERS_PER_LINE = 60  # of the files written here
PHRED_OFFSET = 33  # a score q is written as the character of code q + 33
# dnaio's message where nothing but empty lines follows the last record of a FASTQ file.
BLANK_END = re.compile(r"Premature end .* record was: '(\\n|\\r)*'$")


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
    """Yields the records of a FASTA or FASTQ file (.fasta, .fa, .fastq, .fq; also with .gz).

    Raises ValueError, naming file and line or record, for anything that is not of the format, for
    unknown letters, and for a name that comes twice.
    """
    import dnaio

    names: set[str] = set()
    number = 0
    try:
        with open_bytes(path) as file, dnaio.open(file, fileformat=kind_of(path)) as entries:
            for number, entry in enumerate(entries, start=1):
                record = _make_record(entry.name, entry.sequence, entry.qualities)
                _check_record(path, number, record, names)
                names.add(record.name)
                yield record
    except (dnaio.FileFormatError, OSError, EOFError, UnicodeDecodeError) as error:
        if BLANK_END.search(str(error)):
            return
        raise ValueError(
            f"{path} cannot be read as a file of sequences beyond record {number}: {error} Is it"
            " whole? Fix it or write it again."
        ) from None


def write_fasta(path: Path, records: Sequence[Record]) -> None:
    """Writes a FASTA file that `read_sequences` reads back, 60 letters a line."""
    with path.open("w", encoding="ascii") as file:
        for record in records:
            header = f">{record.name} {record.description}".rstrip()
            file.write(header + "\n")
            for start in range(0, len(record.sequence), LETTERS_PER_LINE):
                line = record.sequence[start : start + LETTERS_PER_LINE]
                file.write(line + "\n")


def one_hot(sequences: Sequence[str], length: int) -> np.ndarray:
    """Returns float32 of shape (n, length, 4), by A, C, G, T.

    An ambiguous letter is shared out among its bases; longer sequences are cut; places beyond the
    end are 0.

    >>> one_hot(["AN"], 3)[0].tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]]
    """
    shares = np.zeros((128, 4), np.float32)  # by the letter's code
    for letter, bases in BASES.items():
        shares[ord(letter)] = [(base in bases) / len(bases) for base in LETTERS]

    codes = np.zeros((len(sequences), length), np.uint8)  # 0: no letter
    for row, sequence in zip(codes, sequences, strict=True):
        content = sequence[:length].encode("ascii")
        row[: len(content)] = np.frombuffer(content, np.uint8)
    return shares[codes]


def sequences_dataset(records: Sequence[Record], label: str, source: str) -> Dataset:
    """Returns one-hot examples as long as the longest sequence, with the classes of `label`.

    The class of a record is the word label=CLASS of its description. Raises ValueError if one has
    none, or if there are no records.
    """
    unlabelled = [record.name for record in records if label not in record.fields]
    if unlabelled or not records:
        received = "no records"
        if unlabelled:
            received = f"none in {unlabelled[0]!r} ({len(unlabelled)} such)"
        raise ValueError(
            f"{source}: each record's description names its class as {label}=... (data.label);"
            f" received {received}."
        )

    labels = [record.fields[label] for record in records]
    classes = tuple(sorted(set(labels)))
    y = np.array([classes.index(name) for name in labels], np.int32)

    sequences = [record.sequence for record in records]
    length = max(len(sequence) for sequence in sequences)
    x = one_hot(sequences, length)
    return Dataset(x, y, len(classes), classes=classes)


def _make_record(header: str, sequence: str, scores: str | None) -> Record:
    name, _, description = header.strip().partition(" ")
    qualities = tuple(ord(score) - PHRED_OFFSET for score in scores or "")
    return Record(name, sequence.upper(), description, qualities)


def _check_record(path: Path, number: int, record: Record, names: set[str]) -> None:
    """Raises ValueError for a record without name or letters, a repeated name, unknown letters."""
    unknown = UNKNOWN_LETTER.search(record.sequence)
    if not record.name:
        problem = "has no name"
    elif record.name in names:
        problem = f"has the name {record.name!r}, which came before"
    elif not record.sequence:
        problem = f"({record.name}) has no letters"
    elif unknown:
        problem = f"({record.name}) holds {unknown[0]!r}, which is no letter of DNA"
    else:
        return
    raise ValueError(f"{path}: record {number} {problem}. Fix it or take it out.")
