"""A silo's examples: loaded, split and described, under the silo's name."""

from dataclasses import dataclass

from fl_app.failures import MessageError
from fl_app.messages import SiloEntry
from fl_app.silo.policy import SiloSettings
from shared.data import Dataset, Schema, Table, fit_schema, load_examples
from shared.data.readers.hubs import is_on_hub
from shared.data.sources import BUILTIN_SETS
from shared.data.splits import split_validation
from shared.experiment import Experiment


@dataclass(frozen=True)
class Silo:
    """A participant: its name, which is its identity, its examples, and the schema that its
    training examples have by themselves.
    """

    name: str
    train: Table | Dataset
    validation: Table | Dataset
    schema: Schema

    def entry(self) -> SiloEntry:
        """The silo's description of itself at the roll call."""
        return SiloEntry(self.name, self.schema, len(self.train), len(self.validation))


def load_silo(settings: SiloSettings, experiment: Experiment) -> Silo:
    """Loads a silo's data, by its owner's rules.

    Raises ValueError if it cannot be used, SiloFailure if the rules forbid it.
    """
    source, policy = settings.source, settings.policy
    own = {"name": source, "cache": policy.cache}  # the owner says where it writes, not the server
    config = experiment.data.model_copy(update=own)
    silo = make_silo(settings.name, load_examples(config), experiment)

    is_public = source in BUILTIN_SETS or is_on_hub(source)
    policy.check_examples(silo.train, silo.validation, silo.schema, config, is_public)
    return silo


def make_silo(name: str, examples: Table | Dataset, experiment: Experiment) -> Silo:
    """Makes a silo of these examples, some of which it holds out.

    Raises ValueError if none are left to train on.
    """
    config = experiment.data
    train, validation = split_validation(
        examples, experiment.seed, config.validation_fraction, owner=name
    )
    if len(train) == 0:
        raise ValueError(
            f"Silo {name!r} has no training examples: {len(examples)} in all. Lower"
            " data.validation_fraction."
        )
    return Silo(name, train, validation, fit_schema(train, config))


def check_schema(schema: Schema, own: Schema) -> None:
    """Checks the federation's schema against that of a silo's own examples.

    Raises MessageError if it is that of other examples, or lacks classes of this silo.
    """
    if schema.kind != own.kind:
        raise MessageError(
            f"a schema of other examples than this silo's: {schema}. Give every silo the same"
            " columns"
        )
    lacks_names = not set(own.classes) <= set(schema.classes)
    if lacks_names or schema.num_classes < own.num_classes:
        raise MessageError(
            "a schema that lacks classes which this silo's examples have. Start the run again if"
            " its data has changed"
        )
