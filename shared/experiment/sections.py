"""A section of the experiment and the rules over its keys, and the sections that are small.

A rule that concerns the keys of one section stands beside it, in its `rules`; combinations of
several sections are refused in `composition.py`. A section answers there by its traits: properties
that say what it needs, has or leaves, whatever method it names. The meaning of "0: all" or "0: as
the host allows" is a method of the section that has the key.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Scalar = bool | int | float | str
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
MAX_INTEGER = 2**63 - 1  # that Flower's run config and TOML can hold
Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Positive = Annotated[float, Field(gt=0.0)]
PositiveOrZero = Annotated[float, Field(ge=0.0)]

# Keras's Python between two steps takes time that ranks, on few cores, do not have (docs/log.md).
STEPS_PER_EXECUTION_ON_RANKS = 8


class Rule(NamedTuple):
    """A rule over several keys: whether it is broken, its keys, and what the user reads if so.

    The message is the rule, the values received and the remedy.
    """

    is_broken: bool
    keys: tuple[str, ...]  # as SECTION.KEY
    message: str


class BrokenRule(ValueError):
    """A rule is broken by the values of these keys together."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule.message)
        self.keys = rule.keys


class Section(BaseModel):
    """A strict, frozen table of scalars. Raises pydantic's ValidationError for any other form."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # what a key means: `archipelago keys`, the reference
    )

    # The keys that only our own round loop follows: a Flower strategy has rules in their place.
    own_rounds_only: ClassVar[tuple[str, ...]] = ()

    def rules(self) -> Iterable[Rule]:
        """The rules over several keys of this section."""
        return ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        for rule in self.rules():
            if rule.is_broken:
                raise BrokenRule(rule)
        return self

    @property
    def keys_for_own_rounds(self) -> list[str]:
        """The keys of `own_rounds_only` whose values are not the defaults."""
        fields = type(self).model_fields
        return [k for k in self.own_rounds_only if getattr(self, k) != fields[k].default]


class ModelSection(Section):
    """The model. `name` is a zoo entry or the user's own builder, `package.module:function`."""

    name: str = "mlp"
    """A zoo entry, or your own builder: 'package.module:function'."""
    options: str = ""
    """Arguments of the builder as TOML text: 'units = [64, 32]'."""
    initial: str = ""
    """A .keras file whose weights to start from; empty: fresh weights."""
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    """mixed_bfloat16: computed in bfloat16, variables in float32."""
    adapter: Literal["none", "lora"] = "none"
    """lora: only low-rank additions to the initial weights are trained."""
    adapter_rank: Count = 8
    """Of the additions: A has so many columns, B so many rows."""

    @property
    def needs_initial_weights(self) -> bool:
        return self.adapter != "none"

    def rules(self) -> Iterable[Rule]:
        yield Rule(
            is_broken=self.needs_initial_weights and not self.initial,
            keys=("model.adapter", "model.initial"),
            message=(
                f"model.adapter = {self.adapter!r} adapts a trained model; received no"
                " model.initial. Set model.initial to a .keras file, for example"
                " runs/NAME/model.keras, or model.adapter = 'none'."
            ),
        )


@dataclass(frozen=True)
class OptimizerTraits:
    """The settings that an optimizer of the training step has."""

    has_momentum: bool = False
    has_weight_decay: bool = False  # decoupled: subtracted from the weights, not from the gradient


OPTIMIZER_TRAITS = {
    "sgd": OptimizerTraits(has_momentum=True, has_weight_decay=True),
    "adam": OptimizerTraits(),
    "adamw": OptimizerTraits(has_weight_decay=True),
}


class OptimizerSection(Section):
    """The optimizer of each training step, of ranks and at silos."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    """Keras's optimizer of this name."""
    learning_rate: Positive = 0.001
    """The step size, before any warm-up."""
    momentum: Fraction = 0.0
    """Of sgd alone."""
    weight_decay: PositiveOrZero = 0.0
    """Decoupled, subtracted from the weights: of sgd and adamw; 0: none."""
    global_clip_norm: PositiveOrZero = 0.0
    """Bound on the norm of the reduced gradient; 0: no clipping."""
    accumulation_steps: Count = 1
    """Batches whose mean gradient makes one update."""

    @property
    def traits(self) -> OptimizerTraits:
        return OPTIMIZER_TRAITS[self.name]

    def rules(self) -> Iterable[Rule]:
        yield Rule(
            is_broken=self.momentum > 0 and not self.traits.has_momentum,
            keys=("optimizer.momentum", "optimizer.name"),
            message=(
                f"optimizer.momentum belongs to sgd; received momentum = {self.momentum:g} with"
                f" {self.name!r}. Set optimizer.name = 'sgd' or momentum = 0.0."
            ),
        )

        yield Rule(
            is_broken=self.weight_decay > 0 and not self.traits.has_weight_decay,
            keys=("optimizer.weight_decay", "optimizer.name"),
            message=(
                f"optimizer.weight_decay is decoupled; received {self.weight_decay:g} with"
                f" {self.name!r}. Set optimizer.name = 'adamw' or weight_decay = 0.0."
            ),
        )


class PartitionSection(Section):
    """The silos' shares of one data set that is divided over them (flwr-datasets' partitioners)."""

    kind: Literal["iid", "dirichlet", "pathological", "size"] = "iid"
    """At random, by classes that differ from silo to silo, or by given sizes."""
    dirichlet_alpha: Positive = 0.5
    """kind = "dirichlet": the smaller, the more the silos' classes differ."""
    classes_per_silo: Count = 2
    """kind = "pathological": the classes that a silo has."""
    sizes: str = ""
    """kind = "size": the number of examples of each silo, '[100, 200, 300]'."""

    def rules(self) -> Iterable[Rule]:
        yield Rule(
            is_broken=self.kind == "size" and not self.sizes,
            keys=("partition.kind", "partition.sizes"),
            message=(
                "partition.kind = 'size' needs partition.sizes; received none. Name one number per"
                " silo: sizes = '[100, 200]'."
            ),
        )


class ServerOptimizerSection(Section):
    """The server's use of a round's mean update (`fl_app/server/optimizer.py` has the formulas)."""

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = "fedavg"
    """fedavg adds the mean update to the weights; the others take it for a gradient."""
    learning_rate: Positive = 1.0
    """Of the server's step; 1.0 with fedavg is the plain mean of the silos' weights."""
    momentum: Fraction = 0.0
    """beta_1, of all but fedavg."""
    beta_2: Fraction = 0.99
    """Decay of the second moment, of fedadam and fedyogi."""
    tau: Positive = 0.001
    """Added to the root of the second moment; the smaller, the more adaptive."""

    own_rounds_only: ClassVar = ("name", "learning_rate", "momentum", "beta_2", "tau")

    @property
    def has_momentum(self) -> bool:
        return self.name != "fedavg"

    def rules(self) -> Iterable[Rule]:
        yield Rule(
            is_broken=self.momentum > 0 and not self.has_momentum,
            keys=("server_optimizer.momentum", "server_optimizer.name"),
            message=(
                "server_optimizer.momentum belongs to an optimizer with momentum; received"
                f" {self.momentum:g} with {self.name!r}. Set server_optimizer.name = 'fedavgm' or"
                " momentum = 0.0."
            ),
        )


class PerformanceSection(Section):
    """Settings that may change speed and memory, never the expected result."""

    threads_per_rank: CountOrZero = 0
    """0: the cores of the host divided by its ranks (dist_train/resources.py)."""
    pin_ranks: bool = True
    """Each rank on cores of its own; false where other jobs share the host's cores."""
    steps_per_execution: CountOrZero = 0
    """Training steps per call of Keras's callbacks; 0: 8 on ranks, else 1."""
    compile_update: bool = True
    """The optimizer's update as one XLA program, where ranks train."""
    gradient_grouping: Literal["auto", "grouped", "per_tensor"] = "auto"
    """Reduce all gradients at once, or each when it is there."""
    predivide_factor: PositiveOrZero = 0.0
    """p: gradients are divided by p before the sum and by N/p after it; 0: by N before it."""

    @property
    def splits_average(self) -> bool:
        return self.predivide_factor > 0

    @property
    def predivision(self) -> float | None:
        """The p of `predivide_factor`; None: the number of ranks."""
        return self.predivide_factor if self.splits_average else None

    def steps_per_execution_on(self, world_size: int) -> int:
        """The training steps per call of Keras's callbacks, on so many ranks."""
        if self.steps_per_execution > 0:
            return self.steps_per_execution
        return STEPS_PER_EXECUTION_ON_RANKS if world_size > 1 else 1


class RunSection(Section):
    """The run's record; no part of the experiment's identity."""

    directory: str = ""
    """Empty: runs/<name>."""
    resume: bool = False
    """Continue the run in its directory from the checkpoint there."""
    tensorboard: bool = False
    """Write TensorBoard's files into the run's directory as well."""
    mlflow: str = ""
    """An MLflow server that gets a copy of the record: http://host:5000, sqlite:///mlflow.db."""
