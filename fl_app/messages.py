"""The wire: Flower records to and from the values of `local_training`. The only place with record keys."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fl_app.local_training import LocalResult, Silo, SiloEntry
from shared.data import Schema
from shared.weights import Weights


def pack_task(schema: Schema, weights: Weights, round_number: int) -> RecordDict:
    """What the server sends: the weights and what a silo needs to build the same model."""
    config = ConfigRecord(
        {"round": round_number, "input_shape": list(schema.input_shape), "num_classes": schema.num_classes}
    )
    return RecordDict({"weights": pack_arrays(weights), "task": config})


def unpack_task(content: RecordDict) -> tuple[Schema, Weights, int]:
    task: Mapping[str, Any] = content.config_records["task"]
    schema = Schema(tuple(task["input_shape"]), task["num_classes"])
    return schema, unpack_arrays(content.array_records["weights"]), task["round"]


def pack_silo(silo: Silo) -> RecordDict:
    """A silo's answer to the roll call."""
    config = ConfigRecord(
        {
            "silo": silo.name,
            "num_examples": len(silo.train),
            "input_shape": list(silo.schema.input_shape),
            "num_classes": silo.schema.num_classes,
        }
    )
    return RecordDict({"silo": config})


def unpack_silo(content: RecordDict) -> SiloEntry:
    silo: Mapping[str, Any] = content.config_records["silo"]
    schema = Schema(tuple(silo["input_shape"]), silo["num_classes"])
    return SiloEntry(silo["silo"], schema, silo["num_examples"])


def pack_result(result: LocalResult) -> RecordDict:
    counts = ConfigRecord({"num_examples": result.num_examples, "num_validation": result.num_validation})
    return RecordDict(
        {
            "update": pack_arrays(result.update),
            "counts": counts,
            "train": MetricRecord(dict(result.train)),
            "validation": MetricRecord(dict(result.validation)),
        }
    )


def unpack_result(content: RecordDict) -> LocalResult:
    counts: Mapping[str, Any] = content.config_records["counts"]
    train, validation = content.metric_records["train"], content.metric_records["validation"]
    return LocalResult(
        num_examples=counts["num_examples"],
        num_validation=counts["num_validation"],
        train={name: float(value) for name, value in train.items()},  # type: ignore[arg-type]
        validation={name: float(value) for name, value in validation.items()},  # type: ignore[arg-type]
        update=unpack_arrays(content.array_records["update"]),
    )


def pack_refusal(silo: str, reason: str) -> RecordDict:
    """A silo that cannot take part. The reason must hold nothing of the silo's data."""
    return RecordDict({"refusal": ConfigRecord({"silo": silo, "reason": reason})})


def unpack_refusal(content: RecordDict) -> str | None:
    """The refusal as a sentence, if the message is one."""
    if "refusal" not in content.config_records:
        return None
    refusal: Mapping[str, Any] = content.config_records["refusal"]
    return f"silo {refusal['silo']!r} refuses: {refusal['reason']}"


def pack_arrays(arrays: Sequence[np.ndarray]) -> ArrayRecord:
    """All arrays as one: Flower moves every array of a record by requests of its own."""
    flat = np.frombuffer(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays), dtype=np.uint8)
    forms = np.array([f"{array.dtype.name} {','.join(map(str, array.shape))}" for array in arrays], dtype=str)
    return ArrayRecord({"bytes": Array(flat), "forms": Array(forms)})


def unpack_arrays(record: ArrayRecord) -> Weights:
    flat = record["bytes"].numpy()
    forms: list[str] = record["forms"].numpy().tolist()
    arrays, start = [], 0
    for form in forms:
        dtype, _, shape_text = form.partition(" ")
        shape = tuple(int(size) for size in shape_text.split(",") if size)
        array = np.frombuffer(flat, dtype=dtype, count=int(np.prod(shape)), offset=start).reshape(shape)
        arrays.append(array)
        start += array.nbytes
    return arrays
