"""python -m shared.export RUN --format onnx: the trained model as a file for other programs."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.command_line import program, quiet
from shared.export import FORMATS, export


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program("shared.export"),
        description="Write the model of a finished run as a file for other programs.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the directory that the run left behind: runs/NAME"
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="where (default: RUN/export.*)"
    )
    options = parser.parse_args(arguments)

    # TensorFlow and the converters log much, and nothing that helps.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.path.insert(0, str(Path.cwd()))  # the user's own models, whichever way Python was started
    try:
        with quiet():
            path = export(options.run, options.format, options.output)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

    tolerance = FORMATS[options.format].tolerance
    print(
        f"export: {path}, which predicts as the run's model does, to {tolerance:g};"
        f" {path}.inputs.json says how"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
