"""The experiment: one strict, frozen description that every runtime reads.

A TOML file of sections and the flat `section.key` scalars of Flower's run config are two spellings of the same thing.
Everything is checked here, before anything runs; afterwards nobody reads a raw dictionary.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Scalar = bool | int | float | str
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSection(Section):
    """Which examples. `name`: built-in, a path, `keras:NAME` or `hf:NAME`. Columns are named as in CSV: "age, sex"."""

    name: str = "digits"
    label: str = "label"  # the column that holds the target: of numbers, or of names of classes
    # auto: whole-number and text targets are classes; reconstruction: the targets are the inputs
    task: Literal["auto", "classification", "regression", "reconstruction"] = "auto"
    features: str = ""  # columns to learn from; empty: all that have no other role
    categorical: str = ""  # of these: columns of categories, each of which becomes an input of 0 or 1
    weight: str = ""  # the column of sample weights
    id: str = ""  # the column that names an example: never learnt from, and no name may come twice
    group: str = ""  # the column of groups (a patient, a document): none is in two splits, or at two silos
    scaling: Literal["auto", "none", "standard"] = "auto"  # auto: tables' numbers as standard deviations
    missing: Literal["refuse", "fill"] = "refuse"  # fill: with the mean of the training examples; no category
    class_weights: Literal["none", "balanced"] = "none"  # balanced: all classes count the same in training
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","  # of CSV files
    encoding: str = "utf-8"  # of text files
    sequence_length: Annotated[int, Field(ge=2)] = 128  # ids of an example of text
    image_size: str = ""  # HEIGHTxWIDTH to which images of a folder are resized; empty: all have one size
    augmentation: str = ""  # of training images: "flip", "shift" or "flip, shift"
    stream: bool = False  # Parquet and TFRecord: the features stay on disk, encoded, and are read by batches
    cache: str = ""  # the directory where they are kept; empty: .encoded beside the file
    test_fraction: Fraction = 0.2
    validation_fraction: Fraction = 0.1


class ModelSection(Section):
    """Which model. `name` is a zoo entry or the user's own builder, `package.module:function`."""

    name: str = "mlp"
    options: str = ""  # arguments of the builder as TOML text: 'units = [64, 32]'
    initial: str = ""  # a .keras file whose weights to start from; empty: fresh weights
    precision: Literal["float32", "mixed_bfloat16"] = "float32"  # mixed: computed in bfloat16, variables in float32
    adapter: Literal["none", "lora"] = "none"  # lora: only low-rank additions to the initial weights are trained
    adapter_rank: Count = 8


class OptimizerSection(Section):
    name: Literal["sgd", "adam", "adamw"] = "adam"
    learning_rate: Annotated[float, Field(gt=0.0)] = 0.001
    momentum: Fraction = 0.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    global_clip_norm: Annotated[float, Field(ge=0.0)] = 0.0  # of the reduced gradient; 0: no clipping
    accumulation_steps: Count = 1  # batches whose mean gradient makes one update


class TrainingSection(Section):
    """Central training: one process or the ranks of a cluster."""

    epochs: Count = 10
    global_batch_size: Count = 32  # examples per step over all ranks
    per_rank_batch_size: CountOrZero = 0  # if set: the global batch is this times world_size
    scale_learning_rate: bool = False  # linear scaling: learning_rate times world_size
    warmup_epochs: CountOrZero = 0  # the rate climbs from learning_rate to the scaled rate
    early_stopping_patience: CountOrZero = 0  # epochs without a better validation loss; 0: never stop early
    restore_best: bool = False  # end with the weights of the best epoch instead of the last
    loss: str = "auto"  # auto: cross-entropy for classes, mean squared error for numbers
    aggregation: Literal["average", "adasum"] = "average"  # how the ranks' gradients become one
    sync_batch_norm: bool = False  # batch normalisation with the statistics of the global batch


class PartitionSection(Section):
    """Who owns which examples when one data set is split over silos (flwr-datasets' partitioners)."""

    kind: Literal["iid", "dirichlet", "pathological", "size"] = "iid"
    dirichlet_alpha: Annotated[float, Field(gt=0.0)] = 0.5
    classes_per_silo: Count = 2
    sizes: str = ""  # kind = "size": the number of examples of each silo, '[100, 200, 300]'


class FederationSection(Section):
    num_rounds: Count = 10
    min_silos: Count = 1  # the roll call waits for so many silos
    cohort_size: CountOrZero = 0  # silos drawn for each round; 0: all
    over_selection: CountOrZero = 0  # silos drawn beyond that; the round ends with the first cohort_size results
    min_replies: CountOrZero = 0  # results that a round needs; 0: of the whole cohort
    round_timeout_s: Annotated[float, Field(gt=0.0)] = 600.0  # then the round goes on with those that have answered
    local_epochs: Count = 1
    local_batch_size: CountOrZero = 32  # 0: the silo's whole training data as one batch
    evaluate_on_server: bool = True  # the test split of [data] after each round
    evaluate_on_silos: bool = True  # each silo's own validation examples
    evaluate_every: Count = 1  # rounds between evaluations; the last round's weights are always evaluated
    early_stopping_patience: CountOrZero = 0  # evaluations without a better validation loss; 0: never stop early
    restore_best: bool = False  # end with the weights of the best round instead of the last
    cross_site_evaluation: bool = False  # at the end: each silo's model on each silo's validation examples
    strategy: str = ""  # a Flower Strategy in place of our rounds, 'package.module:Class'
    strategy_options: str = ""  # its arguments as TOML text: 'beta = 0.2'
    silo_timeout_s: Annotated[float, Field(gt=0.0)] = 600.0  # for silos to connect, and to answer outside of rounds


class ServerOptimizerSection(Section):
    """What the server does with the mean update of a round."""

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = "fedavg"
    learning_rate: Annotated[float, Field(gt=0.0)] = 1.0
    momentum: Fraction = 0.0  # beta_1
    beta_2: Fraction = 0.99
    tau: Annotated[float, Field(gt=0.0)] = 0.001  # the smaller, the more adaptive


class PerformanceSection(Section):
    """May change speed and memory, never the expected result."""

    threads_per_rank: CountOrZero = 0  # 0: the cores of the host divided by its ranks
    pin_ranks: bool = True  # each rank on cores of its own; false where other jobs share the host's cores
    steps_per_execution: CountOrZero = 0  # steps between two looks of Keras's callbacks; 0: 8 on ranks, else 1
    compile_update: bool = True  # the optimizer's update as one XLA program, where ranks train
    gradient_grouping: Literal["auto", "grouped", "per_tensor"] = "auto"  # reduce all at once, or each when it is there
    predivide_factor: Annotated[float, Field(ge=0.0)] = 0.0  # p: 1/p before the sum, p/N after; 0: all before


class RunSection(Section):
    """Where this run's record lies; not part of the experiment's identity."""

    directory: str = ""  # empty: runs/<name>
    resume: bool = False
    tensorboard: bool = False
    mlflow: str = ""  # an MLflow server that gets a copy of the record: http://host:5000, sqlite:///mlflow.db


class Experiment(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    seed: CountOrZero = 0
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    partition: PartitionSection = PartitionSection()
    federation: FederationSection = FederationSection()
    server_optimizer: ServerOptimizerSection = ServerOptimizerSection()
    performance: PerformanceSection = PerformanceSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _check_sections_together(self) -> Self:
        for broken, rule in _cross_field_rules(self):
            if broken:
                raise ValueError(rule)
        return self

    @property
    def run_directory(self) -> Path:
        return Path(self.run.directory or Path("runs") / self.name)

    def to_flat(self) -> dict[str, Scalar]:
        """The experiment as Flower's run config: dotted keys, scalars only."""
        return flatten(self.model_dump())

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump())

    def sha256(self) -> str:
        """Identity of the experiment: of everything but [run]."""
        kept = {key: value for key, value in self.to_flat().items() if not key.startswith("run.")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def trajectory(self) -> dict[str, Scalar]:
        """The keys that a checkpoint must share with the experiment that resumes it.

        How long to train, and how fast, may change between the two.
        """
        federation = ("num_rounds", "silo_timeout_s", "round_timeout_s", "cross_site_evaluation")
        free = ("run.", "performance.", "name", "training.epochs", *(f"federation.{key}" for key in federation))
        return {key: value for key, value in self.to_flat().items() if not key.startswith(free)}


def _cross_field_rules(e: Experiment) -> Iterable[tuple[bool, str]]:
    """Every rule that concerns more than one key: (is it broken, rule + values received + remedy)."""
    yield (
        e.model.adapter != "none" and not e.model.initial,
        f"model.adapter = {e.model.adapter!r} adapts a trained model; received no model.initial. Set model.initial to "
        "a .keras file, for example runs/NAME/model.keras, or model.adapter = 'none'.",
    )
    held_out = e.data.test_fraction + e.data.validation_fraction
    yield (
        held_out >= 1.0,
        f"data.test_fraction + data.validation_fraction must be below 1; received {held_out:g}. Lower one of them.",
    )
    yield (
        e.optimizer.momentum > 0 and e.optimizer.name != "sgd",
        f"optimizer.momentum belongs to sgd; received momentum = {e.optimizer.momentum:g} with "
        f"{e.optimizer.name!r}. Set optimizer.name = 'sgd' or momentum = 0.0.",
    )
    yield (
        e.optimizer.weight_decay > 0 and e.optimizer.name == "adam",
        f"optimizer.weight_decay is decoupled; received {e.optimizer.weight_decay:g} with 'adam'. "
        "Set optimizer.name = 'adamw' or weight_decay = 0.0.",
    )
    watches = e.training.early_stopping_patience > 0 or e.training.restore_best
    yield (
        watches and e.data.validation_fraction == 0,
        "training.early_stopping_patience and training.restore_best watch the validation loss; received "
        "data.validation_fraction = 0. Hold out some examples, for example data.validation_fraction = 0.1.",
    )
    scales = e.training.scale_learning_rate or e.training.warmup_epochs > 0
    yield (
        scales and e.training.per_rank_batch_size == 0,
        "training.scale_learning_rate and training.warmup_epochs follow a global batch that grows with the number of "
        "ranks; received per_rank_batch_size = 0. Set training.per_rank_batch_size.",
    )
    yield (
        e.training.warmup_epochs > 0 and not e.training.scale_learning_rate,
        f"training.warmup_epochs climbs to the scaled rate; received warmup_epochs = {e.training.warmup_epochs} with "
        "scale_learning_rate = false. Set training.scale_learning_rate = true.",
    )
    yield (
        e.training.aggregation == "adasum" and e.performance.predivide_factor > 0,
        f"performance.predivide_factor splits an average; received {e.performance.predivide_factor:g} with "
        "training.aggregation = 'adasum'. Set predivide_factor = 0.0 or aggregation = 'average'.",
    )
    yield (
        e.federation.cohort_size > 0 and e.federation.min_silos < e.federation.cohort_size,
        f"federation.min_silos must reach federation.cohort_size; received {e.federation.min_silos} and "
        f"{e.federation.cohort_size}. Raise min_silos or lower cohort_size.",
    )
    federation = e.federation
    yield (
        federation.over_selection > 0 and federation.cohort_size == 0,
        f"federation.over_selection draws silos beyond cohort_size; received {federation.over_selection} with "
        "cohort_size = 0, all silos. Set federation.cohort_size or over_selection = 0.",
    )
    yield (
        0 < federation.cohort_size < federation.min_replies,
        f"federation.min_replies cannot exceed federation.cohort_size; received {federation.min_replies} and "
        f"{federation.cohort_size}. Lower min_replies or raise cohort_size.",
    )
    watches = federation.early_stopping_patience > 0 or federation.restore_best
    yield (
        watches and not (federation.evaluate_on_silos and e.data.validation_fraction > 0),
        "federation.early_stopping_patience and federation.restore_best watch the silos' validation loss; received "
        f"evaluate_on_silos = {str(federation.evaluate_on_silos).lower()} and data.validation_fraction = "
        f"{e.data.validation_fraction:g}. Set both, for example data.validation_fraction = 0.1.",
    )
    ours = {"cohort_size", "over_selection", "min_replies", "early_stopping_patience", "restore_best"}
    ours |= {"cross_site_evaluation"}
    used = sorted(key for key in ours if getattr(federation, key)) if federation.strategy else []
    used += ["server_optimizer"] if federation.strategy and e.server_optimizer != ServerOptimizerSection() else []
    yield (
        bool(used),
        f"federation.strategy runs by its own rules; received {federation.strategy!r} together with {', '.join(used)}. "
        "Leave these out, or the strategy; its own settings go into federation.strategy_options.",
    )
    yield (
        bool(federation.strategy) and e.run.resume,
        f"A run by a Flower strategy leaves no checkpoint; received run.resume with federation.strategy = "
        f"{federation.strategy!r}. Run it anew in another directory.",
    )
    yield (
        federation.cross_site_evaluation and e.data.validation_fraction == 0,
        "federation.cross_site_evaluation judges models on the silos' validation examples; received "
        "data.validation_fraction = 0. Hold out some, for example data.validation_fraction = 0.1.",
    )
    yield (
        e.server_optimizer.momentum > 0 and e.server_optimizer.name == "fedavg",
        f"server_optimizer.momentum belongs to an optimizer with momentum; received {e.server_optimizer.momentum:g} "
        "with 'fedavg'. Set server_optimizer.name = 'fedavgm' or momentum = 0.0.",
    )
    yield (
        e.partition.kind == "size" and not e.partition.sizes,
        "partition.kind = 'size' needs partition.sizes; received none. Name one number per silo: sizes = '[100, 200]'.",
    )


def load_experiment(path: str | Path, overrides: Iterable[str] = (), **run: Scalar) -> Experiment:
    """Reads an experiment file and applies `section.key=value` overrides; `run` sets keys of [run]."""
    path = Path(path)
    try:
        flat = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"No experiment file at {path}. The ones that come along: ls experiments/*.toml") from None
    except IsADirectoryError:
        raise ValueError(f"An experiment is one TOML file; received the directory {path}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from None
    flat |= dict(parse_override(text) for text in overrides)
    flat |= {f"run.{key}": value for key, value in run.items()}
    return experiment_from_flat(flat, source=str(path))


def parse_override(text: str) -> tuple[str, Scalar]:
    """Splits `section.key=value`; the value is TOML, or a bare string.

    >>> parse_override("optimizer.learning_rate=0.1"), parse_override("data.name=wine")
    (('optimizer.learning_rate', 0.1), ('data.name', 'wine'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set takes section.key=value; received {text!r}. Example: --set training.epochs=5")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def experiment_from_flat(flat: Mapping[str, Any], source: str = "the run config") -> Experiment:
    """Builds the experiment from dotted keys. Raises ValueError: the rule, the value received, the remedy."""
    known = Experiment().to_flat()
    sections = {key.partition(".")[0] for key in known if "." in key}
    for key, value in flat.items():
        if key in sections and value != {}:
            raise ValueError(
                f"{source}: {key} is a section; received {key} = {value!r}. Write a line [{key}] and its keys below it."
            )
        if key not in known and key not in sections:
            raise ValueError(f"Unknown key {key!r} in {source}.{_nearest(key, [*known, *sections])}")
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[key] = value
    try:
        return Experiment.model_validate(nested)
    except ValidationError as error:
        raise ValueError(_explain(error, source)) from None


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Tables to dotted keys, one level deep: the form of Flower's run config. An empty table stays as it is.

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


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """The known names that look most like `name`, best first; all of them if none does.

    >>> nearest_names("digts", ["digits", "wine"])
    ['digits']
    """
    known = sorted(known)
    return difflib.get_close_matches(name, known, n=3, cutoff=0.6) or known


def _nearest(key: str, known: Iterable[str]) -> str:
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    close = [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)]
    if not siblings:  # the section itself is misspelt
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if close:
        return f" Did you mean {close[0]!r}?"
    if siblings and section:
        return f" Known keys of [{section}]: {', '.join(siblings)}."
    return f" Known sections and keys: {', '.join(dict.fromkeys(k.partition('.')[0] for k in known))}."


def _explain(error: ValidationError, source: str) -> str:
    """One sentence per problem, the first problem first."""
    sentences = []
    for problem in error.errors():
        if problem["type"] == "value_error":  # a cross-field rule speaks for itself
            sentences.append(f"{source}: {problem['ctx']['error']}")
        else:
            key = ".".join(map(str, problem["loc"]))
            rule = problem["msg"].removeprefix("Input should ").removeprefix("String should ")
            default = Experiment().to_flat().get(key)
            sentences.append(f"{source}: {key} must {rule}; received {problem['input']!r} (default: {default!r}).")
    return "\n".join(sentences)
