"""Kinds of files: told by the ending of a name, in capitals or not, also with .gz."""

from __future__ import annotations

import codecs
import gzip
import io
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from shared.experiment import nearest_names

# Further endings of a kind stand behind the usual one.
ENDINGS = {
    "npz": (".npz",),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq", ".parq"),
    "arrow": (".arrow", ".feather"),
    "tfrecord": (".tfrecord", ".tfrecords"),
    "fasta": (".fasta", ".fa", ".fna"),
    "fastq": (".fastq", ".fq"),
}
COLUMNAR = ("parquet", "arrow", "tfrecord")  # tables that hold the types of their columns
ZIPPED = ("csv", "tfrecord", "fasta", "fastq")  # the others are compressed within
GZIP_MAGIC = b"\x1f\x8b"
BLOCK_BYTES = 1 << 20


def kind_of(path: Path) -> str:
    """Returns the kind of file or of a table's folder by its name; empty if there is no such.

    >>> kind_of(Path("A.CSV")), kind_of(Path("a.tsv.gz")), kind_of(Path("a.xls"))
    ('csv', 'csv', '')
    """
    ending = _ending(path)
    is_zipped = path.suffix.lower() == ".gz"
    for kind, endings in ENDINGS.items():
        if ending in endings and (kind in ZIPPED or not is_zipped):
            return kind
    return ""


def usual_delimiter(path: Path, delimiter: str) -> str:
    """Returns what is between columns: a tab in .tsv files if data.delimiter is the default."""
    return "\t" if _ending(path) == ".tsv" and delimiter == "," else delimiter


def is_gzipped(path: Path) -> bool:
    """Returns whether the file's content is gzip, whatever its name is."""
    with path.open("rb") as file:
        return file.read(2) == GZIP_MAGIC


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file to read what is in it, unpacked if it is gzip."""
    return cast(BinaryIO, gzip.open(path)) if is_gzipped(path) else path.open("rb")


def open_text(path: Path, encoding: str, errors: str = "strict") -> TextIO:
    """Opens a text file likewise; line ends stay as they are."""
    codecs.lookup(encoding)  # raises LookupError while nothing is open yet
    return io.TextIOWrapper(open_bytes(path), encoding, errors, newline="")


def unpacked_size(path: Path) -> int:
    """Returns the bytes in a file. Raises EOFError or OSError for gzip that is cut off."""
    if not is_gzipped(path):
        return path.stat().st_size
    with open_bytes(path) as file:
        return sum(map(len, iter(lambda: file.read(BLOCK_BYTES), b"")))


def folder_parts(folder: Path) -> list[Path]:
    """Returns the files of a table that is a folder, as Spark writes it; none for other folders.

    Names that begin with "." or "_" (_SUCCESS) do not count. Raises ValueError for parts below
    subfolders (year=2020), and for parts in CSV.
    """
    visible = [path for path in sorted(folder.iterdir()) if path.name[0] not in "._"]
    is_partitioned = bool(visible) and all("=" in path.name and path.is_dir() for path in visible)
    if is_partitioned:
        raise ValueError(
            f"{folder} is a table cut into subfolders ({visible[0].name}), whose values are in no"
            " file. Write it without partitions (Spark: without partitionBy)."
        )
    kinds = {kind_of(path) for path in visible}
    if kinds == {"csv"}:
        raise ValueError(
            f"{folder} is a table in {len(visible)} parts in CSV; a folder's parts are Parquet,"
            " Arrow or TFRecord files. Write one CSV file (Spark: coalesce(1)) and name that, or"
            " write Parquet."
        )
    return visible if len(kinds) == 1 and kinds <= set(COLUMNAR) else []


def table_parts(path: Path) -> list[Path]:
    """Returns the files of a table: itself, or the parts of a folder."""
    return folder_parts(path) if path.is_dir() else [path]


def check_exists(path: Path) -> None:
    """Raises ValueError, with the nearest name in that folder, if there is no such file."""
    if path.is_file() or path.is_dir():
        return
    siblings: list[str] = []
    if path.parent.is_dir():
        kind = kind_of(path)
        siblings = sorted(
            sibling.name for sibling in path.parent.iterdir() if kind_of(sibling) == kind
        )
    if siblings:
        nearest = nearest_names(path.name, siblings)[:3]
        hint = f"Nearest in that folder: {', '.join(nearest)}."
    else:
        hint = f"That folder holds no {_ending(path)} file."
    raise ValueError(f"No data file at {path}. {hint} Set data.name.")


def _ending(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix
