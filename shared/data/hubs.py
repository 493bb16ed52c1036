"""Data sets of others, fetched once over the network: `keras:NAME` and `hf:NAME[@SUBSET][#SPLIT]`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.arrays import dataset_of
from shared.data.dataset import Dataset
from shared.data.folders import stack_images
from shared.data.tables import Table, make_table, parse_names
from shared.data.texts import VOCABULARY_SIZE, as_ids
from shared.experiment import DataSection, nearest_names

if TYPE_CHECKING:
    import datasets

KERAS, HUGGING_FACE = "keras:", "hf:"
KERAS_IMAGES = ("mnist", "fashion_mnist", "cifar10", "cifar100")
KERAS_TEXTS = ("imdb", "reuters")
KERAS_NUMBERS = ("boston_housing", "california_housing")
NUM_WORDS = 10_000  # of texts as numbers of words, commonest first


def read_hub(config: DataSection) -> Table | Dataset:
    """The examples that `config.name` names. Raises ValueError if they cannot be fetched or used."""
    if config.name.startswith(KERAS):
        return _read_keras(config)
    return _read_hugging_face(config)


def is_on_hub(name: str) -> bool:
    return name.startswith((KERAS, HUGGING_FACE))


def _read_keras(config: DataSection) -> Table | Dataset:
    """Training and test examples together: every set is split by the experiment's own rules."""
    import keras

    name = config.name.removeprefix(KERAS)
    known = (*KERAS_IMAGES, *KERAS_TEXTS, *KERAS_NUMBERS)
    if name not in known:
        raise ValueError(
            f"data.name = {config.name!r}: keras.datasets has no such set. Nearest: "
            f"{', '.join(nearest_names(name, known)[:3])}."
        )
    options = {"num_words": NUM_WORDS} if name in KERAS_TEXTS else {}
    try:
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data(**options)
    except Exception as error:  # urllib's, zipfile's, pickle's: whatever a download and its unpacking can raise
        raise _not_fetched(config.name, error) from None
    x, y = np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test]).reshape(-1)
    if name in KERAS_NUMBERS:
        return _keras_table(x, y, config)
    if name in KERAS_TEXTS:
        ids = _padded(x, config.sequence_length)
        return replace(dataset_of(ids, y, config.task, config.name), vocabulary_size=NUM_WORDS + 1)
    pixels = x.astype(np.float32) / np.float32(255)
    return dataset_of(pixels[..., None] if pixels.ndim == 3 else pixels, y, config.task, config.name)


def _keras_table(x: np.ndarray, y: np.ndarray, config: DataSection) -> Table:
    """Whose scaling is then fitted to training examples alone, as any table's."""
    import pandas as pd

    columns = {f"feature{i}": values for i, values in enumerate(x.T)}
    frame = pd.DataFrame({**columns, config.label: y}).rename_axis(index="row")
    task = "regression" if config.task == "auto" else config.task
    return make_table(frame, config.model_copy(update={"task": task}), config.name)


def _padded(texts: np.ndarray, length: int) -> np.ndarray:
    """Numbers of words, cut or padded at the end with the vocabulary's last id."""
    ids = np.full((len(texts), length), NUM_WORDS, np.int32)
    for row, words in zip(ids, texts, strict=True):
        row[: len(words)] = words[:length]
    return ids


def _read_hugging_face(config: DataSection) -> Table | Dataset:
    """Images where there is a column of them, texts where there is nothing else, otherwise a table."""
    examples = _fetch(config)
    kinds = {name: type(feature).__name__ for name, feature in examples.features.items()}
    others = [name for name, kind in kinds.items() if kind not in ("Value", "ClassLabel", "Image")]
    examples = examples.remove_columns(others)
    features = parse_names(config.features) or [name for name in examples.features if name != config.label]
    images = [name for name in features if kinds.get(name) == "Image"]
    texts = [name for name in features if name in kinds and examples.features[name].dtype in ("string", "large_string")]
    if len(images) == 1 or (len(texts) == len(features) == 1 and not config.categorical):
        return _labelled(examples, (images or texts)[0], config)
    return make_table(examples.to_pandas().rename_axis(index="row"), config, config.name)


def _fetch(config: DataSection) -> datasets.Dataset:
    from flwr_datasets import FederatedDataset

    name, _, split = config.name.removeprefix(HUGGING_FACE).partition("#")
    name, _, subset = name.partition("@")
    try:
        return FederatedDataset(dataset=name, subset=subset or None, partitioners={}, shuffle=False).load_split(
            split or "train"
        )
    except Exception as error:  # the hub's client, the network's and the file formats' errors
        raise _not_fetched(config.name, error) from None


def _labelled(examples: datasets.Dataset, feature: str, config: DataSection) -> Dataset:
    """Images or texts, each with a class."""
    if config.label not in examples.features:
        raise ValueError(
            f"{config.name} has no column {config.label!r} (data.label); its columns are "
            f"{', '.join(map(repr, examples.features))}."
        )
    labels = np.array(examples[config.label])
    names = getattr(examples.features[config.label], "names", None)
    if labels.dtype.kind == "U":
        names, labels = np.unique(labels, return_inverse=True)
    is_image = type(examples.features[feature]).__name__ == "Image"
    if is_image:
        rows = [(f"{config.name}, row {i}", image) for i, image in enumerate(examples[feature])]
        x = stack_images(rows, config.image_size)
    else:
        x = as_ids(list(examples[feature]), config.sequence_length)
    found = dataset_of(x, labels, config.task, config.name, None if names is None else len(names))
    known = [] if names is None else [str(name) for name in names]
    return replace(
        found,
        vocabulary_size=0 if is_image else VOCABULARY_SIZE,
        classes=tuple(known) if known == sorted(known) else (),
    )


def _not_fetched(name: str, error: Any) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ValueError(
        f"data.name = {name!r} could not be fetched: {reason}. It needs the network once; on a machine without, copy "
        "the cache of one that has it, or name a file or folder instead."
    )
