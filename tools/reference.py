"""python -m tools.reference --write | --check: the reference pages, made from the code.

| file | from |
|---|---|
| docs/reference-experiment.md | the sections of an experiment: keys, defaults, meaning |
| docs/experiment.schema.json | the same, for editors that check TOML |
| docs/reference-commands.md | the help texts of `archipelago` |
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from archipelago.__main__ import COMMANDS, overview
from shared.experiment import Experiment
from shared.experiment.reference import Key, keys_of, meaning_of, section_names

DOCS = Path(__file__).resolve().parents[1] / "docs"
MADE = "<!-- made by make format from the code; do not edit -->"


def main(arguments: Sequence[str] | None = None, folder: Path = DOCS) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.reference", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write the pages")
    action.add_argument("--check", action="store_true", help="fail if that would change one")
    options = parser.parse_args(arguments)

    status = 0
    for name, text in pages().items():
        path = folder / name
        if options.write:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"error: {path} is not what the code says. Run make format.", file=sys.stderr)
            status = 1
    return status


def pages() -> dict[str, str]:
    """The text of each page, by its file's name."""
    schema = {"title": "An experiment of Archipelago", **Experiment.model_json_schema()}
    return {
        "reference-experiment.md": "\n".join(_experiment_lines()) + "\n",
        "experiment.schema.json": json.dumps(schema, indent=1) + "\n",
        "reference-commands.md": "\n".join(_command_lines()) + "\n",
    }


def _experiment_lines() -> Iterator[str]:
    yield MADE
    yield ""
    yield "# The keys of an experiment file"
    yield ""
    yield "Each with its default. `archipelago keys [SECTION]` prints them; an editor that knows"
    yield "schemas for TOML completes and checks them by"
    yield "[experiment.schema.json](experiment.schema.json)."
    yield ""
    yield from _table(keys_of(""))
    for section in section_names():
        yield ""
        yield f"## [{section}]"
        yield ""
        yield meaning_of(section)
        yield ""
        yield from _table(keys_of(section))


def _table(keys: Sequence[Key]) -> Iterator[str]:
    yield "| key | values | meaning |"
    yield "|---|---|---|"
    for key in keys:
        meaning = key.meaning.replace("|", "\\|")
        yield f"| `{key.as_toml}` | {key.values} | {meaning} |"


def _command_lines() -> Iterator[str]:
    yield MADE
    yield ""
    yield "# Commands"
    yield ""
    yield "`.venv/bin/archipelago`, or `python -m archipelago`. A command ends with"
    yield ""
    yield "| status | when |"
    yield "|---|---|"
    yield "| 0 | all is done |"
    yield "| 1 | `doctor` found that something is missing |"
    yield "| 2 | a mistake of the user's, or a run that cannot go on; a line `error: ...` tells |"
    yield "| 130 | Ctrl-C |"
    yield ""
    yield from _block(overview())
    for name in COMMANDS:
        yield ""
        yield f"## archipelago {name}"
        yield ""
        yield from _block(help_text(name))


def _block(text: str) -> Iterator[str]:
    yield "```text"
    yield from (line.rstrip() for line in text.rstrip().splitlines())
    yield "```"


def help_text(name: str) -> str:
    """What `archipelago NAME --help` prints, 100 columns wide."""
    command = COMMANDS[name]
    printed = io.StringIO()
    called = ["archipelago", name]
    with (
        mock.patch.dict(os.environ, COLUMNS="100"),
        mock.patch.object(sys, "argv", called),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        importlib.import_module(command.module).main([*command.arguments, "--help"])
    return printed.getvalue()


if __name__ == "__main__":
    sys.exit(main())
