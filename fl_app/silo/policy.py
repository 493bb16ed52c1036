"""The rules of a silo's owner: which data a silo has, and what of it may leave.

The server's experiment says which columns are learnt from and what is held out. So without these
rules it could have a silo describe a single row, or list the values of any column.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fl_app.failures import SiloFailure
from fl_app.messages import Task
from shared.data import Dataset, Schema, Table
from shared.data.roles import format_names, parse_names
from shared.experiment import DataSection, Experiment

MIN_EXAMPLES = 5  # the least count that health statistics commonly publish
MAX_VALIDATION_FRACTION = 0.5
ALL = "*"


@dataclass(frozen=True)
class DataPolicy:
    """What an experiment may use of a silo's data, and what of it may leave the silo.

    Numbers of training examples, and the means and variances of their columns, may leave if they
    rest on at least `min_examples` examples. Values themselves (names of classes, categories) leave
    only of the columns in `shared_values`. What a trained model gives away is another matter.
    """

    columns: tuple[str, ...] = ()  # that experiments may use at all; empty: all
    shared_values: tuple[str, ...] = ()  # of which single values may leave; "*": of all
    min_examples: int = MIN_EXAMPLES
    cache: str = ""  # where data.stream may keep encoded copies; empty: nowhere

    def __post_init__(self) -> None:
        if self.min_examples < 1:
            raise ValueError(
                "--min-examples is the least number of examples that a statistic may rest on;"
                f" received {self.min_examples}. Choose 1 or more."
            )

    @classmethod
    def from_node_config(cls, node_config: Mapping[str, Any]) -> Self:
        return cls(
            columns=tuple(parse_names(str(node_config.get("columns", "")))),
            shared_values=tuple(parse_names(str(node_config.get("share-values", "")))),
            min_examples=int(node_config.get("min-examples", MIN_EXAMPLES)),
            cache=str(node_config.get("cache", "")),
        )

    def to_node_config(self) -> dict[str, str | int]:
        """The keys of a SuperNode's node config that say the same."""
        return {
            "columns": format_names(self.columns),
            "share-values": format_names(self.shared_values),
            "min-examples": self.min_examples,
            "cache": self.cache,
        }

    # --- what an experiment may ask for

    def check_request(self, config: DataSection) -> None:
        """Raises SiloFailure if the experiment's [data] asks for what the owner does not allow."""
        if config.validation_fraction > MAX_VALIDATION_FRACTION:
            raise SiloFailure(
                "a silo holds out at most half of its examples; received data.validation_fraction"
                f" = {config.validation_fraction:g}. Lower it"
            )
        if config.stream and not self.cache:
            raise SiloFailure(
                "its owner has named no place for encoded copies of its data (--cache DIR);"
                " received data.stream = true. Set data.stream = false"
            )

    # --- what may leave

    def check_examples(
        self,
        train: Table | Dataset,
        validation: Table | Dataset,
        schema: Schema,
        config: DataSection,
        is_public: bool,
    ) -> None:
        """Raises SiloFailure if the silo's description or results would say too much.

        `is_public`: the data is a built-in set, whose values everybody knows.
        """
        if is_public:
            return
        self._check_columns(schema, config)
        self._check_counts(len(train), len(validation), schema)
        if ALL not in self.shared_values:
            self._check_values(schema, config)

    def _check_columns(self, schema: Schema, config: DataSection) -> None:
        if not self.columns or schema.columns is None:
            return
        roles = [config.label, config.weight, config.id, config.group]
        used = [*schema.columns.names, *filter(None, roles)]
        forbidden = sorted(set(used) - set(self.columns))
        if forbidden:
            named = {*parse_names(config.features), *roles}
            known = [name for name in forbidden if name in named]
            raise SiloFailure(
                "its owner lets experiments use some of its columns only (--columns); received"
                f" {_quoted(known) or 'no data.features, which means all of them'}. Name in"
                " data.features those that all owners allow"
            )

    def _check_counts(self, num_train: int, num_validation: int, schema: Schema) -> None:
        columns = schema.columns
        numbers = [*columns.numbers, *filter(None, [columns.target])] if columns else []
        for what, count in (
            ("training examples", num_train),
            ("validation examples", num_validation or self.min_examples),
            ("values of a column", min([n.count for n in numbers if n.count] or [num_train])),
        ):
            if count < self.min_examples:
                raise SiloFailure(
                    f"nothing leaves it that rests on fewer than {self.min_examples} {what} (its"
                    " --min-examples). Change data.validation_fraction, or go on without it"
                )

    def _check_values(self, schema: Schema, config: DataSection) -> None:
        listed = {config.label} if schema.classes else set()
        if schema.columns:
            listed |= {column.name for column in schema.columns.categories}
        withheld = sorted(listed - set(self.shared_values))
        if withheld:
            raise SiloFailure(
                "single values leave it only of columns that its owner names; the classes or"
                f" categories of {_quoted(withheld)} would. If they may be known to all parties,"
                f" its owner starts it with --share-values {_quoted(withheld)}"
            )


OPEN = DataPolicy(shared_values=(ALL,), min_examples=1)  # of users who own all silos themselves


def _quoted(names: Iterable[str]) -> str:
    return format_names([*names])


@dataclass(frozen=True)
class SiloSettings:
    """A silo's own settings: its name, its data, and its owner's rules."""

    name: str
    source: str  # path of its data, or the name of a built-in set
    allowed_builders: tuple[str, ...] = ()  # of models, that it may import
    state_folder: str = ""  # where methods keep state from round to round; empty: nowhere
    policy: DataPolicy = field(default_factory=DataPolicy)

    @classmethod
    def from_node_config(cls, node_config: Mapping[str, Any]) -> Self:
        """Reads the node config of a SuperNode: silo, data, allow = "module:function ...", state,
        and the keys of `DataPolicy`.

        Raises ValueError if it names no silo or no data.
        """
        for key, example in (("silo", "hospital-a"), ("data", "path/to/data.csv")):
            if not str(node_config.get(key, "")):
                raise ValueError(
                    f"A silo's node config must name {key!r}; received"
                    f" {sorted(node_config) or 'nothing'}. Start it with: flower-supernode"
                    f' --node-config \'silo="..." data="..."\' ({key}, like {example!r}).'
                )
        allowed = str(node_config.get("allow", "")).split()
        return cls(
            name=str(node_config["silo"]),
            source=str(node_config["data"]),
            allowed_builders=tuple(allowed),
            state_folder=str(node_config.get("state", "")),
            policy=DataPolicy.from_node_config(node_config),
        )


def check_task(task: Task, experiment: Experiment, settings: SiloSettings) -> None:
    """Checks what the server asks for against the silo's own rules, before any handler runs.

    A builder of the user's own in the experiment must be one that the silo allows: the server must
    not be able to make a silo import what it likes. Raises SiloFailure.
    """
    builder = experiment.model.name
    if ":" in builder and builder not in settings.allowed_builders:
        raise SiloFailure(
            f"it imports only what its owner allows; received model.name = {builder!r}. An owner"
            f" who trusts that code starts the silo with --allow {builder}"
        )
    settings.policy.check_request(experiment.data)
