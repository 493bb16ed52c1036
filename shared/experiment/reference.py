"""The keys of an experiment as data: name, default, allowed values and meaning, from the sections.

`archipelago keys`, docs/reference-experiment.md and docs/experiment.schema.json show them.
"""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import tomli_w
from pydantic.fields import FieldInfo

from shared.experiment import Experiment
from shared.experiment.sections import Section


@dataclass(frozen=True)
class Key:
    """A key of a section: its default, the values that it takes, and what it means."""

    name: str
    default: bool | int | float | str
    values: str  # empty: any of the default's type
    meaning: str

    @property
    def as_toml(self) -> str:
        """The key with its default, as a line of an experiment file."""
        return tomli_w.dumps({self.name: self.default}).rstrip()


def section_names() -> list[str]:
    return list(Experiment().sections)


def keys_of(section: str) -> list[Key]:
    """The keys of a section; of an empty name those above all sections.

    >>> [key.as_toml for key in keys_of("")]
    ['name = "experiment"', 'seed = 0']
    """
    kind: type[Section] = type(Experiment().sections[section]) if section else Experiment
    return [
        Key(name, field.default, _values(field), " ".join((field.description or "").split()))
        for name, field in kind.model_fields.items()
        if not isinstance(field.default, Section)
    ]


def meaning_of(section: str) -> str:
    """What a section is about: the first paragraph of its docstring."""
    text = type(Experiment().sections[section]).__doc__ or ""
    return " ".join(text.strip().partition("\n\n")[0].split())


def _values(field: FieldInfo) -> str:
    """The values that a key takes, in words.

    | annotated as | becomes |
    |---|---|
    | Literal["a", "b"] | a, b |
    | an int or float with bounds | at least 1; above 0; from 0, below 1 |
    | anything else | nothing |
    """
    kind = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(str(value) for value in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return ""
    if kind not in (int, float):
        return ""
    return ", ".join(_bounds(field.metadata))


def _bounds(metadata: Sequence[Any]) -> list[str]:
    words = []
    for bound in metadata:
        match bound:
            case annotated_types.Ge(ge=value):
                words.append(f"at least {value:g}")
            case annotated_types.Gt(gt=value):
                words.append(f"above {value:g}")
            case annotated_types.Lt(lt=value):
                words.append(f"below {value:g}")
            case annotated_types.Le(le=value):
                words.append(f"at most {value:g}")
    return words
