"""archipelago keys [SECTION]: every key of an experiment file, its default and what it means."""

import argparse
import sys
from collections.abc import Sequence

from shared.experiment.reference import Key, keys_of, section_names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="archipelago keys",
        description="List the keys of an experiment file with their defaults and meaning.",
        epilog="Example: archipelago keys federation",
    )
    parser.add_argument("section", nargs="?", default="", help="one section (default: all)")
    section = parser.parse_args(arguments).section.strip("[]")
    if section and section not in section_names():
        print(
            f"error: an experiment has the sections {', '.join(section_names())}; received"
            f" {section!r}.",
            file=sys.stderr,
        )
        return 2
    for name in [section] if section else ["", *section_names()]:
        _print_section(name, keys_of(name))
    return 0


def _print_section(name: str, keys: Sequence[Key]) -> None:
    if name:
        print(f"[{name}]")
    width = max(len(key.as_toml) for key in keys) + 2
    for key in keys:
        meaning = " ".join(filter(None, [key.meaning, key.values and f"({key.values})"]))
        print(f"{key.as_toml:<{width}}# {meaning}" if meaning else key.as_toml)
    print()


if __name__ == "__main__":
    sys.exit(main())
