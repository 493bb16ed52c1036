"""Roles of a table's columns: label, features, weight, group and id, as [data] declares them."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shared.experiment import DataSection, nearest_names


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

    `source` names the file in messages. Without data.features every column that has no other role
    is a feature. Raises ValueError for a name that is no column, a column with two roles, a
    categorical column that is no feature, and a table without features.
    """
    features = parse_names(config.features)
    categorical = parse_names(config.categorical)

    # A reconstruction needs no label; if the file has one, it is no feature either.
    wants_label = config.task != "reconstruction"
    label = config.label if wants_label or config.label in columns else ""
    labels = [label] if label else []
    singles = [name for name in (config.weight, config.id, config.group) if name]
    non_features = labels + singles

    # Every name is a column of the file, and has one role.
    names_by_key = {
        "label": labels,
        "features": features,
        "categorical": categorical,
        "weight, id or group": singles,
    }
    for key, names in names_by_key.items():
        for name in names:
            check_is_column(name, columns, f"data.{key}", source)
    _check_single_roles(non_features, {*features, *categorical}, source)

    # Features are those declared, or all that remain.
    features = features or [name for name in columns if name not in non_features]
    left_out = [name for name in categorical if name not in features]
    if left_out:
        raise ValueError(
            f"data.categorical names {left_out[0]!r}, which data.features leaves out. Add it there."
        )
    if not features:
        raise ValueError(
            f"{source} has only the label column {config.label!r}. Add at least one feature column."
        )

    return Roles(
        label=label if wants_label else "",
        numbers=tuple(name for name in features if name not in categorical),
        categories=tuple(categorical),
        weight=config.weight,
        group=config.group,
        id=config.id,
    )


def check_is_column(name: str, columns: Collection[str], key: str, source: str) -> None:
    """Raises ValueError, with the nearest names, if there is no such column.

    `key`: where the user names it, such as "data.label".
    """
    if name in columns:
        return
    quoted = ", ".join(repr(column) for column in columns)
    nearest = nearest_names(name, columns)[:3]
    raise ValueError(
        f"{source} has no column {name!r} ({key}); its columns are {quoted}. Nearest:"
        f" {', '.join(nearest)}."
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
    names = [field.strip() for field in fields]
    return [name for name in names if name]


def format_names(names: Sequence[str]) -> str:
    """Returns the names as one line of CSV: the inverse of `parse_names`.

    >>> format_names(["age", "sex, at birth"])
    'age, "sex, at birth"'
    """
    return ", ".join(_quoted(name) if "," in name or '"' in name else name for name in names)


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
