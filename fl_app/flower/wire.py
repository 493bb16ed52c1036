"""The wire: Flower records to and from tasks and replies. The only place with record keys.

A message holds one array of bytes (packing.py), so that it crosses each of Flower's stores in one
piece, cut into chunks if it is large. Where a task's JSON values differ between silos, those that
do travel beside it: the weights, packed once, are one object for all silos.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, MetricRecord, RecordDict

from fl_app.border import printable_line, read_count, read_schema, understood
from fl_app.failures import Failure, MessageError
from fl_app.messages import (
    EVALUATE,
    TRAIN,
    Answer,
    LocalResult,
    Task,
    TrainingRequest,
    refusal_header,
    reply_from_header,
)
from fl_app.packing import pack, unpack
from shared.data.schema import Schema
from shared.weights import Weights, add

RECORD = "packed"
OWN = "own"  # the record of what one silo's task holds apart from the others'
STRATEGY_SETTINGS = {"server-round", "schema"}
FORMAT = "archipelago.packed.3"  # Flower's name for it is a serialisation type


def pack_tasks(tasks: Mapping[str, Task]) -> dict[str, RecordDict]:
    """The tasks as messages, by silo. Tasks with the same arrays share one packed record."""
    groups: dict[tuple[Any, ...], dict[str, Task]] = {}
    for silo, task in tasks.items():
        key = (task.kind, task.run, task.round, task.attempt, id(task.arrays))
        groups.setdefault(key, {})[silo] = task

    messages: dict[str, RecordDict] = {}
    for group in groups.values():
        messages |= _pack_group(group)
    return messages


def _pack_group(tasks: Mapping[str, Task]) -> dict[str, RecordDict]:
    """The messages of tasks that differ in nothing but their bodies."""
    common = _common_values([task.body for task in tasks.values()])
    first = next(iter(tasks.values()))
    header = replace(first, body=common).header()
    packed = _packed_record(header, first.arrays)

    messages = {}
    for silo, task in tasks.items():
        own = {name: value for name, value in task.body.items() if name not in common}
        records = {OWN: ConfigRecord({OWN: json.dumps(own)})} if own else {}
        messages[silo] = RecordDict({RECORD: packed, **records})
    return messages


def unpack_task(content: RecordDict) -> Task:
    """The task in a message. Raises ValueError for anything but what `pack_tasks` made."""
    header, arrays = _unpack_record(content)
    task = Task.from_header(header, arrays)
    if OWN not in content.config_records:
        return task
    with understood("a task"):
        own: Any = content.config_records[OWN][OWN]
        return replace(task, body={**task.body, **json.loads(own)})


def message_type(task: Task) -> str:
    """Flower's name for the kind of a task, which shows in its logs; silos go by the task alone."""
    return task.kind if task.kind in (TRAIN, EVALUATE) else MessageType.QUERY


def pack_answer(answer: Answer) -> RecordDict:
    return RecordDict({RECORD: _packed_record(answer.header(), answer.arrays)})


def pack_refusal(silo: str, reason: str) -> RecordDict:
    """A silo's refusal of a task. The reason must hold nothing of the silo's data."""
    return RecordDict({RECORD: _packed_record(refusal_header(silo, reason), ())})


def unpack_reply(content: RecordDict, silo: str = "") -> Answer | Failure:
    """A silo's answer or refusal; a Failure as well if it is neither.

    `silo`: its name, where it is known.
    """
    try:
        header, arrays = _unpack_record(content)
        return reply_from_header(header, arrays, silo)
    except ValueError as error:
        return Failure(f"it sent {error}")


def _common_values(bodies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values that all bodies have alike, by name."""
    first = bodies[0]
    return {
        name: value
        for name, value in first.items()
        if all(name in body and body[name] == value for body in bodies)
    }


def _packed_record(header: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> ArrayRecord:
    data = pack(header, arrays)
    return ArrayRecord({RECORD: Array("uint8", (len(data),), FORMAT, data)})


def _unpack_record(content: RecordDict) -> tuple[dict[str, Any], Weights]:
    """The header and the arrays, as views of the message's bytes, which are taken out of it."""
    with understood("a message"):
        packed = content.array_records[RECORD][RECORD]
        # Flower's messages lie in cycles: the bytes must not wait for Python's garbage collector.
        data, packed.data = packed.data, b""
    return unpack(data)


# --- the messages of Flower's own strategies: records "arrays" and "config", and back "metrics"


def strategy_config(schema: Schema) -> ConfigRecord:
    """The settings that a strategy sends along with the weights; it adds "server-round"."""
    return ConfigRecord({"schema": json.dumps(schema.to_json())})


def strategy_arrays(weights: Weights) -> ArrayRecord:
    return ArrayRecord([np.asarray(array) for array in weights])


def is_refusal(content: RecordDict) -> bool:
    """True for what a silo sends a strategy in place of a result: a message of our own."""
    return RECORD in content.array_records


def check_strategy_task(content: RecordDict) -> None:
    """Raises ValueError for a message of a strategy with which silos could do nothing."""
    if not (is_of_strategy(content) and "config" in content.config_records):
        raise ValueError(
            "A strategy sends the weights as the record 'arrays', and settings as 'config';"
            f" received {sorted(content)}. Leave the keys of its records at their defaults."
        )
    unknown = sorted(set(content.config_records["config"]) - STRATEGY_SETTINGS)
    if unknown:
        raise MessageError(
            f"The strategy asks for {printable_line(', '.join(unknown))}, which silos do not know."
            " Choose another strategy."
        )


def is_of_strategy(content: RecordDict) -> bool:
    return "arrays" in content.array_records


def unpack_strategy_task(content: RecordDict, kind: str) -> Task:
    """A strategy's message as a task to train or evaluate.

    Raises MessageError for settings that a silo would have to follow and does not know.
    """
    with understood("a task of a strategy"):
        check_strategy_task(content)
        config: Mapping[str, Any] = content.config_records["config"]
        schema = read_schema(json.loads(config["schema"]))
        round_number = read_count(config["server-round"])
        weights = content.array_records["arrays"].to_numpy_ndarrays()
    request = TrainingRequest(schema, evaluate=kind == EVALUATE)
    return Task(kind, round=round_number, body=request.to_body(), arrays=weights)


def pack_strategy_result(task: Task, result: LocalResult) -> RecordDict:
    """The local weights if the silo has trained, and its metrics."""
    if task.kind == TRAIN:
        metrics = MetricRecord({**result.train, "num-examples": result.num_examples})
        local_weights = add(task.arrays, result.update)
        return RecordDict({"arrays": strategy_arrays(local_weights), "metrics": metrics})
    metrics = MetricRecord({**result.validation, "num-examples": result.num_validation})
    return RecordDict({"metrics": metrics})
