"""Sources of examples: the reader for each `data.name`, and the built-in sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from shared.data.dataset import Dataset
from shared.data.preparation import encode, fit_schema
from shared.data.readers.arrays import load_npz, save_npz
from shared.data.readers.biosequences import read_sequences, sequences_dataset
from shared.data.readers.csv_files import read_csv, read_header
from shared.data.readers.files import read_columnar, read_names
from shared.data.readers.folders import read_folder
from shared.data.readers.hubs import is_on_hub, read_hub
from shared.data.readers.kinds import (
    COLUMNAR,
    ENDINGS,
    check_exists,
    folder_parts,
    kind_of,
    usual_delimiter,
)
from shared.data.readers.promoters import simulate_promoters
from shared.data.readers.texts import documentation_topics, language_model_dataset
from shared.data.roles import assign_roles
from shared.data.streaming import iterate_table, stream_table
from shared.data.tables import TASK_ATTRIBUTE, Table, make_table
from shared.experiment import DataSection, nearest_names

FILES = [ending for endings in ENDINGS.values() for ending in endings]


def load_dataset(config: DataSection) -> Dataset:
    """Returns all examples as arrays, fitted to all of them: to look at, not to train on.

    Training fits to its own part, by `split`.
    """
    examples = load_examples(config)
    return encode(examples, fit_schema(examples, config))


def load_examples(config: DataSection) -> Table | Dataset:
    """Returns the examples of `config.name`.

    That is a built-in set, keras:NAME or hf:NAME, the path of a folder, or that of a file of the
    kinds `FILES`. Raises ValueError when the data cannot be used, with what is wrong where.
    """
    path = Path(config.name)
    if config.name in BUILTIN_SETS:
        examples = BUILTIN_SETS[config.name](config)
    elif is_on_hub(config.name):
        examples = read_hub(config)
    elif path.is_dir() and not folder_parts(path):
        examples = read_folder(path, config)
    elif path.is_dir() or kind_of(path):
        examples = _read_file(path, config)
    else:
        raise ValueError(
            "data.name must be a built-in set, the path of a folder or of a file of the kinds"
            f" {', '.join(FILES)} (text and TFRecord also with .gz), keras:NAME or hf:NAME;"
            f" received {config.name!r}. Nearest:"
            f" {', '.join(nearest_names(config.name, BUILTIN_SETS))}."
        )

    if config.task == "reconstruction":
        return _with_inputs_as_targets(examples, config)
    _check_task(examples, config)
    if isinstance(examples, Dataset):
        _check_arrays(examples, config.name)
    return examples


def save_examples(stem: Path, examples: Table | Dataset) -> Path:
    """Writes examples to a file that `load_examples` reads back by the same keys of [data].

    Returns its path: `stem` with .parquet for a table, else with .npz.
    """
    if isinstance(examples, Table):
        path = stem.with_suffix(".parquet")
        _write_parquet(path, examples)
    else:
        path = stem.with_suffix(".npz")
        save_npz(path, examples)
    return path


# --- files


def _read_file(path: Path, config: DataSection) -> Table | Dataset:
    check_exists(path)
    kind = kind_of(path)
    if config.stream:
        return _read_streamed(path, config)
    if kind == "npz":
        # What becomes infinite in float32 is refused by _check_arrays.
        with np.errstate(over="ignore", invalid="ignore"):
            return load_npz(path, config.task)
    if kind == "csv":
        return _read_csv(path, config)
    if kind in ("fasta", "fastq"):
        records = list(read_sequences(path))
        return sequences_dataset(records, config.label, str(path))

    # Columns without a role are not read: what they hold does not matter.
    names = read_names(path)
    roles = assign_roles(config, names, str(path))
    return make_table(read_columnar(path, roles.used), config, str(path), names)


def _read_csv(path: Path, config: DataSection) -> Table:
    delimiter = usual_delimiter(path, config.delimiter)
    header = read_header(path, delimiter, config.encoding)
    roles = assign_roles(config, header, str(path))
    frame = read_csv(path, delimiter, config.encoding, numeric=roles.numbers)
    return make_table(frame, config, str(path))


def _read_streamed(path: Path, config: DataSection) -> Table:
    if config.task == "reconstruction":
        raise ValueError(
            "data.stream holds targets in memory; received data.task = 'reconstruction', where they"
            f" are as large as the inputs, for {path}. Set data.stream = false."
        )
    if not path.is_dir() and kind_of(path) not in COLUMNAR:
        kinds = ", ".join(f".{kind}" for kind in COLUMNAR)
        raise ValueError(f"data.stream is for {kinds}; received {path}. Set data.stream = false.")
    return stream_table(path, config)


def _write_parquet(path: Path, table: Table) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    task = "regression" if table.is_regression else "classification"
    writer = None
    for part in iterate_table(table):
        # The first part decides the types of all.
        schema = writer.schema if writer else None
        frame = part.frame[part.roles.used]
        rows = pa.Table.from_pandas(frame, schema, preserve_index=False)
        rows = rows.replace_schema_metadata({TASK_ATTRIBUTE: task})
        writer = writer or parquet.ParquetWriter(path, rows.schema)
        writer.write_table(rows)
    if writer:
        writer.close()


# --- checks of what was read


def _check_task(examples: Table | Dataset, config: DataSection) -> None:
    """Raises ValueError if data.task is stated and is not that of the targets."""
    if isinstance(examples, Table):
        is_regression = examples.is_regression
    else:
        is_regression = examples.num_classes == 0
    task = "regression" if is_regression else "classification"
    if config.task not in ("auto", task):
        raise ValueError(
            f"data.task = {config.task!r} does not fit {config.name}, whose targets are of {task}. "
            "Set data.task = 'auto'."
        )


def _check_arrays(examples: Dataset, source: str) -> None:
    """Raises ValueError for values that are not finite, and for negative weights."""
    if not (np.isfinite(examples.x).all() and np.isfinite(examples.y).all()):
        raise ValueError(
            f"{source} holds values that are not finite (NaN or infinity). Fill them in or remove"
            " them."
        )
    weight = examples.sample_weight
    if weight is not None and not (np.isfinite(weight) & (weight >= 0)).all():
        raise ValueError(
            f"{source}: sample_weight must be finite and not negative. Fix the weights."
        )


def _with_inputs_as_targets(examples: Table | Dataset, config: DataSection) -> Table | Dataset:
    if isinstance(examples, Table):
        return examples  # it has no label: its encoded inputs will be its targets
    if examples.vocabulary_size:
        raise ValueError(
            "data.task = 'reconstruction' takes numbers (tables, images, .npz); received"
            f" {config.name}, which holds ids. Set data.task = 'auto'."
        )
    return replace(examples, y=examples.x, num_classes=0, classes=())


# --- built-in sets


def _digits(config: DataSection) -> Dataset:
    """Images in [0, 1], float32 of shape (1797, 8, 8, 1)."""
    from sklearn.datasets import load_digits  # half a second to import, needed only here

    pixels, y = load_digits(return_X_y=True)
    x = (pixels / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    return Dataset(x, y.astype(np.int32), num_classes=10)


def _sklearn_classes(config: DataSection) -> Table:
    return _sklearn_table(config, "classification")


def _sklearn_numbers(config: DataSection) -> Table:
    return _sklearn_table(config, "regression")


def _sklearn_table(config: DataSection, task: str) -> Table:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{config.name}")(as_frame=True)
    frame = bunch.data.rename_axis(index="row").assign(**{config.label: bunch.target})
    if config.task != "reconstruction":
        config = config.model_copy(update={"task": task})
    return make_table(frame, config, config.name)


def _documentation(config: DataSection) -> Dataset:
    documents = list(documentation_topics().values())
    return language_model_dataset(documents, config.sequence_length)


def _promoters(config: DataSection) -> Dataset:
    records = simulate_promoters(num_sequences=2000, length=60, seed=0)
    return sequences_dataset(records, "label", config.name)


BUILTIN_SETS: dict[str, Callable[[DataSection], Table | Dataset]] = {
    "digits": _digits,
    "breast_cancer": _sklearn_classes,
    "wine": _sklearn_classes,
    "diabetes": _sklearn_numbers,
    "documentation": _documentation,
    "promoters": _promoters,
}
