"""What a silo does with a message: its own data, its own steps. Knows nothing of Flower."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shared.data import Dataset, Schema, load_dataset
from shared.data.dataset import split_validation
from shared.experiment import Experiment
from shared.weights import Weights, subtract

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Silo:
    """A participant: its name, which is its identity, and its examples."""

    name: str
    train: Dataset
    validation: Dataset

    @property
    def schema(self) -> Schema:
        return self.train.schema


@dataclass(frozen=True)
class SiloEntry:
    """What a silo says of itself at the roll call."""

    name: str
    schema: Schema
    num_examples: int


@dataclass(frozen=True)
class LocalResult:
    """What a silo answers: nothing of its data but counts, means and the update.

    `validation` holds the metrics of the weights that came in, before training on them.
    """

    num_examples: int
    num_validation: int
    train: Mapping[str, float]
    validation: Mapping[str, float]
    update: Weights


def load_silo(node_config: Mapping[str, Any], experiment: Experiment) -> Silo:
    """Loads the data that the silo's own node config names: data = path or built-in set, silo = name.

    Raises ValueError when the node config names none, or the data cannot be used.
    """
    for key, example in (("silo", "hospital-a"), ("data", "path/to/data.csv")):
        if not str(node_config.get(key, "")):
            raise ValueError(
                f"A silo's node config must name {key!r}; received {sorted(node_config) or 'nothing'}. "
                f'Start it with: flower-supernode --node-config \'silo="..." data="..."\' ({key}, like {example!r}).'
            )
    name = str(node_config["silo"])
    dataset = load_dataset(experiment.data.model_copy(update={"name": str(node_config["data"])}))
    train, validation = split_validation(dataset, experiment.seed, experiment.data.validation_fraction, owner=name)
    if len(train) == 0:
        raise ValueError(
            f"Silo {name!r} has no training examples: {len(dataset)} in all. Lower data.validation_fraction."
        )
    return Silo(name, train, validation)


def with_federation_schema(silo: Silo, schema: Schema) -> Silo:
    """The silo seen with the federation's classes, of which its own data may lack some."""
    train = replace(silo.train, num_classes=schema.num_classes)
    return replace(silo, train=train, validation=replace(silo.validation, num_classes=schema.num_classes))


def evaluate_at_silo(silo: Silo, experiment: Experiment, weights: Weights) -> LocalResult:
    """The metrics of the weights on the silo's validation examples."""
    model = _model(silo, experiment, weights)
    return LocalResult(len(silo.train), len(silo.validation), {}, _validate(model, silo, experiment), [])


def train_at_silo(silo: Silo, experiment: Experiment, weights: Weights, round_number: int) -> LocalResult:
    """One round at a silo: evaluate the incoming weights, then `local_epochs` from them with a fresh optimizer.

    The order of examples depends on (seed, silo, epoch), with epochs counted over all rounds.
    """
    from shared.training import EpochBatches, fit_epochs  # Keras: seconds to import, not needed for a roll call

    federation = experiment.federation
    model = _model(silo, experiment, weights)
    validation = _validate(model, silo, experiment)
    batches = EpochBatches(silo.train, federation.local_batch_size, experiment.seed, owner=silo.name)
    first_epoch = (round_number - 1) * federation.local_epochs
    history = fit_epochs(model, batches, first_epoch, first_epoch + federation.local_epochs).history
    return LocalResult(
        num_examples=len(silo.train),
        num_validation=len(silo.validation),
        train={name: float(values[-1]) for name, values in history.items()},
        validation=validation,
        update=subtract(model.get_weights(), weights),
    )


def _model(silo: Silo, experiment: Experiment, weights: Weights) -> "keras.Model":
    from shared.training import compile_model
    from shared.zoo import build_model

    config = experiment.model.model_copy(update={"initial": ""})  # the server's weights replace any initial ones
    model = compile_model(build_model(config, silo.schema, experiment.seed), experiment, silo.schema)
    model.set_weights(weights)
    return model


def _validate(model: "keras.Model", silo: Silo, experiment: Experiment) -> dict[str, float]:
    from shared.training import evaluate

    if not experiment.federation.evaluate_on_silos or len(silo.validation) == 0:
        return {}
    return evaluate(model, silo.validation)
