"""python -m tools.flower_config --write | --check: Flower's copy of the experiment's defaults.

Flower refuses keys of a run that pyproject.toml does not list under [tool.flwr.app.config]. That
block is written from the sections' declarations; the rest of the file stays byte for byte.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from shared.experiment import Experiment

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
TABLE = "tool.flwr.app.config"


def main(arguments: Sequence[str] | None = None, path: Path = PYPROJECT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.flower_config", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help=f"write [{TABLE}] of {path.name}")
    action.add_argument("--check", action="store_true", help="fail if that would change it")
    options = parser.parse_args(arguments)

    text = path.read_bytes().decode()
    try:
        expected = with_defaults(text)
    except ValueError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 2

    if options.check and text != expected:
        print(
            f"error: [{TABLE}] of {path} must be the defaults of shared/experiment; received"
            " others. Run make format.",
            file=sys.stderr,
        )
        return 1
    if options.write:
        path.write_bytes(expected.encode())
    return 0


def with_defaults(pyproject: str) -> str:
    """The text with its block [tool.flwr.app.config] replaced by the defaults.

    The block goes from that line to the last key before a table of another name. Raises ValueError
    if there is none.
    """
    lines = pyproject.splitlines(keepends=True)
    header = f"[{TABLE}]\n"
    if header not in lines:
        raise ValueError(f"There must be a line [{TABLE}]; received none. Add it.")
    start = lines.index(header)

    end = start
    for number, line in enumerate(lines[start:], start):
        is_header = line.startswith("[")
        if is_header and not line.startswith((f"[{TABLE}]", f"[{TABLE}.")):
            break
        if is_header or line[0].isalpha():  # else a comment or a blank line
            end = number + 1

    nested = Experiment().model_dump()
    for name in reversed(TABLE.split(".")):
        nested = {name: nested}
    return "".join(lines[:start]) + tomli_w.dumps(nested) + "".join(lines[end:])


if __name__ == "__main__":
    sys.exit(main())
