"""Data sets of keras.datasets and of Hugging Face: real loading code; without the network one clear
sentence.
"""

from pathlib import Path

import datasets
import keras
import numpy as np
import pytest
from PIL import Image

from shared.data import Dataset, Table, load_dataset, load_examples
from shared.data.readers.texts import PAD
from shared.experiment import DataSection


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and no cache of an earlier download."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(keras.src.utils.file_utils.config, "keras_home", lambda: str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["keras:cifar10", "hf:an-owner/a-set"])
def test_without_the_network_one_sentence_says_so(name: str):
    message = f"data.name = '{name}' could not be fetched: .* It needs the network once"
    with pytest.raises(ValueError, match=message) as found:
        load_examples(DataSection(name=name))
    assert "\n" not in str(found.value)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match=r"keras.datasets has no such set. Nearest: cifar10"):
        load_examples(DataSection(name="keras:cifar_10"))


def test_images_of_keras_are_scaled_and_both_parts_are_used(monkeypatch: pytest.MonkeyPatch):
    """What load_data returns, by the documentation of keras.datasets, for each kind of set."""
    pixels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    parts = (pixels, np.array([[1], [2]])), (pixels[:1], np.array([[9]]))
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: parts)
    examples = load_dataset(DataSection(name="keras:mnist"))
    assert examples.x.shape == (3, 4, 4, 1)
    assert examples.x.max() == np.float32(31 / 255)
    assert (examples.y.tolist(), examples.num_classes) == ([1, 2, 9], 10)


def test_texts_of_keras_are_numbers_of_words(monkeypatch: pytest.MonkeyPatch):
    x = np.array([[1, 5, 7], [1, 2]], dtype=object)
    y = np.array([0, 1])
    monkeypatch.setattr(
        keras.datasets.imdb, "load_data", lambda num_words: ((x, y), (x[:1], y[:1]))
    )
    examples = load_dataset(DataSection(name="keras:imdb", sequence_length=2))
    assert examples.x.tolist() == [[1, 5], [1, 2], [1, 5]]
    assert load_dataset(DataSection(name="keras:imdb", sequence_length=3)).x[1].tolist() == [
        1,
        2,
        10_000,
    ]
    assert examples.vocabulary_size == 10_001


def test_numbers_of_keras_are_scaled(monkeypatch: pytest.MonkeyPatch):
    x, y = np.array([[1.0], [3.0]]), np.array([10.0, 30.0])
    monkeypatch.setattr(keras.datasets.boston_housing, "load_data", lambda: ((x, y), (x, y)))
    examples = load_examples(DataSection(name="keras:boston_housing"))
    assert isinstance(examples, Table)  # so scaling is fitted to training examples, not to all
    assert examples.is_regression
    assert load_dataset(DataSection(name="keras:boston_housing")).x.ravel().tolist() == [
        -1.0,
        1.0,
        -1.0,
        1.0,
    ]


def saved(folder: Path, columns: dict, **features: object) -> str:
    """A data set as Hugging Face's own library writes it, read from this disk instead of the
    hub.
    """
    folder.mkdir()
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(
        folder / "train.parquet"
    )
    return f"hf:{folder}"


def test_tables_of_hugging_face_have_roles(tmp_path: Path):
    columns = {"age": [30, 40, 50], "sex": ["f", "m", "f"], "label": ["ill", "well", "ill"]}
    value = datasets.Value
    name = saved(
        tmp_path / "t", columns, age=value("int64"), sex=value("string"), label=value("string")
    )
    examples = load_examples(DataSection(name=name, categorical="sex"))
    assert isinstance(examples, Table)
    encoded = load_dataset(DataSection(name=name, categorical="sex"))
    assert (encoded.num_classes, encoded.y.tolist(), encoded.x.shape) == (2, [0, 1, 0], (3, 3))


def test_images_of_hugging_face_are_read(tmp_path: Path):
    images = [Image.new("RGB", (3, 2), (255, 0, 51)), Image.new("RGB", (3, 2))]
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    name = saved(tmp_path / "i", {"img": images, "label": [1, 0]}, **features)
    examples = load_examples(DataSection(name=name))
    assert isinstance(examples, Dataset)
    assert examples.x.shape == (2, 2, 3, 3)
    assert examples.x[0, 0, 0].tolist() == [1.0, 0.0, np.float32(0.2)]
    assert (examples.y.tolist(), examples.classes) == ([1, 0], ("cat", "dog"))


def test_images_of_hugging_face_of_several_sizes_are_refused_or_resized(tmp_path: Path):
    images = [Image.new("RGB", (3, 2)), Image.new("RGB", (4, 4))]
    features = {"img": datasets.Image(), "label": datasets.Value("int64")}
    name = saved(tmp_path / "s", {"img": images, "label": [1, 0]}, **features)
    with pytest.raises(
        ValueError, match=r"one size; received hf:.*, row 1 of 4x4 and hf:.*, row 0 of 2x3"
    ):
        load_examples(DataSection(name=name))
    assert load_dataset(DataSection(name=name, image_size="2x2")).x.shape == (2, 2, 2, 3)


def test_texts_of_hugging_face_are_bytes(tmp_path: Path):
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(num_classes=3)}
    name = saved(tmp_path / "x", {"text": ["ab", "c"], "label": [2, 0]}, **features)
    examples = load_dataset(DataSection(name=f"{name}#train", sequence_length=2))
    assert examples.x.tolist() == [[97, 98], [99, PAD]]
    assert examples.num_classes == 3
    with pytest.raises(
        ValueError, match=r"has no column 'class' \(data.label\); its columns are 'text', 'label'"
    ):
        load_examples(DataSection(name=name, label="class"))
    with_ids = {"id": [1, 2], "text": ["ab", "c"], "label": [0, -1]}
    value = datasets.Value
    name_with_ids = saved(
        tmp_path / "y", with_ids, id=value("int64"), text=value("string"), label=value("int64")
    )
    with pytest.raises(
        ValueError, match=r"class targets must be whole numbers from 0 on, .* received -1"
    ):
        load_examples(DataSection(name=name_with_ids, features="text"))
    with pytest.raises(ValueError, match=r"column 'text' must be numeric; received 'ab' in row 0"):
        load_examples(DataSection(name=name_with_ids))
    with pytest.raises(ValueError, match=r"could not be fetched: .*validation"):
        load_examples(DataSection(name=f"{name}#validation"))
