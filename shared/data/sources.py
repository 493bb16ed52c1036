"""Where examples come from: scikit-learn's real sets, and the user's own files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from shared.data.arrays import load_npz, save_npz
from shared.data.biosequences import read_sequences, sequences_dataset, simulate_promoters
from shared.data.dataset import Dataset
from shared.data.files import READERS, check_exists, read_csv, read_header
from shared.data.folders import read_folder
from shared.data.hubs import is_on_hub, read_hub
from shared.data.preparation import encode, fit_schema
from shared.data.streaming import STREAMED, iterate_table, stream_table
from shared.data.tables import TASK, Table, assign_roles, make_table
from shared.data.texts import documentation_topics, language_model_dataset
from shared.experiment import DataSection, nearest_names


def _digits(config: DataSection) -> Dataset:
    from sklearn.datasets import load_digits  # half a second to import, needed only here

    x, y = load_digits(return_X_y=True)
    return Dataset((x / 16.0).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32), num_classes=10)


def _sklearn_table(config: DataSection) -> Table:
    from sklearn import datasets

    found = getattr(datasets, f"load_{config.name}")(as_frame=True)
    frame = found.data.rename_axis(index="row").assign(**{config.label: found.target})
    task = "regression" if config.name in REGRESSIONS else "classification"
    task = config.task if config.task == "reconstruction" else task
    return make_table(frame, config.model_copy(update={"task": task}), config.name)


def _documentation(config: DataSection) -> Dataset:
    return language_model_dataset([*documentation_topics().values()], config.sequence_length)


def _promoters(config: DataSection) -> Dataset:
    return sequences_dataset(simulate_promoters(2000, 60, seed=0), "label", config.name)


REGRESSIONS = {"diabetes"}
BUILTIN_SETS: dict[str, Callable[[DataSection], Table | Dataset]] = {
    "digits": _digits,
    "breast_cancer": _sklearn_table,
    "wine": _sklearn_table,
    "diabetes": _sklearn_table,
    "documentation": _documentation,
    "promoters": _promoters,
}
SEQUENCES = (".fasta", ".fa", ".fastq", ".fq", ".gz")
FILES = (".npz", ".csv", *READERS, *SEQUENCES)


def load_dataset(config: DataSection) -> Dataset:
    """All examples as arrays, with the statistics of all: to look at. Training fits on its own part, by `split`."""
    examples = load_examples(config)
    return encode(examples, fit_schema(examples, config))


def load_examples(config: DataSection) -> Table | Dataset:
    """Loads the examples that `config.name` names: a built-in set or a file of one of the kinds in `FILES`.

    Digits' pixels are scaled to [0, 1]. Raises ValueError when the data cannot be used.
    """
    path = Path(config.name)
    if config.name in BUILTIN_SETS:
        return _checked(BUILTIN_SETS[config.name](config), config)
    if is_on_hub(config.name):
        return _checked(read_hub(config), config)
    if path.is_dir():
        return _checked(read_folder(path, config), config)
    if path.suffix not in FILES:
        raise ValueError(
            f"data.name must be a built-in set, the path of a folder or of a file of the kinds {', '.join(FILES)}, "
            f"keras:NAME or hf:NAME; received {config.name!r}. Nearest: "
            f"{', '.join(nearest_names(config.name, BUILTIN_SETS))}."
        )
    check_exists(path)
    if config.stream:
        if config.task == "reconstruction":
            raise ValueError(
                f"data.stream holds targets in memory; received data.task = 'reconstruction', where they are as large "
                f"as the inputs, for {path}. Set data.stream = false."
            )
        if path.suffix not in STREAMED:
            raise ValueError(f"data.stream is for {', '.join(STREAMED)}; received {path}. Set data.stream = false.")
        return stream_table(path, config)
    if path.suffix == ".npz":
        with np.errstate(over="ignore", invalid="ignore"):  # infinity, and what becomes it, is refused by _checked
            return _checked(load_npz(path, config.task), config)
    if path.suffix == ".csv":
        header = read_header(path, config.delimiter, config.encoding)
        numbers = assign_roles(config, header, str(path)).numbers
        text = [name for name in header if name not in numbers]
        return make_table(read_csv(path, text, config.delimiter, config.encoding), config, str(path))
    if path.suffix in SEQUENCES:
        return sequences_dataset([*read_sequences(path)], config.label, str(path))
    return make_table(READERS[path.suffix](path), config, str(path))


def _checked(examples: Table | Dataset, config: DataSection) -> Table | Dataset:
    if config.task == "reconstruction":
        return _to_reconstruct(examples, config)
    is_regression = examples.is_regression if isinstance(examples, Table) else not examples.num_classes
    if config.task != "auto" and (config.task == "regression") != is_regression:
        task = "regression" if is_regression else "classification"
        raise ValueError(
            f"data.task = {config.task!r} does not fit {config.name}, whose targets are of {task}. "
            "Set data.task = 'auto'."
        )
    if isinstance(examples, Table):
        return examples
    if not (np.isfinite(examples.x).all() and np.isfinite(examples.y).all()):
        raise ValueError(
            f"{config.name} holds values that are not finite (NaN or infinity). Fill them in or remove them."
        )
    weight = examples.sample_weight
    if weight is not None and not (np.isfinite(weight) & (weight >= 0)).all():
        raise ValueError(f"{config.name}: sample_weight must be finite and not negative. Mend the weights.")
    return examples


def _to_reconstruct(examples: Table | Dataset, config: DataSection) -> Table | Dataset:
    if isinstance(examples, Table):
        return examples  # which has no label then
    if examples.vocabulary_size:
        raise ValueError(
            f"data.task = 'reconstruction' takes numbers (tables, images, .npz); received {config.name}, which holds "
            "ids. Set data.task = 'auto'."
        )
    return replace(examples, y=examples.x, num_classes=0, classes=())


def save_examples(stem: Path, examples: Table | Dataset) -> Path:
    """Writes examples as a file that `load_examples` reads back by the same keys of [data]; returns its path."""
    if isinstance(examples, Table):
        path = stem.with_suffix(".parquet")
        _write_parquet(path, examples)
        return path
    path = stem.with_suffix(".npz")
    save_npz(path, examples)
    return path


def _write_parquet(path: Path, table: Table) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    for part in iterate_table(table):
        frame = part.frame[part.roles.used].copy(deep=False)
        frame.attrs[TASK] = "regression" if table.is_regression else "classification"
        rows = pa.Table.from_pandas(frame, writer and writer.schema, preserve_index=False)
        writer = writer or parquet.ParquetWriter(path, rows.schema)
        writer.write_table(rows)
    if writer:
        writer.close()
