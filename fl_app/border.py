"""The border: what another party sends becomes typed, bounded values, or a MessageError.

| a value | is |
|---|---|
| a name | 1 to 100 printable characters |
| a count | a whole number from 0 to 2^53 |
| a number of examples | a count from 1 to 2^31 |
| a metric | finite and below 1e30 in size, or NaN; at most 1,000 of them |
| a duration | 0 to 1e9 seconds |
| a schema | consistent, with statistics that float32 holds, and no larger than data can be |

Nothing here knows what the values are for.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fl_app.failures import MessageError
from shared.data.schema import Schema, schema_from_json

MAX_NAME_LENGTH = 100  # characters, of silos and of metrics
MAX_REASON_LENGTH = 2000  # characters, of a refusal
MAX_METRICS = 1000  # in one answer
MAX_METRIC = 1e30  # so that no mean over silos overflows
MAX_COUNT = 2**53  # a float64 still holds every one of them
MAX_EXAMPLES = 2**31  # of one silo
MAX_SECONDS = 1e9

MAX_NUMBERS_PER_EXAMPLE = 2**31
MAX_COLUMNS = 2**20  # of a table, and inputs that its categories become
MAX_CLASSES = 2**17
MAX_LABEL_LENGTH = 1000  # characters, of a column, a category or a class
MAX_STATISTIC = 3.5e38  # just above the largest float32

# What Python raises on values of other types, lengths, depths or names than expected.
UNREADABLE = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    SyntaxError,
    RecursionError,
)


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Turns whatever the other side garbled into a MessageError that names the part."""
    try:
        yield
    except MessageError:
        raise
    except UNREADABLE as error:
        raise MessageError(
            f"{what} that this version of Archipelago does not understand: it lacks or garbles"
            f" {printable_line(error)}"
        ) from None


def printable_line(value: Any) -> str:
    """Text of another party, fit to be printed: one line of bounded length."""
    text = str(value)
    line = "".join(c if c.isprintable() else " " for c in text[:MAX_REASON_LENGTH])
    return line if len(text) <= MAX_REASON_LENGTH else line + " ..."


def read_name(value: Any) -> str:
    name = str(value)
    if not (0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()):
        raise ValueError(f"a name of 1 to {MAX_NAME_LENGTH} printable characters")
    return name


def read_count(value: Any, largest: int = MAX_COUNT) -> int:
    count = int(value)
    if not 0 <= count <= largest:
        raise ValueError(f"a count from 0 to {largest}: {str(value)[:20]}")
    return count


def read_num_examples(value: Any) -> int:
    num_examples = read_count(value, MAX_EXAMPLES)
    if num_examples == 0:
        raise ValueError("a number of examples: 0")
    return num_examples


def read_metrics(values: Mapping[Any, Any]) -> dict[str, float]:
    """The metrics by name; NaN for one that is not finite or absurd, so that it cannot win."""
    if len(values) > MAX_METRICS:
        raise ValueError(f"metrics: {len(values)} of them, more than {MAX_METRICS}")
    metrics = {read_name(name): float(value) for name, value in values.items()}
    return {name: v if abs(v) < MAX_METRIC else math.nan for name, v in metrics.items()}


def read_seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds <= MAX_SECONDS:
        raise ValueError(f"a duration: {seconds}")
    return seconds


def read_schema(value: Any) -> Schema:
    """The schema of another party's examples.

    Bounded so that neither a sum over parties overflows nor a model of it takes all memory.
    """
    schema = schema_from_json(value)
    _check_size(schema)
    _check_labels(schema)

    columns = schema.columns
    if columns is None:
        return schema
    for number in [*columns.numbers, *filter(None, [columns.target])]:
        if number.count > MAX_COUNT:
            raise ValueError(f"a count of values: {str(number.count)[:20]}")
        if abs(number.mean) > MAX_STATISTIC or number.variance > MAX_STATISTIC**2:
            raise ValueError(
                f"statistics that a float32 can hold: mean {number.mean:g}, variance"
                f" {number.variance:g}"
            )
    return schema


def _check_size(schema: Schema) -> None:
    columns = schema.columns
    inputs = len(columns.inputs) if columns else 0
    for what, size, limit in (
        ("numbers in an example", math.prod(schema.input_shape), MAX_NUMBERS_PER_EXAMPLE),
        ("numbers in a target", math.prod(schema.target_shape), MAX_NUMBERS_PER_EXAMPLE),
        ("inputs of a table", inputs, MAX_COLUMNS),
        ("classes", schema.num_classes, MAX_CLASSES),
        ("ids", schema.vocabulary_size, MAX_CLASSES),
    ):
        if size > limit:
            raise ValueError(f"a schema of at most {limit} {what}: {str(size)[:20]}")


def _check_labels(schema: Schema) -> None:
    labels = [*schema.classes]
    if schema.columns:
        labels += schema.columns.names
        labels += [value for column in schema.columns.categories for value in column.values]
    if any(len(label) > MAX_LABEL_LENGTH for label in labels):
        raise ValueError(
            f"names of at most {MAX_LABEL_LENGTH} characters, of columns, categories and classes"
        )
