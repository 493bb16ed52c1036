"""Text as bytes: ids 0 to 255, and one more for padding."""

from collections.abc import Sequence

import numpy as np

from shared.data.dataset import Dataset

PAD = 256
VOCABULARY_SIZE = 257  # bytes and padding


def documentation_topics() -> dict[str, str]:
    """Python's own documentation of its language, by topic, from the standard library: some 700 kB of English.

    It differs a little from one version of Python to the next.
    """
    from pydoc_data.topics import topics

    return {name: topics[name] for name in sorted(topics)}


def language_model_dataset(documents: Sequence[str], sequence_length: int) -> Dataset:
    """Examples of T ids each with the id that follows at each place; documents are joined by an empty line.

    x, y: int32, shape (n, T), with y[i, t] the byte after x[i, t]; examples do not overlap, and the last len % T bytes
    are left out. Raises ValueError if there are too few bytes for one example.
    """
    content = np.frombuffer("\n\n".join(documents).encode("utf-8"), np.uint8).astype(np.int32)
    num_examples = (len(content) - 1) // sequence_length
    if num_examples < 1:
        raise ValueError(
            f"A language model learns from more than data.sequence_length bytes; received {len(content)} with "
            f"sequence_length = {sequence_length}. Give it more text, or lower data.sequence_length."
        )
    used = num_examples * sequence_length
    x, y = content[:used].reshape(num_examples, -1), content[1 : used + 1].reshape(num_examples, -1)
    return Dataset(x, y, num_classes=256, vocabulary_size=VOCABULARY_SIZE)


def as_ids(texts: Sequence[str], sequence_length: int) -> np.ndarray:
    """Texts as int32 ids of shape (n, T), cut or padded at the end."""
    ids = np.full((len(texts), sequence_length), PAD, np.int32)
    for row, text in zip(ids, texts, strict=True):
        content = np.frombuffer(text.encode("utf-8"), np.uint8)[:sequence_length]
        row[: len(content)] = content
    return ids
