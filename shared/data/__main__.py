"""python -m shared.data inspect FILE: the columns of a file, and the [data] section that suits."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shared.command_line import program
from shared.data.description import ColumnDescription
from shared.data.inspection import Inspection, experiment_text, inspect_file
from shared.data.roles import format_names

MAX_CLASSES_SHOWN = 20
MAX_COLUMNS_SHOWN = 40
MAX_LINE = 500


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program("shared.data").removesuffix(" inspect"))
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect", help="columns, types, missing values, class balance, a [data] section"
    )
    inspect.add_argument("file", type=Path, help="a .csv, .parquet or .tfrecord file")
    inspect.add_argument(
        "--label",
        default="",
        help="the column to predict (default: by its name, else the last one)",
    )
    inspect.add_argument(
        "-o", "--output", type=Path, help="write a whole experiment, to train at once"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Inspects a file; returns the exit status, 2 if the file or the output cannot be used."""
    options = parse_arguments(arguments)
    try:
        inspection = inspect_file(options.file, options.label)
        if options.output:
            _write_experiment(inspection, options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print_inspection(inspection, options.file)
    if options.output:
        print(f"Wrote {options.output}. Train on it: python -m dist_train {options.output}")
    return 0


def _write_experiment(inspection: Inspection, path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} exists already. Choose another file with -o, or delete it.")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "mine"
    path.write_text(experiment_text(inspection, name), encoding="utf-8")


def _print_inspection(inspection: Inspection, path: Path) -> None:
    title = f"{path}: {inspection.num_examples} rows, {len(inspection.columns)} columns"
    table = Table("column", "type", "missing", "distinct", "values", "role", title=title)
    shown = _worth_showing(inspection.columns)
    for column in shown:
        missing = str(column.missing) if column.missing else "-"
        missing += f" ({column.codes})" if column.codes else ""
        distinct = str(column.distinct)
        example = f"{column.example}; {column.note}" if column.note else column.example
        table.add_row(column.name, column.kind, missing, distinct, example, column.role)
    console = Console(highlight=False, markup=False)
    console.print(table)
    num_hidden = len(inspection.columns) - len(shown)
    if num_hidden:
        roles = Counter(column.role for column in inspection.columns)
        counts = ", ".join(f"{role} {count}" for role, count in roles.most_common(5))
        console.print(f"and {num_hidden} columns more; all by role: {counts}")

    if inspection.classes:
        largest = list(inspection.classes.items())[:MAX_CLASSES_SHOWN]
        num_examples = inspection.num_examples
        shares = [
            f"{format_names([name])} {count} ({count / num_examples:.0%})"
            for name, count in largest
        ]
        console.print(f"classes: {', '.join(shares)}")
    console.print()
    for line in inspection.section.splitlines():
        is_long = len(line) > MAX_LINE
        print(f"{line[:MAX_LINE]}... (-o FILE writes all of it)" if is_long else line)


def _worth_showing(columns: Sequence[ColumnDescription]) -> list[ColumnDescription]:
    """All columns, if they fit on a page; else those that are not plain numbers come first."""
    if len(columns) <= MAX_COLUMNS_SHOWN:
        return list(columns)
    by_interest = sorted(columns, key=lambda column: column.role == "number")
    by_interest.sort(key=lambda column: column.role != "label")
    return by_interest[:MAX_COLUMNS_SHOWN]


if __name__ == "__main__":
    sys.exit(main())
