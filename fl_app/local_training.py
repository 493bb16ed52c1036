"""What a silo does with a message: its own data, its own steps. Knows nothing of Flower."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shared.data import Dataset, Schema, Table, encode, fit_schema, load_examples, shard, weigh_classes
from shared.data.splits import split_validation
from shared.experiment import Experiment
from shared.weights import Weights, subtract

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from shared.training import EpochBatches


@dataclass(frozen=True)
class Silo:
    """A participant: its name, which is its identity, its examples, and what its training examples say of the data."""

    name: str
    train: Table | Dataset
    validation: Table | Dataset
    schema: Schema


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
    seconds: float = 0.0  # that the silo computed


def check_node_config(node_config: Mapping[str, Any], experiment: Experiment) -> tuple[str, str]:
    """The silo's name and the path or built-in name of its data, from its own node config: silo = ..., data = ...

    A builder of the user's own in the experiment must be in the silo's list, allow = "package.module:function ...": the
    server must not be able to make a silo import what it likes. Raises ValueError.
    """
    for key, example in (("silo", "hospital-a"), ("data", "path/to/data.csv")):
        if not str(node_config.get(key, "")):
            raise ValueError(
                f"A silo's node config must name {key!r}; received {sorted(node_config) or 'nothing'}. "
                f'Start it with: flower-supernode --node-config \'silo="..." data="..."\' ({key}, like {example!r}).'
            )
    allowed = str(node_config.get("allow", "")).split()
    if ":" in experiment.model.name and experiment.model.name not in allowed:
        raise ValueError(
            f"This silo imports only what it allows: {', '.join(allowed) or 'nothing'}; received model.name = "
            f"{experiment.model.name!r}. If you trust that code, start the silo with --allow {experiment.model.name}"
        )
    return str(node_config["silo"]), str(node_config["data"])


def load_silo(name: str, source: str, experiment: Experiment) -> Silo:
    """Loads a silo's data, a path or the name of a built-in set. Raises ValueError if it cannot be used."""
    own = {"name": source, "cache": ""}  # where a silo writes is not the server's to say
    return make_silo(name, load_examples(experiment.data.model_copy(update=own)), experiment)


def make_silo(name: str, examples: Table | Dataset, experiment: Experiment) -> Silo:
    """A silo of these examples, some of which it holds out. Raises ValueError if none are left to train on."""
    config = experiment.data
    train, validation = split_validation(examples, experiment.seed, config.validation_fraction, owner=name)
    if len(train) == 0:
        raise ValueError(
            f"Silo {name!r} has no training examples: {len(examples)} in all. Lower data.validation_fraction."
        )
    return Silo(name, train, validation, fit_schema(train, config))


class SiloFailure(Exception):
    """Why a silo could not do its work, in words that may leave it: they hold nothing of its data."""


@dataclass(frozen=True)
class Ranks:
    """Who shares a silo's training: this process is `rank` of `world_size`.

    `compile(model, experiment, schema, steps_per_epoch)` compiles in place, so that the ranks train together.
    """

    rank: int
    world_size: int
    compile: Callable[["keras.Model", Experiment, Schema, int], None]


def alone() -> Ranks:
    """One process for the whole silo."""
    from shared.training import compile_model  # Keras: seconds to import, not needed for a roll call

    def compile_alone(model: "keras.Model", experiment: Experiment, schema: Schema, steps_per_epoch: int) -> None:
        compile_model(model, experiment, schema)

    return Ranks(0, 1, compile_alone)


@dataclass(frozen=True)
class LocalTrainer:
    """A silo's compiled model and batches, to be used round after round.

    Guarantee: what it returns depends on its arguments alone, bit by bit, not on the rounds that it did before.
    """

    silo: Silo
    experiment: Experiment
    model: "keras.Model"
    batches: "EpochBatches"
    validation_batches: "tf.data.Dataset"
    fresh_optimizer: Weights  # its variables before the first step

    def evaluate(self, weights: Weights) -> dict[str, float]:
        """The metrics of the weights on the silo's validation examples; empty if it has none."""
        from shared.training import evaluate

        if len(self.silo.validation) == 0:
            return {}
        self.model.set_weights(weights)
        return evaluate(self.model, self.validation_batches)

    def train(self, weights: Weights, round_number: int) -> tuple[dict[str, float], Weights]:
        """`local_epochs` from the weights with a fresh optimizer: (metrics of the last epoch, update).

        The order of examples depends on (seed, silo, epoch), with epochs counted over all rounds.
        """
        from shared.training import fit_epochs

        self.model.set_weights(weights)
        for variable, value in zip(self.model.optimizer.variables, self.fresh_optimizer, strict=True):
            variable.assign(value)
        num_epochs = self.experiment.federation.local_epochs
        first_epoch = (round_number - 1) * num_epochs
        history = fit_epochs(self.model, self.batches, first_epoch, first_epoch + num_epochs).history
        metrics = {name: float(values[-1]) for name, values in history.items()}
        return metrics, subtract(self.model.get_weights(), weights)


def prepare_trainer(
    silo: Silo, schema: Schema, experiment: Experiment, make_ranks: Callable[[], Ranks] = alone
) -> LocalTrainer:
    """Compiles the experiment's model for a silo, whose examples the federation's schema makes into inputs."""
    from shared.augmentation import augmentation_of  # TensorFlow
    from shared.training import EpochBatches, evaluation_batches  # Keras
    from shared.zoo import build_model

    ranks = make_ranks()
    rank, world_size = ranks.rank, ranks.world_size
    train = weigh_classes(encode(silo.train, schema), schema)
    seen = encode(silo.validation, schema)
    config = experiment.model.model_copy(update={"initial": ""})  # the server's weights replace any initial ones
    batch_size = experiment.federation.local_batch_size
    batches = EpochBatches(
        train,
        batch_size,
        experiment.seed,
        owner=silo.name,
        rank=rank,
        world_size=world_size,
        augmentation=augmentation_of(experiment.data, schema.input_shape),
    )
    _check_batches(batches)
    model = build_model(config, schema, experiment.seed)
    ranks.compile(model, experiment, schema, len(batches))
    model.optimizer.build(model.trainable_variables)
    fresh_optimizer = [np.array(variable) for variable in model.optimizer.variables]
    validation = evaluation_batches(shard(seen, rank, world_size))
    return LocalTrainer(silo, experiment, model, batches, validation, fresh_optimizer)


def _check_batches(batches: "EpochBatches") -> None:
    smallest = min(s.stop - s.start for s in batches.slices)
    if smallest < batches.world_size:
        raise ValueError(
            f"Every worker needs an example in every step; received a batch of {smallest} for {batches.world_size} "
            f"workers of silo {batches.owner!r}. Raise federation.local_batch_size, or start the silo with fewer "
            "workers (--num-workers)."
        )


class Bench(Protocol):
    """Where a silo's tasks are done. Raises ValueError, or SiloFailure, if one cannot be."""

    def silo(self, node_config: Mapping[str, Any], experiment: Experiment) -> Silo: ...
    def evaluate(self, silo: Silo, schema: Schema, experiment: Experiment, weights: Weights) -> LocalResult: ...
    def train(
        self, silo: Silo, schema: Schema, experiment: Experiment, weights: Weights, round_number: int, evaluate: bool
    ) -> LocalResult: ...


class Workbench:
    """What the tasks of a silo share, kept warm: its data, and the compiled model of the last two experiments."""

    def __init__(self, prepare: Callable[[Silo, Schema, Experiment], LocalTrainer] | None = None) -> None:
        self._load = lru_cache(maxsize=2)(lambda name, source, stamp, experiment: load_silo(name, source, experiment))
        self._prepare = lru_cache(maxsize=2)(prepare or prepare_trainer)

    def silo(self, node_config: Mapping[str, Any], experiment: Experiment) -> Silo:
        """The silo of a node config, from memory if its file is as it was. Raises ValueError as `load_silo` does."""
        name, source = check_node_config(node_config, experiment)
        return self._load(name, source, _stamp(source), experiment)

    def trainer(self, silo: Silo, schema: Schema, experiment: Experiment) -> LocalTrainer:
        return self._prepare(silo, schema, experiment)

    def evaluate(self, silo: Silo, schema: Schema, experiment: Experiment, weights: Weights) -> LocalResult:
        """The metrics of the weights on the silo's validation examples."""
        started = time.perf_counter()
        metrics = self.trainer(silo, schema, experiment).evaluate(weights)
        return LocalResult(len(silo.train), len(silo.validation), {}, metrics, [], time.perf_counter() - started)

    def train(
        self, silo: Silo, schema: Schema, experiment: Experiment, weights: Weights, round_number: int, evaluate: bool
    ) -> LocalResult:
        """One round at a silo: judge the incoming weights, if asked to, then train from them."""
        started = time.perf_counter()
        trainer = self.trainer(silo, schema, experiment)
        validation = trainer.evaluate(weights) if evaluate else {}
        metrics, update = trainer.train(weights, round_number)
        seconds = time.perf_counter() - started
        return LocalResult(len(silo.train), len(silo.validation), metrics, validation, update, seconds)


def _stamp(source: str) -> tuple[int, ...] | None:
    """What changes when the file does, or a file of the folder; None for a built-in set."""
    path = Path(source)
    if not path.exists():
        return None
    found = [each.stat() for each in sorted(path.rglob("*")) or [path]]
    return tuple(number for stat in found for number in (stat.st_mtime_ns, stat.st_size))
