"""Roles of a table's columns: label, features, weight, group and id, as [data] declares them."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shared.experiment import DataSection, nearest_names

MAX_NAMES_SHOWN = 30


@dataclass(frozen=True)
class Roles:
    """The names of the columns in use, by role; columns without a role are left out.

    `label` is empty where the inputs are the targets too; `weight`, `group` and `id` where the
    experiment names no such column.
    """

    label: str
    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    weight: str
    group: str
    id: str

    @property
    def features(self) -> list[str]:
        return [*self.numbers, *self.categories]

    @property
    def non_features(self) -> list[str]:
        """The columns in use that a model does not take as inputs."""
        names = (self.label, self.weight, self.group, self.id)
        return [name for name in names if name]

    @property
    def used(self) -> list[str]:
        return self.features + self.non_features


def assign_roles(config: DataSection, columns: Sequence[str], source: str) -> Roles:
    """Returns the roles that an experiment gives to the columns of a file.

    It may lack those of data.ignore, as the parts do in which a table is dealt to silos.

    `source` names the file in messages. Without data.features every column that has no other role
    is a feature. Raises ValueError for a name that is no column, a column with two roles, a
    categorical column that is no feature, and a table without features.
    """
    features = parse_names(config.features)
    categorical = parse_names(config.categorical)
    ignored = parse_names(config.ignore)

    # A reconstruction needs no label; if the file has one, it is no feature either.
    wants_label = config.task != "reconstruction"
    label = canonical_name(config.label)
    label = label if wants_label or label in columns else ""
    labels = [label] if label else []
    weight, id_, group = map(canonical_name, (config.weight, config.id, config.group))
    singles = [name for name in (weight, id_, group) if name]
    non_features = labels + singles

    # Every name is a column of the file, and has one role.
    names_by_key = {
        "label": labels,
        "features": features,
        "categorical": categorical,
        "weight, id or group": singles,
    }
    known = set(columns)
    for key, names in names_by_key.items():
        _check_unrepeated(names, f"data.{key}", source)
        for name in set(names) - known:
            check_is_column(name, columns, f"data.{key}", source)
    _check_single_roles(non_features, {*features, *categorical, *ignored}, source)

    # Features are those declared, or all that remain.
    others = {*non_features, *ignored}
    features = features or [name for name in columns if name not in others]
    categories = set(categorical)
    left_out = categories - set(features)
    if left_out:
        raise ValueError(
            f"data.categorical names {min(left_out)!r}, which is no feature. Add it to"
            " data.features, or take it out of data.ignore."
        )
    if not features:
        raise ValueError(
            f"{source}: no column is left to learn from beside {format_names(sorted(others))}. Add"
            " at least one feature column."
        )

    return Roles(
        label=label if wants_label else "",
        numbers=tuple(name for name in features if name not in categories),
        categories=tuple(categorical),
        weight=weight,
        group=group,
        id=id_,
    )


def check_is_column(name: str, columns: Collection[str], key: str, source: str) -> None:
    """Raises ValueError, with the nearest names, if there is no such column.

    `key`: where the user names it, such as "data.label".
    """
    if name in columns:
        return
    shown = [repr(column) for column in list(columns)[:MAX_NAMES_SHOWN]]
    if len(columns) > len(shown):
        shown.append(f"... ({len(columns)} in all)")
    nearest = nearest_names(name, columns)[:3]
    raise ValueError(
        f"{source} has no column {name!r} ({key}); its columns are {', '.join(shown)}. Nearest:"
        f" {', '.join(nearest)}."
    )


def _check_unrepeated(names: Sequence[str], key: str, source: str) -> None:
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{source}: {key} names the column {repeated!r} twice. Name it once; the order of names"
            " is that of a model's inputs."
        )


def _check_single_roles(
    non_features: Sequence[str], features: Collection[str], source: str
) -> None:
    repeated = {name for name in non_features if non_features.count(name) > 1 or name in features}
    if repeated:
        raise ValueError(
            f"{source}: column {min(repeated)!r} has two roles. Name it in one key of [data] only."
        )


def parse_names(text: str) -> list[str]:
    """Returns the names in a line of CSV, without blanks around them and without empty ones.

    >>> parse_names('age, "sex, at birth"')
    ['age', 'sex, at birth']
    """
    fields = next(csv.reader([text], skipinitialspace=True), [])
    names = [canonical_name(field) for field in fields]
    return [name for name in names if name]


def canonical_name(name: object) -> str:
    """A column's name without blanks around it, in NFC.

    >>> canonical_name(" gro\u0308\u00dfe ") == "gr\u00f6\u00dfe"
    True
    """
    return unicodedata.normalize("NFC", str(name)).strip()


def format_names(names: Sequence[str]) -> str:
    """Returns the names as one line of CSV: the inverse of `parse_names`.

    >>> format_names(["age", "sex, at birth"])
    'age, "sex, at birth"'
    """
    return ", ".join(_quoted(name) if "," in name or '"' in name else name for name in names)


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
