"""The schema: the facts that a model needs about its data.

It is fitted to training examples, merged over silos, sent to them, and saved beside the model.

Merging obeys, for disjoint sets of rows A and B of one kind:

* fit(A and B together) = merge(fit(A), fit(B)): counts, categories, classes and class counts
  exactly, means and variances up to rounding;
* the order and the grouping of the parties do not matter, up to the same rounding;
* a column without values (count 0) changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)
NotNegative = Field(ge=0)


@checked_dataclass(frozen=True, config=CHECKED)
class Number:
    """A column of numbers: the count of values in it, their mean and (population) variance."""

    name: str
    count: Annotated[int, NotNegative]
    mean: float
    variance: Annotated[float, NotNegative]

    @property
    def std(self) -> float:
        """The divisor of scaling: the standard deviation, or 1 for a column that is constant.

        What rounding alone leaves of a constant's variance is some 1e-32 mean^2; a timestamp's
        spread may be small beside it, too.
        """
        return math.sqrt(self.variance) if self.variance > 1e-26 * self.mean**2 else 1.0

    def __add__(self, other: Number) -> Number:
        """The statistics of both sets of values (Chan, Golub and LeVeque 1979, equation 2.1).

        >>> Number("age", 1, 4.0, 0.0) + Number("age", 2, 1.0, 0.0)
        Number(name='age', count=3, mean=2.0, variance=2.0)
        """
        count = self.count + other.count
        if count == 0:
            return self
        share = other.count / count
        shift = other.mean - self.mean
        within = (1 - share) * self.variance + share * other.variance
        between = share * (1 - share) * shift**2
        return Number(self.name, count, self.mean + share * shift, within + between)


@checked_dataclass(frozen=True, config=CHECKED)
class Category:
    """A column of categories: the values that training examples have, sorted."""

    name: str
    values: tuple[str, ...]

    def __add__(self, other: Category) -> Category:
        """The categories of both, sorted."""
        return Category(self.name, tuple(sorted({*self.values, *other.values})))


@checked_dataclass(frozen=True, config=CHECKED)
class Columns:
    """The columns of a table as inputs: numbers first, (x - mean) / std, then 0 or 1 per category.

    `target`: statistics of a regression's target; None for classes, and where the inputs are the
    targets. `scaled` = False: numbers and target are taken as they are.
    """

    numbers: tuple[Number, ...]
    categories: tuple[Category, ...]
    target: Number | None
    scaled: bool

    @property
    def inputs(self) -> list[str]:
        """The names of a model's inputs, such as "age" and "sex=f"."""
        numbers = [column.name for column in self.numbers]
        categories = [
            f"{column.name}={value}" for column in self.categories for value in column.values
        ]
        return numbers + categories

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        numbers = [column.name for column in self.numbers]
        categories = [column.name for column in self.categories]
        return numbers + categories

    @property
    def kind(self) -> Hashable:
        """The facts in which all parties' columns agree: names and roles, not statistics.

        Nor the order of the columns: each party finds its own by their names.
        """
        numbers = frozenset(column.name for column in self.numbers)
        categories = frozenset(column.name for column in self.categories)
        return numbers, categories, self.target is not None, self.scaled

    def __add__(self, other: Columns) -> Columns:
        """The statistics of both parties' rows; `other` is of the same kind.

        The columns are in the parties' order, or by name where they differ in it.
        """
        target = None
        if self.target and other.target:
            target = self.target + other.target
        return Columns(
            numbers=_add_by_name(self.numbers, other.numbers),
            categories=_add_by_name(self.categories, other.categories),
            target=target,
            scaled=self.scaled,
        )


C = TypeVar("C", Number, Category)


def _add_by_name(mine: tuple[C, ...], theirs: tuple[C, ...]) -> tuple[C, ...]:
    names = [column.name for column in mine]
    if names != [column.name for column in theirs]:
        names.sort()
    of_mine = {column.name: column for column in mine}
    of_theirs = {column.name: column for column in theirs}
    return tuple(of_mine[name] + of_theirs[name] for name in names)


@dataclass(frozen=True)
class Schema:
    """The facts that a model needs about its data: the shape of one example, the kind of target.

    `num_classes` is 0 for regression. `vocabulary_size`: examples are ids below it; 0: they are
    numbers. `target_shape`: () for one class or number per example, (T,) for one at each of T
    places, and so on. `classes`: their names, where the data has any. `class_counts`: training
    examples of each class, where the experiment weighs classes by them. `columns`: of a table.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    vocabulary_size: int = 0
    target_shape: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    columns: Columns | None = None

    def __str__(self) -> str:
        task = f"{self.task} (named classes)" if self.classes else self.task
        if self.columns:
            return f"{task} on a table of the columns {_listed(self.columns.names)}"
        examples = f"examples of {self.input_shape}"
        if self.vocabulary_size:
            examples += f", ids below {self.vocabulary_size}"
        if self.target_shape:
            examples += f" with targets of {self.target_shape}"
        return f"{task} on {examples}"

    @property
    def input_dtype(self) -> Literal["int32", "float32"]:
        return "int32" if self.vocabulary_size else "float32"

    @property
    def task(self) -> Literal["classification", "regression"]:
        return "classification" if self.num_classes else "regression"

    @property
    def num_outputs(self) -> int:
        """The outputs of a model for each target: one per class, or one number."""
        return self.num_classes or 1

    @property
    def target_scale(self) -> Number | None:
        """The statistics that a regression's targets are scaled by; None: they are not scaled."""
        if self.columns and self.columns.scaled:
            return self.columns.target
        return None

    @property
    def kind(self) -> Hashable:
        """The facts in which the schemas of all parties agree.

        Parties may have other statistics, categories and classes, and so other numbers of inputs
        of a table.
        """
        if self.columns:
            shapes: Hashable = (self.columns.kind, len(self.target_shape))
        else:
            shapes = (self.input_shape, self.target_shape)
        return self.task, self.vocabulary_size, bool(self.classes), shapes

    def to_json(self) -> dict[str, Any]:
        """The schema as JSON values; `schema_from_json` is the inverse."""
        json: dict[str, Any] = SCHEMA.dump_python(self, mode="json")
        return json


def _listed(names: Sequence[str], num_shown: int = 20) -> str:
    """
    >>> _listed(["a", "b", "c"], num_shown=2)
    'a, b and 1 more'
    """
    if len(names) <= num_shown:
        return ", ".join(names)
    return f"{', '.join(names[:num_shown])} and {len(names) - num_shown} more"


SCHEMA = TypeAdapter(Schema)


def schema_from_json(value: Any) -> Schema:
    """Returns the schema that `Schema.to_json` gave. Raises ValueError for anything else."""
    try:
        schema = SCHEMA.validate_python(value, strict=False)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(key) for key in problem["loc"])
        raise ValueError(f"schema: {place} {problem['msg']}") from None
    _check_consistent(schema)
    return schema


def _check_consistent(schema: Schema) -> None:
    """Raises ValueError for facts that contradict each other."""
    lengths = [*schema.input_shape, *schema.target_shape]
    columns = schema.columns
    for is_wrong, rule in (
        (any(length < 0 for length in lengths), "no length is negative"),
        (schema.num_classes < 0 or schema.vocabulary_size < 0, "no number is negative"),
        (
            len(schema.classes) not in (0, schema.num_classes),
            f"{schema.num_classes} classes have as many names; received {len(schema.classes)}",
        ),
        (len(set(schema.classes)) < len(schema.classes), "no two classes have one name"),
        (
            len(schema.class_counts) not in (0, schema.num_classes),
            f"{schema.num_classes} classes have as many counts; received"
            f" {len(schema.class_counts)}",
        ),
        (any(count < 0 for count in schema.class_counts), "no count is negative"),
        (
            columns is not None and schema.input_shape != (len(columns.inputs),),
            f"the columns' inputs are an example's shape; received {schema.input_shape}",
        ),
        (
            columns is not None and len(set(columns.names)) < len(columns.names),
            "no two columns have one name",
        ),
    ):
        if is_wrong:
            raise ValueError(f"schema: {rule}")


def merge_schemas(schemas: Mapping[str, Schema]) -> Schema:
    """Returns the schema of all parties' training examples together, by the laws above.

    `schemas`: by the party's name. Raises ValueError, listing who has what, if the parties hold
    different kinds of examples.
    """
    check_same_kind(schemas)
    return reduce(_merge, schemas.values())


def check_same_kind(schemas: Mapping[str, Schema]) -> None:
    """Raises ValueError, listing who has what, unless all schemas are of one kind."""
    kinds = {schema.kind for schema in schemas.values()}
    if len(kinds) > 1:
        received = "; ".join(f"{party}: {schema}" for party, schema in sorted(schemas.items()))
        raise ValueError(
            f"All parties must hold the same kind of examples; received {received}. Give every silo"
            " the same columns; if the server's data is another, set federation.evaluate_on_server"
            " = false."
        )


def _merge(a: Schema, b: Schema) -> Schema:
    # A table has as many inputs as both parties have columns and categories together.
    columns = None
    input_shape, target_shape = a.input_shape, a.target_shape
    if a.columns and b.columns:
        columns = a.columns + b.columns
        input_shape = (len(columns.inputs),)
        target_shape = input_shape if a.target_shape else ()

    # Classes go by name where they have one, else by number; in the order that both have, if any.
    classes = a.classes if a.classes == b.classes else tuple(sorted({*a.classes, *b.classes}))
    num_classes = len(classes) or max(a.num_classes, b.num_classes)
    class_counts: tuple[int, ...] = ()
    if a.class_counts and b.class_counts:
        totals = _count_classes(a) + _count_classes(b)
        class_counts = tuple(totals[name] for name in classes or range(num_classes))

    return replace(
        a,
        input_shape=input_shape,
        num_classes=num_classes,
        target_shape=target_shape,
        classes=classes,
        class_counts=class_counts,
        columns=columns,
    )


def _count_classes(schema: Schema) -> Counter[Any]:
    """The training examples of each class, by its name or number."""
    classes = schema.classes or range(schema.num_classes)
    return Counter(dict(zip(classes, schema.class_counts, strict=True)))
