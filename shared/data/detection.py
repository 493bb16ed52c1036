"""What a file's text tells of itself: encoding, delimiter, and the notation of its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.data.readers.csv_files import DELIMITERS, declared_delimiter
from shared.data.readers.kinds import open_bytes, open_text
from shared.data.values import Notation, parse_numbers, text_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SAMPLE_ROWS = 10_000  # of a column, by which its notation is found
SAMPLE_COLUMNS = 200
PLAIN = Notation()
# The simpler ones first: of those that read as many columns as numbers the first is taken.
NOTATIONS = (
    PLAIN,
    Notation(","),
    Notation(".", ","),
    Notation(",", "."),
    Notation(",", " "),
    Notation(".", " "),
    Notation(".", "'"),
    Notation(",", "'"),
)
AMBIGUOUS = (Notation(","), Notation(".", ","))  # 1,234 is read by both


def detect_dialect(path: Path) -> dict[str, str]:
    """Returns data.encoding and data.delimiter of a CSV file, where they are not UTF-8 and ","."""
    with open_bytes(path) as file:
        content = file.read()
    dialect: dict[str, str] = {}

    encoding = _detect_encoding(content)
    if encoding != "utf-8":
        dialect["encoding"] = encoding

    with open_text(path, encoding) as text:
        header = text.readline()
    delimiter = declared_delimiter(path, encoding)
    delimiter = delimiter or max(DELIMITERS, key=header.count)  # "," if the header has none
    if delimiter != ",":
        dialect["delimiter"] = delimiter
    return dialect


def detect_notation(frame: pd.DataFrame) -> Notation:
    """Returns the notation that reads most columns of text as numbers.

    The plain one if the file says too little: numbers like 1,234 alone may be either.
    """
    step = max(1, frame.shape[1] // SAMPLE_COLUMNS)
    samples = [text_of(frame[name].head(SAMPLE_ROWS)) for name in frame.columns[::step]]
    texts = [text for text in samples if text is not None and not _are_numbers(text, PLAIN)]

    counts = [sum(_are_numbers(text, notation) for text in texts) for notation in NOTATIONS]
    best = NOTATIONS[int(np.argmax(counts))]
    of_ambiguous = {counts[NOTATIONS.index(notation)] for notation in AMBIGUOUS}
    return PLAIN if best in AMBIGUOUS and len(of_ambiguous) == 1 else best


def _are_numbers(text: pa.Array, notation: Notation) -> bool:
    """Whether a column is of numbers in this notation, but for gaps."""
    numbers, is_text = parse_numbers(text, notation)
    return not is_text.any() and not np.isnan(numbers).all()


def _detect_encoding(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"
