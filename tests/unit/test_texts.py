"""Text as bytes."""

import numpy as np
import pytest

from shared.data import Dataset, load_examples
from shared.data.readers.texts import (
    PAD,
    VOCABULARY_SIZE,
    as_ids,
    documentation_topics,
    language_model_dataset,
)
from shared.experiment import DataSection


def test_every_target_is_the_byte_after_its_input():
    dataset = language_model_dataset(["naïve text", "and more of it"], 5)
    content = "naïve text\n\nand more of it".encode()
    assert dataset.x.shape == dataset.y.shape == (len(content) // 5, 5)
    assert bytes(dataset.x.ravel().tolist()) == content[: dataset.x.size]
    assert bytes(dataset.y.ravel().tolist()) == content[1 : dataset.y.size + 1]
    assert (dataset.num_classes, dataset.vocabulary_size) == (256, VOCABULARY_SIZE)
    assert dataset.schema.target_shape == dataset.schema.input_shape == (5,)


@pytest.mark.parametrize("length", range(1, 12))
def test_no_more_than_a_part_of_an_example_is_left_out(length: int):
    for num_bytes in range(length + 1, 40):
        dataset = language_model_dataset(["x" * num_bytes], length)
        assert 0 <= num_bytes - 1 - dataset.x.size < length


def test_too_little_text_is_told():
    with pytest.raises(
        ValueError, match=r"received 5 with sequence_length = 5\. Give it more text"
    ):
        language_model_dataset(["hello"], 5)


def test_texts_are_cut_or_padded():
    assert as_ids(["ab", "ü", ""], 3).tolist() == [[97, 98, PAD], [195, 188, PAD], [PAD] * 3]
    assert as_ids(["abcdef"], 3).tolist() == [[97, 98, 99]]


def test_the_documentation_is_half_a_megabyte_of_english():
    topics = documentation_topics()
    assert list(topics) == sorted(topics)
    assert sum(map(len, topics.values())) > 400_000
    assert "assignment" in topics
    dataset = load_examples(DataSection(name="documentation", sequence_length=100))
    assert isinstance(dataset, Dataset)
    assert dataset.x.dtype == np.int32
    assert len(dataset) * 100 > 400_000
    assert dataset.x.max() < 256
