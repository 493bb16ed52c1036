"""What a model must know of its data: a value that is fitted to training examples, merged over silos, and saved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)


@checked_dataclass(frozen=True, config=CHECKED)
class Number:
    """A column of numbers: how many training examples have a value there, their mean and (population) variance."""

    name: str
    count: int
    mean: float
    variance: float

    @property
    def std(self) -> float:
        """What to divide by: the standard deviation, or 1 for a column that is constant."""
        return math.sqrt(self.variance) if self.variance > 1e-12 * self.mean**2 else 1.0

    def __add__(self, other: Number) -> Number:
        """Of both sets of examples together (Chan, Golub and LeVeque 1979, equation 2.1).

        >>> Number("age", 1, 4.0, 0.0) + Number("age", 2, 1.0, 0.0)
        Number(name='age', count=3, mean=2.0, variance=2.0)
        """
        count = self.count + other.count
        if count == 0:
            return self
        share, apart = other.count / count, other.mean - self.mean
        variance = (1 - share) * self.variance + share * other.variance + share * (1 - share) * apart**2
        return Number(self.name, count, self.mean + share * apart, variance)


@checked_dataclass(frozen=True, config=CHECKED)
class Category:
    """A column of categories: those that training examples have, sorted."""

    name: str
    values: tuple[str, ...]

    def __add__(self, other: Category) -> Category:
        return Category(self.name, tuple(sorted({*self.values, *other.values})))


@checked_dataclass(frozen=True, config=CHECKED)
class Columns:
    """How the columns of a table become inputs: numbers first, (x - mean) / std, then a 0 or 1 for each category.

    `target` is None for classes. `scaled` = False: numbers are taken as they are.
    """

    numbers: tuple[Number, ...]
    categories: tuple[Category, ...]
    target: Number | None
    scaled: bool

    @property
    def inputs(self) -> list[str]:
        """The names of a model's inputs."""
        ones = [f"{column.name}={value}" for column in self.categories for value in column.values]
        return [column.name for column in self.numbers] + ones

    @property
    def names(self) -> list[str]:
        return [*(column.name for column in self.numbers), *(column.name for column in self.categories)]

    def __add__(self, other: Columns) -> Columns:
        target = self.target and other.target and self.target + other.target
        numbers = tuple(a + b for a, b in zip(self.numbers, other.numbers, strict=True))
        return Columns(numbers, _added(self.categories, other.categories), target, self.scaled)


@dataclass(frozen=True)
class Schema:
    """What a model must know of the data: the shape of one example and the kind of target.

    `num_classes` is 0 for regression. `vocabulary_size`: examples are ids below it; 0: they are numbers.
    `target_shape`: () for one class or number per example, (T,) for one at each of T places, and so on.
    `classes`: their names, where the data has any. `class_counts`: training examples of each class, where the
    experiment weighs classes by them. `columns`: of a table.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    vocabulary_size: int = 0
    target_shape: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    columns: Columns | None = None

    def __str__(self) -> str:
        ids = f", ids below {self.vocabulary_size}," if self.vocabulary_size else ""
        targets = f" with targets of {self.target_shape}" if self.target_shape else ""
        kind = f"examples of {self.input_shape}{ids}{targets}".rstrip(",")
        if self.columns:
            kind = f"a table of the columns {', '.join(self.columns.names)}"
        return f"{self.task}{' (named classes)' if self.classes else ''} on {kind}"

    @property
    def input_dtype(self) -> Literal["int32", "float32"]:
        return "int32" if self.vocabulary_size else "float32"

    @property
    def task(self) -> Literal["classification", "regression"]:
        return "classification" if self.num_classes else "regression"

    @property
    def num_outputs(self) -> int:
        return self.num_classes or 1

    @property
    def kind(self) -> Schema:
        """What the schemas of all parties must have in common, and nothing else."""
        columns = self.columns
        if columns:
            numbers = tuple(Number(column.name, 0, 0.0, 0.0) for column in columns.numbers)
            categories = tuple(Category(column.name, ()) for column in columns.categories)
            columns = Columns(numbers, categories, columns.target and Number("", 0, 0.0, 0.0), columns.scaled)
        shape = () if columns else self.input_shape
        named = ("",) if self.classes else ()
        targets = (0,) * len(self.target_shape) if columns else self.target_shape  # as many as inputs
        return Schema(shape, min(1, self.num_classes), self.vocabulary_size, targets, named, (), columns)

    def to_json(self) -> dict[str, Any]:
        json: dict[str, Any] = SCHEMA.dump_python(self, mode="json")
        return json


SCHEMA = TypeAdapter(Schema)


def schema_from_json(value: Any) -> Schema:
    """The inverse of `Schema.to_json`. Raises ValueError for anything else."""
    try:
        return SCHEMA.validate_python(value, strict=False)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"schema: {'.'.join(map(str, problem['loc']))} {problem['msg']}") from None


def merge_schemas(schemas: Mapping[str, Schema]) -> Schema:
    """The schema of all parties' training examples together: a table's statistics are those of the union.

    Raises ValueError, naming who has what, if the parties hold different kinds of examples.
    """
    check_same_kind(schemas)
    return reduce(_merged, schemas.values())


def check_same_kind(schemas: Mapping[str, Schema]) -> None:
    if len({schema.kind for schema in schemas.values()}) > 1:
        found = "; ".join(f"{who}: {schema}" for who, schema in sorted(schemas.items()))
        raise ValueError(
            f"All parties must hold the same kind of examples; received {found}. Give every silo the same columns; "
            "if the server's data is another, set federation.evaluate_on_server = false."
        )


def _merged(a: Schema, b: Schema) -> Schema:
    columns = a.columns and b.columns and a.columns + b.columns
    classes = tuple(sorted({*a.classes, *b.classes}))
    return replace(
        a,
        input_shape=(len(columns.inputs),) if columns else a.input_shape,
        target_shape=(len(columns.inputs),) if columns and a.target_shape else a.target_shape,
        num_classes=len(classes) or max(a.num_classes, b.num_classes),
        classes=classes,
        class_counts=_added_counts(a, b) if a.class_counts and b.class_counts else (),
        columns=columns,
    )


def _added_counts(a: Schema, b: Schema) -> tuple[int, ...]:
    total: Counter[Any] = Counter()  # by name where classes have names, else by number
    for schema in (a, b):
        total.update(dict(zip(schema.classes or range(schema.num_classes), schema.class_counts, strict=True)))
    return tuple(total[name] for name in sorted(total))


def _added(a: Sequence[Category], b: Iterable[Category]) -> tuple[Category, ...]:
    return tuple(mine + theirs for mine, theirs in zip(a, b, strict=True))
