"""python -m shared.data inspect FILE: what a file holds, and the [data] section that suits it."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shared.data.inspection import Inspection, experiment_text, inspect_file


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m shared.data")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="columns, types, missing values, class balance, a [data] section")
    inspect.add_argument("file", type=Path, help="a .csv, .parquet or .tfrecord file")
    inspect.add_argument("--label", default="", help="the column to predict (default: by its name, else the last one)")
    inspect.add_argument("-o", "--output", type=Path, help="write a whole experiment, to train at once")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        found = inspect_file(options.file, options.label)
        if options.output:
            _write_experiment(found, options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _show(found, options.file)
    if options.output:
        print(f"Wrote {options.output}. Train on it: python -m dist_train {options.output}")
    return 0


def _write_experiment(found: Inspection, path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} exists already. Choose another file with -o, or delete it.")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "mine"
    path.write_text(experiment_text(found, name), encoding="utf-8")


def _show(found: Inspection, path: Path) -> None:
    table = Table("column", "type", "missing", "distinct", "values", "role", title=f"{path}: {found.num_examples} rows")
    for column in found.columns:
        missing = str(column.missing) if column.missing else "-"
        table.add_row(column.name, column.kind, missing, str(column.distinct), column.example, column.role)
    console = Console(highlight=False, markup=False)
    console.print(table)
    if found.classes:
        share = ", ".join(f"{name} {n} ({n / found.num_examples:.0%})" for name, n in list(found.classes.items())[:20])
        console.print(f"classes: {share}")
    console.print()
    print(found.section)


if __name__ == "__main__":
    sys.exit(main())
