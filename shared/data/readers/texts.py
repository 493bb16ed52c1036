"""Text as bytes: ids 0 to 255, and one more for padding."""

from collections.abc import Sequence

import numpy as np

from shared.data.dataset import Dataset

PAD = 256
VOCABULARY_SIZE = 257  # bytes and padding


def documentation_topics() -> dict[str, str]:
    """Returns Python's own documentation of its language by topic: some 700 kB of English.

    It is in the standard library, and differs a little from one version of Python to the next.
    """
    from pydoc_data.topics import topics

    return {name: topics[name] for name in sorted(topics)}


def language_model_dataset(documents: Sequence[str], sequence_length: int) -> Dataset:
    """Returns examples of T = sequence_length ids, each with the id that follows at each place.

    x, y: int32, shape (n, T), with y[i, t] the byte after x[i, t]. Documents are joined by an empty
    line, examples do not overlap, and the last (len - 1) % T bytes are left out. Raises ValueError
    if there are too few bytes for one example.
    """
    joined = "\n\n".join(documents).encode("utf-8")
    content = np.frombuffer(joined, np.uint8).astype(np.int32)
    num_examples = (len(content) - 1) // sequence_length
    if num_examples < 1:
        raise ValueError(
            "A language model learns from more than data.sequence_length bytes; received"
            f" {len(content)} with sequence_length = {sequence_length}. Give it more text, or lower"
            " data.sequence_length."
        )
    num_used = num_examples * sequence_length
    x = content[:num_used].reshape(num_examples, sequence_length)
    y = content[1 : num_used + 1].reshape(num_examples, sequence_length)
    return Dataset(x, y, num_classes=256, vocabulary_size=VOCABULARY_SIZE)


def as_ids(texts: Sequence[str], sequence_length: int) -> np.ndarray:
    """Returns texts as int32 ids of shape (n, sequence_length), cut or padded at the end."""
    ids = np.full((len(texts), sequence_length), PAD, np.int32)
    for row, text in zip(ids, texts, strict=True):
        content = text.encode("utf-8")[:sequence_length]
        row[: len(content)] = np.frombuffer(content, np.uint8)
    return ids
