"""The experiment: one strict, frozen description that every runtime reads.

A TOML file of sections and the flat `section.key` scalars of Flower's run config are two spellings
of the same thing. Everything is checked here, before anything runs; afterwards nobody reads a raw
dictionary.

    data.py  training.py  federation.py  sections.py    the keys, their defaults and each
                                                        section's own rules
    composition.py                                      combinations that are refused
    toml.py                                             spellings, and the sentences of errors
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field, ValidationError

from shared.experiment import composition
from shared.experiment.data import DataSection
from shared.experiment.federation import FederationSection
from shared.experiment.sections import (
    CountOrZero,
    ModelSection,
    OptimizerSection,
    PartitionSection,
    PerformanceSection,
    Rule,
    RunSection,
    Scalar,
    Section,
    ServerOptimizerSection,
)
from shared.experiment.toml import (
    Origin,
    check_keys,
    explain,
    flatten,
    nearest_names,
    nest,
    parse_override,
    parse_toml,
    read_flat,
)
from shared.experiment.training import TrainingSection

__all__ = [
    "DataSection",
    "Experiment",
    "FederationSection",
    "ModelSection",
    "OptimizerSection",
    "PartitionSection",
    "PerformanceSection",
    "RunSection",
    "Scalar",
    "ServerOptimizerSection",
    "TrainingSection",
    "experiment_from_flat",
    "experiment_from_run_config",
    "flatten",
    "load_experiment",
    "nearest_names",
    "parse_override",
    "parse_toml",
]

# The beginnings of keys that may differ between a checkpoint and the experiment that resumes it.
FREE_TO_CHANGE = (
    "run.",
    "performance.",
    "name",
    "training.epochs",
    "federation.num_rounds",
    "federation.silo_timeout_s",
    "federation.round_timeout_s",
    "federation.cross_site_evaluation",
)

# Keys of no consequence, as every experiment has them; not left out, so that identities stay.
UNIDENTIFIED: dict[str, Scalar] = {"data.cache": ""}


MAX_NAME_LENGTH = 100  # characters: the name is also that of files


class Experiment(Section):
    """All sections, each valid by itself and with the others."""

    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MAX_NAME_LENGTH)
    ] = "experiment"
    """The run goes to runs/NAME."""
    seed: CountOrZero = 0
    """Of the initial weights, the splits, the order of examples and the cohorts."""

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    partition: PartitionSection = PartitionSection()
    federation: FederationSection = FederationSection()
    server_optimizer: ServerOptimizerSection = ServerOptimizerSection()
    performance: PerformanceSection = PerformanceSection()
    run: RunSection = RunSection()

    @property
    def sections(self) -> dict[str, Section]:
        return {name: value for name, value in self if isinstance(value, Section)}

    def rules(self) -> Iterable[Rule]:
        return composition.rules(self)

    @property
    def run_directory(self) -> Path:
        return Path(self.run.directory or Path("runs") / self.name)

    def to_flat(self) -> dict[str, Scalar]:
        """The experiment as Flower's run config: dotted keys, scalars only."""
        return flatten(self.model_dump())

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump())

    def sha256(self) -> str:
        """Identity of the experiment: of everything but [run], and where data is cached."""
        flat = self.to_flat() | UNIDENTIFIED
        kept = {key: value for key, value in flat.items() if not key.startswith("run.")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def trajectory(self) -> dict[str, Scalar]:
        """The keys that a checkpoint must share with the experiment that resumes it.

        How long to train, and how fast, may change between the two.
        """
        flat = self.to_flat() | UNIDENTIFIED
        return {key: value for key, value in flat.items() if not key.startswith(FREE_TO_CHANGE)}


def load_experiment(
    path: str | Path,
    overrides: Iterable[str] = (),
    run_directory: str | None = None,
    resume: bool = False,
) -> Experiment:
    """Reads an experiment file and applies the options of a command to it.

    `overrides` are texts `section.key=value`, of --set. Raises ValueError as `experiment_from_flat`
    does, and if neither says on which data: that file is empty or was cut off. A mistake is blamed
    on the file or on the option, wherever it was made.
    """
    flat = read_flat(Path(path))
    options = {}
    for text in overrides:
        key, value = parse_override(text)
        flat[key] = value
        options[key] = f"--set {text}"
    if run_directory:
        flat["run.directory"] = run_directory
        options["run.directory"] = f"--run-dir {run_directory}"
    if resume:
        flat["run.resume"] = True
        options["run.resume"] = "--resume"

    experiment = _checked(flat, Origin(str(path), options))
    if "data.name" not in flat:
        raise ValueError(
            f"{path}: an experiment file must say on which data, as data.name; received none. Is it"
            " whole? Add it below a line [data], such as name = 'digits', or use --set data.name=."
        )
    return experiment


def experiment_from_flat(flat: Mapping[str, Any], source: str = "the run config") -> Experiment:
    """Builds the experiment from dotted keys.

    Raises ValueError: the rule, the value received, the remedy.
    """
    return _checked(flat, Origin(source))


def experiment_from_run_config(config: Mapping[str, Any]) -> Experiment:
    """Builds the experiment from Flower's run config, which comes with every message of a run.

    A config of equal content is parsed once: the experiment, which is frozen, is returned again.
    """
    return _parsed(json.dumps(dict(config), sort_keys=True))


@lru_cache(maxsize=4)  # the runs that share a silo
def _parsed(run_config: str) -> Experiment:
    return experiment_from_flat(json.loads(run_config))


def _checked(flat: Mapping[str, Any], origin: Origin) -> Experiment:
    defaults = Experiment().to_flat()
    check_keys(flat, defaults, origin)
    try:
        return Experiment.model_validate(nest(flat))
    except ValidationError as error:
        raise ValueError(explain(error, defaults, origin)) from None
