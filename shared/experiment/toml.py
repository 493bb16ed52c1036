"""The spellings of an experiment: TOML tables, dotted keys, overrides; and the errors about them.

An error says where the value came from, so that a mistake in an option of the command is not looked
for in the file.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shared.experiment.sections import BrokenRule, Scalar

MAX_QUOTED = 80  # characters of a faulty line


@dataclass(frozen=True)
class Origin:
    """The origin of an experiment's values: a file, and for some keys an option of the command.

    >>> origin = Origin("mine.toml", {"training.epochs": "--set training.epochs=3"})
    >>> origin.of("seed"), origin.of("training.epochs")
    ('mine.toml', '--set training.epochs=3')
    >>> origin.of("seed", "training.epochs")
    'mine.toml with --set training.epochs=3'
    """

    file: str
    options: Mapping[str, str] = field(default_factory=dict)  # by key, as the user typed them

    def of(self, *keys: str) -> str:
        """The origin of these keys together."""
        options = [self.options[key] for key in keys if key in self.options]
        if not options:
            return self.file
        if len(options) == len(keys):
            return " and ".join(options)
        return f"{self.file} with {' and '.join(options)}"


def read_flat(path: Path) -> dict[str, Any]:
    """The dotted keys of a TOML file, with or without a byte order mark.

    Raises ValueError if it is none.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"No experiment file at {path}. The ones that come along: ls experiments/*.toml"
        ) from None
    except IsADirectoryError:
        raise ValueError(
            f"An experiment is one TOML file; received the directory {path}."
        ) from None
    except OSError as error:
        raise ValueError(
            f"The experiment file must be one that can be read; received {path} ({error.strerror})."
        ) from None
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is not valid TOML: it must be text in UTF-8. Save it in that encoding."
        ) from None

    try:
        return flatten(parse_toml(text))
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from None


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises ValueError: what is wrong, with the line where it is."""
    try:
        return tomllib.loads(f"{text}\n")  # so that a mistake in the last line has a place
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except ValueError as error:  # of TOML, or a number with thousands of digits
        message = str(error).replace("Cannot overwrite a value", "a key is set twice")
        raise ValueError(message + _faulty_line(text, message)) from None


def _faulty_line(text: str, message: str) -> str:
    """The line that a message of tomllib's is about, after a colon; empty if it names none."""
    at = re.search(r"at line (\d+)", message)
    if not at:
        return ""
    line = text.split("\n")[int(at[1]) - 1].strip()
    return f": {line[:MAX_QUOTED]}"


def parse_override(text: str) -> tuple[str, Scalar]:
    """Splits `section.key=value`; the value is TOML, or a bare string.

    >>> parse_override("optimizer.learning_rate=0.1"), parse_override("data.name=wine")
    (('optimizer.learning_rate', 0.1), ('data.name', 'wine'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(
            f"--set takes section.key=value; received {text!r}. Example: --set training.epochs=5"
        )
    try:
        return key.strip(), parse_toml(f"value = {value}")["value"]
    except ValueError:
        return key.strip(), value.strip()


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Tables to dotted keys, one level deep: the form of Flower's run config.

    An empty table stays as it is.

    >>> flatten({"seed": 1, "data": {"name": "wine"}})
    {'seed': 1, 'data.name': 'wine'}
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[key] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys to tables, the inverse of `flatten`.

    >>> nest({"seed": 1, "data.name": "wine"})
    {'seed': 1, 'data': {'name': 'wine'}}
    """
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        elif value == {}:
            nested.setdefault(key, {})  # an empty table takes nothing from the keys that are there
        else:
            nested[key] = value
    return nested


def check_keys(flat: Mapping[str, Any], defaults: Mapping[str, Scalar], origin: Origin) -> None:
    """Raises ValueError for a key that is not declared, with the nearest that is."""
    first_keys: dict[str, str] = {}  # of each section
    for key in defaults:
        section, dot, _ = key.partition(".")
        if dot:
            first_keys.setdefault(section, key)

    for key, value in flat.items():
        if key in first_keys and value != {}:
            raise ValueError(
                f"{origin.of(key)}: {key} is a section; received {key} = {value!r}. Set one of its"
                f" keys, such as {first_keys[key]}; in a file they stand below a line [{key}]."
            )
        if key not in defaults and key not in first_keys:
            nearest = _nearest(key, [*defaults, *first_keys])
            raise ValueError(f"Unknown key {key!r} in {origin.of(key)}.{nearest}")


def explain(error: ValidationError, defaults: Mapping[str, Scalar], origin: Origin) -> str:
    """One sentence per problem: its origin, the rule, the value received, the default."""
    sentences = []
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, BrokenRule):  # speaks for itself
            sentences.append(f"{origin.of(*cause.keys)}: {cause}")
            continue
        key = ".".join(map(str, problem["loc"]))
        rule = problem["msg"].removeprefix("Input should ").removeprefix("String should ")
        sentences.append(
            f"{origin.of(key)}: {key} must {rule}; received {problem['input']!r} (default:"
            f" {defaults.get(key)!r})."
        )
    return "\n".join(sentences)


def nearest_names(name: str, candidates: Iterable[str]) -> list[str]:
    """The candidates that look most like `name`, best first; all of them, sorted, if none does.

    >>> nearest_names("digts", ["digits", "wine"])
    ['digits']
    """
    candidates = sorted(candidates)
    return difflib.get_close_matches(name, candidates, n=3, cutoff=0.6) or candidates


def _nearest(key: str, declared_keys: Sequence[str]) -> str:
    """A sentence, after a space: the nearest declared key, or those of the section, or all."""
    section, _, name = key.rpartition(".")
    siblings = {
        declared.rpartition(".")[2]: declared
        for declared in declared_keys
        if declared.rpartition(".")[0] == section
    }
    if siblings:
        matches = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
        closest = [siblings[match] for match in matches]
    else:  # the section itself is misspelt
        closest = difflib.get_close_matches(key, declared_keys, n=1, cutoff=0.75)

    if closest:
        return f" Did you mean {closest[0]!r}?"
    if siblings and section:
        return f" Known keys of [{section}]: {', '.join(siblings)}."
    tops = dict.fromkeys(declared.partition(".")[0] for declared in declared_keys)
    return f" Known sections and keys: {', '.join(tops)}."
