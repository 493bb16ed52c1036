"""python -m shared.data inspect FILE: the columns of a file, and the [data] section that suits."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shared.command_line import program
from shared.data.inspection import Inspection, experiment_text, inspect_file

MAX_CLASSES_SHOWN = 20


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
    title = f"{path}: {inspection.num_examples} rows"
    table = Table("column", "type", "missing", "distinct", "values", "role", title=title)
    for column in inspection.columns:
        missing = str(column.missing) if column.missing else "-"
        distinct = str(column.distinct)
        table.add_row(column.name, column.kind, missing, distinct, column.example, column.role)
    console = Console(highlight=False, markup=False)
    console.print(table)

    if inspection.classes:
        largest = list(inspection.classes.items())[:MAX_CLASSES_SHOWN]
        num_examples = inspection.num_examples
        shares = [f"{name} {count} ({count / num_examples:.0%})" for name, count in largest]
        console.print(f"classes: {', '.join(shares)}")
    console.print()
    print(inspection.section)


if __name__ == "__main__":
    sys.exit(main())
