"""Data sets of others, fetched once over the network: keras:NAME and hf:NAME[@SUBSET][#SPLIT]."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.dataset import Dataset
from shared.data.readers.arrays import dataset_of
from shared.data.readers.arrow_columns import make_usable_frame
from shared.data.readers.folders import stack_images
from shared.data.readers.texts import VOCABULARY_SIZE, as_ids
from shared.data.roles import check_is_column, parse_names
from shared.data.tables import Table, make_table
from shared.experiment import DataSection, nearest_names

if TYPE_CHECKING:
    import datasets

KERAS, HUGGING_FACE = "keras:", "hf:"
KERAS_IMAGES = ("mnist", "fashion_mnist", "cifar10", "cifar100")
KERAS_TEXTS = ("imdb", "reuters")
KERAS_NUMBERS = ("boston_housing", "california_housing")
NUM_WORDS = 10_000  # of texts as numbers of words, commonest first


def read_hub(config: DataSection) -> Table | Dataset:
    """Returns the examples of keras:NAME or hf:NAME[@SUBSET][#SPLIT].

    | examples | become |
    |---|---|
    | images | arrays in [0, 1] |
    | texts of Keras | numbers of words, cut or padded to data.sequence_length |
    | texts of Hugging Face | bytes as ids, cut or padded to data.sequence_length |
    | anything else | a table |

    Raises ValueError if they cannot be fetched or used.
    """
    if config.name.startswith(KERAS):
        return _read_keras(config)
    return _read_hugging_face(config)


def is_on_hub(name: str) -> bool:
    """Returns whether `data.name` is a set of Keras or of Hugging Face."""
    return name.startswith((KERAS, HUGGING_FACE))


# --- keras.datasets


def _read_keras(config: DataSection) -> Table | Dataset:
    """Training and test examples together: every set is split by the experiment's own rules."""
    name = config.name.removeprefix(KERAS)
    x, y = _fetch_keras(name, config.name)
    if name in KERAS_NUMBERS:
        return _keras_table(x, y, config)
    if name in KERAS_TEXTS:
        ids = _cut_or_pad(x, config.sequence_length)
        dataset = dataset_of(ids, y, config.task, config.name)
        return replace(dataset, vocabulary_size=NUM_WORDS + 1)
    pixels = x.astype(np.float32) / np.float32(255)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    return dataset_of(pixels, y, config.task, config.name)


def _fetch_keras(name: str, source: str) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of a set of keras.datasets, training examples first."""
    import keras

    sets = (*KERAS_IMAGES, *KERAS_TEXTS, *KERAS_NUMBERS)
    if name not in sets:
        raise ValueError(
            f"data.name = {source!r}: keras.datasets has no such set. Nearest: "
            f"{', '.join(nearest_names(name, sets)[:3])}."
        )
    options = {"num_words": NUM_WORDS} if name in KERAS_TEXTS else {}
    load_data = getattr(keras.datasets, name).load_data
    try:
        (x_train, y_train), (x_test, y_test) = load_data(**options)
    except Exception as error:  # a download and its unpacking raise urllib's, zipfile's, pickle's
        raise _not_fetched(source, error) from None
    x = np.concatenate([x_train, x_test])
    y = np.concatenate([y_train, y_test]).reshape(-1)
    return x, y


def _keras_table(x: np.ndarray, y: np.ndarray, config: DataSection) -> Table:
    """A table, so that its scaling is fitted to training examples alone."""
    import pandas as pd

    columns = {f"feature{i}": values for i, values in enumerate(x.T)}
    frame = pd.DataFrame({**columns, config.label: y}).rename_axis(index="row")
    task = "regression" if config.task == "auto" else config.task
    return make_table(frame, config.model_copy(update={"task": task}), config.name)


def _cut_or_pad(texts: np.ndarray, length: int) -> np.ndarray:
    """Lists of numbers of words as int32 of shape (n, length), padded by the id NUM_WORDS."""
    ids = np.full((len(texts), length), NUM_WORDS, np.int32)
    for row, words in zip(ids, texts, strict=True):
        row[: len(words)] = words[:length]
    return ids


# --- the Hugging Face hub


def _read_hugging_face(config: DataSection) -> Table | Dataset:
    """Images where there is one column of them, texts where there is nothing else, or a table."""
    examples = _fetch_hugging_face(config)

    # Columns of lists, audio and the like are left out.
    kinds = {name: type(feature).__name__ for name, feature in examples.features.items()}
    unusable = [
        name for name, kind in kinds.items() if kind not in ("Value", "ClassLabel", "Image")
    ]
    examples = examples.remove_columns(unusable)

    features = parse_names(config.features)
    if not features:
        features = [name for name in examples.features if name != config.label]
    images = [name for name in features if kinds.get(name) == "Image"]
    texts = [name for name in features if _is_text(examples, name)]
    if len(images) == 1:
        return _image_dataset(examples, images[0], config)
    if len(features) == 1 and texts and not config.categorical:
        return _text_dataset(examples, texts[0], config)
    table = examples.with_format("arrow")[:]
    frame, _ = make_usable_frame(table, table.column_names)
    return make_table(frame.rename_axis(index="row"), config, config.name)


def _fetch_hugging_face(config: DataSection) -> datasets.Dataset:
    from flwr_datasets import FederatedDataset

    name, _, split = config.name.removeprefix(HUGGING_FACE).partition("#")
    name, _, subset = name.partition("@")
    try:
        source = FederatedDataset(
            dataset=name, subset=subset or None, partitioners={}, shuffle=False
        )
        return source.load_split(split or "train")
    except Exception as error:  # the hub's client, the network's and the file formats' errors
        raise _not_fetched(config.name, error) from None


def _is_text(examples: datasets.Dataset, name: str) -> bool:
    if name not in examples.features:
        return False
    return examples.features[name].dtype in ("string", "large_string")


def _image_dataset(examples: datasets.Dataset, column: str, config: DataSection) -> Dataset:
    from PIL import ImageOps

    labels, names = _read_labels(examples, config)
    upright = [ImageOps.exif_transpose(image) for image in examples[column]]
    images = [(f"{config.name}, row {i}", image) for i, image in enumerate(upright)]
    x = stack_images(images, config.image_size)
    return _labelled_dataset(x, labels, names, config)


def _text_dataset(examples: datasets.Dataset, column: str, config: DataSection) -> Dataset:
    labels, names = _read_labels(examples, config)
    x = as_ids(list(examples[column]), config.sequence_length)
    dataset = _labelled_dataset(x, labels, names, config)
    return replace(dataset, vocabulary_size=VOCABULARY_SIZE)


def _read_labels(
    examples: datasets.Dataset, config: DataSection
) -> tuple[np.ndarray, list[str] | None]:
    """(labels, names of the classes): text becomes numbers; None where classes have no names."""
    check_is_column(config.label, examples.features, "data.label", config.name)
    labels = np.array(examples[config.label])
    if labels.dtype.kind == "U":
        text_names, numbers = np.unique(labels, return_inverse=True)
        return numbers, [str(name) for name in text_names]
    declared_names = getattr(examples.features[config.label], "names", None)
    return labels, declared_names and [str(name) for name in declared_names]


def _labelled_dataset(
    x: np.ndarray, labels: np.ndarray, names: list[str] | None, config: DataSection
) -> Dataset:
    """The data set; it keeps names of classes that are sorted, as the schema's are."""
    num_classes = None if names is None else len(names)
    dataset = dataset_of(x, labels, config.task, config.name, num_classes)
    is_sorted = names is not None and names == sorted(names)
    return replace(dataset, classes=tuple(names) if names and is_sorted else ())


def _not_fetched(name: str, error: Any) -> ValueError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[0][:200]
    return ValueError(
        f"data.name = {name!r} could not be fetched: {reason}. It needs the network once; on a"
        " machine without, copy the cache of one that has it, or name a file or folder instead."
    )
