"""The wire: Flower records to and from the values of `local_training`. The only place with record keys.

A message holds one object, so that it crosses each of Flower's stores in one piece (cut into chunks if it is large): a
JSON header and the arrays behind it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fl_app.local_training import LocalResult, Silo, SiloEntry
from shared.data.schema import Schema, schema_from_json
from shared.weights import Weights, add

RECORD = "packed"
FORMAT = "archipelago.packed.1"  # Flower's name for it is a serialisation type
ALIGNMENT = 64  # bytes; of the header, so that arrays of four-byte numbers lie well


def pack_task(schema: Schema, weights: Weights, round_number: int, evaluate: bool) -> RecordDict:
    """What the server sends: the weights, what a silo needs to build the same model, and whether to judge them."""
    return pack({"schema": schema.to_json(), "round": round_number, "evaluate": evaluate}, weights)


def unpack_task(content: RecordDict) -> tuple[Schema, Weights, int, bool]:
    header, weights = unpack(content)
    with _understood("a task"):
        return schema_from_json(header["schema"]), weights, int(header["round"]), bool(header["evaluate"])


def pack_silo(silo: Silo) -> RecordDict:
    """A silo's answer to the roll call."""
    return pack({"silo": silo.name, "num_examples": len(silo.train), "schema": silo.schema.to_json()})


def unpack_silo(content: RecordDict) -> SiloEntry:
    header, _ = unpack(content)
    with _understood("an answer to the roll call"):
        return SiloEntry(str(header["silo"]), schema_from_json(header["schema"]), int(header["num_examples"]))


def pack_result(result: LocalResult) -> RecordDict:
    header = {name: value for name, value in vars(result).items() if name != "update"}
    return pack(header, result.update)


def unpack_result(content: RecordDict) -> LocalResult:
    header, update = unpack(content)
    with _understood("a result"):
        return LocalResult(
            num_examples=_count(header["num_examples"]),
            num_validation=_count(header["num_validation"]),
            train={str(name): float(value) for name, value in header["train"].items()},
            validation={str(name): float(value) for name, value in header["validation"].items()},
            update=update,
            seconds=float(header["seconds"]),
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


# --- the messages of Flower's own strategies, which have the records "arrays" and "config", and back "metrics"


def strategy_config(schema: Schema) -> ConfigRecord:
    """What a strategy sends along with the weights. It adds "server-round"."""
    return ConfigRecord({"schema": json.dumps(schema.to_json())})


def strategy_arrays(weights: Weights) -> ArrayRecord:
    return ArrayRecord([np.asarray(array) for array in weights])


def is_of_strategy(content: RecordDict) -> bool:
    return "arrays" in content.array_records


def unpack_strategy_task(content: RecordDict) -> tuple[Schema, Weights, int]:
    """(schema, weights, round). Raises ValueError for settings that a silo would have to follow and does not know."""
    config: Mapping[str, Any] = content.config_records["config"]
    unknown = sorted(set(config) - {"server-round", "schema"})
    if unknown:
        raise ValueError(
            f"The strategy asks for {', '.join(unknown)}, which silos do not know. Choose another strategy."
        )
    with _understood("a task of a strategy"):
        schema = schema_from_json(json.loads(config["schema"]))
    return schema, content.array_records["arrays"].to_numpy_ndarrays(), config["server-round"]


def pack_strategy_result(weights: Weights, result: LocalResult) -> RecordDict:
    """The local weights if the silo has trained, and its metrics."""
    judged = result.validation if not result.update else result.train
    num_examples = result.num_examples if result.update else result.num_validation
    metrics = MetricRecord({**judged, "num-examples": num_examples})
    if not result.update:
        return RecordDict({"metrics": metrics})
    return RecordDict({"arrays": strategy_arrays(add(weights, result.update)), "metrics": metrics})


# --- a header and arrays as bytes


def pack(header: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> RecordDict:
    """A header of JSON values and arrays as one record of one array of bytes."""
    forms = [[array.dtype.newbyteorder("<").str, list(array.shape)] for array in arrays]
    text = json.dumps({"header": dict(header), "arrays": forms}).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    parts: list[Any] = [len(text).to_bytes(ALIGNMENT, "little"), text]
    for array in filter(np.size, arrays):
        parts.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data.cast("B"))
    data = b"".join(parts)
    return RecordDict({RECORD: ArrayRecord({RECORD: Array("uint8", (len(data),), FORMAT, data)})})


def unpack(content: RecordDict) -> tuple[dict[str, Any], Weights]:
    """The header, and the arrays as views of the message's bytes, which are taken out of it.

    Raises ValueError for anything but what `pack` made.
    """
    with _understood("a message"):
        packed = content.array_records[RECORD][RECORD]
        data, packed.data = packed.data, b""  # Flower's messages lie in cycles; the bytes must not wait for Python's gc
        start = ALIGNMENT + int.from_bytes(data[:ALIGNMENT], "little")
        text = json.loads(data[ALIGNMENT:start])
        header, forms = text["header"], [(_plain_dtype(name), tuple(shape)) for name, shape in text["arrays"]]
        arrays = []
        for dtype, shape in forms:
            array = np.frombuffer(data, dtype, count=math.prod(shape), offset=start).reshape(shape)
            arrays.append(array)
            start += array.nbytes
    return header, arrays


def _count(value: Any) -> int:
    count = int(value)
    if not 0 <= count < 2**53:
        raise ValueError(f"a count: {str(value)[:20]}")
    return count


def _plain_dtype(name: str) -> np.dtype:
    dtype = np.dtype(name)
    if dtype.kind not in "biuf":
        raise ValueError(f"arrays hold numbers; received {name!r}")
    return dtype


@contextmanager
def _understood(what: str) -> Iterator[None]:
    """Whatever the other side sent: a ValueError that says which part is missing or of no use."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SyntaxError) as error:
        raise ValueError(
            f"{what} that this version of Archipelago does not understand: it lacks or garbles {error}"
        ) from None
