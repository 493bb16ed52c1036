"""The values that cross between a server and its silos: tasks, answers, and what their bodies hold.

| value | direction | holds |
|---|---|---|
| `Task` | to a silo | any piece of work: its kind, its place in the run, JSON values, arrays |
| `Answer` | from a silo | JSON values and arrays |
| `Failure` | in place of an answer | the reason, in words that may leave the silo |
| `TrainingRequest` | body of the tasks "train" and "evaluate" | schema, whether to evaluate first |
| `SiloEntry` | body of the answer to "describe" | a silo's name, schema and number of examples |
| `LocalResult` | the answer to "train" and "evaluate" | counts, mean metrics and the update |

No engine is known here: Flower, the simulation and the tests carry the same values. The other side
is not trusted: what `from_answer` and `from_task` return is typed and bounded by `border`, or they
raise MessageError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from fl_app.border import (
    MAX_EXAMPLES,
    printable_line,
    read_count,
    read_metrics,
    read_name,
    read_num_examples,
    read_schema,
    read_seconds,
    understood,
)
from fl_app.failures import Failure, MessageError
from shared.data.schema import Schema
from shared.weights import Weights

DESCRIBE, INFORM, TRAIN, EVALUATE = "describe", "inform", "train", "evaluate"


@dataclass(frozen=True)
class Task:
    """A piece of work that the server asks of a silo.

    `kind` names the handler at the silo. (`run`, `round`, `attempt`) say where in which run it
    belongs: they key state and randomness, and tell a repetition from something new. `body` holds
    JSON values; `arrays` are the global weights for most kinds.
    """

    kind: str
    run: str = ""
    round: int = 0
    attempt: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)
    arrays: Sequence[np.ndarray] = ()

    def header(self) -> dict[str, Any]:
        """All but the arrays, as JSON values."""
        return {
            "kind": self.kind,
            "run": self.run,
            "round": self.round,
            "attempt": self.attempt,
            "body": dict(self.body),
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> Self:
        with understood("a task"):
            return cls(
                kind=read_name(header["kind"]),
                run=read_name(header["run"]) if header["run"] else "",
                round=read_count(header["round"]),
                attempt=read_count(header["attempt"]),
                body=dict(header["body"]),
                arrays=arrays,
            )


@dataclass(frozen=True)
class Answer:
    """A silo's answer to a task. It holds nothing of the silo's data but what its kind allows."""

    body: Mapping[str, Any] = field(default_factory=dict)
    arrays: Sequence[np.ndarray] = ()

    def header(self) -> dict[str, Any]:
        """All but the arrays, as JSON values."""
        return {"answer": dict(self.body)}


def refusal_header(silo: str, reason: str) -> dict[str, Any]:
    """The header of a silo's refusal. The reason must hold nothing of the silo's data."""
    return {"refusal": reason, "silo": silo}


def reply_from_header(
    header: Mapping[str, Any], arrays: Sequence[np.ndarray], silo: str = ""
) -> Answer | Failure:
    """A silo's reply: its answer, or its refusal as one printable sentence.

    `silo`: its name where that is known; else a refusal goes by the name that it states.
    """
    with understood("a reply"):
        if "refusal" not in header:
            return Answer(dict(header["answer"]), arrays)
        name = silo or printable_line(header["silo"])
        return Failure(f"silo {name!r} refuses: {printable_line(header['refusal'])}")


Reply = tuple[str, Answer | Failure]  # of a silo, by name


@dataclass(frozen=True)
class TrainingRequest:
    """The body of a task with a model: what a silo needs beside the weights.

    `evaluate`: report the metrics of the incoming weights, before training on them.
    `acknowledged_round`: the last round in which the server used this silo's answer, 0 for none;
    the silo's own state goes on from there.
    """

    schema: Schema
    evaluate: bool
    acknowledged_round: int = 0

    def to_body(self) -> dict[str, Any]:
        return {
            "schema": self.schema.to_json(),
            "evaluate": self.evaluate,
            "acknowledged_round": self.acknowledged_round,
        }

    @classmethod
    def from_task(cls, task: Task) -> Self:
        with understood(f"a task {task.kind!r}"):
            return cls(
                schema=read_schema(task.body["schema"]),
                evaluate=bool(task.body["evaluate"]),
                acknowledged_round=read_count(task.body["acknowledged_round"]),
            )


@dataclass(frozen=True)
class SiloEntry:
    """A silo's description of itself at the roll call.

    Its results may rest on no more examples than it claims here.
    """

    name: str
    schema: Schema
    num_examples: int  # that it trains on
    num_validation: int = 0

    def to_answer(self) -> Answer:
        return Answer(
            {
                "silo": self.name,
                "num_examples": self.num_examples,
                "num_validation": self.num_validation,
                "schema": self.schema.to_json(),
            }
        )

    @classmethod
    def from_answer(cls, answer: Answer) -> Self:
        with understood("an answer to the roll call"):
            return cls(
                name=read_name(answer.body["silo"]),
                schema=read_schema(answer.body["schema"]),
                num_examples=read_num_examples(answer.body["num_examples"]),
                num_validation=read_count(answer.body["num_validation"], MAX_EXAMPLES),
            )


@dataclass(frozen=True)
class LocalResult:
    """A silo's result: counts, mean metrics and the update; no examples.

    `validation` holds the metrics of the weights that came in, before training on them; `update` is
    local weights - global weights, empty if the silo was only to evaluate.
    """

    num_examples: int
    num_validation: int
    train: Mapping[str, float]
    validation: Mapping[str, float]
    update: Weights
    seconds: float = 0.0  # that the silo computed

    def to_answer(self) -> Answer:
        body = {
            "num_examples": self.num_examples,
            "num_validation": self.num_validation,
            "train": dict(self.train),
            "validation": dict(self.validation),
            "seconds": self.seconds,
        }
        return Answer(body, self.update)

    @classmethod
    def from_answer(cls, answer: Answer, claim: SiloEntry | None = None) -> Self:
        """The result in an answer.

        Raises MessageError if it is garbled, or rests on more examples than the silo's `claim`.
        """
        body = answer.body
        with understood("a result"):
            result = cls(
                num_examples=read_count(body["num_examples"]),
                num_validation=read_count(body["num_validation"]),
                train=read_metrics(body["train"]),
                validation=read_metrics(body["validation"]),
                update=list(answer.arrays),
                seconds=read_seconds(body["seconds"]),
            )
        if claim:
            _check_claim("training", result.num_examples, claim.num_examples)
            _check_claim("validation", result.num_validation, claim.num_validation)
        return result


def _check_claim(what: str, num_examples: int, claimed: int) -> None:
    if num_examples > claimed:
        raise MessageError(
            f"a result that rests on {num_examples} {what} examples, where it claimed {claimed} at"
            " the roll call. If its data has grown, start the run again"
        )


def result_of(reply: Answer | Failure, claim: SiloEntry | None = None) -> LocalResult | Failure:
    """The result in a silo's reply; a failure if it is one, is garbled, or breaks its `claim`."""
    if isinstance(reply, Failure):
        return reply
    try:
        return LocalResult.from_answer(reply, claim)
    except MessageError as error:
        return Failure(f"it sent {error}")
