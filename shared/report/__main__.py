"""python -m shared.report RUN_DIR [RUN_DIR ...] -o page.html: runs side by side, on one page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.command_line import program
from shared.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program("shared.report"), description="Set runs side by side on one page."
    )
    parser.add_argument(
        "run_dirs",
        nargs="*",
        type=Path,
        metavar="RUN_DIR",
        help="what a run left behind: runs/NAME",
    )
    parser.add_argument(
        "-o",
        dest="output",
        type=Path,
        default="report.html",
        help="the page (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        write_report(options.run_dirs, options.output)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"report: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
