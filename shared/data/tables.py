"""Tables: columns with roles, what of them is fitted to training examples, and how they become a model's inputs."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from shared.data.dataset import Dataset
from shared.data.rows import Rows
from shared.data.schema import Category, Columns, Number, Schema
from shared.experiment import DataSection, nearest_names

if TYPE_CHECKING:
    import pandas as pd

TASK = "archipelago task"  # what a file of ours says of its targets, which may all happen to be whole numbers
MAX_CLASSES = 100_000  # more are ids or numbers, not classes
MAX_CATEGORIES = 1000  # of a column; more are ids


def parse_names(text: str) -> list[str]:
    """Names as in a line of CSV.

    >>> parse_names('age, "sex, at birth"')
    ['age', 'sex, at birth']
    """
    return [name.strip() for name in next(csv.reader([text], skipinitialspace=True), []) if name.strip()]


@dataclass(frozen=True)
class Roles:
    """Which columns of a file are what. `label` is empty where the inputs are the targets too."""

    label: str
    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    weight: str
    group: str
    id: str

    @property
    def used(self) -> list[str]:
        return list(filter(None, (*self.numbers, *self.categories, self.label, self.weight, self.group, self.id)))


def assign_roles(config: DataSection, columns: Sequence[str], source: str) -> Roles:
    """The roles that an experiment gives to the columns of a file. Raises ValueError for names that it lacks."""
    features, categorical = parse_names(config.features), parse_names(config.categorical)
    others = list(filter(None, (config.weight, config.id, config.group)))
    wants_label = config.task != "reconstruction"
    label = config.label if wants_label or config.label in columns else ""
    for key, names in (
        ("label", [label] if label else []),
        ("features", features),
        ("categorical", categorical),
        ("weight, id or group", others),
    ):
        for name in names:
            if name not in columns:
                raise ValueError(
                    f"{source} has no column {name!r} (data.{key}); its columns are {', '.join(map(repr, columns))}. "
                    f"Nearest: {', '.join(nearest_names(name, columns)[:3])}."
                )
    apart = [label, *others] if label else others
    if twice := {name for name in apart if apart.count(name) > 1 or name in features or name in categorical}:
        raise ValueError(f"{source}: column {min(twice)!r} has two roles. Name it in one key of [data] only.")
    features = features or [name for name in columns if name not in apart]
    if left_out := [name for name in categorical if name not in features]:
        raise ValueError(f"data.categorical names {left_out[0]!r}, which data.features leaves out. Add it there.")
    if not features:
        raise ValueError(f"{source} has only the label column {config.label!r}. Add at least one feature column.")
    numbers = tuple(name for name in features if name not in categorical)
    return Roles(label if wants_label else "", numbers, tuple(categorical), config.weight, config.group, config.id)


@dataclass(frozen=True, eq=False)
class Table:
    """Examples as their file holds them, in columns with roles: what a schema turns into a `Dataset`.

    `config` says what is done with them. The index of `frame` tells where in the file a row stood.
    """

    frame: pd.DataFrame
    roles: Roles
    config: DataSection
    source: str
    is_regression: bool
    file: Path | None = None  # that holds the features, where they are not in the frame

    def __len__(self) -> int:
        return len(self.frame)

    def take(self, indices: np.ndarray) -> Self:
        return replace(self, frame=self.frame.iloc[indices])

    def sha256(self) -> str:
        """Of the examples in their order: equal for equal data."""
        import pandas as pd

        digest = hashlib.sha256(repr(list(self.frame.columns)).encode())
        digest.update(pd.util.hash_pandas_object(self.frame, index=False).to_numpy().tobytes())
        return digest.hexdigest()

    @property
    def groups(self) -> np.ndarray | None:
        """A number for each example: the same for those of one group."""
        return _numbered(self.frame[self.roles.group]) if self.roles.group else None

    @property
    def labels(self) -> np.ndarray | None:
        """A number for each example's class; None for a regression."""
        return None if self.is_regression else _numbered(self.frame[self.roles.label])


def make_table(frame: pd.DataFrame, config: DataSection, source: str) -> Table:
    """Checks the columns that have a role, and leaves out the others. Raises ValueError, naming column and row."""
    if len(frame) == 0:
        raise ValueError(f"{source} holds no examples. Give it at least one.")
    roles = assign_roles(config, list(map(str, frame.columns)), source)
    return finish_table(check_columns(frame, roles, config, source), roles, config, source)


def check_columns(frame: pd.DataFrame, roles: Roles, config: DataSection, source: str) -> pd.DataFrame:
    """The columns with a role: numbers as numbers, categories as text. Raises ValueError, naming column and row."""
    frame = frame[roles.used].copy()
    may_lack = [*roles.numbers, *roles.categories] if config.missing == "fill" else []
    for name in roles.numbers:
        frame[name] = _as_numbers(frame[name], source)
    for name in roles.categories:
        frame[name] = frame[name].where(frame[name].isna(), frame[name].map(_as_text))
    for name in frame.columns.difference(may_lack):
        _check_complete(frame[name], source)
    if roles.weight:
        _check_weights(frame, roles.weight, source)
    return frame


def finish_table(
    frame: pd.DataFrame, roles: Roles, config: DataSection, source: str, file: Path | None = None
) -> Table:
    """The table of checked columns, whose targets and ids are looked at all together."""
    if roles.id and frame[roles.id].duplicated().any():
        at = frame.index[frame[roles.id].duplicated()][0]
        raise ValueError(
            f"{source}: column {roles.id!r} names each example once (data.id); received "
            f"{str(frame.loc[at, roles.id])!r} again in {frame.index.name} {at}. Take one of the two out."
        )
    task = frame.attrs.get(TASK, "auto") if config.task == "auto" else config.task
    is_regression = True
    if roles.label:
        frame[roles.label], is_regression = _target(frame[roles.label], task, source)
    return Table(frame, roles, config, source, is_regression, file)


def fit_table(train: Table) -> Schema:
    """The schema of training examples: statistics of numbers, the categories and classes that there are."""
    numbers = tuple(_fit_number(train.frame[name]) for name in train.roles.numbers)
    categories = tuple(_fit_category(train.frame[name], train.source) for name in train.roles.categories)
    scaled = train.config.scaling != "none"
    if not train.roles.label:
        columns = Columns(numbers, categories, None, scaled)
        return Schema((len(columns.inputs),), 0, target_shape=(len(columns.inputs),), columns=columns)
    label = train.frame[train.roles.label]
    columns = Columns(numbers, categories, _fit_number(label) if train.is_regression else None, scaled)
    classes: tuple[str, ...] = ()
    num_classes = 0
    if not train.is_regression:
        classes = tuple(sorted(set(label))) if _is_text(label) else ()
        num_classes = len(classes) or int(label.max()) + 1
    return Schema((len(columns.inputs),), num_classes, classes=classes, columns=columns)


def encode_table(table: Table, schema: Schema, inputs: Rows | None = None) -> Dataset:
    """Inputs (x - mean) / std, ones for categories, and targets, by a schema; a category it lacks becomes zeros.

    `inputs`: where they are encoded already. A missing number becomes the mean. Raises ValueError for a class that the
    schema lacks.
    """
    columns = schema.columns
    if columns is None:
        raise ValueError(
            f"{table.source} is a table; received the schema of other data: {schema}. Give all the same kind."
        )
    x: Any = encode_inputs(table.frame, columns) if inputs is None else inputs
    weight = table.frame[table.roles.weight].to_numpy(np.float32) if table.roles.weight else None
    y = _encode_target(table, schema) if table.roles.label else x
    return Dataset(x, y, schema.num_classes, weight, groups=table.groups)


def encode_inputs(frame: pd.DataFrame, columns: Columns) -> np.ndarray:
    """A model's inputs, float32 (n, len(columns.inputs)), from a frame that has these columns."""
    numbers = frame[[column.name for column in columns.numbers]].to_numpy(np.float64)
    means = np.array([column.mean for column in columns.numbers])
    numbers = np.where(np.isnan(numbers), means, numbers)
    if columns.scaled:
        numbers = (numbers - means) / np.array([column.std for column in columns.numbers])
    ones = [
        frame[column.name].to_numpy()[:, None] == np.array(column.values, object)[None, :]
        for column in columns.categories
    ]
    inputs: np.ndarray = np.concatenate([numbers, *ones], axis=1).astype(np.float32)
    return inputs


def _encode_target(table: Table, schema: Schema) -> np.ndarray:
    label = table.frame[table.roles.label]
    if table.is_regression:
        target = schema.columns and schema.columns.target
        values = label.to_numpy(np.float64)
        scale = target if target and schema.columns and schema.columns.scaled else None
        return (values if scale is None else (values - scale.mean) / scale.std).astype(np.float32)
    known = schema.classes or range(schema.num_classes)
    unknown = ~label.isin(list(known))
    if unknown.any():
        raise ValueError(
            f"{table.source}: the class {label[unknown].iloc[0]!r} (in {label.index.name} {label.index[unknown][0]}) "
            "has no training example. Add some, take that class out, or hold out less (data.test_fraction, "
            "data.validation_fraction)."
        )
    if schema.classes:
        return label.map({name: number for number, name in enumerate(schema.classes)}).to_numpy(np.int32)
    return label.to_numpy(np.int32)


def _as_numbers(column: pd.Series[Any], source: str) -> pd.Series[Any]:
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce").astype(np.float64)
    text = column[numbers.isna() & column.notna()]
    if len(text):
        raise ValueError(
            f"{source}: column {column.name!r} must be numeric; received {text.iloc[0]!r} in {column.index.name} "
            f"{text.index[0]} ({len(text)} such). Mend the values; or, if the column holds categories, name it in "
            "data.categorical; or leave it out of data.features."
        )
    with np.errstate(over="ignore"):
        infinite = numbers.index[np.isinf(numbers.astype(np.float32))]
    if len(infinite):
        raise ValueError(
            f"{source}: column {column.name!r} must be finite, below 3e38; received {numbers[infinite[0]]:g} in "
            f"{column.index.name} {infinite[0]}. Mend that value."
        )
    return numbers


def _check_complete(column: pd.Series[Any], source: str) -> None:
    gaps = column.index[column.isna()]
    if len(gaps):
        raise ValueError(
            f"{source}: column {column.name!r} has no value in {column.index.name} {gaps[0]} ({len(gaps)} such). Fill "
            "the values in, take the rows out, or, for a feature, set data.missing = 'fill'."
        )


def _check_weights(frame: pd.DataFrame, name: str, source: str) -> None:
    frame[name] = _as_numbers(frame[name], source)
    negative = frame.index[frame[name] < 0]
    if len(negative):
        raise ValueError(
            f"{source}: column {name!r} holds weights (data.weight), which must not be negative; received "
            f"{frame.loc[negative[0], name]} in {frame.index.name} {negative[0]}. Mend that value."
        )


def _target(column: pd.Series[Any], task: str, source: str) -> tuple[pd.Series[Any], bool]:
    """The targets as numbers or as names of classes, and whether they are a regression's."""
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce").astype(np.float64)
    if task == "regression":
        return _as_numbers(column, source), True
    if numbers.isna().any():
        few = f" ({numbers.isna().sum()} of {len(column)} are no numbers)" if numbers.notna().any() else ""
        if few:
            at = numbers.index[numbers.isna()][0]
            raise ValueError(
                f"{source}: column {column.name!r} mixes numbers and text: {column[at]!r} in {column.index.name} {at}"
                f"{few}. Mend the values, or name all classes by text."
            )
        return column.map(_as_text), False
    is_whole = np.mod(numbers, 1) == 0
    if task == "auto" and not is_whole.all():
        return _as_numbers(column, source), True
    wrong = numbers[~(is_whole & (numbers >= 0) & (numbers < MAX_CLASSES))]
    if len(wrong):
        raise ValueError(
            f"{source}: class targets must be whole numbers from 0 on, below {MAX_CLASSES}; received "
            f"{wrong.iloc[0]} in {column.index.name} {wrong.index[0]}. Number the classes 0, 1, 2, ..., or set "
            "data.task = 'regression'."
        )
    return numbers.astype(np.int64), False


def _fit_number(column: pd.Series[Any]) -> Number:
    values = column.to_numpy(np.float64)
    values = values[~np.isnan(values)]
    if values.size == 0:
        return Number(str(column.name), 0, 0.0, 0.0)
    return Number(str(column.name), int(values.size), float(values.mean()), float(values.var()))


def _fit_category(column: pd.Series[Any], source: str) -> Category:
    values = sorted(set(column.dropna()))
    if len(values) > MAX_CATEGORIES:
        raise ValueError(
            f"{source}: column {column.name!r} has {len(values)} categories; at most {MAX_CATEGORIES} can be learnt "
            "from. Is it an id? Then name it in data.id, or leave it out of data.features."
        )
    return Category(str(column.name), tuple(values))


def _as_text(value: object) -> str:
    """A category's name: 1.0 and 1 are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _is_text(column: Iterable[Any]) -> bool:
    return isinstance(next(iter(column)), str)


def _numbered(column: pd.Series[Any]) -> np.ndarray:
    values: np.ndarray = np.unique(column.to_numpy().astype(str), return_inverse=True)[1]
    return values
